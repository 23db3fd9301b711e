//! The state machine of one forwarded connection: plain data in, plain data out.
//!
//! A [`Flow`] joins two sockets, one on each [`Side`]. It consists of two halves, one per
//! direction, named by the side their bytes come from. The worker tells the flow what happened
//! ([`Flow::on`]) and then asks it what to do until it has no more wishes ([`Flow::next`]).
//! What it wants is a function of its state alone, so there is no order of events to get wrong:
//! any event may come at any time.
//!
//! Promises, each checked by `tests/sim.rs`:
//! - bytes leave a half in the order they came in, and all of them before its end is passed on;
//! - at most one request of each [`Op`] is in flight, and none when the flow asks to be closed;
//! - a socket that failed makes the *other* one be reset, after what it had sent was delivered.
//!
//! It must not know: descriptors, system calls, clocks, engines, buffers' addresses.

use std::ops::Not;

use nix::errno::Errno;

use crate::config::Transfer;
use crate::half::{Half, Held};

/// Bytes a flow may splice before other flows get a turn.
///
/// Large enough that a turn's overhead does not show in bulk (4 fills of a 1 MiB pipe), small
/// enough that a short message behind it waits about a millisecond.
pub const TURN_BYTES: u32 = 4 << 20;

/// One of the two sockets of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The client's socket.
    Listen,
    /// The target's socket.
    Connect,
}

impl Side {
    /// Both sides, listen side first.
    pub const BOTH: [Side; 2] = [Side::Listen, Side::Connect];

    /// Index into two-element arrays.
    pub fn index(self) -> usize {
        self as usize
    }
}

impl Not for Side {
    type Output = Side;
    fn not(self) -> Side {
        match self {
            Side::Listen => Side::Connect,
            Side::Connect => Side::Listen,
        }
    }
}

/// A request that finishes later, by one event (`Watch`: by several).
///
/// Those of a half carry the half's source side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Connect the connect side's socket to the target.
    Connect,
    /// Receive into a buffer, when there is something to receive.
    Recv(Side),
    /// Say when the half's source has something to read.
    Readable(Side),
    /// Send what is left of the half's buffer, without waiting.
    Send(Side),
    /// Say whenever this side's socket becomes writable or fails.
    Watch(Side),
}

impl Op {
    /// All requests a flow can have in flight.
    pub const ALL: [Op; 9] = [
        Op::Connect,
        Op::Recv(Side::Listen),
        Op::Recv(Side::Connect),
        Op::Readable(Side::Listen),
        Op::Readable(Side::Connect),
        Op::Send(Side::Listen),
        Op::Send(Side::Connect),
        Op::Watch(Side::Listen),
        Op::Watch(Side::Connect),
    ];

    /// Position in [`Op::ALL`].
    pub fn index(self) -> usize {
        match self {
            Op::Connect => 0,
            Op::Recv(side) => 1 + side.index(),
            Op::Readable(side) => 3 + side.index(),
            Op::Send(side) => 5 + side.index(),
            Op::Watch(side) => 7 + side.index(),
        }
    }
}

