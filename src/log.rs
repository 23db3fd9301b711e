//! Lines on standard error that never hold up a worker.
//!
//! A worker hands a line to a thread of its own and goes on; when the reader of standard error is
//! slower than the lines come, lines are dropped and counted. Failures are lines by their kind, of
//! which a few are written and the rest is counted.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use limiter::Limiter;

mod limiter;

/// How often it is looked whether lines were left out.
const LOOK: Duration = Duration::from_secs(1);

/// Lines that may wait to be written.
const QUEUE_LINES: usize = 1024;

/// Writes `text` to standard error, at once. For the main threads, which hold nobody up.
///
/// A standard error that is gone is nothing to end a connection for, let alone to panic.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// [`say`] with the time before it.
pub fn say_now(text: &str) {
    let now = humantime::format_rfc3339_millis(SystemTime::now());
    say(&format!("{now} {text}"));
}

fn say_left_out(left_out: Vec<(&'static str, u64)>) {
    for (kind, count) in left_out {
        say_now(&format!("{kind}: {count} more times"));
    }
}

/// Failures of a main thread.
#[derive(Debug, Default)]
pub struct Failures {
    limiter: Limiter,
}

impl Failures {
    /// Tells how many were left out in a time that is over. To be called now and then.
    pub fn tell_left_out(&mut self) {
        say_left_out(self.limiter.left_out(Instant::now()));
    }

    /// Writes a failure of this kind, unless there were several of late.
    pub fn say(&mut self, kind: &'static str, text: impl FnOnce() -> String) {
        self.tell_left_out();
        if self.limiter.admits(kind, Instant::now()) {
            say_now(&text());
        }
    }
}

impl Drop for Failures {
    fn drop(&mut self) {
        say_left_out(self.limiter.all_left_out());
    }
}

/// Where a worker's lines go.
#[derive(Clone, Debug)]
pub struct Log {
    lines: SyncSender<String>,
    shared: Arc<Shared>,
    verbose: bool,
}

#[derive(Debug, Default)]
struct Shared {
    dropped: AtomicU64,
    limiter: Mutex<Limiter>,
}

impl Shared {
    fn limit<T>(&self, look: impl FnOnce(&mut Limiter) -> T) -> T {
        // A panic elsewhere ends the process; until then lines are written.
        look(&mut self.limiter.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Log {
    /// Starts the thread that writes. `verbose`: connections are logged, not only failures.
    ///
    /// The returned handle ends when all [`Log`]s are gone and their lines written.
    pub fn start(verbose: bool) -> std::io::Result<(Log, std::thread::JoinHandle<()>)> {
        let (lines, queue) = sync_channel(QUEUE_LINES);
        let shared = Arc::new(Shared::default());
        let writing = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_lines(&queue, &writing))?;
        Ok((Log { lines, shared, verbose }, writer))
    }

    /// Whether connections are logged.
    pub fn is_verbose(&self) -> bool {
        self.verbose
    }

    /// Logs a failure of this kind, unless there were several of late.
    pub fn failure(&self, kind: &'static str, text: impl FnOnce() -> String) {
        if self.shared.limit(|limiter| limiter.admits(kind, Instant::now())) {
            self.line(&text());
        }
    }

    /// Logs `text` with the time before it.
    pub fn line(&self, text: &str) {
        let now = humantime::format_rfc3339_millis(SystemTime::now());
        if self.lines.try_send(format!("{now} {text}")).is_err() {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn write_lines(queue: &Receiver<String>, shared: &Shared) {
    loop {
        // Nobody is woken for nothing.
        let line = match shared.limit(|limiter| limiter.is_idle()) {
            true => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => queue.recv_timeout(LOOK),
        };
        if let Ok(line) = &line {
            say(line);
        }
        let lost = shared.dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            say(&format!("({lost} lines dropped: standard error is too slow)"));
        }
        let is_end = line == Err(RecvTimeoutError::Disconnected);
        let left_out = shared.limit(|limiter| match is_end {
            true => limiter.all_left_out(),
            false => limiter.left_out(Instant::now()),
        });
        say_left_out(left_out);
        if is_end {
            return;
        }
    }
}
