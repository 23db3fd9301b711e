//! The table of options: the one place that knows how an option is spelled and described.
//!
//! The normaliser, `--help`, the man page and the tests all read it. What the typed values mean is
//! [`Args`](super::Args)' business.

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::values::{Backlog, Connections, CpuList, Microseconds, PipeSize, Seconds, Workers};
use crate::config::{Engine, Handoff, Keepalive, NetnsGone, NetnsSource, SummaryFormat, Transfer};

/// Options that belong together, under one heading.
pub(super) struct Section {
    pub(super) title: &'static str,
    pub(super) options: &'static [Opt],
}

/// One option.
pub(super) struct Opt {
    pub(super) short: Option<char>,
    /// The long name, with its dashes.
    pub(super) long: &'static str,
    /// What follows it; `None` for a switch.
    pub(super) value: Option<Value>,
    /// A phrase without a full stop; ASCII.
    pub(super) help: &'static str,
    /// What holds when the option is not given, as a person would type or say it.
    pub(super) default: Option<&'static str>,
}

/// The value an option takes.
pub(super) struct Value {
    /// Its placeholder.
    pub(super) name: &'static str,
    /// Completes "... is not ..." in an error text.
    pub(super) form: &'static str,
    /// Parses it as the field of [`Args`](super::Args) does, for the reason it is refused.
    pub(super) check: fn(&str) -> Result<(), String>,
}

/// The option of this short name.
pub(super) fn by_short(short: char) -> Option<&'static Opt> {
    all().find(|option| option.short == Some(short))
}

/// The option of this long name, with its dashes; names cannot be abbreviated.
pub(super) fn by_long(long: &str) -> Option<&'static Opt> {
    all().find(|option| option.long == long)
}

/// All options, in the order of the table.
pub(super) fn all() -> impl Iterator<Item = &'static Opt> {
    SECTIONS.iter().flat_map(|section| section.options)
}

pub(super) const HELP: &str = "--help";
pub(super) const VERSION: &str = "--version";

/// The table.
pub(super) const SECTIONS: &[Section] = &[
    Section { title: "Listen side (exactly one of -l, -L, -S)", options: LISTEN_SIDE },
    Section { title: "Connect side (exactly one of -c, -C)", options: CONNECT_SIDE },
    Section { title: "Namespaces that come and go", options: NAMESPACES },
    Section { title: "Restart without loss", options: RESTART },
    Section { title: "Forwarding", options: FORWARDING },
    Section { title: "Limits and times", options: LIMITS },
    Section { title: "Reporting", options: REPORTING },
];

const LISTEN_SIDE: &[Opt] = &[
    Opt {
        short: Some('l'),
        long: "--listen",
        value: Some(ADDRESS),
        help: "Bind this numeric address and listen; [::]:PORT takes IPv4 too, \
               port 0 lets the kernel choose",
        default: None,
    },
    Opt {
        short: Some('L'),
        long: "--listen-fd",
        value: Some(FD),
        help: "Accept from this inherited listening socket, whose options become those of one that \
               -l makes",
        default: None,
    },
    Opt {
        short: Some('S'),
        long: "--preaccepted-fd",
        value: Some(FD),
        help: "Forward this inherited connected socket as the only client, then exit",
        default: None,
    },
    Opt {
        short: Some('f'),
        long: "--listen-netns-file",
        value: Some(NETNS),
        help: "Listen in this network namespace: a path such as /proc/1234/ns/net, \
               a name that ip netns knows, or pid:N",
        default: Some("the caller's"),
    },
    Opt {
        short: Some('F'),
        long: "--listen-netns-fd",
        value: Some(FD),
        help: "Listen in the network namespace this inherited descriptor refers to",
        default: None,
    },
];

const CONNECT_SIDE: &[Opt] = &[
    Opt {
        short: Some('c'),
        long: "--connect",
        value: Some(ADDRESS),
        help: "Forward to this numeric address",
        default: None,
    },
    Opt {
        short: Some('C'),
        long: "--connect-fd",
        value: Some(FD),
        help: "Forward one connection to this inherited connected socket, then exit",
        default: None,
    },
    Opt {
        short: Some('t'),
        long: "--connect-netns-file",
        value: Some(NETNS),
        help: "Connect from this network namespace, named as for -f",
        default: Some("the caller's"),
    },
    Opt {
        short: Some('T'),
        long: "--connect-netns-fd",
        value: Some(FD),
        help: "Connect from the network namespace this inherited descriptor refers to",
        default: None,
    },
];

