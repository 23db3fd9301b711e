//! The command line: what was typed, and how it becomes a [`Config`].
//!
//! argv is read in three steps. The normaliser accepts every spelling netns_tcp_bridge does and
//! refuses the rest with its words; argh turns the one spelling that is left into [`Args`];
//! [`Args::into_config`] refuses options that do not go together. Nothing here opens a file or
//! asks the kernel anything.

mod help;
mod normalise;
mod options;
#[cfg(test)]
mod tests;
mod values;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;

use argh::FromArgs;

use crate::config::{
    Config, ConnectSide, Engine, Forward, Handoff, Keepalive, ListenSide, Netns, NetnsGone,
    NetnsSource, SocketOptions, SummaryFormat, Times, Transfer,
};
use crate::error::{Error, Kind, Result};

pub use help::{help, long_options, man, version};
pub use values::{Backlog, Connections, CpuList, Microseconds, PipeSize, Seconds, Workers};

/// What a command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "there is one, made once and taken apart at once")]
pub enum Command {
    /// Forward.
    Run(Args),
    /// Print [`help`].
    Help,
    /// Print [`version`].
    Version,
}

/// Reads an argv, program name included.
///
/// Help is printed, and comes before version, when all of argv parses: an error anywhere else on
/// the line is the answer instead, as in netns_tcp_bridge. The options need not go together then.
///
/// # Errors
/// [`Kind::Usage`]; the text is what follows `PROGRAM: `.
pub fn parse(argv: Vec<OsString>) -> Result<Command> {
    let typed = normalise::normalise(argv)?;
    let asked_for = |long| typed.iter().any(|typed| typed.option.long == long);
    if asked_for(options::HELP) {
        return Ok(Command::Help);
    }
    if asked_for(options::VERSION) {
        return Ok(Command::Version);
    }
    let canonical: Vec<&str> = typed
        .iter()
        .flat_map(|typed| [Some(typed.option.long), typed.value.as_deref()])
        .flatten()
        .collect();
    Args::from_args(&[], &canonical)
        .map(Command::Run)
        .map_err(|exit| Error::new(Kind::Usage, exit.output.trim_end()))
}

/// What was typed.
#[derive(Clone, Debug, Default, PartialEq, Eq, FromArgs)]
pub struct Args {
    /// address to listen at (`-l`)
    #[argh(option)]
    pub listen: Option<SocketAddr>,
    /// listening socket (`-L`)
    #[argh(option)]
    pub listen_fd: Option<u64>,
    /// the only client (`-S`)
    #[argh(option)]
    pub preaccepted_fd: Option<u64>,
    /// namespace to listen in (`-f`)
    #[argh(option)]
    pub listen_netns_file: Option<NetnsSource>,
    /// namespace to listen in (`-F`)
    #[argh(option)]
    pub listen_netns_fd: Option<u64>,
    /// address to forward to (`-c`)
    #[argh(option)]
    pub connect: Option<SocketAddr>,
    /// socket to forward to (`-C`)
    #[argh(option)]
    pub connect_fd: Option<u64>,
    /// namespace to connect from (`-t`)
    #[argh(option)]
    pub connect_netns_file: Option<NetnsSource>,
    /// namespace to connect from (`-T`)
    #[argh(option)]
    pub connect_netns_fd: Option<u64>,
    /// time to wait for a namespace
    #[argh(option)]
    pub wait_netns: Option<Seconds>,
    /// what to do when a name is another namespace's
    #[argh(option)]
    pub netns_gone: Option<NetnsGone>,
    /// where to get the listening socket from
    #[argh(option)]
    pub takeover: Option<PathBuf>,
    /// io_uring or epoll
    #[argh(option)]
    pub engine: Option<Engine>,
    /// what the listener passes to the connector
    #[argh(option)]
    pub handoff: Option<Handoff>,
    /// how bytes move
    #[argh(option)]
    pub transfer: Option<Transfer>,
    /// capacity of a pipe
    #[argh(option)]
    pub pipe_size: Option<PipeSize>,
    /// time to deliver what came before a reset
    #[argh(option)]
    pub reset_timeout: Option<Seconds>,
    /// number of threads
    #[argh(option)]
    pub workers: Option<Workers>,
    /// where the workers run
    #[argh(option)]
    pub cpus: Option<CpuList>,
    /// workers may move between CPUs
    #[argh(switch)]
    pub no_pin: bool,
    /// time to look for work before sleeping
    #[argh(option)]
    pub busy_poll: Option<Microseconds>,
    /// connections at a time
    #[argh(option)]
    pub max_connections: Option<Connections>,
    /// connections that may wait
    #[argh(option)]
    pub backlog: Option<Backlog>,
    /// time to connect
    #[argh(option)]
    pub connect_timeout: Option<Seconds>,
    /// time without a byte
    #[argh(option)]
    pub idle_timeout: Option<Seconds>,
    /// time without a byte when half-closed
    #[argh(option)]
    pub half_close_timeout: Option<Seconds>,
    /// time to end in
    #[argh(option)]
    pub drain_timeout: Option<Seconds>,
    /// probing of silent peers
    #[argh(option)]
    pub keepalive: Option<Keepalive>,
    /// time for acknowledgements
    #[argh(option)]
    pub user_timeout: Option<Seconds>,
    /// log addresses and connections (`-v`)
    #[argh(switch)]
    pub verbose: bool,
    /// descriptor that is told the listening address
    #[argh(option)]
    pub ready_fd: Option<u64>,
    /// summary at exit
    #[argh(option)]
    pub summary: Option<SummaryFormat>,
}

