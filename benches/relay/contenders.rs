//! Baselines: whole relays that move bytes by other means than `nsplice`, to measure it against.
//!
//! `benches/relay.rs` runs them in one namespace, `examples/relay.rs` makes them a program for
//! `scripts/compare`. What is the same for all, so that only the means differ:
//! - one thread does everything, as `nsplice --workers 1`;
//! - TCP_NODELAY on both sides, the system's longest backlog, and RLIMIT_NOFILE as far as allowed;
//! - half-closed connections stay half-closed, nothing is lost before an end is passed on.
//!
//! They stop there: a reset becomes an end, an urgent byte an ordinary one or none, and nothing is
//! counted or logged. What `nsplice` does about these is part of its figures.

use std::fmt::Write;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use argh::FromArgs;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrStorage, connect, listen,
    setsockopt, shutdown, socket, sockopt,
};
use nsplice::config::{Netns, NetnsSource};
use nsplice::inherited::Inherited;
use nsplice::netns::{self, OpenNetns};

#[path = "contenders/epoll_splice.rs"]
mod epoll_splice;
#[path = "contenders/pipes.rs"]
mod pipes;
#[path = "contenders/tokio_copy.rs"]
mod tokio_copy;
#[path = "contenders/uring_copy.rs"]
mod uring_copy;
#[path = "contenders/uring_splice.rs"]
mod uring_splice;

/// Serves until it fails: connections from the listener, forwarded to the address.
type Relay = fn(TcpListener, SocketAddr) -> io::Result<()>;

/// A way to move bytes: its name, and the relay that uses it.
#[derive(Clone, Copy)]
pub struct Kind {
    pub name: &'static str,
    relay: Relay,
}

pub const KINDS: &[Kind] = &[
    Kind { name: "tokio-8k", relay: |from, to| tokio_copy::relay(from, to, 8 << 10) },
    Kind { name: "tokio-64k", relay: |from, to| tokio_copy::relay(from, to, 64 << 10) },
    Kind { name: "tokio-uring", relay: uring_copy::relay },
    Kind { name: "uring-splice", relay: uring_splice::relay },
    Kind { name: "epoll-splice", relay: epoll_splice::relay },
];

impl FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let kind = KINDS.iter().find(|kind| kind.name == name);
        kind.copied().ok_or_else(|| {
            let mut names = String::from("not one of");
            for kind in KINDS {
                let _ = write!(names, " {}", kind.name);
            }
            names
        })
    }
}

/// Forward TCP connections as a baseline for measurements of nsplice. The first line of output is
/// the address it listens at.
#[derive(FromArgs)]
struct Options {
    /// how bytes are moved: tokio-8k, tokio-64k, tokio-uring, uring-splice or epoll-splice
    #[argh(option)]
    kind: Kind,
    /// address to listen at; with port 0 the kernel chooses
    #[argh(option, short = 'l')]
    listen: SocketAddr,
    /// network namespace to listen in: a path, a name that ip netns knows, or pid:N
    #[argh(option, short = 'f')]
    listen_netns_file: Option<String>,
    /// address to forward to
    #[argh(option, short = 'c')]
    connect: SocketAddr,
    /// network namespace to connect from, named as for -f
    #[argh(option, short = 't')]
    connect_netns_file: Option<String>,
}

/// Does what the command line asks for, until it fails or is told to end.
pub fn main() -> ExitCode {
    let Err(error) = run(argh::from_env()) else { return ExitCode::SUCCESS };
    eprintln!("Error: {error}");
    ExitCode::FAILURE
}

fn run(options: Options) -> io::Result<()> {
    let Options { kind, listen, listen_netns_file, connect, connect_netns_file } = options;
    let open = |option, name: Option<String>| name.map(|name| open(option, &name)).transpose();
    let listen_netns = open("-f", listen_netns_file)?;
    let connect_netns = open("-t", connect_netns_file)?;
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    enter(listen_netns)?;
    let listener = bind(listen)?;
    end_by_signal(listener.try_clone()?)?;
    // A socket stays where it was made. The relay's own thread goes on to the other namespace;
    // this one stays, so that /proc shows the process where it listens.
    let relay = std::thread::spawn(move || {
        enter(connect_netns)?;
        println!("{}", listener.local_addr()?);
        (kind.relay)(listener, connect)
    });
    let outcome = relay.join().unwrap_or_else(|_| Err(io::Error::other("the relay panicked")));
    if STOPPED.load(Ordering::Acquire) { Ok(()) } else { outcome }
}

/// Told to end: what fails from then on is no failure.
static STOPPED: AtomicBool = AtomicBool::new(false);

/// Lets SIGTERM and SIGINT end the program, and the port be free at once. A ring's requests hold
/// the listener for a while after the process is gone, but what is shut down no
/// longer listens.
fn end_by_signal(listener: TcpListener) -> io::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    // In this thread, and in all it starts from now on.
    signals.thread_block()?;
    std::thread::spawn(move || {
        let _ = signals.wait();
        STOPPED.store(true, Ordering::Release);
        let _ = shutdown(listener.as_raw_fd(), Shutdown::Both);
        std::process::exit(0);
    });
    Ok(())
}

fn open(option: &'static str, name: &str) -> io::Result<OpenNetns> {
    let source = match name.strip_prefix("pid:").map(str::parse) {
        Some(Ok(pid)) => NetnsSource::Pid(pid),
        _ => NetnsSource::Path(name.into()),
    };
    netns::open(&Netns { option, source }, &mut Inherited::default()).map_err(io::Error::other)
}

fn enter(netns: Option<OpenNetns>) -> io::Result<()> {
    netns.map_or(Ok(()), |netns| netns::enter(&netns).map_err(io::Error::other))
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)
        .map_err(|error| io::Error::new(error.kind(), format!("-l {address}: {error}")))?;
    // Accepted sockets inherit it.
    setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
    listen(&listener, Backlog::MAXCONN)?;
    Ok(listener)
}

/// A socket that does not wait, and will be connected to the target or fail.
pub fn begin_connect(target: SocketAddr) -> io::Result<TcpStream> {
    let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(family, SockType::Stream, flags, None)?;
    setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(target)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket.into()),
        Err(errno) => Err(errno.into()),
    }
}
