//! IORING_OP_SPLICE: the ring not only says when, it also moves the bytes.
//!
//! Fair because it does what helps that request. The kernel runs each one on a kernel worker
//! thread, which waits there if it must. So it is linked behind a poll, and an idle connection
//! costs no thread; for that its pipes must be there already, 1 MiB each. A poll and its splice are
//! one submission and one completion. A sink that is full may hold up its worker thread, which is
//! cheaper than to fail and be asked again. The ring has the flags that suit one thread.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage, setsockopt, socket, sockopt,
};

use super::pipes::{Pipe, Pipes};

/// Requests that can be collected before they must be handed to the kernel.
const SQ_ENTRIES: u32 = 1024;
/// Completions that can wait to be read: two for each of 16 thousand connections.
const CQ_ENTRIES: u32 = 32768;

pub(super) fn relay(listener: TcpListener, target: SocketAddr) -> io::Result<()> {
    let ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .setup_cqsize(CQ_ENTRIES)
        .build(SQ_ENTRIES)?;
    let (flows, free, pipes) = (Vec::new(), Vec::new(), Pipes::default());
    let mut relay = Relay { ring, listener, target: target.into(), flows, free, pipes };
    relay.accept()?;
    let mut completed = Vec::new();
    loop {
        match relay.ring.submit_and_wait(1) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => completed.extend(relay.ring.completion()),
        }
        for entry in completed.drain(..) {
            relay.complete(&entry)?;
        }
    }
}

/// What has completed. Those of a half carry its index.
#[derive(Clone, Copy)]
enum Op {
    Accept,
    /// A poll that failed; the request behind it reports that, too.
    Poll,
    Connect,
    Fill(usize),
    Drain(usize),
}

impl Op {
    const ALL: [Op; 7] =
        [Op::Accept, Op::Poll, Op::Connect, Op::Fill(0), Op::Fill(1), Op::Drain(0), Op::Drain(1)];

    /// As the kernel carries it, together with the flow's index.
    fn token(self, index: usize) -> u64 {
        let op = match self {
            Op::Accept => 0,
            Op::Poll => 1,
            Op::Connect => 2,
            Op::Fill(half) => 3 + half,
            Op::Drain(half) => 5 + half,
        };
        (index << 8 | op) as u64
    }
}

struct Relay {
    ring: IoUring,
    listener: TcpListener,
    target: SockaddrStorage,
    flows: Vec<Option<Flow>>,
    free: Vec<usize>,
    pipes: Pipes,
}

/// A connection. Side 0 is the client's, and half 0 moves the bytes that come from there.
struct Flow {
    sockets: [TcpStream; 2],
    pipes: [Pipe; 2],
    /// Requests that have not completed, at most one for each half.
    in_flight: usize,
    failed: bool,
}

impl Relay {
    fn accept(&mut self) -> io::Result<()> {
        let listener = Fd(self.listener.as_raw_fd());
        let entry = opcode::AcceptMulti::new(listener).flags(libc::SOCK_CLOEXEC).build();
        push(&mut self.ring, &[entry.user_data(Op::Accept.token(0))])
    }

    fn complete(&mut self, entry: &cqueue::Entry) -> io::Result<()> {
        let index = (entry.user_data() >> 8) as usize;
        let result = match entry.result() {
            failure @ ..0 => Err(Errno::from_raw(-failure)),
            count => Ok(count as usize),
        };
        match Op::ALL[entry.user_data() as usize & 0xff] {
            Op::Poll => Ok(()),
            Op::Accept => {
                if !cqueue::more(entry.flags()) {
                    self.accept()?;
                }
                match result {
                    // SAFETY: the kernel has just made this descriptor for this completion alone.
                    Ok(fd) => self.add(unsafe { TcpStream::from_raw_fd(fd as i32) }),
                    Err(Errno::ECONNABORTED) => Ok(()),
                    Err(errno) => Err(errno.into()),
                }
            }
            op => self.advance(index, op, result),
        }
    }

