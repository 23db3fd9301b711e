//! The relays: what starts each, and the one on tokio itself.

use std::env;
use std::io::{self, BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr};
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

/// Makes this program a tokio relay instead of the benchmark: buffer size and target.
const TOKIO_RELAY: &str = "NSPLICE_BENCH_TOKIO_RELAY";

pub fn nsplice(transfer: &str, target: SocketAddr) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nsplice"));
    command.args(["-l", "127.0.0.1:0", "-c", &target.to_string(), "--transfer", transfer]);
    command.args(["--ready-fd", "1"]);
    command
}

pub fn tokio(buffer_bytes: usize, target: SocketAddr) -> Command {
    let mut command = Command::new(env::current_exe().expect("this program has a file"));
    command.env(TOKIO_RELAY, format!("{buffer_bytes} {target}"));
    command
}

/// What [`tokio`] asks of this process, if anything.
pub fn tokio_order() -> Option<String> {
    env::var(TOKIO_RELAY).ok()
}

/// What netns_tcp_bridge does with the connections it accepts: a task for each, on one thread.
pub fn run_tokio(order: &str) -> io::Result<()> {
    use tokio::net::{TcpListener, TcpStream};

    let (size, target) = order.split_once(' ').expect("as written by `tokio`");
    let size: usize = size.parse().expect("a number of bytes");
    let target: SocketAddr = target.parse().expect("an address");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async move {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        println!("{}", listener.local_addr()?);
        loop {
            let (mut client, _) = listener.accept().await?;
            tokio::spawn(async move {
                client.set_nodelay(true)?;
                let mut target = TcpStream::connect(target).await?;
                target.set_nodelay(true)?;
                tokio::io::copy_bidirectional_with_sizes(&mut client, &mut target, size, size).await
            });
        }
    })
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

/// Whether there is something to read, or to accept, in time.
pub fn readable(file: &impl AsFd) -> io::Result<bool> {
    let mut files = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut files, PollTimeout::try_from(PATIENCE).expect("seconds fit"))? > 0)
}
