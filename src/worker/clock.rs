//! The clock by which a worker's flows are timed: one request for all of them, and nothing to do
//! for a byte.

use crate::config::Times;
use crate::flow::Limits;

/// Ticks in the shortest time that is limited: a limit is overrun by one of them at most.
const TICKS: u32 = 8;
/// A shorter tick would cost more than it is worth.
const MIN_TICK_MS: u32 = 10;
/// A longer one would save nothing.
const MAX_TICK_MS: u32 = 1000;

/// How often flows are told the time, and how much of it they have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// Length of a tick in milliseconds; 0: nothing is limited and the clock does not run.
    pub tick_ms: u32,
    /// The longest times of a flow.
    pub limits: Limits,
}

impl From<Times> for Clock {
    fn from(times: Times) -> Self {
        let all = [times.connect_ms, times.idle_ms, times.half_close_ms];
        let Some(shortest) = all.into_iter().filter(|&ms| ms > 0).min() else {
            return Self::default();
        };
        let tick_ms = shortest.div_ceil(TICKS).clamp(MIN_TICK_MS, MAX_TICK_MS);
        let ticks = |ms: u32| ms.div_ceil(tick_ms);
        let limits = Limits {
            connect: ticks(times.connect_ms),
            idle: ticks(times.idle_ms),
            half_close: ticks(times.half_close_ms),
        };
        Self { tick_ms, limits }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_is_a_share_of_the_shortest_limit() {
        assert_eq!(Clock::from(Times::default()).tick_ms, 0);
        let times = Times { connect_ms: 2000, idle_ms: 60_001, half_close_ms: 0 };
        let clock = Clock::from(times);
        assert_eq!(clock.tick_ms, 250);
        assert_eq!(clock.limits, Limits { connect: 8, idle: 241, half_close: 0 });
        let shortest = Clock::from(Times { connect_ms: 1, ..Times::default() });
        assert_eq!((shortest.tick_ms, shortest.limits.connect), (10, 1));
        let longest = Clock::from(Times { idle_ms: 86_400_000, ..Times::default() });
        assert_eq!((longest.tick_ms, longest.limits.idle), (1000, 86_400));
    }
}
