//! What the command line means: types that cannot hold a wrong mix of options.
//!
//! [`crate::cli`] says what was typed; this module says what is to be done. It opens nothing and
//! asks the kernel nothing.

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// Everything the program was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What to forward, and where to. The command line makes exactly one.
    pub forwards: Vec<Forward>,
    /// How long to wait for namespaces to appear under their names, in milliseconds.
    pub wait_netns_ms: u32,
    /// What to do when a namespace's name goes or comes to stand for another.
    pub netns_gone: NetnsGone,
    /// Where a process gets the listening socket of the one it replaces, and is asked for it.
    pub takeover: Option<PathBuf>,
    /// What the workers wait for the kernel with.
    pub engine: Engine,
    /// How accepted connections reach the connector.
    pub handoff: Handoff,
    /// How a half moves its bytes.
    pub transfer: Transfer,
    /// Number of worker threads; `None`: one for each CPU the process may run on.
    pub workers: Option<usize>,
    /// CPUs the workers run on, in turn; `None`: all the process may run on.
    pub cpus: Option<Vec<usize>>,
    /// Whether each worker is pinned to its CPU.
    pub pin: bool,
    /// Capacity wanted for each pipe, in bytes.
    pub pipe_size_bytes: u32,
    /// Time to deliver what a side sent before its reset is passed on, in milliseconds.
    pub reset_timeout_ms: u32,
    /// How long a worker without work looks for some before it sleeps, in microseconds.
    pub busy_poll_us: u32,
    /// The longest times of a connection.
    pub times: Times,
    /// What is asked of every connection's sockets.
    pub sockets: SocketOptions,
    /// Connections that may wait to be accepted; the system has a maximum of its own.
    pub backlog: u32,
    /// Connections at a time; `None`: as many as there are descriptors for.
    pub max_connections: Option<u32>,
    /// Time for connections to end by themselves once told to stop, in milliseconds.
    pub drain_timeout_ms: u32,
    /// Log the listening address and a line for each connection.
    pub verbose: bool,
    /// Inherited descriptor that is told the address once connections are accepted.
    pub ready_fd: Option<RawFd>,
    /// What to print on standard output at the end.
    pub summary: Option<SummaryFormat>,
}

/// One forwarding rule: connections from the listen side go to the connect side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Where connections come from.
    pub listen: ListenSide,
    /// Where they go to.
    pub connect: ConnectSide,
}

/// Where connections come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenSide {
    /// `-l`: bind and listen at an address, in a namespace.
    Bind {
        /// Address to bind; port 0 lets the kernel choose.
        address: SocketAddr,
        /// Namespace to enter first; `None`: the caller's.
        netns: Option<Netns>,
    },
    /// `-L`: an inherited listening socket.
    Listener(RawFd),
    /// `-S`: an inherited connected socket, the only client.
    Accepted(RawFd),
}

/// Where connections go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectSide {
    /// `-c`: connect to an address, from a namespace.
    Address {
        /// Address of the target.
        address: SocketAddr,
        /// Namespace to enter first; `None`: the caller's.
        netns: Option<Netns>,
    },
    /// `-C`: an inherited connected socket, for a single connection.
    Connected(RawFd),
}

/// A network namespace as the user named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    /// The option that named it, for error texts: `-f`, `-F`, `-t` or `-T`.
    pub option: &'static str,
    /// How it was named.
    pub source: NetnsSource,
}

/// The ways to name a network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetnsSource {
    /// A file, or when there is no such file a name as `ip netns` keeps them.
    Path(PathBuf),
    /// `pid:N`: the namespace of a process.
    Pid(u32),
    /// An inherited descriptor.
    Fd(RawFd),
}

/// What to do when the name of a namespace is deleted, or comes to stand for another namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetnsGone {
    /// Stay in the namespace that was entered at the start.
    #[default]
    Keep,
    /// End.
    Exit,
    /// Have new connections in the namespace the name stands for, as soon as there is one.
    Reopen,
}