/// Large enough that a bulk transfer's pipe is seldom full; the usual `fs.pipe-max-size`, so no
/// privilege is needed.
const DEFAULT_PIPE_SIZE: PipeSize = PipeSize(1 << 20);

/// Several retransmissions to a slow or distant peer; what is still not delivered then would not
/// have been without a forwarder either.
const DEFAULT_RESET_TIMEOUT: Seconds = Seconds { ms: 5000 };

impl Args {
    /// What is meant by what was typed.
    ///
    /// # Errors
    /// [`Kind::Mix`] for options that do not go together and for a number no descriptor can have,
    /// with netns_tcp_bridge's texts, looked for in its order.
    pub fn into_config(self) -> Result<Config> {
        let forward = Forward { listen: self.listen_side()?, connect: self.connect_side()? };
        self.check_names(&forward)?;
        let binds = matches!(forward.listen, ListenSide::Bind { .. });
        if self.takeover.is_some() && (!binds || forward.is_single()) {
            return Err(mix("--takeover goes with -l and -c only"));
        }
        Ok(Config {
            forwards: vec![forward],
            wait_netns_ms: self.wait_netns.map_or(0, |Seconds { ms }| ms),
            ready_fd: fd("--ready-fd", self.ready_fd)?,
            netns_gone: self.netns_gone.unwrap_or_default(),
            takeover: self.takeover,
            engine: self.engine.unwrap_or_default(),
            handoff: self.handoff.unwrap_or_default(),
            transfer: self.transfer.unwrap_or_default(),
            workers: self.workers.map(|Workers(workers)| workers),
            cpus: self.cpus.map(|CpuList(cpus)| cpus),
            pin: !self.no_pin,
            busy_poll_us: self.busy_poll.map_or(0, |Microseconds(us)| us),
            pipe_size_bytes: self.pipe_size.unwrap_or(DEFAULT_PIPE_SIZE).0,
            reset_timeout_ms: self.reset_timeout.unwrap_or(DEFAULT_RESET_TIMEOUT).ms,
            times: Times {
                connect_ms: self.connect_timeout.map_or(0, |time| time.ms),
                idle_ms: self.idle_timeout.map_or(0, |time| time.ms),
                half_close_ms: self.half_close_timeout.map_or(0, |time| time.ms),
            },
            sockets: SocketOptions {
                keepalive: self.keepalive.unwrap_or_default(),
                user_timeout_ms: self.user_timeout.map_or(0, |time| time.ms),
            },
            max_connections: self.max_connections.map(|Connections(count)| count),
            drain_timeout_ms: self.drain_timeout.map_or(0, |time| time.ms),
            backlog: self.backlog.map_or(u32::MAX, |Backlog(count)| count),
            verbose: self.verbose,
            summary: self.summary,
        })
    }

