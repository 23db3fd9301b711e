//! What is asked of the kernel for the sockets of every connection.
//!
//! Sockets accepted from a listening one inherit all of it (kernel-fact 18), so a listening socket
//! is prepared instead of each of its connections.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};

use crate::config::{Keepalive, SocketOptions};

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