/// What the flow wants done. All but `Start` and `Cancel` are done at once; `TakePipe`, `Fill`
/// and `Drain` are answered at once by the event of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin a request.
    Start(Op),
    /// Ask for a request in flight to end early; its event still comes.
    Cancel(Op),
    /// Get a pipe for the half.
    TakePipe(Side),
    /// Move up to `len` bytes from the half's source into its pipe.
    Fill {
        /// The half.
        half: Side,
        /// Bytes asked for; never more than the pipe has room for.
        len: u32,
    },
    /// Move `len` bytes from the half's pipe into its sink.
    Drain {
        /// The half.
        half: Side,
        /// Bytes asked for; exactly what the pipe holds.
        len: u32,
    },
    /// Give back the half's buffer or pipe.
    Release(Side),
    /// Pass the end of a stream on: shut down the writing direction of this side's socket.
    Shutdown(Side),
    /// Let other flows have a turn, then report [`Event::Turn`].
    Yield,
    /// Nothing can be received for want of a buffer: report [`Event::Turn`] when one is free.
    Starve,
    /// The flow is over and nothing is in flight: reset this socket if one is named, close both.
    Close {
        /// The side whose peer must see a reset.
        reset: Option<Side>,
    },
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// [`Op::Connect`] finished.
    Connected(Result<(), Errno>),
    /// [`Op::Recv`] finished.
    Received {
        /// The half.
        half: Side,
        /// Bytes received into a buffer the half now holds (0: end of stream, no buffer).
        result: Result<u32, Errno>,
        /// The socket had still more to read.
        more: bool,
    },
    /// [`Op::Readable`] finished.
    Readable {
        /// The half.
        half: Side,
        /// A failure is the request's, not the socket's.
        result: Result<(), Errno>,
    },
    /// [`Op::Send`] finished.
    Sent {
        /// The half.
        half: Side,
        /// Bytes the sink took.
        result: Result<u32, Errno>,
    },
    /// [`Op::Watch`] reported.
    Watched {
        /// The side.
        side: Side,
        /// The socket can take bytes.
        writable: bool,
        /// The socket failed.
        failed: bool,
        /// The watch goes on.
        armed: bool,
    },
    /// [`Action::TakePipe`] found a pipe of this many bytes, or none.
    TakePipe {
        /// The half.
        half: Side,
        /// The pipe's capacity in bytes.
        capacity: Option<u32>,
    },
    /// [`Action::Fill`] moved bytes.
    Fill {
        /// The half.
        half: Side,
        /// Bytes moved (0: end of stream, or an urgent mark).
        result: Result<u32, Errno>,
    },
    /// [`Action::Drain`] moved bytes.
    Drain {
        /// The half.
        half: Side,
        /// Bytes moved.
        result: Result<u32, Errno>,
    },
    /// The wait asked for by [`Action::Yield`] or [`Action::Starve`] is over.
    Turn,
    /// The flow is to end now, whatever its state.
    Stop,
}

/// How a flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Both streams ended and were passed on whole.
    Complete,
    /// The target could not be reached; the client was reset.
    ConnectFailed(Errno),
    /// This side's socket failed; the other one was reset.
    Failed(Side, Errno),
    /// The program was told to stop.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Connecting,
    Open,
    /// Told to end; waiting until nothing is in flight.
    Closing(End),
    /// `Close` was asked for.
    Closed(End),
}

/// A set of [`Op`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct OpSet(u16);

impl OpSet {
    fn has(self, op: Op) -> bool {
        self.0 & (1 << op.index()) != 0
    }
    fn insert(&mut self, op: Op) {
        self.0 |= 1 << op.index();
    }
    fn remove(&mut self, op: Op) {
        self.0 &= !(1 << op.index());
    }
    fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// One forwarded connection.
#[derive(Clone, Debug)]
pub struct Flow {
    phase: Phase,
    halves: [Half; 2],
    /// True exactly for the requests the engine has and has not reported yet.
    in_flight: OpSet,
    /// Requests in flight whose cancellation was asked for.
    cancelled: OpSet,
    /// The side's socket takes bytes, as far as is known.
    writable: [bool; 2],
    /// The side's socket failed, whichever half noticed: a socket's error is reported once.
    failed: [Option<Errno>; 2],
    /// Waiting for [`Event::Turn`].
    waiting_turn: bool,
    starved: bool,
    /// Bytes the flow may still splice in this turn.
    turn_left: u32,
}

impl Flow {
    /// A flow whose connect side is still to be connected.
    pub fn connecting(transfer: Transfer) -> Self {
        Self::new(Phase::Connecting, transfer)
    }

    /// A flow between two connected sockets.
    pub fn connected(transfer: Transfer) -> Self {
        Self::new(Phase::Open, transfer)
    }

