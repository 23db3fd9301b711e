//! What the CPUs are used for, as `/proc` tells it.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use super::{Place, Use};

/// Between two looks. The kernel counts what is idle in ticks of 10 ms.
const INTERVAL: Duration = Duration::from_millis(200);

/// A look that comes so late says nothing: the worker slept for want of work.
const INTERVAL_MAX: Duration = Duration::from_millis(600);

/// Turns between two looks at the clock.
const TURNS_TO_LOOK: u32 = 16;

/// A tick of `/proc/stat`, in seconds.
const TICK: f64 = 0.01;

/// What has been used up to now, in seconds.
#[derive(Clone, Copy, Debug)]
struct Reading {
    at: Instant,
    demand: f64,
    used: f64,
    idle: f64,
}

/// A worker's look at the CPUs, now and then.
pub struct Gauge {
    place: Place,
    is_splicing: bool,
    cpus: Arc<[usize]>,
    before: Option<Reading>,
    turns: u32,
    /// What a file held, to be read without new memory.
    text: Vec<u8>,
}

impl Gauge {
    /// Of the calling thread, whose worker has `place`; all workers may have `cpus`.
    ///
    /// # Errors
    /// There is no `/proc`, or it does not tell.
    pub fn new(place: Place, cpus: Arc<[usize]>) -> io::Result<Self> {
        let (is_splicing, before, turns, text) = Default::default();
        let mut gauge = Self { place, is_splicing, cpus, before, turns, text };
        gauge.read(Instant::now())?;
        Ok(gauge)
    }

    /// A turn of the worker is over. `is_splicing`: most of them splice.
    pub fn turned(&mut self, is_splicing: bool) {
        if is_splicing != self.is_splicing {
            self.is_splicing = is_splicing;
            self.place.spread.note_splicing(self.place.index, is_splicing);
        }
        self.turns = self.turns.wrapping_add(1);
        if !self.turns.is_multiple_of(TURNS_TO_LOOK) {
            return;
        }
        let now = Instant::now();
        let age = self.before.map_or(INTERVAL_MAX, |before| now - before.at);
        if age < INTERVAL {
            return;
        }
        // Not read for want of a descriptor: another time.
        let reading = self.read(now).ok();
        let before = std::mem::replace(&mut self.before, reading);
        let seen = reading.zip(before).map(|(reading, before)| reading.since(&before));
        if let Some(seen) = seen.filter(|_| age < INTERVAL_MAX) {
            self.place.spread.judge(seen, now);
        }
    }

    fn read(&mut self, at: Instant) -> io::Result<Reading> {
        let untold = || io::Error::from(io::ErrorKind::InvalidData);
        let demand = demand(self.file("/proc/thread-self/schedstat")?).ok_or_else(untold)?;
        let cpus = Arc::clone(&self.cpus);
        let idle = idle(self.file("/proc/stat")?, &cpus).ok_or_else(untold)?;
        let used = getrusage(UsageWho::RUSAGE_SELF)?;
        let used = (used.user_time() + used.system_time()).num_microseconds() as f64 / 1e6;
        Ok(Reading { at, demand, used, idle })
    }

    fn file(&mut self, path: &str) -> io::Result<&str> {
        self.text.clear();
        File::open(path)?.read_to_end(&mut self.text)?;
        std::str::from_utf8(&self.text).map_err(io::Error::other)
    }
}

impl Reading {
    fn since(&self, before: &Reading) -> Use {
        let seconds = (self.at - before.at).as_secs_f64();
        Use {
            demand: (self.demand - before.demand) / seconds,
            used: (self.used - before.used) / seconds,
            idle: (self.idle - before.idle) / seconds,
        }
    }
}

/// The seconds that a thread has run and waited to run, of its `schedstat`.
fn demand(text: &str) -> Option<f64> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse::<u64>);
    Some((numbers.next()?.ok()? + numbers.next()?.ok()?) as f64 / 1e9)
}

/// The seconds that these CPUs were idle, of `/proc/stat`: the fourth and fifth number of each.
fn idle(text: &str, cpus: &[usize]) -> Option<f64> {
    let mut ticks = 0;
    // The first line is of all.
    for line in text.lines().skip(1).map_while(|line| line.strip_prefix("cpu")) {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u64>);
        let cpu = numbers.next()?.ok()? as usize;
        if cpus.contains(&cpu) {
            ticks += numbers.nth(3)?.ok()? + numbers.next()?.ok()?;
        }
    }
    Some(ticks as f64 * TICK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spread::Spread;

    #[test]
    fn what_a_thread_demands_is_what_it_ran_and_waited_for() {
        assert_eq!(demand("1500000000 500000000 77\n"), Some(2.0));
        assert_eq!(demand(""), None);
        assert_eq!(demand("1 -"), None);
    }

    #[test]
    fn the_cpus_of_workers_are_those_whose_idle_time_counts() {
        let stat = "cpu  9 9 9 9000 9 0 0 0 0 0\ncpu0 1 2 3 400 50 0 0 0 0 0\n\
                    cpu3 1 2 3 100 0 0 0 0 0 0\nintr 5 6 7\ncpu4 is no line of a CPU's\n";
        assert_eq!(idle(stat, &[0]), Some(4.5));
        assert_eq!(idle(stat, &[3, 0]), Some(5.5));
        assert_eq!(idle(stat, &[1]), Some(0.0));
        assert_eq!(idle("cpu 1\ncpu0 1 2", &[0]), None);
    }

    #[test]
    fn a_thread_that_runs_sees_that_it_does() {
        let place = Place { index: 0, spread: Arc::new(Spread::new(2)) };
        let mut gauge = Gauge::new(place, [0, 1].into()).expect("/proc tells");
        let before = gauge.read(Instant::now()).expect("/proc tells");
        while before.at.elapsed() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        let seen = gauge.read(Instant::now()).expect("/proc tells").since(&before);
        assert!(seen.demand > 0.5 && seen.used > 0.0, "{seen:?}");
    }
}
