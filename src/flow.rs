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
//! - a socket that failed makes the *other* one be reset, after what it had sent was delivered;
//! - a stream that is not passed on whole ends with a reset.
//!
//! It must not know: descriptors, system calls, clocks, engines, buffers' addresses.

use nix::errno::Errno;

use crate::config::Transfer;

mod ending;
pub mod half;
mod leaving;
mod words;

use half::{Half, Held};
use words::OpSet;
pub use words::{Action, End, Event, Limit, Limits, Op, Question, Side};

/// Bytes that flows whose turn has come may splice before what has completed is served.
///
/// A quarter of a pipe: with less, bulk costs more; with more, a short message behind bulk waits
/// longer (ARCHITECTURE.md has the figures). A fill that has begun is not cut short.
pub const TURN_BYTES: u32 = 256 << 10;

/// Longest pause of a flow that waits for what a failed socket had sent to arrive. The first is a
/// millisecond; mostly nothing is left to wait for, or a peer that acknowledges late, after 40 ms.
const MAX_PAUSE_MS: u32 = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// `watched`: the client is, in case it goes away first. Most targets answer before the next
    /// turn, so that starts only then.
    Connecting {
        watched: bool,
    },
    Open,
    /// Told to end; waiting until nothing is in flight.
    Closing(End),
    /// `Close` was asked for.
    Closed(End),
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
    /// To go on elsewhere.
    leaving: bool,
    /// The side's socket reported a failure that reading has not come to yet.
    alarmed: [bool; 2],
    /// What is left of the time to deliver what a failed socket had sent.
    grace_left_ms: u32,
    /// Time spent in pauses.
    paused_ms: u32,
    /// The failed side's sink was asked, since the last pause, what it has not sent.
    asked_unsent: bool,
    /// Whole ticks since a byte was last passed on, or since the phase began.
    quiet_ticks: u32,
    /// Bytes passed on, both ways, at the last tick; `None`: there was none in this phase.
    bytes_at_tick: Option<u64>,
}

impl Flow {
    /// A flow whose connect side is still to be connected.
    ///
    /// `grace_ms`: time to deliver what a socket had sent before it failed.
    pub fn connecting(transfer: Transfer, grace_ms: u32) -> Self {
        Self::new(Phase::Connecting { watched: false }, transfer, grace_ms)
    }

    /// A flow between two connected sockets; otherwise as [`Flow::connecting`].
    pub fn connected(transfer: Transfer, grace_ms: u32) -> Self {
        Self::new(Phase::Open, transfer, grace_ms)
    }

    fn new(phase: Phase, transfer: Transfer, grace_ms: u32) -> Self {
        Self {
            phase,
            halves: [Half::new(transfer), Half::new(transfer)],
            in_flight: OpSet::default(),
            cancelled: OpSet::default(),
            writable: [true; 2],
            failed: [None; 2],
            waiting_turn: false,
            starved: false,
            turn_left: 0,
            leaving: false,
            alarmed: [false; 2],
            grace_left_ms: grace_ms,
            paused_ms: 0,
            asked_unsent: false,
            quiet_ticks: 0,
            bytes_at_tick: None,
        }
    }

    /// Bytes the half has passed on.
    pub fn delivered_bytes(&self, half: Side) -> u64 {
        self.halves[half.index()].delivered_bytes()
    }

    /// Whether what follows what the half has to send is there: more, or the end of the stream.
    pub fn has_more(&self, half: Side) -> bool {
        matches!(self.halves[half.index()].held(), Held::Buffer { more: true, .. })
    }

