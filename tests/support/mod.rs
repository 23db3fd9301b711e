//! What the integration tests share: network namespaces, the program under test, streams whose
//! bytes can be told apart, and waiting with a limit.
//!
//! Tests run in parallel and next to other programs, so each makes its own namespaces and uses no
//! port of the caller's. Nothing here sleeps to let something happen: it asks again until it has
//! happened, for a limited time.

#![allow(dead_code, unused_imports, unused_macros)] // Each test file uses its own part.
#![allow(unreachable_pub, clippy::unwrap_used)]

use std::time::{Duration, Instant};

/// Ends the test early with the reason; under `CI=true` a test that cannot run has failed.
macro_rules! skip {
    ($($reason:tt)*) => {{
        $crate::support::skipped(&format!($($reason)*));
        return;
    }};
}
pub(crate) use skip;

/// Makes as many namespaces as the pattern names, or skips the test:
/// `namespaces!(clients, targets);`
macro_rules! namespaces {
    ($($name:ident),+) => {
        $(let $name = match $crate::support::netns::Netns::new() {
            Ok(netns) => netns,
            Err(error) => $crate::support::skip!("no network namespace to be had: {error}"),
        };)+
    };
}
pub(crate) use namespaces;

pub mod calls;
pub mod engine;
pub mod exchanges;
pub mod forwarder;
pub mod netns;
pub mod process;
pub mod streams;

pub use forwarder::{Exit, Forwarder, Launch, Program};
pub use netns::Netns;
pub use process::Process;

/// Longest wait for one thing. Far above what anything here takes, so that reaching it means that
/// the thing will not happen, also on a machine busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Reports a test that cannot run here.
pub fn skipped(reason: &str) {
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "would be skipped, but CI=true: {reason}"
    );
    eprintln!("skipped: {reason}");
}

/// Asks again until there is an answer; panics with `what` when there is none in time.
#[track_caller]
pub fn eventually<T>(what: &str, mut answer: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = answer() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        // The pause between two questions, not a guess at how long the thing takes.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The program `name` in PATH, if it is installed.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

/// A directory that is removed with all it holds.
pub struct TempDir(std::path::PathBuf);

impl TempDir {
    pub fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("nsplice-test-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &std::path::Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
