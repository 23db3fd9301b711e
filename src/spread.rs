//! Which worker has which connection.
//!
//! Short messages that come together cost a worker less than as many that come one by one; and
//! where CPUs are short, a second worker takes one from the clients and servers that it forwards
//! for. So connections that copy are brought together: with as few workers as can carry them, as
//! long as there is no CPU idle for more. Those that splice are shared evenly by all. A message
//! behind bulk waits for it: so while CPUs are short, and a worker more or less is nothing to bulk,
//! those that splice keep away from those that copy. docs/performance.md has the figures.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use gauge::Gauge;
use nix::errno::Errno;

use crate::sys::is_shortage;

mod gauge;

/// How much of the time a worker runs, or waits to, before others are to help it.
const DEMAND_TO_GROW: f64 = 0.9;

/// Idle CPUs that are enough for more workers. Clients and servers that wait for a worker and for
/// each other leave up to half of one idle where two workers do less than one.
const IDLE_TO_GROW: f64 = 0.5;

/// Idle CPUs so few that a worker less gives its CPU to others.
const IDLE_TO_SHRINK: f64 = 0.3;

/// How long there are not fewer workers after there were more or less of them, and how long CPUs
/// that became short are taken to be so.
const HOLD: Duration = Duration::from_secs(10);

/// How long a worker that was seen to splice is taken to do so.
const SPLICING: Duration = Duration::from_millis(500);

/// How long one is kept for those that copy. They are looked at after so many reads, which may take
/// them long.
const COPYING: Duration = Duration::from_secs(5);

/// Between two looks at the CPUs. The kernel counts what is idle in ticks of 10 ms.
const INTERVAL: Duration = Duration::from_millis(200);

/// A look that comes so late says nothing: the workers slept for want of work.
const INTERVAL_MAX: Duration = Duration::from_millis(600);

/// What CPUs were used for over a stretch of time, each in CPUs: 1 is one for all that time.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Use {
    /// The one that did most of the workers that do not mostly splice ran, or waited for a CPU.
    demand: f64,
    /// All of these ran.
    used: f64,
    /// Nobody ran on those that workers may have.
    idle: f64,
}

/// A worker's place among its siblings.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its number.
    pub index: usize,
    /// What all of them know.
    pub spread: Arc<Spread>,
}

/// What others know of a worker.
#[derive(Debug, Default)]
struct Known {
    /// When it was last seen to splice mostly, in milliseconds from the start.
    splicing_ms: AtomicU64,
    /// When one that copies was last found to be here, or to go here, in the same way.
    copying_ms: AtomicU64,
    /// It takes no connections of others.
    is_full: AtomicBool,
}

/// What workers know of each other.
pub struct Spread {
    started: Instant,
    workers: Box<[Known]>,
    /// How many have the connections that copy.
    active: AtomicUsize,
    /// There is no CPU idle.
    is_short: AtomicBool,
    /// Nobody knows what the CPUs are used for.
    is_blind: AtomicBool,
    /// When somebody looked last, in milliseconds from the start.
    looked_ms: AtomicU64,
    looks: Mutex<Looks>,
}

/// What there is to see for the one who looks.
struct Looks {
    gauge: Gauge,
    times: Times,
}

/// When something changed.
#[derive(Default)]
struct Times {
    /// How many have those that copy.
    active: Option<Instant>,
    /// CPUs are short.
    short: Option<Instant>,
}

impl std::fmt::Debug for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spread").field("workers", &self.workers).finish_non_exhaustive()
    }
}

impl Spread {
    /// Of so many workers, which may have `cpus`.
    pub fn new(workers: usize, cpus: Arc<[usize]>) -> Self {
        Self {
            started: Instant::now(),
            workers: (0..workers).map(|_| Known::default()).collect(),
            active: AtomicUsize::new(1),
            is_short: AtomicBool::new(false),
            is_blind: AtomicBool::new(false),
            looked_ms: AtomicU64::new(0),
            looks: Mutex::new(Looks { gauge: Gauge::new(workers, cpus), times: Times::default() }),
        }
    }

