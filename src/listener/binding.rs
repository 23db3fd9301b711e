//! Making the listening socket, and saying why there can be none.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, getsockname, setsockopt, socket,
    sockopt,
};

use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::socket::prepare;
use crate::sys::listen;

/// Listens at `address` in the namespace this process is in.
pub(super) fn listen_at(address: SocketAddr, config: &Config) -> Result<OwnedFd> {
    bind_and_listen(address, config).map_err(|errno| cannot_listen(address, errno))
}

pub(super) fn cannot_listen(address: SocketAddr, errno: Errno) -> Error {
    let cause = match errno {
        Errno::EADDRINUSE => "another socket listens there",
        Errno::EADDRNOTAVAIL => {
            "no interface of the listen side's namespace has this address; is it up?"
        }
        Errno::EACCES => "ports below net.ipv4.ip_unprivileged_port_start need root",
        _ => "",
    };
    Error::system(Kind::Socket, format!("-l {address}: cannot listen"), errno, cause)
}

pub(super) fn bind_and_listen(
    address: SocketAddr,
    config: &Config,
) -> std::result::Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let listener = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    // Accepted sockets inherit what is set here (tests/kernel/accepting.rs).
    prepare(&listener, &config.sockets)?;
    if address.is_ipv6() {
        setsockopt(&listener, sockopt::Ipv6V6Only, &false)?;
    }
    bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&listener, config.backlog)?;
    Ok(listener)
}

/// The address a socket is bound to, if it can be told.
pub(super) fn own_address(socket: &OwnedFd) -> Option<SockaddrStorage> {
    getsockname(socket.as_raw_fd()).ok()
}

/// The same address as the standard library has it; `None` if it is no internet address.
pub(super) fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|&address| SocketAddr::V4(address.into()));
    v4.or_else(|| address.as_sockaddr_in6().map(|&address| SocketAddr::V6(address.into())))
}
