//! Load for measurements: the client or the server of a TCP workload, in any network namespace.
//!
//! One thread, one epoll, one buffer for all connections and no allocation per operation: client,
//! server and forwarder share the machine, so what this program wastes the forwarder lacks. It
//! always ends: after its time, or (server) when standard input ends. Results are JSON lines on
//! standard output, described in README.md.
//!
//! The loop is closed: a connection asks again when it was answered, never before. So a forwarder
//! that stalls is asked less meanwhile, and latencies are those of a saturated service, not of a
//! given rate. Nothing is measured before every connection has been answered once.

#[path = "nsplice-load/client.rs"]
mod client;
#[path = "nsplice-load/conn.rs"]
mod conn;
#[path = "nsplice-load/histogram.rs"]
mod histogram;
#[path = "nsplice-load/server.rs"]
mod server;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;

use argh::FromArgs;
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

/// Bytes of one read or write of a bulk transfer: large enough to make the calls few, small
/// enough to stay in a core's second-level cache.
const BUFFER_BYTES: usize = 256 << 10;
/// Events taken from the kernel at a time.
const EVENTS: usize = 256;
/// Longest wait for events, so that the clock is looked at.
const TICK_MS: u16 = 50;

/// Load for measurements of TCP forwarders: a server, and a client that measures. Results are JSON
/// lines on standard output.
#[derive(FromArgs)]
#[argh(
    note = "The measured time begins when every connection has been answered once and the warm-up
is over. Latencies are those of a closed loop: a connection asks again when it was answered.",
    example = "{command_name} server --listen 127.0.0.1:0 --mode rr --size 64",
    example = "{command_name} client --connect 127.0.0.1:40001 --work rr --size 64 --connections 64"
)]
struct Load {
    #[argh(subcommand)]
    side: Side,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Side {
    Server(Server),
    Client(Client),
}

/// Answer clients until standard input ends or the time is up.
#[derive(FromArgs)]
#[argh(subcommand, name = "server")]
struct Server {
    /// address to listen at; with port 0 the kernel chooses, the first line of output tells
    #[argh(option)]
    listen: SocketAddr,
    /// file of the network namespace to enter
    #[argh(option)]
    netns: Option<String>,
    /// sink (read), discard (drop unread), echo (the same bytes) or rr (--size for --size bytes)
    #[argh(option)]
    mode: Mode,
    /// bytes of a request and of its response (64)
    #[argh(option, default = "64")]
    size: usize,
    /// longest time to run, in seconds (600)
    #[argh(option, default = "600.0")]
    seconds: f64,
    /// CPU to run on
    #[argh(option)]
    cpu: Option<usize>,
}

/// Load a server for a time and print what it did.
#[derive(FromArgs)]
#[argh(subcommand, name = "client")]
struct Client {
    /// address of the server, or of the forwarder before it
    #[argh(option)]
    connect: SocketAddr,
    /// file of the network namespace to enter
    #[argh(option)]
    netns: Option<String>,
    /// bulk (send as fast as possible), rr (request/response), crr (connect, rr, close) or
    /// idle (one rr, then nothing)
    #[argh(option)]
    work: Work,
    /// connections at a time (1)
    #[argh(option, default = "1")]
    connections: usize,
    /// bytes of a request and of its response (64)
    #[argh(option, default = "64")]
    size: usize,
    /// time that is measured, in seconds (3)
    #[argh(option, default = "3.0")]
    seconds: f64,
    /// time of load before it that is not measured, in seconds (0.5)
    #[argh(option, default = "0.5")]
    warmup: f64,
    /// print a line when the measured time begins, answer each line of standard input by the report
    /// so far, and after the last one keep the connections until standard input ends
    #[argh(switch)]
    progress: bool,
    /// CPU to run on
    #[argh(option)]
    cpu: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Sink,
    /// As `Sink`, but the kernel drops the bytes: leaves a core that a forwarder can use.
    Discard,
    Echo,
    Rr,
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "sink" => Ok(Mode::Sink),
            "discard" => Ok(Mode::Discard),
            "echo" => Ok(Mode::Echo),
            "rr" => Ok(Mode::Rr),
            _ => Err("not sink, discard, echo or rr".into()),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Bulk,
    Rr,
    Crr,
    Idle,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Work::Bulk => "bulk",
            Work::Rr => "rr",
            Work::Crr => "crr",
            Work::Idle => "idle",
        }
    }
}

impl std::str::FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bulk" => Ok(Work::Bulk),
            "rr" => Ok(Work::Rr),
            "crr" => Ok(Work::Crr),
            "idle" => Ok(Work::Idle),
            _ => Err("not bulk, rr, crr or idle".into()),
        }
    }
}

fn main() -> ExitCode {
    let result = match argh::from_env::<Load>().side {
        Side::Server(options) => server::serve(&options).map(|report| println!("{report}")),
        Side::Client(options) => client::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Makes the process what the options ask for: with room for many connections, on its CPU, in its
/// namespace.
fn prepare(netns: Option<&str>, cpu: Option<usize>) -> io::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    if let Some(cpu) = cpu {
        let mut set = CpuSet::new();
        set.set(cpu)
            .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
            .map_err(|errno| named(errno.into(), &format!("--cpu {cpu}")))?;
    }
    enter(netns)
}

fn named(error: io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Moves this thread, the only one, into the namespace at `path`.
fn enter(path: Option<&str>) -> io::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let file = File::open(path).map_err(|error| named(error, &format!("--netns {path}")))?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| named(errno.into(), &format!("--netns {path}")))
}

/// Waits for events, at most a tick.
fn wait(epoll: &Epoll, events: &mut [EpollEvent]) -> io::Result<usize> {
    match epoll.wait(events, EpollTimeout::from(TICK_MS)) {
        Err(nix::errno::Errno::EINTR) => Ok(0),
        other => Ok(other?),
    }
}