    /// The calling thread is the one of `worker`.
    pub fn begin(&self, worker: usize) {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner).gauge.begin(worker);
    }

    /// Whose a connection is to be that is with the worker `here`, came to the worker `home` as its
    /// `number`th, and copies or splices.
    pub fn worker_for(&self, home: usize, number: usize, here: usize, is_copied: bool) -> usize {
        let takes =
            |worker: usize| worker == here || !self.workers[worker].is_full.load(Ordering::Relaxed);
        let wanted = if self.is_blind.load(Ordering::Relaxed) {
            home
        } else if is_copied {
            self.worker_to_copy(home + number, here, takes)
        } else {
            self.worker_to_splice(home + number, here)
        };
        if takes(wanted) { wanted } else { here }
    }

    fn worker_to_copy(&self, number: usize, here: usize, takes: impl Fn(usize) -> bool) -> usize {
        let now = self.ms(Instant::now());
        let active = self.active.load(Ordering::Relaxed);
        let is_splicing =
            |worker: usize| is_recent(&self.workers[worker].splicing_ms, now, SPLICING);
        let all = || (0..self.workers.len()).filter(|&worker| takes(worker));
        let quiet = || all().filter(|&worker| !is_splicing(worker)).take(active);
        let (quiet_count, count) = (quiet().count(), all().take(active).count());
        let own = number % active;
        let worker = if takes(own) && !is_splicing(own) {
            // So one that others are not to be at moves none but these.
            Some(own)
        } else if quiet_count > 0 {
            quiet().nth(number % quiet_count)
        } else if count > 0 && self.is_short.load(Ordering::Relaxed) {
            // Those that splice there leave.
            all().nth(number % count)
        } else {
            None
        };
        let Some(worker) = worker else { return here };
        if worker != here {
            // Others that copy there say so again.
            self.workers[here].copying_ms.store(0, Ordering::Relaxed);
        }
        self.workers[worker].copying_ms.store(now, Ordering::Relaxed);
        worker
    }

    fn worker_to_splice(&self, number: usize, here: usize) -> usize {
        let now = self.ms(Instant::now());
        let is_short = self.is_short.load(Ordering::Relaxed);
        let is_kept =
            |worker: usize| is_short && is_recent(&self.workers[worker].copying_ms, now, COPYING);
        let own = number % self.workers.len();
        let free = || (0..self.workers.len()).filter(|&worker| !is_kept(worker));
        let other = || free().nth(number % free().count().max(1)).unwrap_or(here);
        if is_kept(own) { other() } else { own }
    }

    /// Takes note of a worker: `is_splicing`, most of its turns do, until `now`.
    pub fn note(&self, worker: usize, is_splicing: bool, now: Instant) {
        let ms = self.ms(now);
        if is_splicing {
            self.workers[worker].splicing_ms.store(ms, Ordering::Relaxed);
        }
        if ms.saturating_sub(self.looked_ms.load(Ordering::Relaxed)) >= INTERVAL.as_millis() as u64
        {
            self.look(now);
        }
    }

    /// Whether `worker` takes connections of others.
    pub fn note_full(&self, worker: usize, is_full: bool) {
        self.workers[worker].is_full.store(is_full, Ordering::Relaxed);
    }

    fn look(&self, now: Instant) {
        let mut looks = match self.looks.try_lock() {
            Ok(looks) => looks,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Another one does.
            Err(TryLockError::WouldBlock) => return,
        };
        let ms = self.ms(now);
        self.looked_ms.store(ms, Ordering::Relaxed);
        let is_splicing =
            |worker: usize| is_recent(&self.workers[worker].splicing_ms, ms, SPLICING);
        match looks.gauge.look(now, is_splicing) {
            Ok(Some(seen)) => self.judge(seen, now, &mut looks.times),
            Ok(None) => {}
            // Another time.
            Err(error) if error.raw_os_error().map(Errno::from_raw).is_some_and(is_shortage) => {}
            Err(_) => self.is_blind.store(true, Ordering::Relaxed),
        }
    }

    fn judge(&self, seen: Use, now: Instant, times: &mut Times) {
        let is_over =
            |at: Option<Instant>| at.is_none_or(|at| now.saturating_duration_since(at) > HOLD);
        let active = self.active.load(Ordering::Relaxed);
        let next = wanted(active, self.workers.len(), seen, is_over(times.active));
        if next != active {
            times.active = Some(now);
            self.active.store(next, Ordering::Relaxed);
        }
        let was_short = self.is_short.load(Ordering::Relaxed);
        if was_short && seen.idle >= IDLE_TO_GROW && is_over(times.short) {
            self.is_short.store(false, Ordering::Relaxed);
        } else if !was_short && seen.idle < IDLE_TO_SHRINK {
            times.short = Some(now);
            self.is_short.store(true, Ordering::Relaxed);
        }
    }

    /// Never 0, which is before all.
    fn ms(&self, now: Instant) -> u64 {
        1 + now.saturating_duration_since(self.started).as_millis() as u64
    }
}

