//! How a flow ends: complete, by a socket's failure, by a limit, or by order.

use nix::errno::Errno;

use super::half::{Half, Held};
use super::{Action, End, Flow, Limit, Limits, Op, Phase, Question, Side, ask};

impl Flow {
    pub(super) fn terminate(&mut self, end: End) {
        if matches!(self.phase, Phase::Connecting { .. } | Phase::Open) {
            self.phase = Phase::Closing(end);
        }
    }

    /// Ends the flow when it has been quiet for as long as it may.
    pub(super) fn on_tick(&mut self, limits: Limits) {
        let bytes = Some(self.halves.iter().map(Half::delivered_bytes).sum());
        self.quiet_ticks += 1;
        // The tick after a byte may come at once, so the time begins with it.
        if bytes != self.bytes_at_tick {
            self.bytes_at_tick = bytes;
            self.quiet_ticks = 0;
        }
        let is_over = |limit: u32| limit > 0 && self.quiet_ticks >= limit;
        let is_half_closed = self.halves.iter().any(Half::is_shut);
        match self.phase {
            Phase::Connecting { .. } if is_over(limits.connect) => {
                self.terminate(End::ConnectFailed(Errno::ETIMEDOUT));
            }
            Phase::Open if is_half_closed && is_over(limits.half_close) => {
                self.terminate(End::Expired(Limit::HalfClose));
            }
            Phase::Open if is_over(limits.idle) => self.terminate(End::Expired(Limit::Idle)),
            _ => {}
        }
    }

    /// Nothing can be moved now. What to do about it if that is because a socket failed, or
    /// because all is done.
    pub(super) fn next_ending(&mut self) -> Option<Action> {
        if self.halves.iter().all(Half::is_shut) {
            self.terminate(End::Complete);
            return self.next();
        }
        let side = Side::BOTH.into_iter().find(|&side| self.is_troubled(side))?;
        let hopeless = self.is_troubled(!side) || self.grace_left_ms == 0;
        if hopeless {
            // A watch tells that a socket failed, and not how.
            let Some(errno) = self.failed[side.index()] else {
                return ask(Question::Failure(side));
            };
            self.terminate(End::Failed(side, errno));
            return self.next();
        }
        // What the failed socket had sent is to arrive before the reset, which would purge it.
        if self.halves[side.index()].is_drained() && !self.asked_unsent {
            self.asked_unsent = true;
            return ask(Question::Unsent(!side));
        }
        self.start(Op::Pause)
    }

    /// Whether the side's socket failed.
    pub(super) fn is_troubled(&self, side: Side) -> bool {
        self.failed[side.index()].is_some() || self.alarmed[side.index()]
    }

    /// Ends early what is in flight.
    pub(super) fn next_cancel(&mut self) -> Option<Action> {
        let is_to_end = |op: &Op| self.in_flight.has(*op) && !self.cancelled.has(*op);
        let op = Op::ALL.into_iter().find(is_to_end)?;
        self.cancelled.insert(op);
        Some(Action::Cancel(op))
    }

    pub(super) fn next_closing(&mut self, end: End) -> Option<Action> {
        if let Some(cancel) = self.next_cancel() {
            return Some(cancel);
        }
        if !self.in_flight.is_empty() {
            return None;
        }
        for side in Side::BOTH {
            let half = &mut self.halves[side.index()];
            let held = half.held();
            half.on_released();
            if matches!(held, Held::Buffer { .. } | Held::Pipe { .. }) {
                return Some(Action::Release(side));
            }
        }
        self.phase = Phase::Closed(end);
        // A stream that is cut must not look like one that has ended; one that has ended was
        // passed on whole, and a reset would take back what is still on its way.
        let is_cut = |side: Side| !self.halves[(!side).index()].is_shut();
        // The first also holds for a socket that failed: the kernel may have refused a request.
        let hears_of_failure = |side: Side| end != End::Complete && self.is_troubled(!side);
        let reset = Side::BOTH.map(|side| is_cut(side) || hears_of_failure(side));
        Some(Action::Close { reset })
    }
}
