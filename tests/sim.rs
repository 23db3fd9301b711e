//! The worker in a world without a kernel: hundreds of thousands of schedules, each made from one
//! number, with everything going wrong that can (`sim/plan.rs`), and what must hold regardless
//! (`sim/checks.rs`, `sim/verdict.rs`).
//!
//! `NSPLICE_SEED=n` replays one schedule and prints what happens; `NSPLICE_SCHEDULES=n` sets how
//! many are run; `NSPLICE_BASE=n` runs others than usual.

#![allow(clippy::unwrap_used)]

#[path = "sim/checks.rs"]
mod checks;
#[path = "sim/direct.rs"]
mod direct;
#[path = "sim/engine.rs"]
mod engine;
#[path = "sim/memory.rs"]
mod memory;
#[path = "sim/plan.rs"]
mod plan;
#[path = "sim/requests.rs"]
mod requests;
#[path = "sim/rng.rs"]
mod rng;
#[path = "sim/schedule.rs"]
mod schedule;
#[path = "sim/socket.rs"]
mod socket;
#[path = "sim/time.rs"]
mod time;
#[path = "sim/verdict.rs"]
mod verdict;
#[path = "sim/world.rs"]
mod world;

use std::fs::File;
use std::io::{Write, stdout};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use schedule::{Logs, Summary};

const SCHEDULES: u64 = 240_000;

const THREADS: usize = 2;

/// How often the threads are looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(20);

/// Many times what the longest schedule takes.
const SCHEDULE_TIME_MAX: Duration = Duration::from_secs(20);

#[test]
fn every_schedule_ends_as_it_must() {
    if let Some(seed) = number("NSPLICE_SEED") {
        return replay(seed);
    }
    let base = number("NSPLICE_BASE").unwrap_or(1) << 32;
    let count = number("NSPLICE_SCHEDULES").unwrap_or(SCHEDULES);
    let threads: [Thread; THREADS] = Default::default();
    let failures: Vec<String> = thread::scope(|scope| {
        scope.spawn(|| watch(&threads));
        let running: Vec<_> = (0..THREADS)
            .map(|first| {
                let seeds = (base + first as u64..base + count).step_by(THREADS);
                let threads = &threads;
                scope.spawn(move || first_failure(seeds, first, threads))
            })
            .collect();
        running.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
    });
    println!("{}", failures.join("\n"));
    assert!(failures.is_empty(), "{} failures, see above", failures.len());
}

#[test]
fn a_seed_decides_everything() {
    let logs = logs();
    for seed in 0..500 {
        assert_eq!(run(seed, &logs, false), run(seed, &logs, false));
    }
}

#[test]
fn flows_that_need_less_share_a_turn() {
    let logs = logs();
    let shared = |seed| run(seed, &logs, false).is_ok_and(|summary| summary.shared_fills > 0);
    assert!((0..4000).any(shared), "each has a turn of its own");
}

#[test]
fn connections_leave_and_come_back() {
    let logs = logs();
    let moves = |seed| run(seed, &logs, false).map_or(0, |summary| summary.moves);
    let moves: u64 = (0..4000).map(moves).sum();
    assert!(moves > 100, "{moves} moves");
}

fn replay(seed: u64) {
    match run(seed, &logs(), true) {
        Ok(summary) => println!("{summary:?}"),
        Err(failure) => {
            println!("{failure}");
            panic!("see above");
        }
    }
}

/// Runs the schedule of `seed`; the error says what did not hold.
fn run(seed: u64, logs: &Logs, is_traced: bool) -> Result<Summary, String> {
    catch_unwind(AssertUnwindSafe(|| schedule::run(seed, logs, is_traced))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
        format!("seed {seed}: {text}")
    })
}

/// What a thread that runs schedules lets others know.
#[derive(Default)]
struct Thread {
    seed: AtomicU64,
    has_ended: AtomicBool,
    has_failed: AtomicBool,
}

/// Runs schedules until one fails, here or in another thread; says which and how to see it.
fn first_failure(
    seeds: impl Iterator<Item = u64>,
    own: usize,
    threads: &[Thread],
) -> Option<String> {
    let logs = logs();
    let mut failure = None;
    for seed in seeds {
        threads[own].seed.store(seed, Ordering::Relaxed);
        if threads.iter().any(|thread| thread.has_failed.load(Ordering::Relaxed)) {
            break;
        }
        if let Err(text) = run(seed, &logs, false) {
            threads[own].has_failed.store(true, Ordering::Relaxed);
            failure = Some(format!("{text}\n    to see it: {}", replay_command(seed)));
        }
    }
    threads[own].has_ended.store(true, Ordering::Relaxed);
    failure
}

/// Ends the process when a schedule does not: a worker that spins calls no engine that could tell.
fn watch(threads: &[Thread]) {
    let mut seeds = vec![(0, Instant::now()); threads.len()];
    while !threads.iter().all(|thread| thread.has_ended.load(Ordering::Relaxed)) {
        thread::sleep(WATCH_INTERVAL);
        for (thread, (seed, since)) in threads.iter().zip(&mut seeds) {
            let current = thread.seed.load(Ordering::Relaxed);
            if thread.has_ended.load(Ordering::Relaxed) || current != *seed {
                (*seed, *since) = (current, Instant::now());
            } else if since.elapsed() > SCHEDULE_TIME_MAX {
                // Not by println!: what a test prints is shown only after its end.
                let how = replay_command(*seed);
                let _ = writeln!(stdout(), "seed {seed}: the worker spins\n    to see it: {how}");
                std::process::exit(1);
            }
        }
    }
}

fn replay_command(seed: u64) -> String {
    let test = "every_schedule_ends_as_it_must -- --nocapture";
    format!("NSPLICE_SEED={seed} cargo test --test sim {test}")
}

/// Logs nobody sees: their lines go to standard error, which is sent away for good. So what the
/// tests have to say goes to standard output.
fn logs() -> Logs {
    static SILENCE: Once = Once::new();
    SILENCE.call_once(|| nix::unistd::dup2_stderr(File::create("/dev/null").unwrap()).unwrap());
    Logs::start().unwrap()
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}
