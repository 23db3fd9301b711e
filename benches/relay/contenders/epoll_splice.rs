//! epoll says when, splice(2) moves the bytes: what a good forwarder does without io_uring.
//!
//! Fair because it asks the kernel for as little as it can: readiness is level-triggered, so
//! nothing is read to learn that there is nothing more; a message costs two splices and its share
//! of an epoll_wait(2); the interest in a socket changes only when a sink is full. Each direction
//! moves at most a pipe of 1 MiB before others get their turn, and pipes are kept for the next use.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::begin_connect;
use super::pipes::{Pipe, Pipes};

/// Events taken from the kernel at a time.
const EVENTS: usize = 256;

/// The listener's token; a socket's is twice its flow's index, plus its side.
const LISTENER: u64 = u64::MAX;

const FLAGS: SpliceFFlags = SpliceFFlags::SPLICE_F_NONBLOCK.union(SpliceFFlags::SPLICE_F_MOVE);

pub(super) fn relay(listener: TcpListener, target: SocketAddr) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut relay =
        Relay { epoll, target, flows: Vec::new(), free: Vec::new(), pipes: Pipes::default() };
    let mut events = [EpollEvent::empty(); EVENTS];
    loop {
        let count = match relay.epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            count => count?,
        };
        // Indexes are used again only after all events of this turn, which may name them.
        let mut ended = Vec::new();
        for event in &events[..count] {
            let (token, flags) = (event.data(), event.events());
            if token == LISTENER {
                relay.accept(&listener)?;
                continue;
            }
            let (index, side) = (token as usize / 2, token as usize % 2);
            // A flow that fails is dropped as it is: that ends, or resets, both its connections.
            if !relay.serve(index, side, flags).unwrap_or(false) {
                relay.flows[index] = None;
                ended.push(index);
            }
        }
        relay.free.append(&mut ended);
    }
}

struct Relay {
    epoll: Epoll,
    target: SocketAddr,
    flows: Vec<Option<Flow>>,
    free: Vec<usize>,
    pipes: Pipes,
}

/// A connection. Side 0 is the client's, and half 0 moves the bytes that come from there.
struct Flow {
    sockets: [TcpStream; 2],
    connected: bool,
    halves: [Half; 2],
    /// What epoll waits for; `None`: for nothing, not even for a failure.
    interest: [Option<EpollFlags>; 2],
}

#[derive(Default)]
struct Half {
    /// Only while there are bytes in it.
    pipe: Option<Pipe>,
    at_end: bool,
    shut: bool,
}

impl Relay {
    fn accept(&mut self, listener: &TcpListener) -> io::Result<()> {
        loop {
            match listener.accept() {
                Ok((client, _)) => self.add(client)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn add(&mut self, client: TcpStream) -> io::Result<()> {
        client.set_nonblocking(true)?;
        let mut flow = Flow {
            sockets: [client, begin_connect(self.target)?],
            connected: false,
            halves: Default::default(),
            interest: [None, None],
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.flows.push(None);
            self.flows.len() - 1
        });
        flow.watch(index, &self.epoll)?;
        self.flows[index] = Some(flow);
        Ok(())
    }

    /// Moves what an event allows; false when the flow is complete.
    fn serve(&mut self, index: usize, side: usize, flags: EpollFlags) -> io::Result<bool> {
        let Some(flow) = &mut self.flows[index] else { return Ok(true) };
        if !flow.connected {
            if let Some(error) = flow.sockets[1].take_error()? {
                return Err(error);
            }
            flow.connected = true;
        }
        if flags.contains(EpollFlags::EPOLLOUT) {
            flow.drain(1 - side, &mut self.pipes)?;
        }
        let failed = flags.contains(EpollFlags::EPOLLERR);
        if flow.halves[side].at_end && failed {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if failed || flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP) {
            flow.fill(side, &mut self.pipes)?;
            flow.drain(side, &mut self.pipes)?;
        }
        flow.watch(index, &self.epoll)?;
        Ok(!flow.halves.iter().all(|half| half.shut))
    }
}

impl Flow {
    /// Moves what the half's source has into its pipe, unless there is something left.
    fn fill(&mut self, half: usize, pipes: &mut Pipes) -> io::Result<()> {
        let source = &self.sockets[half];
        let half = &mut self.halves[half];
        if half.pipe.is_some() || half.at_end {
            return Ok(());
        }
        let mut pipe = pipes.take()?;
        match splice(source, None, &pipe.write, None, pipe.capacity, FLAGS) {
            Ok(0) => half.at_end = true,
            Ok(count) => pipe.pending = count,
            Err(Errno::EAGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
        match pipe.pending {
            0 => pipes.give_back(pipe),
            _ => half.pipe = Some(pipe),
        }
        Ok(())
    }

    /// Moves what is in the half's pipe into its sink, and then passes its end on.
    fn drain(&mut self, half: usize, pipes: &mut Pipes) -> io::Result<()> {
        let sink = &self.sockets[1 - half];
        let half = &mut self.halves[half];
        while let Some(pipe) = &mut half.pipe {
            match splice(&pipe.read, None, sink, None, pipe.pending, FLAGS) {
                Ok(count) => pipe.pending -= count,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
            if let Some(empty) = half.pipe.take_if(|pipe| pipe.pending == 0) {
                pipes.give_back(empty);
            }
        }
        if half.at_end && !half.shut {
            half.shut = true;
            sink.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    /// Makes epoll wait for what the flow needs now.
    fn watch(&mut self, index: usize, epoll: &Epoll) -> io::Result<()> {
        for side in 0..2 {
            let wanted = self.wanted(side);
            let before = std::mem::replace(&mut self.interest[side], wanted);
            let socket = &self.sockets[side];
            let event = |flags| EpollEvent::new(flags, (2 * index + side) as u64);
            match (before, wanted) {
                (None, Some(flags)) => epoll.add(socket, event(flags))?,
                (Some(before), Some(flags)) if before != flags => {
                    epoll.modify(socket, &mut event(flags))?;
                }
                (Some(_), None) => epoll.delete(socket)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn wanted(&self, side: usize) -> Option<EpollFlags> {
        if !self.connected {
            // Early bytes wait in the client's socket.
            return (side == 1).then_some(EpollFlags::EPOLLOUT);
        }
        let (out_of, into) = (&self.halves[side], &self.halves[1 - side]);
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, out_of.pipe.is_none() && !out_of.at_end);
        flags.set(EpollFlags::EPOLLOUT, into.pipe.is_some());
        if flags.is_empty() && into.shut {
            // It may be hung up, which epoll would report again and again.
            return None;
        }
        Some(flags)
    }
}
