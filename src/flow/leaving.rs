//! How a flow leaves its worker for another: between two messages, with nothing in flight.

use super::half::Held;
use super::{Action, Flow, Op, Side};

impl Flow {
    /// Whether both halves only wait for something to read, or for nothing.
    pub(super) fn is_quiet(&self) -> bool {
        let is_busy = |side: Side| {
            let is_held = self.halves[side.index()].held() != Held::Nothing;
            let is_moving =
                [Op::Recv(side), Op::Send(side)].iter().any(|&op| self.in_flight.has(op));
            is_held || is_moving || self.is_troubled(side)
        };
        !self.waiting_turn && !self.starved && !Side::BOTH.into_iter().any(is_busy)
    }

    /// What is waited for here is waited for there.
    pub(super) fn next_leaving(&mut self) -> Option<Action> {
        if let Some(cancel) = self.next_cancel() {
            return Some(cancel);
        }
        if !self.in_flight.is_empty() {
            return None;
        }
        self.leaving = false;
        // There its turn is another, and the clock ticks at other times.
        self.turn_left = 0;
        self.bytes_at_tick = None;
        Some(Action::Leave)
    }
}
