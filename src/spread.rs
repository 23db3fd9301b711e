//! Which worker has which connection.
//!
//! Short messages that come together cost a worker less than as many that come one by one; and
//! where CPUs are short, a second worker takes one from the clients and servers that it forwards
//! for. So connections that copy are brought together: with as few workers as can carry them, as
//! long as there is no CPU idle for more. Those that splice stay with the worker they came to, and
//! those that copy keep away from them. docs/performance.md has the figures.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub mod gauge;

/// How much of the time a worker runs, or waits to, before others are to help it.
const DEMAND_TO_GROW: f64 = 0.9;

/// Idle CPUs that are enough for more workers. Clients and servers that wait for a worker and for
/// each other leave up to half of one idle where two workers do less than one.
const IDLE_TO_GROW: f64 = 0.5;

/// Idle CPUs so few that a worker less gives its CPU to others.
const IDLE_TO_SHRINK: f64 = 0.3;

/// How long there are not fewer workers after there had to be more.
const HOLD: Duration = Duration::from_secs(10);

/// What CPUs were used for over a stretch of time, each in CPUs: 1 is one for all that time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Use {
    /// The calling thread ran, or waited for a CPU.
    pub demand: f64,
    /// All threads of the process ran.
    pub used: f64,
    /// Nobody ran on those that workers may have.
    pub idle: f64,
}

/// What workers know of each other.
#[derive(Debug)]
pub struct Spread {
    /// Which of them mostly splice.
    splicing: Box<[AtomicBool]>,
    /// How many have the connections that copy: the first so many.
    active: AtomicUsize,
    /// When there had to be more of them.
    grown: Mutex<Option<Instant>>,
}

/// A worker's place among its siblings.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its number.
    pub index: usize,
    /// What all of them know.
    pub spread: Arc<Spread>,
}

impl Spread {
    /// Of so many workers.
    pub fn new(workers: usize) -> Self {
        let splicing = (0..workers).map(|_| AtomicBool::new(false)).collect();
        Self { splicing, active: AtomicUsize::new(1), grown: Mutex::new(None) }
    }

    /// Whose a connection is that came to the worker `home`, and copies or splices.
    pub fn place(&self, home: usize, is_copied: bool) -> usize {
        let active = self.active.load(Ordering::Relaxed);
        let mut workers = [home % active, home].into_iter().chain(0..self.splicing.len());
        let is_quiet = |worker: &usize| !self.splicing[*worker].load(Ordering::Relaxed);
        let place = if is_copied { workers.find(is_quiet) } else { None };
        place.unwrap_or(home)
    }

    /// Whether `worker` mostly splices.
    pub fn note_splicing(&self, worker: usize, is_splicing: bool) {
        self.splicing[worker].store(is_splicing, Ordering::Relaxed);
    }

    /// All workers have connections that copy: nobody knows what the CPUs are used for.
    pub fn give_up(&self) {
        self.active.store(self.splicing.len(), Ordering::Relaxed);
    }

    /// Makes of what a worker has seen until `now` what is to be made of it.
    fn judge(&self, seen: Use, now: Instant) {
        let mut grown = self.grown.lock().unwrap_or_else(PoisonError::into_inner);
        let active = self.active.load(Ordering::Relaxed);
        let may_shrink = grown.is_none_or(|at| now.saturating_duration_since(at) > HOLD);
        let next = wanted(active, self.splicing.len(), seen, may_shrink);
        if next > active {
            *grown = Some(now);
        }
        self.active.store(next, Ordering::Relaxed);
    }
}

/// How many workers are to have the connections that copy, when `active` of `workers` have them.
/// `may_shrink`: it is long since that was too few.
fn wanted(active: usize, workers: usize, seen: Use, may_shrink: bool) -> usize {
    let Use { demand, used, idle } = seen;
    if demand >= DEMAND_TO_GROW && idle >= IDLE_TO_GROW {
        // A few looks, and all work.
        return (active * 2).min(workers);
    }
    let fewer = active.saturating_sub(1).max(1);
    let can_carry = used <= fewer as f64;
    if may_shrink && idle < IDLE_TO_SHRINK && can_carry { fewer } else { active }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(demand: f64, used: f64, idle: f64) -> Use {
        Use { demand, used, idle }
    }

    #[test]
    fn those_that_copy_are_with_the_first_and_those_that_splice_where_they_came_to() {
        let spread = Spread::new(4);
        let places = |is_copied| [0, 1, 2, 3].map(|home| spread.place(home, is_copied));
        assert_eq!(places(true), [0, 0, 0, 0]);
        assert_eq!(places(false), [0, 1, 2, 3]);
        let now = Instant::now();
        spread.judge(seen(1.0, 1.0, 2.0), now);
        assert_eq!(places(true), [0, 1, 0, 1]);
        spread.judge(seen(0.5, 0.9, 0.0), now + HOLD);
        assert_eq!(places(true), [0, 1, 0, 1], "one was too few not long ago");
        spread.judge(seen(0.5, 0.9, 0.0), now + HOLD * 2);
        assert_eq!(places(true), [0, 0, 0, 0]);
        spread.give_up();
        assert_eq!(places(true), [0, 1, 2, 3]);
    }

    #[test]
    fn those_that_copy_keep_away_from_those_that_splice() {
        let spread = Spread::new(3);
        spread.note_splicing(0, true);
        let places = || [0, 1, 2].map(|home| spread.place(home, true));
        assert_eq!(places(), [1, 1, 2], "where they came to, unless it splices, too");
        spread.note_splicing(1, true);
        assert_eq!(places(), [2, 2, 2]);
        spread.note_splicing(2, true);
        assert_eq!(places(), [0, 1, 2], "all splice");
        spread.note_splicing(0, false);
        assert_eq!(places(), [0, 0, 0]);
    }

    #[test]
    fn there_are_more_while_one_is_short_and_cpus_are_idle() {
        assert_eq!(wanted(1, 16, seen(0.95, 0.9, 8.0), true), 2);
        assert_eq!(wanted(2, 16, seen(0.95, 1.9, 8.0), true), 4);
        assert_eq!(wanted(8, 12, seen(1.0, 8.0, 1.0), true), 12, "no more than there are");
        assert_eq!(wanted(1, 16, seen(0.8, 0.8, 8.0), true), 1, "one is enough");
        assert_eq!(wanted(1, 2, seen(1.0, 0.9, 0.3), true), 1, "peers need the CPUs");
    }

    #[test]
    fn there_are_fewer_while_cpus_are_short_and_fewer_are_enough() {
        assert_eq!(wanted(2, 2, seen(0.7, 0.9, 0.1), true), 1);
        assert_eq!(wanted(2, 2, seen(0.7, 0.9, 0.1), false), 2, "it was too few not long ago");
        assert_eq!(wanted(2, 2, seen(0.7, 1.2, 0.1), true), 2, "one could not carry that");
        assert_eq!(wanted(2, 2, seen(0.7, 0.9, 0.4), true), 2, "nobody needs the CPU");
        assert_eq!(wanted(1, 2, seen(0.7, 0.5, 0.0), true), 1);
    }
}
