//! The relays' processes: what starts each, and what ends it.

use std::env;
use std::io::{self, BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::PATIENCE;

/// Makes this program a baseline relay instead of the benchmark.
const AS_RELAY: &str = "NSPLICE_BENCH_AS_RELAY";

/// nsplice with one worker, as the baselines have one thread.
pub fn nsplice(transfer: &str, target: SocketAddr) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nsplice"));
    command.args(["-l", "127.0.0.1:0", "-c", &target.to_string(), "--ready-fd", "1"]);
    command.args(["--transfer", transfer, "--workers", "1"]);
    command
}

pub fn baseline(kind: &str, target: SocketAddr) -> Command {
    let mut command = Command::new(env::current_exe().expect("this program has a file"));
    command.env(AS_RELAY, "");
    command.args(["--kind", kind, "-l", "127.0.0.1:0", "-c", &target.to_string()]);
    command
}

/// Whether [`baseline`] started this process.
pub fn is_baseline() -> bool {
    env::var_os(AS_RELAY).is_some()
}

/// A relay's process.
pub struct Relay {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Relay {
    /// Starts a relay and waits until it listens.
    pub fn start(mut command: Command) -> io::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: set_pdeathsig is one system call; it allocates nothing and takes no lock.
        unsafe {
            // A relay does not outlive a benchmark that is killed.
            command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGTERM)?));
        }
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().expect("it is a pipe");
        let mut line = String::new();
        if readable(&stdout)? {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        if let Ok(address) = line.trim().parse() {
            return Ok(Self { child, address });
        }
        stop(&mut child);
        let mut cause = String::new();
        child.stderr.take().expect("it is a pipe").read_to_string(&mut cause)?;
        Err(io::Error::other(format!("{command:?} does not listen: {cause}")))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        stop(&mut self.child);
    }
}

/// Asks a process to end, and makes it end when it does not.
fn stop(child: &mut Child) {
    let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
    let deadline = Instant::now() + PATIENCE;
    while let Ok(None) = child.try_wait() {
        if Instant::now() > deadline {
            let _ = child.kill();
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Whether there is something to read in time.
fn readable(file: &impl AsFd) -> io::Result<bool> {
    let mut files = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut files, PollTimeout::try_from(PATIENCE).expect("seconds fit"))? > 0)
}
