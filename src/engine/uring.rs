//! The io_uring engine: one ring, used by one thread.
//!
//! The ring says *when*, and for sockets with short messages a set (`Readiness`); bulk bytes are
//! moved by splice(2) on the ring's own thread, because the kernel runs every IORING_OP_SPLICE on a
//! kernel worker thread (tests/kernel/workers.rs). Nothing that is submitted here may be punted to
//! such a worker: sends do not wait, and shutting down, which always is, is the plain system call.

#![allow(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{SockaddrLike, SockaddrStorage};

use self::buffers::{Buffers, GROUP};
use self::readiness::Readiness;
pub use self::setup::probe;
use self::setup::{CQ_ENTRIES, Refusal, SQ_ENTRIES, build_ring, decode_result};
use super::{Buffer, Completion, Engine, Outcome, Setup, Sleep, Start, Token, calls};
use crate::config::SocketOptions;
use crate::error::{Error, Kind};
use crate::flow::Op;
use crate::flow::half::BUFFER_BYTES;
use crate::pipe::{Pipe, PipePool};

mod buffers;
mod readiness;
mod setup;
mod waiting;

/// Completions of a turn up to which what is received takes a call of its own. More share an entry
/// into the ring.
const RECEIVED_BY_CALLS: usize = 64;

/// The same of what is sent. Fewer: a call lets the peer interrupt the worker, and what one entry
/// sends the peer finds together.
const SENT_BY_CALLS: usize = 3;

/// An engine on one io_uring ring.
pub struct Uring {
    // Dropped in this order: the ring before what it writes to.
    ring: IoUring,
    buffers: Buffers,
    readiness: Readiness,
    pipes: PipePool,
    /// Boxed: requests point to it.
    target: Option<Box<SockaddrStorage>>,
    sockets: SocketOptions,
    /// Completions taken from the ring and not yet handed on.
    inbox: VecDeque<cqueue::Entry>,
    /// What was done at once, and is not yet handed on.
    done: VecDeque<Completion<OwnedFd>>,
    /// How many completions the turn began with, while these are served.
    turn: Option<usize>,
    enter_flags: u32,
    busy_poll: Duration,
    /// Lengths of pauses, in milliseconds, as the kernel reads them when it takes the request.
    pauses: BTreeMap<u32, Box<Timespec>>,
}

impl Uring {
    /// Whether a turn with no more than so many completions is being served.
    fn has_at_most(&self, completions: usize) -> bool {
        self.turn.is_some_and(|count| count <= completions)
    }

    fn push(&mut self, token: Token, entry: squeue::Entry) {
        self.push_chain(&[entry.user_data(token.encode())]);
    }

    /// Entries that must be submitted together.
    fn push_chain(&mut self, entries: &[squeue::Entry]) {
        // SAFETY: what the entries point to outlives the requests: buffers are part of the
        // engine, the target's address is boxed, and a flow closes a socket or gives a buffer
        // back only after the request that uses it has completed (`Flow::in_flight`).
        while unsafe { self.ring.submission().push_multiple(entries) }.is_err() {
            // A failure passes by itself, once the kernel's completions are read.
            let _ = self.ring.submit();
            // What completes while it is submitted is less than there is room for: nothing in the
            // ring overflows, however much is submitted in a turn.
            self.take();
        }
    }

    fn decode(&mut self, entry: &cqueue::Entry) -> Option<Completion<OwnedFd>> {
        let token = Token::decode(entry.user_data());
        let result = decode_result(entry.result());
        let armed = cqueue::more(entry.flags());
        let outcome = match token {
            Token::Ignored => return None,
            Token::Accept => {
                // SAFETY: the kernel has just made this descriptor for this completion alone.
                Outcome::Accepted(result.map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) }))
            }
            Token::Handoff | Token::Command | Token::Tick => Outcome::Done(result.map(drop)),
            Token::Flow { op, .. } => match op {
                Op::Connect => Outcome::Done(result.map(drop)),
                // The request has done what it is for when its time is up.
                Op::Pause => Outcome::Done(Ok(())),
                Op::Readable(_) => {
                    self.readiness.waited_apart();
                    let urgent = |events| events & libc::POLLPRI as u32 != 0;
                    Outcome::Readable(result.map(urgent))
                }
                Op::Recv(_) => self.decode_received(entry, result),
                Op::Send(_) => Outcome::Sent(result),
                Op::Watch(_) => {
                    let events = result.unwrap_or(0) as i16;
                    let failed = events & libc::POLLERR != 0;
                    Outcome::Watched { writable: events & libc::POLLOUT != 0, failed, armed }
                }
            },
        };
        Some(Completion { token, outcome })
    }

    fn decode_received(
        &mut self,
        entry: &cqueue::Entry,
        result: Result<u32, Errno>,
    ) -> Outcome<OwnedFd> {
        let more = cqueue::sock_nonempty(entry.flags());
        let id = cqueue::buffer_select(entry.flags());
        let buffer = id.map(|id| Buffer::received(id, result.unwrap_or(0)));
        let result = match result {
            Ok(0) | Err(_) => {
                if let Some(unused) = buffer {
                    self.buffers.give_back(unused);
                }
                match result {
                    // More buffers can be had: to be tried again. Not EAGAIN, which would say that
                    // a readable socket had nothing to receive.
                    Err(Errno::ENOBUFS) if self.buffers.promise() => Err(Errno::EINTR),
                    _ => result.map(|_| None),
                }
            }
            Ok(_) => Ok(buffer),
        };
        Outcome::Received { result, more }
    }
}

