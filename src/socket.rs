//! What is asked of the kernel for the sockets of every connection.
//!
//! Sockets accepted from a listening one inherit all of it (tests/kernel/accepting.rs), so a
//! listening socket is prepared instead of each of its connections.

use std::fs::read_to_string;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use crate::config::{Keepalive, SocketOptions};
use crate::sys;

/// Takes back what [`prepare`] sets in some sockets only, with the namespace's values as those of a
/// new socket. Errors as setsockopt(2).
pub fn reset(socket: &impl AsFd) -> Result<(), Errno> {
    let of_namespace = |name| read_to_string(format!("/proc/sys/net/ipv4/tcp_keepalive_{name}"));
    let value = |name| of_namespace(name).ok()?.trim().parse::<u32>().ok();
    setsockopt(socket, sockopt::TcpUserTimeout, &0)?;
    // Without /proc they stay as they are.
    value("time").map_or(Ok(()), |s| setsockopt(socket, sockopt::TcpKeepIdle, &s))?;
    value("intvl").map_or(Ok(()), |s| setsockopt(socket, sockopt::TcpKeepInterval, &s))?;
    value("probes").map_or(Ok(()), |count| setsockopt(socket, sockopt::TcpKeepCount, &count))
}

/// Prepares a TCP socket: short messages are not delayed, an urgent byte keeps its place in the
/// stream, a silent peer is probed. Errors as setsockopt(2).
pub fn prepare(socket: &impl AsFd, options: &SocketOptions) -> Result<(), Errno> {
    setsockopt(socket, sockopt::TcpNoDelay, &true)?;
    setsockopt(socket, sockopt::OobInline, &true)?;
    if options.user_timeout_ms > 0 {
        setsockopt(socket, sockopt::TcpUserTimeout, &options.user_timeout_ms)?;
    }
    setsockopt(socket, sockopt::KeepAlive, &(options.keepalive != Keepalive::Off))?;
    if let Keepalive::Set { idle_s, interval_s, count } = options.keepalive {
        setsockopt(socket, sockopt::TcpKeepIdle, &idle_s)?;
        setsockopt(socket, sockopt::TcpKeepInterval, &interval_s)?;
        setsockopt(socket, sockopt::TcpKeepCount, &count)?;
    }
    Ok(())
}

/// As [`prepare`], for a socket that another program made, or that was accepted from such a one:
/// what that program asked for, and a peer would notice, is undone. As far as it is a kind of
/// socket that knows all this; one that was reset refuses, and forwarding then says so.
pub fn adopt(socket: &OwnedFd, options: &SocketOptions) {
    // Closing must not wait: it would hold up every other connection of its worker.
    let _ = setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 });
    for (level, name, value) in NEUTRAL {
        let _ = sys::set_option(socket, level, name, value);
    }
    sys::empty_error_queue(socket);
    if sys::is_inet(socket) {
        let _ = prepare(socket, options);
    } else {
        let _ = setsockopt(socket, sockopt::OobInline, &true);
    }
}

/// Options by level and name, and the values that change nothing on the wire.
const NEUTRAL: [(i32, i32, i32); 6] = [
    // Bytes are sent and told of as they come ...
    (libc::IPPROTO_TCP, libc::TCP_CORK, 0),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 0),
    // ... and the socket fails only when the connection does.
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPING, 0),
    (libc::IPPROTO_IP, libc::IP_RECVERR, 0),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 0),
];

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use nix::sys::socket::getsockopt;

    use super::*;

    #[test]
    fn what_was_set_is_taken_back() {
        let times = |socket: &TcpListener| {
            let idle = getsockopt(socket, sockopt::TcpKeepIdle).expect("TCP");
            let interval = getsockopt(socket, sockopt::TcpKeepInterval).expect("TCP");
            let count = getsockopt(socket, sockopt::TcpKeepCount).expect("TCP");
            let user_timeout = getsockopt(socket, sockopt::TcpUserTimeout).expect("TCP");
            [idle, interval, count, user_timeout]
        };
        let socket = TcpListener::bind("127.0.0.1:0").expect("bind");
        let new = times(&socket);
        let keepalive = Keepalive::Set { idle_s: 60, interval_s: 10, count: 6 };
        prepare(&socket, &SocketOptions { keepalive, user_timeout_ms: 5000 }).expect("prepared");
        assert_eq!(times(&socket), [60, 10, 6, 5000]);
        reset(&socket).expect("reset");
        assert_eq!(times(&socket), new);
    }
}
