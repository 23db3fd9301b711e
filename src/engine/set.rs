//! A set of descriptors, by number, and what is to be reported of each.

use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollOp, EpollTimeout};

/// Numbers below this need no more memory than there is at the start.
const ROOM: usize = 1 << 16;

pub(super) struct Set {
    epoll: Epoll,
    /// A bit for each descriptor's number.
    members: Vec<u64>,
}

impl Set {
    /// Errors as epoll_create(2).
    pub(super) fn new() -> Result<Self, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll, members: Vec::with_capacity(ROOM / 64) })
    }

    pub(super) fn has(&self, fd: RawFd) -> bool {
        let (word, bit) = position(fd);
        self.members.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Reports `events` of the descriptor from now on, by the name `data`. Errors as epoll_ctl(2):
    /// ENOMEM, ENOSPC.
    pub(super) fn join(&mut self, fd: RawFd, events: EpollFlags, data: u64) -> Result<(), Errno> {
        let op = if self.has(fd) { EpollOp::EpollCtlMod } else { EpollOp::EpollCtlAdd };
        crate::sys::epoll_ctl(&self.epoll, op, fd, events, data)?;
        let (word, bit) = position(fd);
        if word >= self.members.len() {
            self.members.resize(word + 1, 0);
        }
        self.members[word] |= bit;
        Ok(())
    }

    /// Reports nothing of the descriptor any more; false if it was not there.
    pub(super) fn leave(&mut self, fd: RawFd) -> bool {
        let was_there = self.has(fd);
        if was_there {
            let (word, bit) = position(fd);
            self.members[word] &= !bit;
            // It is there and open, and needs no memory.
            let (op, nothing) = (EpollOp::EpollCtlDel, EpollFlags::empty());
            let _ = crate::sys::epoll_ctl(&self.epoll, op, fd, nothing, 0);
        }
        was_there
    }

    /// Takes as many reports as there is room for. Errors as epoll_wait(2).
    pub(super) fn wait(
        &self,
        events: &mut [EpollEvent],
        timeout: EpollTimeout,
    ) -> Result<usize, Errno> {
        self.epoll.wait(events, timeout)
    }
}

impl AsRawFd for Set {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }
}

fn position(fd: RawFd) -> (usize, u64) {
    (fd as usize / 64, 1 << (fd as usize % 64))
}
