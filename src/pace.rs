//! Whether a worker interrupts others when there is work for it.
//!
//! A worker that is woken for each message interrupts whoever runs on its CPU, often the very
//! client or server it forwards for, and finds little to do. That is right for a single message,
//! which is to arrive at once. A worker with a lot to do forwards more, with less CPU, when those
//! finish first what they are at: so it asks the scheduler for that while its turns are full, and
//! only then, because it costs a worker beside busy programs milliseconds to be woken so.
//! ARCHITECTURE.md has the figures.

use crate::stats::Stats;
use crate::sys;

/// Receives and sends that make a turn a full one; a fill or a drain does too.
const FULL_TURN_COPIES: u64 = 4;

/// Full turns more than others, or the reverse, before the worker changes its mind. So it calls
/// the kernel for that once in as many turns at most.
const TURNS_TO_CHANGE: u32 = 128;

/// What the turns of a worker were like.
#[derive(Debug, Default)]
pub struct Pace {
    copies: u64,
    splices: u64,
    /// Full turns more than others, between 0 and [`TURNS_TO_CHANGE`].
    full: u32,
    is_patient: bool,
}

impl Pace {
    /// Takes note of a turn of the calling thread's worker, whose counters are `stats` now.
    pub fn turned(&mut self, stats: &Stats) {
        let was_patient = self.is_patient;
        if self.judge(stats) != was_patient {
            // Refused (by a seccomp filter): the worker goes on as it is.
            let _ = sys::set_interrupting(was_patient);
        }
    }

    /// Whether the worker is to be patient from now on.
    fn judge(&mut self, stats: &Stats) -> bool {
        let is_full = stats.splice_operations > self.splices
            || stats.copy_operations >= self.copies + FULL_TURN_COPIES;
        (self.copies, self.splices) = (stats.copy_operations, stats.splice_operations);
        self.full = if is_full {
            (self.full + 1).min(TURNS_TO_CHANGE)
        } else {
            self.full.saturating_sub(1)
        };
        self.is_patient = match self.full {
            0 => false,
            TURNS_TO_CHANGE => true,
            _ => self.is_patient,
        };
        self.is_patient
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets the pace judge `turns` turns, each with so many receives and sends, and splices.
    fn judge(pace: &mut Pace, stats: &mut Stats, turns: u32, copies: u64, splices: u64) -> bool {
        for _ in 0..turns {
            stats.copy_operations += copies;
            stats.splice_operations += splices;
            pace.judge(stats);
        }
        pace.is_patient
    }

    #[test]
    fn a_worker_is_patient_while_its_turns_are_full() {
        let (pace, stats) = (&mut Pace::default(), &mut Stats::default());
        assert!(!judge(pace, stats, 1000, 3, 0), "a few messages a turn");
        assert!(!judge(pace, stats, 127, 4, 0), "not for long yet");
        assert!(judge(pace, stats, 1, 4, 0), "many messages a turn");
        assert!(judge(pace, stats, 127, 0, 0), "a short lull");
        assert!(!judge(pace, stats, 1, 0, 0), "nothing to do");
        assert!(judge(pace, stats, 128, 0, 1), "bulk");
    }
}
