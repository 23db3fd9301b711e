//! What the CPUs are used for, as `/proc` tells it.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::mem::swap;
use std::sync::Arc;
use std::time::Instant;

use nix::unistd::gettid;

use super::{INTERVAL_MAX, Use};

/// A tick of `/proc/stat`, in seconds.
const TICK: f64 = 0.01;

/// What a thread has done, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Times {
    ran: f64,
    waited: f64,
}

/// What has been done up to a moment.
#[derive(Debug, Default)]
struct Reading {
    /// `None`: this is none.
    at: Option<Instant>,
    /// By worker.
    times: Vec<Times>,
    /// Seconds that the CPUs together were idle.
    idle: f64,
}

/// What is read, and what was read last.
pub(super) struct Gauge {
    cpus: Arc<[usize]>,
    /// By worker: the file that tells of its thread; empty: it has none yet.
    threads: Vec<String>,
    last: Reading,
    /// The one before it.
    former: Reading,
    /// What a file holds.
    text: Vec<u8>,
}

impl Gauge {
    pub(super) fn new(workers: usize, cpus: Arc<[usize]>) -> Self {
        let (last, former, text) = Default::default();
        Self { cpus, threads: vec![String::new(); workers], last, former, text }
    }

    /// The calling thread is the one of `worker`.
    pub(super) fn begin(&mut self, worker: usize) {
        self.threads[worker] = format!("/proc/self/task/{}/schedstat", gettid());
    }

    /// What was done since the last look; `None`: that was too long ago, or there was none.
    ///
    /// # Errors
    /// It is not told: [`ErrorKind::InvalidData`], or as open(2) and read(2).
    pub(super) fn look(
        &mut self,
        now: Instant,
        is_splicing: impl Fn(usize) -> bool,
    ) -> io::Result<Option<Use>> {
        self.read(now)?;
        swap(&mut self.last, &mut self.former);
        let Some(before) = self.former.at else { return Ok(None) };
        let time = now.saturating_duration_since(before);
        let seen = || self.last.since(&self.former, time.as_secs_f64(), is_splicing);
        Ok((time < INTERVAL_MAX && !time.is_zero()).then(seen))
    }

    /// Takes the place of the former one.
    fn read(&mut self, now: Instant) -> io::Result<()> {
        let Self { cpus, threads, former: reading, text, .. } = self;
        reading.times.clear();
        for path in threads {
            let times = match file(text, path) {
                Ok(text) => times(text).ok_or(ErrorKind::InvalidData)?,
                // Not there yet, or no more.
                Err(error) if error.kind() == ErrorKind::NotFound => Times::default(),
                Err(error) => return Err(error),
            };
            reading.times.push(times);
        }
        if reading.times.iter().all(|times| times.ran == 0.0) {
            // A kernel that does not count it: somebody has run to get here.
            return Err(ErrorKind::InvalidData.into());
        }
        reading.idle = idle(file(text, "/proc/stat")?, cpus).ok_or(ErrorKind::InvalidData)?;
        reading.at = Some(now);
        Ok(())
    }
}

impl Reading {
    fn since(&self, before: &Reading, seconds: f64, is_splicing: impl Fn(usize) -> bool) -> Use {
        let mut seen = Use { demand: 0.0, used: 0.0, idle: (self.idle - before.idle) / seconds };
        let workers = self.times.iter().zip(&before.times).enumerate();
        for (_, (now, before)) in workers.filter(|(worker, _)| !is_splicing(*worker)) {
            let ran = (now.ran - before.ran).max(0.0) / seconds;
            let waited = (now.waited - before.waited).max(0.0) / seconds;
            seen.used += ran;
            seen.demand = seen.demand.max(ran + waited);
        }
        seen
    }
}

fn file<'a>(text: &'a mut Vec<u8>, path: &str) -> io::Result<&'a str> {
    text.clear();
    File::open(path)?.read_to_end(text)?;
    std::str::from_utf8(text).map_err(|_| ErrorKind::InvalidData.into())
}

/// What a thread's `schedstat` tells.
fn times(text: &str) -> Option<Times> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse::<u64>);
    let (ran, waited) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some(Times { ran: ran as f64 / 1e9, waited: waited as f64 / 1e9 })
}

/// The seconds that these CPUs were idle, of `/proc/stat`: the fourth and fifth number of each. It
/// may tell of others only, in a container, or not of one that was taken away.
fn idle(text: &str, cpus: &[usize]) -> Option<f64> {
    let (mut ticks, mut count) = (0.0, 0);
    // The first line is of all.
    for line in text.lines().skip(1).map_while(|line| line.strip_prefix("cpu")) {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u64>);
        let cpu = numbers.next()?.ok()? as usize;
        if cpus.contains(&cpu) {
            count += 1;
            ticks += numbers.nth(3)?.ok()? as f64 + numbers.next()?.ok()? as f64;
        }
    }
    (count == cpus.len()).then_some(ticks * TICK)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_a_thread_demands_is_what_it_ran_and_waited_for() {
        let some = Times { ran: 1.5, waited: 0.5 };
        assert_eq!(times("1500000000 500000000 77\n"), Some(some));
        assert_eq!(times(""), None);
        assert_eq!(times("1 -"), None);
    }

    #[test]
    fn the_cpus_of_workers_are_those_whose_idle_time_counts() {
        let stat = "cpu  9 9 9 9000 9 0 0 0 0 0\ncpu0 1 2 3 400 50 0 0 0 0 0\n\
                    cpu3 1 2 3 100 0 0 0 0 0 0\nintr 5 6 7\ncpu4 is no line of a CPU's\n";
        assert_eq!(idle(stat, &[0]), Some(4.5));
        assert_eq!(idle(stat, &[3, 0]), Some(5.5));
        assert_eq!(idle(stat, &[0, 1]), None, "it does not tell of all");
        assert_eq!(idle("cpu 1\ncpu0 1 2", &[0]), None);
    }

    #[test]
    fn the_busiest_of_those_that_do_not_splice_counts() {
        let reading = |ran: [f64; 3], idle| {
            let times = ran.map(|ran| Times { ran, waited: ran / 10.0 });
            Reading { at: None, times: times.to_vec(), idle }
        };
        let (before, now) = (reading([5.0, 1.0, 2.0], 7.0), reading([9.0, 2.0, 4.0], 8.0));
        let seen = now.since(&before, 4.0, |worker| worker == 0);
        assert_eq!(seen, Use { demand: 0.55, used: 0.75, idle: 0.25 });
    }

    #[test]
    fn a_thread_that_runs_is_seen_to() {
        let mut gauge = Gauge::new(2, [].into());
        gauge.begin(1);
        // What it has run is counted when it sleeps.
        std::thread::sleep(Duration::from_millis(1));
        let started = Instant::now();
        let mut look = |now| gauge.look(now, |_| false).expect("/proc tells");
        assert_eq!(look(started), None, "there was no look before");
        while started.elapsed() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        let seen = look(Instant::now()).expect("it was not long ago");
        assert!(seen.demand > 0.5 && seen.used > 0.0, "{seen:?}");
        assert_eq!(look(started + INTERVAL_MAX * 2), None, "that was too long ago");
    }
}