    fn add(&mut self, client: TcpStream) -> io::Result<()> {
        let family = self.target.family().unwrap_or(AddressFamily::Inet);
        let target: OwnedFd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&target, sockopt::TcpNoDelay, &true)?;
        let index = self.free.pop().unwrap_or_else(|| {
            self.flows.push(None);
            self.flows.len() - 1
        });
        let (address, length) = (self.target.as_ptr(), self.target.len());
        let connect = opcode::Connect::new(Fd(target.as_raw_fd()), address, length).build();
        self.flows[index] = Some(Flow {
            sockets: [client, target.into()],
            pipes: [self.pipes.take()?, self.pipes.take()?],
            in_flight: 1,
            failed: false,
        });
        push(&mut self.ring, &[connect.user_data(Op::Connect.token(index))])
    }

    /// A flow's request has completed: makes the next one.
    fn advance(&mut self, index: usize, op: Op, result: Result<usize, Errno>) -> io::Result<()> {
        let Some(flow) = &mut self.flows[index] else { return Ok(()) };
        flow.in_flight -= 1;
        let ring = &mut self.ring;
        match (op, result) {
            // Nothing new; what is still in flight comes to its end.
            _ if flow.failed => {}
            (Op::Connect, Ok(_)) => {
                flow.start(Op::Fill(0), index, ring)?;
                flow.start(Op::Fill(1), index, ring)?;
            }
            // It fails when the peer has reset the connection, which the other half meets, too.
            (Op::Fill(half), Ok(0)) => {
                let _ = flow.sockets[1 - half].shutdown(Shutdown::Write);
            }
            (Op::Fill(half), Ok(count)) => {
                flow.pipes[half].pending = count;
                flow.start(Op::Drain(half), index, ring)?;
            }
            (Op::Drain(half), Ok(count)) => {
                let left = &mut flow.pipes[half].pending;
                *left -= count;
                let next = if *left > 0 { Op::Drain(half) } else { Op::Fill(half) };
                flow.start(next, index, ring)?;
            }
            (op, Err(Errno::EINTR | Errno::EAGAIN)) => flow.start(op, index, ring)?,
            _ => flow.fail(),
        }
        if flow.in_flight == 0
            && let Some(Flow { pipes, .. }) = self.flows[index].take()
        {
            self.free.push(index);
            pipes.into_iter().for_each(|pipe| self.pipes.give_back(pipe));
        }
        Ok(())
    }
}

impl Flow {
    fn start(&mut self, op: Op, index: usize, ring: &mut IoUring) -> io::Result<()> {
        self.in_flight += 1;
        let socket = |side: usize| Fd(self.sockets[side].as_raw_fd());
        let token = op.token(index);
        match op {
            Op::Fill(half) => {
                let pipe = &self.pipes[half];
                let poll = opcode::PollAdd::new(socket(half), libc::POLLIN as u32).build();
                let flags = squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS;
                let poll = poll.flags(flags).user_data(Op::Poll.token(index));
                let fill = splice(socket(half), Fd(pipe.write.as_raw_fd()), pipe.capacity);
                push(ring, &[poll, fill.user_data(token)])
            }
            Op::Drain(half) => {
                let pipe = &self.pipes[half];
                let drain = splice(Fd(pipe.read.as_raw_fd()), socket(1 - half), pipe.pending);
                push(ring, &[drain.user_data(token)])
            }
            _ => unreachable!("it begins a flow"),
        }
    }

    /// Ends both streams, which also wakes up what waits for their sockets.
    fn fail(&mut self) {
        self.failed = true;
        for socket in &self.sockets {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

fn splice(from: Fd, into: Fd, bytes: usize) -> squeue::Entry {
    // Both are streams: they have no offsets.
    let splice = opcode::Splice::new(from, -1, into, -1, bytes as u32);
    splice.flags(libc::SPLICE_F_MOVE).build()
}

/// Adds entries that must be submitted together.
fn push(ring: &mut IoUring, entries: &[squeue::Entry]) -> io::Result<()> {
    // SAFETY: descriptors are closed only when no request of their flow is in flight, and the
    // target's address, which the kernel copies on submission, is as old as the ring.
    while unsafe { ring.submission().push_multiple(entries) }.is_err() {
        ring.submit()?;
    }
    Ok(())
}
