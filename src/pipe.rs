//! Pipes for splicing, and the pool that keeps empty ones for the next half that needs one.
//!
//! A pipe counts its own content. The pool takes an empty pipe back and closes any other, so no
//! flow can find bytes of another in its pipe.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// Smallest capacity in bytes worth having; below it copying is cheaper. A user past
/// `fs.pipe-user-pages-soft` gets pipes of 8 KiB (tests/kernel/pipes.rs).
const MIN_CAPACITY_BYTES: u32 = 64 << 10;

/// Empty pipes kept by a worker. Each flow that splices holds its pipe only while it has bytes
/// in it, so a few serve many flows.
const POOL_MAX: usize = 32;

/// Both flags, always: the pipe end must not block, and neither must the sockets, which are
/// O_NONBLOCK. Never SPLICE_F_MORE (tests/kernel/splicing.rs).
const FLAGS: SpliceFFlags = SpliceFFlags::SPLICE_F_NONBLOCK.union(SpliceFFlags::SPLICE_F_MOVE);

/// A pipe and the number of bytes in it.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: u32,
    content: u32,
}

impl Pipe {
    fn new(wanted_bytes: u32) -> Result<Pipe, Errno> {
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        let mut size = wanted_bytes;
        while fcntl(&write, FcntlArg::F_SETPIPE_SZ(size as i32)).is_err()
            && size > MIN_CAPACITY_BYTES
        {
            size = (size / 4).max(MIN_CAPACITY_BYTES);
        }
        let capacity = fcntl(&write, FcntlArg::F_GETPIPE_SZ)? as u32;
        Ok(Pipe { read, write, capacity, content: 0 })
    }

    /// Moves up to `len` bytes from `socket` into the pipe.
    pub fn fill(&mut self, socket: impl AsFd, len: u32) -> Result<u32, Errno> {
        let moved = splice(socket, None, &self.write, None, len as usize, FLAGS)? as u32;
        self.content += moved;
        Ok(moved)
    }

    /// Moves up to `len` bytes from the pipe into `socket`; `len` must not be more than the pipe
    /// holds (tests/kernel/splicing.rs).
    pub fn drain(&mut self, socket: impl AsFd, len: u32) -> Result<u32, Errno> {
        let len = len.min(self.content);
        let moved = splice(&self.read, None, socket, None, len as usize, FLAGS)? as u32;
        self.content -= moved;
        Ok(moved)
    }
}

/// How many times a pipe is not even asked for after the system had none worth having: asking costs
/// several calls, and whoever asks can copy.
const DENIALS: u32 = 64;

/// A worker's pipes: the empty ones, and how many there may be.
#[derive(Debug)]
pub struct PipePool {
    wanted_bytes: u32,
    empty: Vec<Pipe>,
    /// Pipes that may still be made.
    left: usize,
    denials: u32,
}

impl PipePool {
    /// A pool of up to `most` pipes that are to have a capacity of `wanted_bytes`.
    pub fn new(wanted_bytes: u32, most: usize) -> Self {
        Self { wanted_bytes, empty: Vec::with_capacity(POOL_MAX), left: most, denials: 0 }
    }

    /// An empty pipe and its capacity in bytes; `None` when there is none worth having.
    pub fn take(&mut self) -> Option<(Pipe, u32)> {
        if let Some(pipe) = self.empty.pop() {
            let capacity = pipe.capacity;
            return Some((pipe, capacity));
        }
        if self.denials > 0 {
            self.denials -= 1;
            return None;
        }
        let worth_having = MIN_CAPACITY_BYTES.min(self.wanted_bytes);
        let left = self.left.checked_sub(1)?;
        match Pipe::new(self.wanted_bytes) {
            Ok(pipe) if pipe.capacity >= worth_having => {
                self.left = left;
                let capacity = pipe.capacity;
                Some((pipe, capacity))
            }
            _ => {
                self.denials = DENIALS;
                None
            }
        }
    }

    /// Keeps `pipe` if it is empty and there is room, closes it otherwise.
    pub fn give_back(&mut self, pipe: Pipe) {
        if pipe.content == 0 && self.empty.len() < POOL_MAX {
            self.empty.push(pipe);
        } else {
            self.left += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_an_empty_pipe_comes_back() {
        let (mut peer, source) = UnixStream::pair().expect("socketpair");
        let (sink, mut out) = UnixStream::pair().expect("socketpair");
        peer.write_all(b"one flow's bytes").expect("write");
        let mut pool = PipePool::new(64 << 10, 2);

        let (mut pipe, capacity) = pool.take().expect("a pipe");
        assert_eq!(capacity, 64 << 10);
        assert_eq!(pipe.fill(&source, capacity), Ok(16));
        pool.give_back(pipe);
        assert!(pool.empty.is_empty());

        let (mut pipe, _) = pool.take().expect("a pipe");
        peer.write_all(b"another's").expect("write");
        assert_eq!(pipe.fill(&source, capacity), Ok(9));
        assert_eq!(pipe.drain(&sink, capacity), Ok(9));
        pool.give_back(pipe);
        assert_eq!(pool.empty.len(), 1);
        let mut got = [0; 9];
        out.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"another's");
    }

    #[test]
    fn there_are_no_more_than_there_may_be() {
        let mut pool = PipePool::new(64 << 10, 2);
        let (one, _) = pool.take().expect("a pipe");
        let two = pool.take().expect("a second one");
        assert!(pool.take().is_none());
        pool.give_back(one);
        let (mut one, _) = pool.take().expect("the first one again");
        // One that holds bytes is closed, which makes room for another.
        one.content = 1;
        pool.give_back(one);
        assert!(pool.take().is_some() && pool.take().is_none());
        drop(two);
    }
}