/// What crosses the socketpair between the two processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Handoff {
    /// The listening socket, once; workers accept.
    #[default]
    Socket,
    /// Each accepted connection, in batches.
    Connections,
}

/// What the workers wait for the kernel with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, or epoll where it is not to be had.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// epoll.
    Epoll,
}

/// How a half moves its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transfer {
    /// Copy or splice, by the size of the half's reads.
    #[default]
    Auto,
    /// Always recv into a buffer and send from it.
    Copy,
    /// Always splice through a pipe.
    Splice,
}

/// Format of the summary written at exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SummaryFormat {
    /// One JSON object.
    Json,
}

/// The longest times of a connection, in milliseconds; 0: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// To reach the target.
    pub connect_ms: u32,
    /// Without a byte passed on.
    pub idle_ms: u32,
    /// The same, once one side has ended its stream.
    pub half_close_ms: u32,
}

/// What is asked of the kernel for each connection's two sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketOptions {
    /// Whether and how it is found out that a silent peer is gone.
    pub keepalive: Keepalive,
    /// Longest time without acknowledgement of what was sent, in milliseconds; 0: the system's.
    pub user_timeout_ms: u32,
}

/// Probing of silent peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keepalive {
    /// None.
    Off,
    /// With the system's times.
    #[default]
    System,
    /// With these.
    Set {
        /// Seconds of silence before the first probe.
        idle_s: u32,
        /// Seconds between two probes.
        interval_s: u32,
        /// Probes without an answer.
        count: u32,
    },
}

impl Config {
    /// The inherited descriptors options name, each with its option.
    pub fn named_fds(&self) -> Vec<(&'static str, RawFd)> {
        let mut named: Vec<_> = self.ready_fd.map(|fd| ("--ready-fd", fd)).into_iter().collect();
        for netns in self.netns() {
            if let NetnsSource::Fd(fd) = netns.source {
                named.push((netns.option, fd));
            }
        }
        for forward in &self.forwards {
            match forward.listen {
                ListenSide::Bind { .. } => {}
                ListenSide::Listener(fd) => named.push(("-L", fd)),
                ListenSide::Accepted(fd) => named.push(("-S", fd)),
            }
            if let ConnectSide::Connected(fd) = forward.connect {
                named.push(("-C", fd));
            }
        }
        named
    }

    /// The namespaces that options name.
    pub fn netns(&self) -> impl Iterator<Item = &Netns> {
        self.forwards.iter().flat_map(Forward::netns)
    }
}

impl Forward {
    /// The namespaces of both sides, as far as any are named.
    pub fn netns(&self) -> impl Iterator<Item = &Netns> {
        let listen = match &self.listen {
            ListenSide::Bind { netns, .. } => netns.as_ref(),
            ListenSide::Listener(_) | ListenSide::Accepted(_) => None,
        };
        let connect = match &self.connect {
            ConnectSide::Address { netns, .. } => netns.as_ref(),
            ConnectSide::Connected(_) => None,
        };
        listen.into_iter().chain(connect)
    }

    /// Whether the rule forwards one connection and is then done.
    pub fn is_single(&self) -> bool {
        matches!(self.listen, ListenSide::Accepted(_))
            || matches!(self.connect, ConnectSide::Connected(_))
    }
}

impl Netns {
    /// Whether it has a name, which can appear, go, and come to mean another namespace.
    pub fn is_named(&self) -> bool {
        !matches!(self.source, NetnsSource::Fd(_))
    }
}

/// As it was typed: `-f blue`.
impl fmt::Display for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = self.option;
        match &self.source {
            NetnsSource::Path(path) => write!(f, "{option} {}", path.display()),
            NetnsSource::Pid(pid) => write!(f, "{option} pid:{pid}"),
            NetnsSource::Fd(fd) => write!(f, "{option} {fd}"),
        }
    }
}