impl Start for Uring {
    const NAME: &'static str = "uring";

    fn start(setup: &Setup) -> Result<Self, Error> {
        let ring = build_ring(SQ_ENTRIES).map_err(Refusal::to("set up a ring"))?;
        let mut buffers = Buffers::new()
            .map_err(|errno| Error::system(Kind::Kernel, "cannot map buffers", errno, ""))?;
        buffers.register(&ring).map_err(Refusal::to("register buffers"))?;
        let no_iowait = ring.params().is_feature_no_iowait();
        let readiness = Readiness::new().map_err(|errno| {
            Error::system(Kind::Kernel, "cannot set up epoll", errno, calls::NO_EPOLL)
        })?;
        let submitter = ring.submitter();
        submitter.register_eventfd(readiness.bell()).map_err(Refusal::to("register an eventfd"))?;
        let mut engine = Self {
            ring,
            buffers,
            readiness,
            pipes: PipePool::new(setup.pipe_size_bytes, setup.pipes),
            target: setup.target.map(|target| Box::new(target.into())),
            sockets: setup.sockets,
            inbox: VecDeque::with_capacity(CQ_ENTRIES as usize),
            done: VecDeque::with_capacity(4),
            turn: None,
            pauses: BTreeMap::new(),
            busy_poll: Duration::from_micros(setup.busy_poll_us.into()),
            enter_flags: waiting::enter_flags(no_iowait),
        };
        engine.disable_bell();
        Ok(engine)
    }
}

impl Engine for Uring {
    type Socket = OwnedFd;
    type Pipe = Pipe;

    fn accept(&mut self, token: Token, listener: &OwnedFd) {
        // One-shot: a multishot accept keeps its place at the head of the listening socket's
        // queue, and with it all connections for its worker.
        let nobody = (std::ptr::null_mut(), std::ptr::null_mut());
        let entry = opcode::Accept::new(fd(listener), nobody.0, nobody.1)
            .flags(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)
            .build();
        self.push(token, entry);
    }

    fn connect(&mut self, token: Token, socket: &OwnedFd) {
        if let Some(target) = &self.target {
            let entry = opcode::Connect::new(fd(socket), target.as_ptr(), target.len());
            self.push(token, entry.build());
        }
    }

    fn recv(&mut self, token: Token, socket: &OwnedFd) {
        self.readiness.receiving(token, socket);
        if self.has_at_most(RECEIVED_BY_CALLS) && self.receive_at_once(token, socket) {
            return;
        }
        let entry = opcode::Recv::new(fd(socket), std::ptr::null_mut(), BUFFER_BYTES)
            .buf_group(GROUP)
            .flags(libc::MSG_DONTWAIT)
            .build()
            .flags(squeue::Flags::BUFFER_SELECT);
        self.push(token, entry);
    }

    fn readable(&mut self, token: Token, socket: &OwnedFd) {
        if self.readiness.wait_for(token, socket) {
            return;
        }
        // Two in a chain. The first waits, but what it reports are the events its wake-up names,
        // and TCP's name urgent data also where there is none. The second asks for the state; it
        // alone completes, unless the first fails: then that one does.
        // One-shot, so a fill that stopped early needs no probe. They cannot spin after a FIN,
        // which completes them at once (tests/kernel/polling.rs), because then the flow reads the
        // end and never waits here again.
        let wait = opcode::PollAdd::new(fd(socket), libc::POLLIN as u32).build();
        let state = opcode::PollAdd::new(fd(socket), (libc::POLLIN | libc::POLLPRI) as u32).build();
        let wait = wait.flags(squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS);
        self.push_chain(&[wait, state].map(|entry| entry.user_data(token.encode())));
    }

    fn send(&mut self, token: Token, socket: &OwnedFd, buffer: &Buffer, more: bool) {
        if self.has_at_most(SENT_BY_CALLS) {
            let result = self.buffers.send(socket, buffer, more);
            self.done.push_back(Completion { token, outcome: Outcome::Sent(result) });
            return;
        }
        // Without waiting: a send that had to wait on a half-closed socket would be punted to a
        // kernel worker (tests/kernel/workers.rs).
        let entry = opcode::Send::new(fd(socket), self.buffers.bytes(buffer), buffer.len())
            .flags(calls::send_flags(more).bits());
        self.push(token, entry.build());
    }

