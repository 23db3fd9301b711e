//! A flow's place in its worker: its sockets, what it holds, and the calls made for it.

use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::SockaddrStorage;

use super::moving::{Name, Reads};
use crate::engine::{Buffer, Engine, Outcome, Token};
use crate::flow::{End, Event, Flow, Limit, Op, Question, Side};
use crate::stats::Stats;

/// Slots that are not moved when there are more. Memory is used as they come.
pub(super) const ROOM: usize = 1 << 12;

/// A place for a flow.
pub(super) struct Slot<E: Engine> {
    /// How many flows have been here, to tell their late completions from this one's.
    pub(super) generation: u32,
    pub(super) tenant: Option<Tenant<E>>,
}

/// A flow and all that belongs to it.
pub(super) struct Tenant<E: Engine> {
    pub(super) flow: Flow,
    pub(super) sockets: [E::Socket; 2],
    pub(super) buffers: [Option<Buffer>; 2],
    pub(super) pipes: [Option<E::Pipe>; 2],
    pub(super) record: Option<Box<Record>>,
    pub(super) name: Name,
    pub(super) reads: Reads,
}

/// What the log says of a flow at its end; kept only when it will.
pub(super) struct Record {
    pub(super) client: Option<SockaddrStorage>,
    pub(super) started: Instant,
}

impl<E: Engine> Tenant<E> {
    pub(super) fn new(
        flow: Flow,
        sockets: [E::Socket; 2],
        record: Option<Box<Record>>,
        name: Name,
    ) -> Self {
        let (buffers, pipes) = Default::default();
        Self { flow, sockets, buffers, pipes, record, name, reads: Reads::default() }
    }

    /// Begins a request of the flow. `promises`: sockets may be told that more is to come.
    pub(super) fn start(&self, engine: &mut E, token: Token, op: Op, promises: bool) {
        let Some(side) = op.side() else { return engine.pause(token, self.flow.pause_ms()) };
        let socket = &self.sockets[side.index()];
        match op {
            Op::Connect => engine.connect(token, socket),
            Op::Recv(_) => engine.recv(token, socket),
            Op::Readable(_) => engine.readable(token, socket),
            Op::Watch(_) => engine.watch(token, socket),
            Op::Send(half) => {
                if let Some(buffer) = &self.buffers[half.index()] {
                    let more = promises && self.flow.has_more(half);
                    engine.send(token, socket, buffer, more);
                }
            }
            Op::Pause => {}
        }
    }

    /// Tells the flow that a request has completed.
    pub(super) fn completed(
        &mut self,
        engine: &mut E,
        op: Op,
        outcome: Outcome<E::Socket>,
        stats: &mut Stats,
    ) {
        let event = match (op, outcome) {
            (Op::Connect, Outcome::Done(result)) => Event::Connected(result),
            (Op::Pause, Outcome::Done(_)) => Event::Paused,
            (Op::Readable(half), Outcome::Readable(urgent)) => Event::Readable { half, urgent },
            (Op::Recv(half), Outcome::Received { result, more }) => {
                let result = result.map(|buffer| {
                    let len = buffer.as_ref().map_or(0, Buffer::len);
                    self.buffers[half.index()] = buffer;
                    len
                });
                stats.copy_operations += u64::from(result.is_ok_and(|len| len > 0));
                if result.is_ok_and(|len| len > 0) {
                    self.reads.copied();
                }
                stats.no_buffer += u64::from(result == Err(Errno::ENOBUFS));
                if result == Err(Errno::EAGAIN) {
                    // It was readable: it must not seem so for ever.
                    engine.has_failed(&self.sockets[half.index()]);
                }
                Event::Received { half, result, more }
            }
            (Op::Send(half), Outcome::Sent(result)) => {
                stats.copy_operations += u64::from(result.is_ok());
                if let (Ok(len), Some(buffer)) = (result, &mut self.buffers[half.index()]) {
                    buffer.consume(len);
                }
                Event::Sent { half, result }
            }
            (Op::Watch(side), Outcome::Watched { writable, failed, armed }) => {
                let failed = failed && engine.has_failed(&self.sockets[side.index()]);
                Event::Watched { side, writable, failed, armed }
            }
            // No engine answers a request with another's outcome.
            _ => return,
        };
        self.flow.on(event);
    }

