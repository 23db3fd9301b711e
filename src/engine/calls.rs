//! What is done at once: the plain system calls, the same whichever engine waits for the rest.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    self as net, MsgFlags, Shutdown, SockFlag, SockType, SockaddrLike, SockaddrStorage,
    getpeername, socket,
};

use super::Buffer;
use crate::config::SocketOptions;
use crate::socket::prepare;

/// Why a set cannot be made.
pub(super) const NO_EPOLL: &str = "RLIMIT_NOFILE, or sysctl fs.epoll.max_user_watches, is too low";

pub(super) fn target_socket(
    target: Option<&SockaddrStorage>,
    options: &SocketOptions,
) -> Result<OwnedFd, Errno> {
    let family = target.ok_or(Errno::EDESTADDRREQ)?.family().ok_or(Errno::EAFNOSUPPORT)?;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(family, SockType::Stream, flags, None)?;
    prepare(&socket, options)?;
    Ok(socket)
}

/// How all is sent; `more`: see [`Engine::send`](super::Engine::send).
pub(super) fn send_flags(more: bool) -> MsgFlags {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    // The crate has no name for it.
    if more { flags | MsgFlags::from_bits_retain(libc::MSG_MORE) } else { flags }
}

/// Receives into `memory`, that of the buffer `id`, without waiting. `None`: end of stream. Also
/// whether the socket had more, asked only when the buffer is full. Errors as recv(2).
pub(super) fn receive(
    socket: &OwnedFd,
    id: u16,
    memory: &mut [u8],
) -> (Result<Option<Buffer>, Errno>, bool) {
    match net::recv(socket.as_raw_fd(), memory, MsgFlags::MSG_DONTWAIT) {
        Ok(length @ 1..) => {
            let more = length == memory.len() && crate::sys::unread(socket).unwrap_or(0) > 0;
            (Ok(Some(Buffer::received(id, length as u32))), more)
        }
        result => (result.map(|_| None), false),
    }
}

/// Sends `bytes`, as much as the socket takes at once. Errors as send(2).
pub(super) fn send(socket: &OwnedFd, bytes: &[u8], more: bool) -> Result<u32, Errno> {
    net::send(socket.as_raw_fd(), bytes, send_flags(more)).map(|length| length as u32)
}

/// Has what is kept back for more sent now; none may come, because the flow fails.
fn push(socket: &OwnedFd) {
    // Setting it does that, also again (tests/kernel/sending.rs). Unix-domain sockets keep nothing.
    let _ = net::setsockopt(socket, net::sockopt::TcpNoDelay, &true);
}

pub(super) fn shutdown(socket: &OwnedFd) {
    // ENOTCONN: the peer has reset it; reading tells.
    let _ = net::shutdown(socket.as_raw_fd(), Shutdown::Write);
}

pub(super) fn reset(socket: &OwnedFd) {
    push(socket);
    // It fails when the peer has reset it first, and for unix-domain sockets, which have no
    // reset: closing is all that can be done.
    let _ = crate::sys::reset(socket);
}

pub(super) fn is_at_mark(socket: &OwnedFd) -> bool {
    crate::sys::is_at_mark(socket).unwrap_or(false)
}

pub(super) fn recv_urgent(socket: &OwnedFd) -> Result<Option<u8>, Errno> {
    let mut byte = [0];
    let length = net::recv(socket.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT)?;
    Ok((length > 0).then_some(byte[0]))
}

pub(super) fn send_urgent(socket: &OwnedFd, byte: u8) -> Result<(), Errno> {
    net::send(socket.as_raw_fd(), &[byte], MsgFlags::MSG_OOB | send_flags(false)).map(drop)
}

pub(super) fn has_failed(socket: &OwnedFd) -> bool {
    !crate::sys::empty_error_queue(socket) || crate::sys::is_closed(socket).unwrap_or(true)
}

pub(super) fn failure(socket: &OwnedFd) -> Option<Errno> {
    crate::sys::take_error(socket.as_raw_fd()).err()
}

pub(super) fn unsent(socket: &OwnedFd) -> u32 {
    push(socket);
    crate::sys::unsent(socket).unwrap_or(0)
}

pub(super) fn peer(socket: &OwnedFd) -> Option<SockaddrStorage> {
    getpeername(socket.as_raw_fd()).ok()
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    /// What a peer gets of bytes with more to come, when `and_then` was done; before the kernel's
    /// timer would send them.
    fn received(and_then: impl Fn(&OwnedFd)) -> usize {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let near = OwnedFd::from(TcpStream::connect(address).expect("it listens"));
        let (mut far, _) = listener.accept().expect("it was connected to");
        let sent = net::send(near.as_raw_fd(), b"kept back", send_flags(true));
        assert_eq!(sent, Ok(9));
        and_then(&near);
        far.set_read_timeout(Some(Duration::from_millis(100))).expect("it is a time");
        far.read(&mut [0; 16]).unwrap_or(0)
    }

    #[test]
    fn what_is_kept_back_is_pushed_before_a_reset() {
        assert_eq!(received(|_| {}), 0, "nothing is kept back");
        assert_eq!(received(|socket| _ = unsent(socket)), 9);
        assert_eq!(received(reset), 9);
    }
}
