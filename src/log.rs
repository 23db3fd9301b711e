//! Lines on standard error that never hold up a worker.
//!
//! A worker hands a line to a thread of its own and goes on; when the reader of standard error is
//! slower than the lines come, lines are dropped and counted.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::SystemTime;

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

/// Where a worker's lines go.
#[derive(Clone, Debug)]
pub struct Log {
    lines: SyncSender<String>,
    dropped: Arc<AtomicU64>,
    verbose: bool,
}

impl Log {
    /// Starts the thread that writes. `verbose`: connections are logged, not only failures.
    ///
    /// The returned handle ends when all [`Log`]s are gone and their lines written.
    pub fn start(verbose: bool) -> std::io::Result<(Log, std::thread::JoinHandle<()>)> {
        let (lines, queue) = sync_channel(QUEUE_LINES);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&dropped);
        let writer = std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_lines(&queue, &counter))?;
        Ok((Log { lines, dropped, verbose }, writer))
    }

    /// Whether connections are logged.
    pub fn is_verbose(&self) -> bool {
        self.verbose
    }

    /// Logs `text` with the time before it.
    pub fn line(&self, text: &str) {
        let now = humantime::format_rfc3339_millis(SystemTime::now());
        if self.lines.try_send(format!("{now} {text}")).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn write_lines(queue: &Receiver<String>, dropped: &AtomicU64) {
    for line in queue {
        say(&line);
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            say(&format!("({lost} lines dropped: standard error is too slow)"));
        }
    }
}
