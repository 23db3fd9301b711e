//! A set of descriptors, by number, and what is to be reported of each.

use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollOp, EpollTimeout};

pub(super) struct Set(Epoll);

impl Set {
    /// Errors as epoll_create(2).
    pub(super) fn new() -> Result<Self, Errno> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(Self)
    }

    /// Reports `after` of the descriptor from now on, instead of `before`; nothing: it is not in
    /// the set. Errors as epoll_ctl(2): ENOMEM, ENOSPC.
    pub(super) fn change(
        &self,
        fd: RawFd,
        before: EpollFlags,
        after: EpollFlags,
    ) -> Result<(), Errno> {
        let op = match (before.is_empty(), after.is_empty()) {
            _ if before == after => return Ok(()),
            (true, _) => EpollOp::EpollCtlAdd,
            (false, true) => EpollOp::EpollCtlDel,
            (false, false) => EpollOp::EpollCtlMod,
        };
        crate::sys::epoll_ctl(&self.0, op, fd, after)
    }

    /// Takes as many reports as there is room for; each carries its descriptor's number. Errors
    /// as epoll_wait(2).
    pub(super) fn wait(
        &self,
        events: &mut [EpollEvent],
        timeout: EpollTimeout,
    ) -> Result<usize, Errno> {
        self.0.wait(events, timeout)
    }
}

impl AsRawFd for Set {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}