    fn new(phase: Phase, transfer: Transfer) -> Self {
        Self {
            phase,
            halves: [Half::new(transfer), Half::new(transfer)],
            in_flight: OpSet::default(),
            cancelled: OpSet::default(),
            writable: [true; 2],
            failed: [None; 2],
            waiting_turn: false,
            starved: false,
            turn_left: TURN_BYTES,
        }
    }

    /// Bytes the half has passed on.
    pub fn delivered_bytes(&self, half: Side) -> u64 {
        self.halves[half.index()].delivered_bytes()
    }

    /// Whether the half's source had nothing to read when it was last asked: a receive does
    /// better to wait first than to try first.
    pub fn expects_wait(&self, half: Side) -> bool {
        self.halves[half.index()].source_is_empty()
    }

    /// How the flow ended, once it asked to be closed.
    pub fn end(&self) -> Option<End> {
        match self.phase {
            Phase::Closed(end) => Some(end),
            _ => None,
        }
    }

    /// Takes note of what happened.
    pub fn on(&mut self, event: Event) {
        match event {
            Event::Connected(result) => self.on_connected(result),
            Event::Received { half, result, more } => {
                self.finished(Op::Recv(half));
                let outcome = self.halves[half.index()].on_received(result, more);
                self.note(half, outcome);
                self.starved |= result == Err(Errno::ENOBUFS);
            }
            Event::Readable { half, result } => {
                self.finished(Op::Readable(half));
                self.turn_left = TURN_BYTES;
                self.halves[half.index()].on_readable(result);
            }
            Event::Sent { half, result } => {
                self.finished(Op::Send(half));
                self.on_delivered(half, result);
            }
            Event::Watched { side, writable, failed, armed } => {
                if !armed {
                    self.finished(Op::Watch(side));
                }
                self.writable[side.index()] |= writable;
                // While the side is still read, reading tells the error after the last byte.
                if failed && self.halves[side.index()].is_at_end() {
                    self.note(side, Err(Errno::ECONNRESET));
                }
            }
            Event::TakePipe { half, capacity } => {
                self.halves[half.index()].on_pipe(capacity);
            }
            Event::Fill { half, result } => {
                self.turn_left = self.turn_left.saturating_sub(result.unwrap_or(0));
                let outcome = self.halves[half.index()].on_filled(result);
                self.note(half, outcome);
            }
            Event::Drain { half, result } => self.on_delivered(half, result),
            Event::Turn => {
                self.waiting_turn = false;
                self.turn_left = TURN_BYTES;
            }
            Event::Stop => self.terminate(End::Stopped),
        }
    }

    /// What to do now; `None`: nothing until the next event.
    ///
    /// The answer counts as carried out.
    #[allow(clippy::should_implement_trait)] // not an iterator: its state is the flow
    pub fn next(&mut self) -> Option<Action> {
        match self.phase {
            Phase::Connecting => self.start(Op::Connect),
            Phase::Open => self.next_open(),
            Phase::Closing(end) => self.next_closing(end),
            Phase::Closed(_) => None,
        }
    }

    fn on_connected(&mut self, result: Result<(), Errno>) {
        self.finished(Op::Connect);
        match (self.phase, result) {
            (Phase::Connecting, Ok(())) => self.phase = Phase::Open,
            (Phase::Connecting, Err(errno)) => self.terminate(End::ConnectFailed(errno)),
            _ => {}
        }
    }

    /// The half's sink took bytes, or did not.
    fn on_delivered(&mut self, half: Side, result: Result<u32, Errno>) {
        match result {
            Ok(len) => {
                let left = self.halves[half.index()].on_delivered(len);
                self.writable[(!half).index()] &= left == 0;
            }
            Err(Errno::EAGAIN) => self.writable[(!half).index()] = false,
            Err(Errno::EINTR | Errno::ECANCELED) => {}
            Err(errno) => self.note(!half, Err(errno)),
        }
    }