    /// Whether there is a name for the options that are about names.
    fn check_names(&self, forward: &Forward) -> Result<()> {
        if !forward.netns().any(Netns::is_named) {
            if self.wait_netns.is_some() {
                return Err(mix("--wait-netns waits for what -f or -t names; neither is given"));
            }
            if self.netns_gone.is_some() {
                return Err(mix("--netns-gone is about what -f or -t names; neither is given"));
            }
        }
        let process = forward.netns().find(|netns| matches!(netns.source, NetnsSource::Pid(_)));
        match process {
            Some(netns) if self.netns_gone == Some(NetnsGone::Reopen) => Err(mix(format!(
                "--netns-gone reopen does not go with {netns}: the number may come back as that \
                 of any other process; give a name or a file"
            ))),
            _ => Ok(()),
        }
    }

    fn listen_side(&self) -> Result<ListenSide> {
        let listener = fd("-L", self.listen_fd)?;
        let accepted = fd("-S", self.preaccepted_fd)?;
        let side = match (self.listen, listener, accepted) {
            (Some(address), None, None) => ListenSide::Bind { address, netns: None },
            (None, Some(listener), None) => ListenSide::Listener(listener),
            (None, None, Some(accepted)) => ListenSide::Accepted(accepted),
            _ => return Err(mix("Specify exactly one of -l, -L or -S")),
        };
        let named = netns("-f", self.listen_netns_file.clone());
        let inherited = netns("-F", fd("-F", self.listen_netns_fd)?.map(NetnsSource::Fd));
        match (side, one_netns(named, inherited)?) {
            (ListenSide::Bind { address, .. }, netns) => Ok(ListenSide::Bind { address, netns }),
            (side, None) => Ok(side),
            _ => Err(mix("Listening-side network namespace is not relevant with -L or -S")),
        }
    }

    fn connect_side(&self) -> Result<ConnectSide> {
        let side = match (self.connect, fd("-C", self.connect_fd)?) {
            (Some(address), None) => ConnectSide::Address { address, netns: None },
            (None, Some(connected)) => ConnectSide::Connected(connected),
            _ => return Err(mix("Specify exactly one of -c or -C")),
        };
        let named = netns("-t", self.connect_netns_file.clone());
        let inherited = netns("-T", fd("-T", self.connect_netns_fd)?.map(NetnsSource::Fd));
        match (side, one_netns(named, inherited)?) {
            (ConnectSide::Address { address, .. }, netns) => {
                Ok(ConnectSide::Address { address, netns })
            }
            (side, None) => Ok(side),
            _ => Err(mix("Connecting-side network namespace is not relevant with -C")),
        }
    }
}

/// The namespace of one side, which one option names and another inherits.
fn one_netns(named: Option<Netns>, inherited: Option<Netns>) -> Result<Option<Netns>> {
    match (named, inherited) {
        (Some(Netns { option: named, .. }), Some(Netns { option: inherited, .. })) => {
            Err(mix(format!("Cannot specify both {named} and {inherited} simultaneously")))
        }
        (named, inherited) => Ok(named.or(inherited)),
    }
}

fn netns(option: &'static str, source: Option<NetnsSource>) -> Option<Netns> {
    source.map(|source| Netns { option, source })
}

/// The descriptor an option numbers. The original parses 64 bits first, so that a number no
/// descriptor can have is found here and not by the parser.
fn fd(option: &str, number: Option<u64>) -> Result<Option<RawFd>> {
    let Some(number) = number else { return Ok(None) };
    RawFd::try_from(number).map(Some).map_err(|reason| {
        mix(format!("{reason} ({option} {number} is not a file descriptor number)"))
    })
}

fn mix(text: impl Into<String>) -> Error {
    Error::new(Kind::Mix, text)
}