const NAMESPACES: &[Opt] = &[
    Opt {
        short: None,
        long: "--wait-netns",
        value: Some(SECONDS),
        help: "Longest time to wait at the start for the namespaces -f and -t name to be there",
        default: Some("0"),
    },
    Opt {
        short: None,
        long: "--netns-gone",
        value: Some(NETNS_GONE),
        help: "When a name given by -f or -t is deleted or becomes another namespace's: stay in \
               the one entered at the start, exit, or have new connections in the other one",
        default: Some("keep"),
    },
];

const RESTART: &[Opt] = &[Opt {
    short: None,
    long: "--takeover",
    value: Some(PATH),
    help: "Take the listening socket over from the process that waits at this path, if there is \
           one, which then accepts no more; and wait there for the next. It needs Linux 5.14",
    default: None,
}];

const FORWARDING: &[Opt] = &[
    Opt {
        short: None,
        long: "--engine",
        value: Some(ENGINE),
        help: "Wait for the kernel with io_uring or with epoll; auto takes io_uring, or epoll \
               where the kernel has no io_uring or does not allow it. The one needs Linux 6.1, the \
               other 4.11",
        default: Some("auto"),
    },
    Opt {
        short: None,
        long: "--handoff",
        value: Some(HANDOFF),
        help: "Pass the connector the listening socket, once, or each accepted connection",
        default: Some("socket"),
    },
    Opt {
        short: None,
        long: "--transfer",
        value: Some(TRANSFER),
        help: "Copy the bytes, splice them through a pipe, or choose by what each direction \
               of a connection carries",
        default: Some("auto"),
    },
    Opt {
        short: None,
        long: "--pipe-size",
        value: Some(PIPE_SIZE),
        help: "Capacity of each pipe, 4K to 1024M; K and M mean KiB and MiB",
        default: Some("1M"),
    },
    Opt {
        short: None,
        long: "--workers",
        value: Some(WORKERS),
        help: "Number of worker threads, 1 to 1024, each of which keeps the connections it gets. \
               Else bulk is shared evenly, and short messages are brought together in as few as \
               can carry them",
        default: Some("one for each allowed CPU"),
    },
    Opt {
        short: None,
        long: "--cpus",
        value: Some(CPUS),
        help: "CPUs to run the workers on, in turn, such as 0-2,5",
        default: Some("all that are allowed"),
    },
    Opt {
        short: None,
        long: "--no-pin",
        value: None,
        help: "Let workers run on any CPU. Otherwise each keeps to one of --cpus, but while it \
               splices it may run on all of these; the worker of -S or -C is pinned only if \
               --cpus is given",
        default: None,
    },
    Opt {
        short: None,
        long: "--busy-poll",
        value: Some(MICROSECONDS),
        help: "Time for which a worker with nothing to do keeps its CPU busy looking for work, \
               before it sleeps",
        default: Some("0"),
    },
];

const LIMITS: &[Opt] = &[
    Opt {
        short: None,
        long: "--max-connections",
        value: Some(CONNECTIONS),
        help: "Connections at a time; further clients wait in the backlog",
        default: Some("as descriptors allow"),
    },
    Opt {
        short: None,
        long: "--backlog",
        value: Some(BACKLOG),
        help: "Connections that may wait to be accepted",
        default: Some("the system's maximum"),
    },
    Opt {
        short: None,
        long: "--connect-timeout",
        value: Some(SECONDS),
        help: "Longest time to reach the target; then the client is reset; 0: the system's",
        default: Some("0"),
    },
    Opt {
        short: None,
        long: "--idle-timeout",
        value: Some(SECONDS),
        help: "Reset a connection that carries no byte for this time; 0: never",
        default: Some("0"),
    },
    Opt {
        short: None,
        long: "--half-close-timeout",
        value: Some(SECONDS),
        help: "The same for a connection of which one side has ended its stream; 0: never",
        default: Some("0"),
    },
    Opt {
        short: None,
        long: "--reset-timeout",
        value: Some(SECONDS),
        help: "Longest time to deliver what a connection's one side sent before a reset, \
               before the reset is passed on to the other",
        default: Some("5"),
    },
    Opt {
        short: None,
        long: "--drain-timeout",
        value: Some(SECONDS),
        help: "Time for connections to end by themselves after SIGTERM or SIGINT, or when \
               another process has taken over; those that are left then, or at a second signal, \
               are reset. Signals within 200 ms are one order",
        default: Some("0"),
    },
    Opt {
        short: None,
        long: "--keepalive",
        value: Some(KEEPALIVE),
        help: "TIMES is IDLE,INTERVAL,COUNT: probe a silent peer after IDLE seconds, then every \
               INTERVAL seconds, and give it up after COUNT probes; off: never",
        default: Some("the system's times"),
    },
    Opt {
        short: None,
        long: "--user-timeout",
        value: Some(SECONDS),
        help: "Longest time for which a peer may leave unacknowledged what was sent to it; 0: \
               the system's",
        default: Some("0"),
    },
];

