//! When a worker interrupts others, and where it runs.
//!
//! A worker that is woken for each message interrupts whoever runs on its CPU, often the very
//! client or server it forwards for, and finds little to do. That is right for a single message,
//! which is to arrive at once. A worker with a lot to do forwards more, with less CPU, when those
//! finish first what they are at: so it asks the scheduler for that while its turns are full, and
//! only then, because it costs a worker beside busy programs milliseconds to be woken so.
//!
//! A worker is pinned to a CPU of its own: many short messages cost less so. Bulk keeps client and
//! server busy too, and goes best where the scheduler has spread all of them: so while a worker
//! splices it may run on any CPU that workers may have.
//! ARCHITECTURE.md has the figures.

use std::sync::Arc;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::mostly::Mostly;
use crate::stats::Stats;
use crate::sys;

/// Receives and sends that make a turn a full one; a fill or a drain does too.
const FULL_TURN_COPIES: u64 = 4;

/// The CPUs of a pinned worker.
#[derive(Clone, Debug)]
pub struct Home {
    /// Where it runs.
    pub cpu: usize,
    /// Where it may run while it splices: what `--cpus` says, or all that are allowed.
    pub all: Arc<[usize]>,
}

impl Home {
    /// Has the calling thread run on its own CPU alone, or on all. Errors as
    /// sched_setaffinity(2).
    pub fn confine(&self, is_free: bool) -> Result<(), Errno> {
        let mut set = CpuSet::new();
        for &cpu in if is_free { &*self.all } else { std::slice::from_ref(&self.cpu) } {
            set.set(cpu)?;
        }
        sched_setaffinity(Pid::from_raw(0), &set)
    }
}

/// What the turns of a worker were like.
#[derive(Debug)]
pub struct Pace {
    home: Option<Home>,
    copies: u64,
    splices: u64,
    full: Mostly,
    bulk: Mostly,
}

impl Pace {
    /// Of a worker that was pinned to `home`, or runs wherever the scheduler puts it.
    pub fn new(home: Option<Home>) -> Self {
        Self { home, copies: 0, splices: 0, full: Mostly::default(), bulk: Mostly::default() }
    }

    /// Takes note of a turn of the calling thread's worker, whose counters are `stats` now.
    pub fn turned(&mut self, stats: &Stats) {
        let was = (self.full.is(), self.bulk.is());
        self.judge(stats);
        // Refused (by a seccomp filter, or because CPUs were taken away): the worker goes on as it
        // is.
        if self.full.is() != was.0 {
            let _ = sys::set_interrupting(!self.full.is());
        }
        if self.bulk.is() != was.1
            && let Some(home) = &self.home
        {
            let _ = home.confine(self.bulk.is());
        }
    }

    /// Whether most of them spliced.
    pub fn is_bulk(&self) -> bool {
        self.bulk.is()
    }

    fn judge(&mut self, stats: &Stats) {
        let is_bulk = stats.splice_operations > self.splices;
        let is_full = is_bulk || stats.copy_operations >= self.copies + FULL_TURN_COPIES;
        (self.copies, self.splices) = (stats.copy_operations, stats.splice_operations);
        self.full.note(is_full);
        self.bulk.note(is_bulk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets the pace judge `turns` turns, each with so many receives and sends, and splices.
    /// Returns whether turns are full now, and whether they move bulk.
    fn judge(worker: &mut (Pace, Stats), turns: u32, copies: u64, splices: u64) -> (bool, bool) {
        let (pace, stats) = worker;
        for _ in 0..turns {
            stats.copy_operations += copies;
            stats.splice_operations += splices;
            pace.judge(stats);
        }
        (pace.full.is(), pace.bulk.is())
    }

    #[test]
    fn turns_are_judged_by_what_most_were_like() {
        let worker = &mut (Pace::new(None), Stats::default());
        assert_eq!(judge(worker, 1000, 3, 0), (false, false), "a few messages a turn");
        assert_eq!(judge(worker, 127, 4, 0), (false, false), "not for long yet");
        assert_eq!(judge(worker, 1, 4, 0), (true, false), "many messages a turn");
        assert_eq!(judge(worker, 127, 0, 0), (true, false), "a short lull");
        assert_eq!(judge(worker, 1, 0, 0), (false, false), "nothing to do");
        assert_eq!(judge(worker, 128, 0, 1), (true, true), "bulk");
        assert_eq!(judge(worker, 128, 4, 0), (true, false), "many messages after it");
    }
}