    fn watch(&mut self, token: Token, socket: &OwnedFd) {
        // Multishot: a socket whose peer has sent its FIN is reported once, not for ever
        // (tests/kernel/polling.rs).
        let entry = opcode::PollAdd::new(fd(socket), libc::POLLOUT as u32).multi(true);
        self.push(token, entry.build());
    }

    fn pause(&mut self, token: Token, ms: u32) {
        let time = self.pauses.entry(ms).or_insert_with(|| Box::new(timespec(ms)));
        let entry = opcode::Timeout::new(&**time as *const Timespec).build();
        self.push(token, entry);
    }

    fn cancel(&mut self, token: Token) {
        if self.readiness.cancel(token) {
            return;
        }
        // All of them: `readable` makes two with the same token.
        let entry =
            opcode::AsyncCancel2::new(CancelBuilder::user_data(token.encode()).all()).build();
        self.push(Token::Ignored, entry.flags(squeue::Flags::SKIP_SUCCESS));
    }

    fn close(&mut self, socket: OwnedFd) {
        self.readiness.forget(&socket);
        let entry = opcode::Close::new(Fd(socket.into_raw_fd())).build();
        self.push(Token::Ignored, entry.flags(squeue::Flags::SKIP_SUCCESS));
    }

    fn let_go(&mut self, socket: &OwnedFd) {
        self.readiness.forget(socket);
    }

    fn target_socket(&mut self) -> Result<OwnedFd, Errno> {
        calls::target_socket(self.target.as_deref(), &self.sockets)
    }

    fn shutdown(&mut self, socket: &OwnedFd) {
        calls::shutdown(socket);
    }

    fn reset(&mut self, socket: &OwnedFd) {
        calls::reset(socket);
    }

    fn is_at_mark(&self, socket: &OwnedFd) -> bool {
        calls::is_at_mark(socket)
    }

    fn recv_urgent(&mut self, socket: &OwnedFd) -> Result<Option<u8>, Errno> {
        calls::recv_urgent(socket)
    }

    fn send_urgent(&mut self, socket: &OwnedFd, byte: u8) -> Result<(), Errno> {
        calls::send_urgent(socket, byte)
    }

    fn adopt(&mut self, client: &OwnedFd) {
        crate::socket::adopt(client, &self.sockets);
    }

    fn has_failed(&mut self, socket: &OwnedFd) -> bool {
        calls::has_failed(socket)
    }

    fn failure(&self, socket: &OwnedFd) -> Option<Errno> {
        calls::failure(socket)
    }

    fn unsent(&self, socket: &OwnedFd) -> u32 {
        calls::unsent(socket)
    }

    fn peer(&self, socket: &OwnedFd) -> Option<SockaddrStorage> {
        calls::peer(socket)
    }

    fn give_back(&mut self, buffer: Buffer) {
        self.buffers.give_back(buffer);
    }

    fn take_pipe(&mut self) -> Option<(Pipe, u32)> {
        self.pipes.take()
    }

    fn release_pipe(&mut self, pipe: Pipe) {
        self.pipes.give_back(pipe);
    }

    fn fill(&mut self, socket: &OwnedFd, pipe: &mut Pipe, len: u32) -> Result<u32, Errno> {
        pipe.fill(socket, len)
    }

    fn drain(&mut self, pipe: &mut Pipe, socket: &OwnedFd, len: u32) -> Result<u32, Errno> {
        pipe.drain(socket, len)
    }

    fn wait(&mut self, sleep: Sleep) -> Result<(), Errno> {
        if self.inbox.is_empty() {
            // From its beginning again: what is used is what is needed at a time.
            self.inbox.clear();
        }
        self.buffers.turn();
        self.take();
        if self.readiness.is_awaited() {
            self.wait_for_set(sleep)?;
        } else {
            self.wait_for_ring(sleep)?;
        }
        self.turn = Some(self.told());
        Ok(())
    }

    fn completion(&mut self) -> Option<Completion<OwnedFd>> {
        loop {
            if let Some(done) = self.done.pop_front() {
                return Some(done);
            }
            if let Some((token, urgent)) = self.readiness.next() {
                return Some(Completion { token, outcome: Outcome::Readable(urgent) });
            }
            let Some(entry) = self.inbox.pop_front() else {
                self.turn = None;
                return None;
            };
            if let Some(completion) = self.decode(&entry) {
                return Some(completion);
            }
        }
    }
}

fn timespec(ms: u32) -> Timespec {
    Timespec::new().sec(u64::from(ms / 1000)).nsec(ms % 1000 * 1_000_000)
}

fn fd(socket: &OwnedFd) -> Fd {
    Fd(socket.as_raw_fd())
}
