//! Load for measurements: the client or the server of a TCP workload, in any network namespace.
//!
//! One thread, one epoll, one buffer for all connections and no allocation per operation: client,
//! server and forwarder share the machine, so what this program wastes the forwarder lacks. It
//! always ends: after its time, or (server) when standard input ends. Results are JSON lines on
//! standard output.

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
use nix::sched::{CloneFlags, setns};
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};

/// Bytes of one read or write of a bulk transfer: large enough to make the calls few, small
/// enough to stay in a core's second-level cache.
const BUFFER_BYTES: usize = 256 << 10;
/// Events taken from the kernel at a time.
const EVENTS: usize = 256;
/// Longest wait for events, so that the clock is looked at.
const TICK_MS: u16 = 50;

/// Load for measurements of TCP forwarders.
#[derive(FromArgs)]
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
    /// bulk (send as fast as possible), rr (request/response) or crr (connect, rr, close)
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
    /// time before it that is not measured, in seconds (0.5)
    #[argh(option, default = "0.5")]
    warmup: f64,
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
}

impl std::str::FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bulk" => Ok(Work::Bulk),
            "rr" => Ok(Work::Rr),
            "crr" => Ok(Work::Crr),
            _ => Err("not bulk, rr or crr".into()),
        }
    }
}

fn main() -> ExitCode {
    let result = match argh::from_env::<Load>().side {
        Side::Server(options) => server::serve(&options),
        Side::Client(options) => client::Run::new(&options).and_then(client::Run::finish),
    };
    match result {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Moves this thread, the only one, into the namespace at `path`.
fn enter(path: Option<&str>) -> io::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let file = File::open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("--netns {path}: {error}")))?;
    Ok(setns(file, CloneFlags::CLONE_NEWNET)?)
}

/// Waits for events, at most a tick.
fn wait(epoll: &Epoll, events: &mut [EpollEvent]) -> io::Result<usize> {
    match epoll.wait(events, EpollTimeout::from(TICK_MS)) {
        Err(nix::errno::Errno::EINTR) => Ok(0),
        other => Ok(other?),
    }
}
