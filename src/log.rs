//! Lines on standard error that never hold up the program.
//!
//! Each process has a thread that writes; whoever has a line hands it over and goes on. When the
//! reader of standard error is slower than the lines come, lines are dropped and counted. One that
//! reads nothing (a pipe that is full) keeps neither connections waiting nor the program from
//! ending. Failures are lines by their kind, of which a few are written and the rest is counted.

use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Error, Kind, Result};
use crate::netns::{self, OpenNetns};
use limiter::Limiter;

mod limiter;

/// How often it is looked whether lines were left out.
const LOOK: Duration = Duration::from_secs(1);

/// Lines that may wait to be written.
const QUEUE_LINES: usize = 1024;

/// Longest time to wait for the last of what is written, if standard error takes nothing.
pub const LAST_LINES: Duration = Duration::from_secs(1);

/// Writes `text` to standard error, unless that takes nothing for [`LAST_LINES`]. For the time
/// before there is a [`Log`]: a program with a second thread cannot fork.
pub fn say(text: &str) {
    // A pipe with any room takes a line of up to 4096 bytes; only somebody else who writes in this
    // moment could take the room.
    if is_read() {
        write_line(text);
    }
}

/// Whether standard error takes something, or fails, within [`LAST_LINES`].
pub fn is_read() -> bool {
    let stderr = std::io::stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::try_from(LAST_LINES).unwrap_or(PollTimeout::ZERO)) != Ok(0)
}

/// Writes `text`, the last line; returns when it is written, or after [`LAST_LINES`].
pub fn say_last(text: String) {
    let line = text.clone();
    if bounded(move || write_line(&line)).is_err() {
        say(&text);
    }
}

/// What comes of `write`, which may wait for a reader; `None`: it still does after [`LAST_LINES`].
/// Fails if there can be no thread for it.
pub fn bounded<T: Send + 'static>(
    write: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<Option<T>> {
    let (writing, written) = channel();
    // Nobody may wait for it any more.
    let writer = move || drop(writing.send(write()));
    thread::Builder::new().name("last line".into()).spawn(writer)?;
    Ok(written.recv_timeout(LAST_LINES).ok())
}

/// A standard error that is gone is nothing to end a connection for, let alone to panic.
fn write_line(text: &str) {
    // In one piece: the other process writes there, too.
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

fn with_time(text: &str) -> String {
    format!("{} {text}", humantime::format_rfc3339_millis(SystemTime::now()))
}

/// Does `work` with a log, and has its last lines written, if that does not take too long.
/// `verbose`: connections are logged, not only failures.
pub fn with<T>(verbose: bool, work: impl FnOnce(Log) -> Result<T>) -> Result<T> {
    let (log, writer) = Log::start(verbose)
        .map_err(|error| Error::new(Kind::Kernel, format!("cannot start a thread: {error}")))?;
    let result = work(log);
    // The writer ends when it has written what it has, as there is no log any more.
    let deadline = Instant::now() + LAST_LINES;
    while !writer.is_finished() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    result
}

/// Where lines go.
#[derive(Clone, Debug)]
pub struct Log {
    entries: SyncSender<Entry>,
    shared: Arc<Shared>,
    verbose: bool,
}

/// What the thread that writes is told.
#[derive(Debug)]
enum Entry {
    Line(String),
    Enter(Arc<OpenNetns>),
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
    pub fn start(verbose: bool) -> std::io::Result<(Log, thread::JoinHandle<()>)> {
        let (entries, queue) = sync_channel(QUEUE_LINES);
        let shared = Arc::new(Shared::default());
        let writing = Arc::clone(&shared);
        let writer = thread::Builder::new()
            .name("log".into())
            .spawn(move || write_lines(&queue, &writing))?;
        Ok((Log { entries, shared, verbose }, writer))
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
        self.plain_line(with_time(text));
    }

    /// Logs `text` as it is.
    pub fn plain_line(&self, text: String) {
        if self.entries.try_send(Entry::Line(text)).is_err() {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Has the thread that writes leave its network namespace for this one: a thread keeps the one
    /// it is in from ending.
    pub fn enter(&self, netns: Arc<OpenNetns>) {
        // One that cannot write stays where it is.
        let _ = self.entries.try_send(Entry::Enter(netns));
    }
}

fn write_lines(queue: &Receiver<Entry>, shared: &Shared) {
    loop {
        // Nobody is woken for nothing.
        let entry = match shared.limit(|limiter| limiter.is_idle()) {
            true => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => queue.recv_timeout(LOOK),
        };
        match &entry {
            Ok(Entry::Line(line)) => write_line(line),
            // The threads that matter are there, so this one can be.
            Ok(Entry::Enter(netns)) => drop(netns::enter(netns)),
            Err(_) => {}
        }
        let lost = shared.dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            write_line(&format!("({lost} lines dropped: standard error is too slow)"));
        }
        let is_end = matches!(entry, Err(RecvTimeoutError::Disconnected));
        let left_out = shared.limit(|limiter| match is_end {
            true => limiter.all_left_out(),
            false => limiter.left_out(Instant::now()),
        });
        for (kind, count) in left_out {
            write_line(&with_time(&format!("{kind}: {count} more times")));
        }
        if is_end {
            return;
        }
    }
}