    /// How long [`Op::Pause`] is to last.
    pub fn pause_ms(&self) -> u32 {
        // Not much longer in all than what is waited for takes.
        (1 + self.paused_ms / 8).min(MAX_PAUSE_MS).min(self.grace_left_ms)
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
            Event::Readable { half, urgent } => {
                self.finished(Op::Readable(half));
                self.halves[half.index()].on_readable(urgent);
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
                self.alarmed[side.index()] |= failed;
                if failed && matches!(self.phase, Phase::Connecting { .. }) {
                    self.terminate(End::Failed(side, Errno::ECONNRESET));
                }
            }
            Event::Paused => {
                let over_ms = self.pause_ms();
                self.grace_left_ms -= over_ms;
                self.paused_ms += over_ms;
                self.asked_unsent = false;
                self.finished(Op::Pause);
            }
            Event::Mark { half, next_is_urgent } => {
                self.halves[half.index()].on_mark(next_is_urgent);
            }
            Event::TakeUrgent { half, byte } => {
                let outcome = self.halves[half.index()].on_urgent(byte);
                self.note(half, outcome);
            }
            Event::SendUrgent { half, result } => self.on_delivered(half, result.map(|()| 1)),
            Event::Failure { side, errno } => {
                // Another request was told, and is late.
                self.note(side, Err(errno.unwrap_or(Errno::ECONNRESET)));
            }
            Event::Unsent { bytes: 0 } => self.grace_left_ms = 0,
            Event::Unsent { .. } => {}
            Event::Pipe { half, capacity } => self.halves[half.index()].on_pipe(capacity),
            Event::Fill { half, result } => {
                self.turn_left = self.turn_left.saturating_sub(result.unwrap_or(0));
                let outcome = self.halves[half.index()].on_filled(result);
                self.note(half, outcome);
            }
            Event::Drain { half, result } => self.on_delivered(half, result),
            Event::Turn => {
                self.waiting_turn = false;
                self.starved = false;
                self.turn_left = TURN_BYTES;
                if let Phase::Connecting { watched } = &mut self.phase {
                    *watched = true;
                }
            }
            Event::Leave => self.leaving = true,
            Event::Tick(limits) => self.on_tick(limits),
            Event::Stop => self.terminate(End::Stopped),
        }
    }

    /// What to do now; `None`: nothing until the next event.
    ///
    /// The answer counts as carried out.
    #[allow(clippy::should_implement_trait)] // not an iterator: its state is the flow
    pub fn next(&mut self) -> Option<Action> {
        match self.phase {
            Phase::Connecting { watched } => self.next_connecting(watched),
            Phase::Open => self.next_open(),
            Phase::Closing(end) => self.next_closing(end),
            Phase::Closed(_) => None,
        }
    }

    fn on_connected(&mut self, result: Result<(), Errno>) {
        self.finished(Op::Connect);
        match (self.phase, result) {
            // These errors are of a socket that was connected: what it had sent comes first.
            (Phase::Connecting { .. }, Ok(()) | Err(Errno::ECONNRESET | Errno::EPIPE)) => {
                self.phase = Phase::Open;
                self.bytes_at_tick = None;
                self.note(Side::Connect, result);
            }
            (Phase::Connecting { .. }, Err(errno)) => self.terminate(End::ConnectFailed(errno)),
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

    /// Remembers the first failure of a side's socket. EPIPE only says that there was one, which
    /// another request has been told and will report.
    fn note(&mut self, side: Side, outcome: Result<(), Errno>) {
        let known = &mut self.failed[side.index()];
        if let Err(errno) = outcome
            && known.is_none_or(|known| known == Errno::EPIPE)
        {
            *known = Some(errno);
        }
    }

    fn finished(&mut self, op: Op) {
        self.in_flight.remove(op);
        self.cancelled.remove(op);
    }

    /// Begins `op` unless it is in flight.
    fn start(&mut self, op: Op) -> Option<Action> {
        if self.in_flight.has(op) {
            return None;
        }
        self.in_flight.insert(op);
        Some(Action::Start(op))
    }

    fn next_connecting(&mut self, watched: bool) -> Option<Action> {
        if let Some(connect) = self.start(Op::Connect) {
            return Some(connect);
        }
        if watched { self.start(Op::Watch(Side::Listen)) } else { self.next_turn() }
    }

    fn next_open(&mut self) -> Option<Action> {
        if self.leaving && self.is_quiet() {
            return self.next_leaving();
        }
        let wish = self.next_half(Side::Listen).or_else(|| self.next_half(Side::Connect));
        wish.or_else(|| self.next_ending())
    }

    /// Reading is what a flow waits with for its turn, or for a buffer. It goes on giving back
    /// what it holds: that may be what others wait for.
    fn next_turn(&mut self) -> Option<Action> {
        if self.waiting_turn {
            return None;
        }
        self.waiting_turn = true;
        let starved = std::mem::take(&mut self.starved);
        Some(if starved { Action::Starve } else { Action::Yield })
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
                // Ask ahead: the answer comes with the send's, not a turn after it.
                return if half.must_wait() { self.start(Op::Readable(side)) } else { None };
            }
            if !self.writable[sink.index()] {
                // While the source is not read, only a watch can tell that it failed.
                return self.start(Op::Watch(sink)).or_else(|| self.start(Op::Watch(side)));
            }
            return match half.held() {
                Held::Pipe { .. } => ask(Question::Drain { half: side, len: pending }),
                Held::Urgent(byte) => ask(Question::SendUrgent { half: side, byte }),
                Held::Buffer { .. } | Held::Nothing => self.start(Op::Send(side)),
            };
        }
        if half.wants_release() {
            half.on_released();
            return Some(Action::Release(side));
        }
        if half.is_at_end() {
            // A sink that has failed hears of no end; its failure is passed on instead.
            if self.alarmed[sink.index()] {
                return None;
            }
            // The source's alarm is no failure here: had the stream not ended before it, reading
            // would have told the failure and not the end.
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
        // At once: the next buffer that is given back counts.
        if self.starved && !self.waiting_turn {
            return self.next_turn();
        }
        let read = half.next_read(side);
        let must_wait = match read {
            Ok(Question::Pipe(_) | Question::Fill { .. }) => {
                self.waiting_turn || self.turn_left == 0
            }
            Err(Op::Recv(_)) => self.waiting_turn,
            _ => false,
        };
        if must_wait {
            return self.next_turn();
        }
        read.map_or_else(|op| self.start(op), ask)
    }
}

fn ask(question: Question) -> Option<Action> {
    Some(Action::Ask(question))
}

#[cfg(test)]
mod tests;