const REPORTING: &[Opt] = &[
    Opt {
        short: Some('v'),
        long: "--verbose",
        value: None,
        help: "Log the listening address and a line for each connection",
        default: None,
    },
    Opt {
        short: None,
        long: "--ready-fd",
        value: Some(FD),
        help: "Tell this inherited descriptor the address once connections are accepted",
        default: None,
    },
    Opt {
        short: None,
        long: "--summary",
        value: Some(SUMMARY),
        help: "Print a summary on standard output at exit",
        default: None,
    },
    Opt { short: Some('h'), long: HELP, value: None, help: "Print this help", default: None },
    Opt {
        short: Some('V'),
        long: VERSION,
        value: None,
        help: "Print the name and version",
        default: None,
    },
];

const ADDRESS: Value =
    Value { name: "IP:PORT", form: "a numeric IP:PORT or [IPv6]:PORT", check: check::<SocketAddr> };
const FD: Value = Value { name: "FD", form: "a file descriptor number", check: check::<u64> };
const NETNS: Value =
    Value { name: "NETNS", form: "a path, a name or pid:N", check: check::<NetnsSource> };
const NETNS_GONE: Value =
    Value { name: "keep|exit|reopen", form: "keep, exit or reopen", check: check::<NetnsGone> };
const PATH: Value = Value { name: "PATH", form: "a path", check: check::<PathBuf> };
const HANDOFF: Value =
    Value { name: "socket|connections", form: "socket or connections", check: check::<Handoff> };
const ENGINE: Value =
    Value { name: "auto|uring|epoll", form: "auto, uring or epoll", check: check::<Engine> };
const TRANSFER: Value =
    Value { name: "auto|copy|splice", form: "auto, copy or splice", check: check::<Transfer> };
const PIPE_SIZE: Value =
    Value { name: "BYTES", form: "a size from 4K to 1024M", check: check::<PipeSize> };
const SECONDS: Value = Value {
    name: "SECONDS",
    form: "a number of seconds up to 86400, such as 5 or 0.25",
    check: check::<Seconds>,
};
const MICROSECONDS: Value = Value {
    name: "USEC",
    form: "a number of microseconds up to 1000000",
    check: check::<Microseconds>,
};
const CONNECTIONS: Value =
    Value { name: "CONNECTIONS", form: "a number from 1 to 10000000", check: check::<Connections> };
const BACKLOG: Value =
    Value { name: "CLIENTS", form: "a number from 1 to 2147483647", check: check::<Backlog> };
const KEEPALIVE: Value = Value {
    name: "TIMES|off",
    form: "three numbers such as 60,10,6 (1 to 32767 seconds each, 1 to 127 probes), or off",
    check: check::<Keepalive>,
};
const WORKERS: Value =
    Value { name: "N", form: "a number from 1 to 1024", check: check::<Workers> };
const CPUS: Value = Value {
    name: "LIST",
    form: "a list of CPU numbers below 1024 such as 0-2,5",
    check: check::<CpuList>,
};
const SUMMARY: Value = Value { name: "json", form: "json", check: check::<SummaryFormat> };

fn check<T: FromStr<Err: Display>>(value: &str) -> Result<(), String> {
    value.parse::<T>().map(drop).map_err(|reason| reason.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for option in all() {
            assert_eq!(all().filter(|other| other.long == option.long).count(), 1);
            let shorts = all().filter(|other| other.short == option.short).count();
            assert!(option.short.is_none() || shorts == 1, "{}", option.long);
        }
    }

    #[test]
    fn long_names_start_with_dashes_and_hold_no_equals_sign() {
        for option in all() {
            assert!(option.long.starts_with("--") && !option.long.contains('='));
        }
    }
}
