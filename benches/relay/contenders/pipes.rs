//! Pipes to splice through, as large as those of `nsplice`, and the empty ones between two uses.

use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

/// Capacity asked for. A user who may have no more gets less.
const WANTED_BYTES: usize = 1 << 20;

/// Empty pipes kept at most.
const KEPT_MAX: usize = 64;

pub(super) struct Pipe {
    pub(super) read: OwnedFd,
    pub(super) write: OwnedFd,
    pub(super) capacity: usize,
    /// Bytes in it.
    pub(super) pending: usize,
}

/// Pipes nobody uses now. A direction that is idle has none, so that an idle connection has no
/// more descriptors than with `nsplice`.
#[derive(Default)]
pub(super) struct Pipes(Vec<Pipe>);

impl Pipes {
    pub(super) fn take(&mut self) -> io::Result<Pipe> {
        if let Some(pipe) = self.0.pop() {
            return Ok(pipe);
        }
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(WANTED_BYTES as i32));
        let capacity = fcntl(&write, FcntlArg::F_GETPIPE_SZ)? as usize;
        Ok(Pipe { read, write, capacity, pending: 0 })
    }

    /// What is not empty is closed.
    pub(super) fn give_back(&mut self, pipe: Pipe) {
        if pipe.pending == 0 && self.0.len() < KEPT_MAX {
            self.0.push(pipe);
        }
    }
}