/// Whether it was not longer ago, in milliseconds from the start; 0: never.
fn is_recent(at: &AtomicU64, now: u64, time: Duration) -> bool {
    let at = at.load(Ordering::Relaxed);
    at > 0 && now.saturating_sub(at) < time.as_millis() as u64
}

/// How many workers are to have the connections that copy, when `active` of `workers` have them.
/// `may_shrink`: it is long since that was too few.
fn wanted(active: usize, workers: usize, seen: Use, may_shrink: bool) -> usize {
    let Use { demand, used, idle } = seen;
    if demand >= DEMAND_TO_GROW && idle >= IDLE_TO_GROW {
        // A few looks, and all work.
        return (active * 2).min(workers);
    }
    // Half as many: half of the connections stay where they are.
    let fewer = (active / 2).max(1);
    let can_carry = used <= fewer as f64;
    if may_shrink && idle < IDLE_TO_SHRINK && can_carry { fewer } else { active }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(workers: usize) -> Spread {
        Spread::new(workers, (0..workers).collect())
    }

    fn seen(demand: f64, used: f64, idle: f64) -> Use {
        Use { demand, used, idle }
    }

    /// Where four connections of the second worker are to be.
    fn places(spread: &Spread, is_copied: bool) -> [usize; 4] {
        [0, 1, 2, 3].map(|number| spread.worker_for(1, number, 1, is_copied))
    }

    #[test]
    fn those_that_copy_are_with_the_first_and_those_that_splice_with_all() {
        let (spread, times, now) = (spread(4), &mut Times::default(), Instant::now());
        assert_eq!(places(&spread, true), [0, 0, 0, 0]);
        assert_eq!(places(&spread, false), [1, 2, 3, 0]);
        spread.judge(seen(1.0, 1.0, 2.0), now, times);
        assert_eq!(places(&spread, true), [1, 0, 1, 0]);
        spread.judge(seen(0.5, 0.9, 0.0), now + HOLD, times);
        assert_eq!(places(&spread, true), [1, 0, 1, 0], "one was too few not long ago");
        spread.judge(seen(0.5, 0.9, 0.0), now + HOLD * 2, times);
        assert_eq!(places(&spread, true), [0, 0, 0, 0]);
        spread.is_blind.store(true, Ordering::Relaxed);
        assert_eq!(places(&spread, true), [1, 1, 1, 1], "where they came to");
        assert_eq!(places(&spread, false), [1, 1, 1, 1]);
    }

    #[test]
    fn while_cpus_are_short_workers_have_either() {
        let now = Instant::now();
        let busy = |idle| {
            let spread = spread(3);
            (0..3).for_each(|worker| spread.note(worker, true, now));
            spread.judge(seen(0.5, 0.5, idle), now, &mut Times::default());
            spread
        };
        let idle = busy(0.5);
        assert_eq!(places(&idle, true), [1, 1, 1, 1], "there is a CPU: they stay");
        assert_eq!(places(&idle, false), [1, 2, 0, 1]);
        let short = busy(0.2);
        assert_eq!(places(&short, false), [1, 2, 0, 1], "there are none that copy");
        assert_eq!(places(&short, true), [0, 0, 0, 0]);
        let times = &mut Times::default();
        assert_eq!(places(&short, false), [1, 2, 2, 1], "they make room");
        short.judge(seen(0.5, 0.5, 0.4), now + HOLD * 2, times);
        assert_eq!(places(&short, false), [1, 2, 2, 1], "neither short nor idle: as before");
        short.judge(seen(0.5, 0.5, 0.5), now + HOLD * 2, times);
        assert_eq!(places(&short, false), [1, 2, 0, 1]);
        short.judge(seen(0.5, 0.5, 0.2), now + HOLD * 2, times);
        assert_eq!(places(&short, false), [1, 2, 2, 1], "at once");
        short.judge(seen(0.5, 0.5, 0.5), now + HOLD * 3, times);
        assert_eq!(places(&short, false), [1, 2, 2, 1], "which it left a CPU idle for");
    }

    #[test]
    fn a_worker_that_those_that_copy_leave_is_kept_no_longer() {
        let spread = spread(2);
        spread.is_short.store(true, Ordering::Relaxed);
        spread.active.store(2, Ordering::Relaxed);
        assert_eq!(spread.worker_for(1, 0, 1, true), 1);
        assert_eq!(spread.worker_for(1, 0, 1, false), 0, "it is kept");
        spread.active.store(1, Ordering::Relaxed);
        assert_eq!(spread.worker_for(1, 0, 1, true), 0);
        assert_eq!(spread.worker_for(0, 0, 0, false), 1);
    }

    #[test]
    fn few_connections_of_many_workers_are_shared_evenly_too() {
        let spread = spread(4);
        spread.active.store(4, Ordering::Relaxed);
        for is_copied in [true, false] {
            let mut firsts = [0, 1, 2, 3].map(|home| spread.worker_for(home, 1, home, is_copied));
            firsts.sort_unstable();
            assert_eq!(firsts, [0, 1, 2, 3]);
        }
    }

    #[test]
    fn who_cannot_look_for_ever_has_all_where_they_came_to() {
        // No such CPU.
        let spread = Spread::new(2, [usize::MAX].into());
        spread.begin(0);
        std::thread::sleep(Duration::from_millis(1));
        spread.look(Instant::now());
        assert_eq!(places(&spread, true), [1, 1, 1, 1]);
    }

    #[test]
    fn those_that_copy_keep_away_from_those_that_splice() {
        let spread = spread(3);
        spread.note(0, true, Instant::now());
        assert_eq!(places(&spread, true), [1, 1, 1, 1]);
        spread.note(1, true, Instant::now());
        assert_eq!(places(&spread, true), [2, 2, 2, 2]);
        spread.note(2, true, Instant::now());
        assert_eq!(places(&spread, true), [1, 1, 1, 1], "all splice: they stay");
        let later = spread.ms(Instant::now() + SPLICING);
        let is_splicing = is_recent(&spread.workers[0].splicing_ms, later, SPLICING);
        assert!(!is_splicing, "it has nothing to do any more");
    }

    #[test]
    fn nobody_goes_to_a_worker_that_is_full() {
        let spread = spread(3);
        spread.note_full(0, true);
        assert_eq!(places(&spread, true), [1, 1, 1, 1]);
        assert_eq!(spread.worker_for(0, 0, 0, true), 0, "but who is there stays");
        assert_eq!(spread.worker_for(0, 0, 2, false), 2, "also who splices");
        spread.note_full(1, true);
        assert_eq!(places(&spread, true), [1, 1, 1, 1]);
        spread.note_full(0, false);
        assert_eq!(places(&spread, true), [0, 0, 0, 0]);
    }

    #[test]
    fn there_are_more_while_one_is_short_and_cpus_are_idle() {
        assert_eq!(wanted(1, 16, seen(0.95, 0.9, 8.0), true), 2);
        assert_eq!(wanted(2, 16, seen(0.95, 1.9, 8.0), true), 4);
        assert_eq!(wanted(8, 12, seen(1.0, 8.0, 1.0), true), 12, "no more than there are");
        assert_eq!(wanted(1, 16, seen(0.8, 0.8, 8.0), true), 1, "one is enough");
        assert_eq!(wanted(1, 2, seen(1.0, 0.9, 0.4), true), 1, "peers need the CPUs");
    }

    #[test]
    fn there_are_fewer_while_cpus_are_short_and_fewer_are_enough() {
        assert_eq!(wanted(2, 2, seen(0.7, 0.9, 0.1), true), 1);
        assert_eq!(wanted(8, 8, seen(0.7, 3.9, 0.1), true), 4);
        assert_eq!(wanted(2, 2, seen(0.7, 0.9, 0.1), false), 2, "it was too few not long ago");
        assert_eq!(wanted(2, 2, seen(0.7, 1.2, 0.1), true), 2, "one could not carry that");
        assert_eq!(wanted(2, 2, seen(0.7, 0.9, 0.4), true), 2, "nobody needs the CPU");
        assert_eq!(wanted(1, 2, seen(0.7, 0.5, 0.0), true), 1);
    }
}
