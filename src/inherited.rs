//! Descriptors given by number: taking them over, and checking that they are what they should be.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getpeername, getsockname, getsockopt,
    sockopt,
};

use crate::config::SocketOptions;
use crate::error::{Error, Kind, Result};
use crate::socket::{adopt, reset};

/// Checks that the descriptors options name are open, before the program opens any of its own:
/// a number that is not open would come to mean one of those.
pub fn check_open(named: &[(&str, RawFd)]) -> Result<()> {
    for &(option, fd) in named {
        crate::sys::copy_inherited(fd).map_err(|errno| unusable(option, fd, errno))?;
    }
    Ok(())
}

/// The descriptors taken over so far. The same number may be given for several options.
#[derive(Debug, Default)]
pub struct Inherited {
    taken: BTreeSet<RawFd>,
}

impl Inherited {
    /// A descriptor of our own for the inherited `fd`, which `option` named.
    pub fn take(&mut self, option: &str, fd: RawFd) -> Result<OwnedFd> {
        let copy = crate::sys::copy_inherited(fd).map_err(|errno| unusable(option, fd, errno))?;
        self.taken.insert(fd);
        Ok(copy)
    }

    /// Closes the inherited numbers: from now on only what [`Inherited::take`] returned is open,
    /// so closing that really closes it.
    pub fn close_originals(self) {
        for fd in self.taken {
            // It was open when it was taken, so closing it cannot fail in a way that matters.
            let _ = crate::sys::close_inherited(fd);
        }
    }
}

/// Where a program that waits for us wants to be told the address. A standard stream stays open.
pub fn ready_fd(fd: RawFd, inherited: &mut Inherited) -> Result<OwnedFd> {
    let copy = inherited.take("--ready-fd", fd)?;
    if fd <= nix::libc::STDERR_FILENO {
        inherited.taken.remove(&fd);
    }
    let flags =
        fcntl(&copy, FcntlArg::F_GETFL).map_err(|errno| unusable("--ready-fd", fd, errno))?;
    if OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE == OFlag::O_RDONLY {
        return Err(wrong("--ready-fd", fd, "is open for reading only"));
    }
    Ok(copy)
}

/// Checks that `socket`, given as `option`, is a listening stream socket.
pub fn check_listener(
    option: &str,
    fd: RawFd,
    socket: &OwnedFd,
    options: &SocketOptions,
) -> Result<()> {
    check_stream(option, fd, socket)?;
    if !getsockopt(socket, sockopt::AcceptConn).unwrap_or(false) {
        return Err(wrong(option, fd, "is not a listening socket; listen(2) must come first"));
    }
    // For those accepted later; who waits already has what it had (tests/kernel/accepting.rs). A
    // socket of another kind has no such times.
    let _ = reset(socket);
    adopt(socket, options);
    Ok(())
}

/// Checks that `socket`, given as `option`, is a connected stream socket, and makes it ready for
/// forwarding.
pub fn check_connected(
    option: &str,
    fd: RawFd,
    socket: &OwnedFd,
    options: &SocketOptions,
) -> Result<()> {
    check_stream(option, fd, socket)?;
    if getsockopt(socket, sockopt::AcceptConn).unwrap_or(false) {
        return Err(wrong(option, fd, "is a listening socket, not a connected one"));
    }
    if getpeername::<SockaddrStorage>(socket.as_raw_fd()) == Err(Errno::ENOTCONN) {
        return Err(wrong(option, fd, "is not connected"));
    }
    let _ = reset(socket);
    adopt(socket, options);
    crate::sys::set_nonblocking(socket).map_err(|errno| unusable(option, fd, errno))
}

fn check_stream(option: &str, fd: RawFd, socket: &OwnedFd) -> Result<()> {
    match getsockopt(socket, sockopt::SockType) {
        Ok(SockType::Stream) => {}
        Ok(_) => return Err(wrong(option, fd, "is not a stream socket")),
        Err(Errno::ENOTSOCK) => return Err(wrong(option, fd, "is not a socket")),
        Err(errno) => return Err(unusable(option, fd, errno)),
    }
    let name = getsockname::<SockaddrStorage>(socket.as_raw_fd()).ok();
    match name.and_then(|name| name.family()) {
        Some(AddressFamily::Inet | AddressFamily::Inet6 | AddressFamily::Unix) => Ok(()),
        _ => Err(wrong(option, fd, "is neither a TCP nor a unix-domain socket")),
    }
}

fn unusable(option: &str, fd: RawFd, errno: Errno) -> Error {
    let cause = match errno {
        Errno::EBADF => "it must be open when the program starts",
        _ => "",
    };
    Error::system(Kind::Socket, format!("{option} {fd}: cannot use the descriptor"), errno, cause)
}

fn wrong(option: &str, fd: RawFd, what: &str) -> Error {
    Error::new(Kind::Socket, format!("{option} {fd}: the descriptor {what}"))
}