    /// Remembers the first failure of a side's socket.
    fn note(&mut self, side: Side, outcome: Result<(), Errno>) {
        if let Err(errno) = outcome {
            self.failed[side.index()].get_or_insert(errno);
        }
    }

    fn finished(&mut self, op: Op) {
        self.in_flight.remove(op);
        self.cancelled.remove(op);
    }

    fn terminate(&mut self, end: End) {
        if matches!(self.phase, Phase::Connecting | Phase::Open) {
            self.phase = Phase::Closing(end);
        }
    }

    /// Begins `op` unless it is in flight.
    fn start(&mut self, op: Op) -> Option<Action> {
        if self.in_flight.has(op) {
            return None;
        }
        self.in_flight.insert(op);
        Some(Action::Start(op))
    }

    fn next_open(&mut self) -> Option<Action> {
        if self.waiting_turn {
            return None;
        }
        if self.starved || self.turn_left == 0 {
            self.waiting_turn = true;
            let action = if self.starved { Action::Starve } else { Action::Yield };
            self.starved = false;
            return Some(action);
        }
        let wish = self.next_half(Side::Listen).or_else(|| self.next_half(Side::Connect));
        if wish.is_some() {
            return wish;
        }
        self.terminate(self.verdict()?);
        self.next()
    }

    /// The flow's end, if it has come.
    fn verdict(&self) -> Option<End> {
        for side in Side::BOTH {
            let half = &self.halves[side.index()];
            if let Some(errno) = self.failed[side.index()] {
                // What the failed socket had sent goes out first, if it can go out at all.
                if half.is_drained() || self.failed[(!side).index()].is_some() {
                    return Some(End::Failed(side, errno));
                }
            }
        }
        self.halves.iter().all(Half::is_shut).then_some(End::Complete)
    }

    fn next_half(&mut self, side: Side) -> Option<Action> {
        let sink = !side;
        if self.failed[sink.index()].is_some() {
            return None;
        }
        let half = &mut self.halves[side.index()];
        let pending = half.pending();
        if pending > 0 {
            if self.in_flight.has(Op::Send(side)) {
                return None;
            }
            if !self.writable[sink.index()] {
                return self.start(Op::Watch(sink));
            }
            return match half.held() {
                Held::Pipe { .. } => Some(Action::Drain { half: side, len: pending }),
                Held::Buffer { .. } | Held::Nothing => self.start(Op::Send(side)),
            };
        }
        if half.wants_release() {
            half.on_released();
            return Some(Action::Release(side));
        }
        if half.is_at_end() {
            if self.failed[side.index()].is_none() && half.shut() {
                return Some(Action::Shutdown(sink));
            }
            // Nothing is read here any more, so only a watch can tell that the socket failed.
            let other_is_open = !self.halves[sink.index()].is_shut();
            return if other_is_open { self.start(Op::Watch(side)) } else { None };
        }
        if self.in_flight.has(Op::Recv(side)) || self.in_flight.has(Op::Readable(side)) {
            return None;
        }
        half.next_read(side).or_else(|| {
            let op = self.halves[side.index()].next_wait(side);
            self.start(op)
        })
    }

    fn next_closing(&mut self, end: End) -> Option<Action> {
        for op in Op::ALL {
            if self.in_flight.has(op) && !self.cancelled.has(op) {
                self.cancelled.insert(op);
                return Some(Action::Cancel(op));
            }
        }
        if !self.in_flight.is_empty() {
            return None;
        }
        for side in Side::BOTH {
            let half = &mut self.halves[side.index()];
            if half.held() != Held::Nothing {
                half.on_released();
                return Some(Action::Release(side));
            }
        }
        self.phase = Phase::Closed(end);
        let reset = match end {
            End::ConnectFailed(_) => Some(Side::Listen),
            End::Failed(side, _) => Some(!side),
            End::Complete | End::Stopped => None,
        };
        Some(Action::Close { reset })
    }
}