    /// Does at once what the flow asks, and tells it what came of it. Returns how many bytes went
    /// into a pipe. `wanted_bytes`: the capacity a pipe is to have.
    pub(super) fn answer(
        &mut self,
        engine: &mut E,
        question: Question,
        wanted_bytes: u32,
        stats: &mut Stats,
    ) -> u32 {
        let event = self.ask(engine, question);
        let mut filled = 0;
        match event {
            Event::Pipe { capacity: None, .. } => stats.no_pipe += 1,
            Event::Pipe { capacity: Some(capacity), .. } => {
                stats.small_pipes += u64::from(capacity < wanted_bytes);
            }
            Event::Fill { result: Ok(len @ 1..), .. } => {
                stats.splice_operations += 1;
                self.reads.spliced();
                filled = len;
            }
            Event::Drain { result: Ok(len @ 1..), .. } => {
                stats.splice_operations += 1;
                stats.spliced_bytes += u64::from(len);
            }
            _ => {}
        }
        self.flow.on(event);
        filled
    }

    fn ask(&mut self, engine: &mut E, question: Question) -> Event {
        let source = |half: Side| &self.sockets[half.index()];
        let sink = |half: Side| &self.sockets[(!half).index()];
        match question {
            Question::Pipe(half) => {
                let taken = engine.take_pipe();
                let capacity = taken.as_ref().map(|&(_, capacity)| capacity);
                self.pipes[half.index()] = taken.map(|(pipe, _)| pipe);
                Event::Pipe { half, capacity }
            }
            Question::Fill { half, len } => {
                let socket = source(half);
                let pipe = self.pipes[half.index()].as_mut();
                let result = pipe.map_or(Err(Errno::EBADF), |pipe| engine.fill(socket, pipe, len));
                Event::Fill { half, result }
            }
            Question::Drain { half, len } => {
                let socket = sink(half);
                let pipe = self.pipes[half.index()].as_mut();
                let result = pipe.map_or(Err(Errno::EBADF), |pipe| engine.drain(pipe, socket, len));
                Event::Drain { half, result }
            }
            Question::Mark(half) => {
                Event::Mark { half, next_is_urgent: engine.is_at_mark(source(half)) }
            }
            Question::TakeUrgent(half) => {
                Event::TakeUrgent { half, byte: engine.recv_urgent(source(half)) }
            }
            Question::SendUrgent { half, byte } => {
                Event::SendUrgent { half, result: engine.send_urgent(sink(half), byte) }
            }
            Question::Failure(side) => Event::Failure { side, errno: engine.failure(source(side)) },
            Question::Unsent(side) => Event::Unsent { bytes: engine.unsent(source(side)) },
        }
    }
}

/// An address as logs show it.
pub(super) fn display(address: Option<SockaddrStorage>) -> String {
    address.map_or_else(|| "unknown client".to_owned(), |address| address.to_string())
}

/// How a flow ended, for its line in the log.
pub(super) fn describe(end: End) -> String {
    match end {
        End::Complete => "complete".to_owned(),
        End::Stopped => "cut: the program was told to stop".to_owned(),
        End::Expired(Limit::Idle) => "cut: idle for longer than --idle-timeout".to_owned(),
        End::Expired(Limit::HalfClose) => {
            "cut: half-closed and idle for longer than --half-close-timeout".to_owned()
        }
        End::ConnectFailed(errno) => {
            format!("cannot connect: {errno:?}: {}", errno.desc())
        }
        End::Failed(side, errno) => {
            let who = if side == Side::Listen { "client" } else { "target" };
            format!("{who} failed: {errno:?}: {}", errno.desc())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::epoll::Epoll;
    use crate::engine::uring::Uring;

    /// With what engines keep of a connection and what is left of a page, less than 512 bytes.
    #[test]
    fn a_slot_is_small() {
        assert!(size_of::<Slot<Uring>>() <= 224);
        assert!(size_of::<Slot<Epoll>>() <= 224);
    }
}
