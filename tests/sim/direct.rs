//! What the worker does by itself, between two waits: splicing, and urgent bytes.

use nix::errno::Errno;

use crate::memory::{Extent, Pipe, PipeState};
use crate::world::{World, other};

/// Splicing.
impl World {
    /// An empty pipe from the pool, or a new one.
    pub fn empty_pipe(&mut self) -> Option<usize> {
        if let Some(id) = self.pipes.iter().position(|pipe| pipe.state == PipeState::InPool) {
            (self.pipes[id].state, self.pipes[id].source) = (PipeState::Out, None);
            return Some(id);
        }
        let is_out = |pipe: &&Pipe| pipe.state == PipeState::Out;
        if self.pipes.iter().filter(is_out).count() >= self.plan.pipes {
            return None;
        }
        let capacity = u64::from(self.rng.pick(&self.plan.capacities));
        self.pipes.push(Pipe { capacity, content: None, source: None, state: PipeState::Out });
        Some(self.pipes.len() - 1)
    }

    pub fn fill(&mut self, socket: usize, pipe: usize, len: u64) -> Result<u32, Errno> {
        self.check_fill(socket, pipe, len);
        if self.mishap() {
            return Err(self.rng.pick(&[Errno::EINTR, Errno::EAGAIN, Errno::ENOMEM]));
        }
        let available = if self.sockets[socket].is_next_urgent() {
            self.fill_at_mark(socket)?
        } else {
            self.sockets[socket].look()?
        };
        let available = self.sockets[socket].before_mark().map_or(available, |m| m.min(available));
        let moved = self.some_of(available.min(len));
        self.pipes[pipe].source = Some(socket);
        if moved > 0 {
            let start = self.sockets[socket].take_from(moved);
            self.pipes[pipe].content = Some(Extent { source: socket, start, len: moved });
            self.connections[socket / 2].filled += moved;
        }
        Ok(moved as u32)
    }

    /// At an urgent mark splice(2) finds nothing (tests/kernel/urgent.rs), or a failure that waits.
    fn fill_at_mark(&mut self, socket: usize) -> Result<u64, Errno> {
        let tells_failure = self.rng.percent(30);
        let source = &mut self.sockets[socket];
        if tells_failure && !source.fin && source.has_failed() {
            return Err(source.error.take().expect("it has failed"));
        }
        // Which of the two it is, is so at every attempt.
        if source.read.is_multiple_of(2) { Ok(0) } else { Err(Errno::EAGAIN) }
    }

    pub fn drain(&mut self, pipe: usize, socket: usize, len: u64) -> Result<u32, Errno> {
        let held = self.pipes[pipe].pending();
        assert!(len == held && held > 0, "drain of {len} bytes from a pipe of {held}");
        let bytes = self.pipes[pipe].content.expect("it holds bytes");
        if self.mishap() && self.rng.percent(50) {
            return Err(Errno::EINTR);
        }
        let mishap = self.mishap();
        let moved = self.put(socket, bytes, mishap)?;
        self.pipes[pipe].content = (moved < held).then(|| bytes.after(moved));
        self.drained += moved;
        Ok(moved as u32)
    }
}

/// Urgent bytes.
impl World {
    pub fn recv_urgent(&mut self, socket: usize) -> Result<Option<u8>, Errno> {
        if self.mishap() {
            return Err(self.failed(socket, &[Errno::EINTR]));
        }
        if self.sockets[socket].look()? == 0 {
            return Ok(None);
        }
        let is_urgent = self.sockets[socket].was_next_urgent();
        let offset = self.sockets[socket].take_from(1);
        assert!(is_urgent, "byte {offset} of {socket} is taken for an urgent one");
        self.sockets[socket].urgent_read.push_back(offset);
        Ok(Some(byte_at(socket, offset)))
    }

    pub fn send_urgent(&mut self, socket: usize, byte: u8) -> Result<(), Errno> {
        if self.mishap() && self.rng.percent(50) {
            return Err(Errno::EINTR);
        }
        let source = other(socket);
        let start = self.sockets[source].urgent_read.front().copied();
        let start = start.unwrap_or_else(|| panic!("{socket} gets a byte as urgent that is not"));
        assert!(byte == byte_at(source, start), "{byte} is not byte {start} of {source}");
        let mishap = self.mishap();
        self.put(socket, Extent { source, start, len: 1 }, mishap)?;
        self.sockets[source].urgent_read.pop_front();
        Ok(())
    }
}

/// Bytes are not stored; one that the worker holds itself is known by this.
fn byte_at(socket: usize, offset: u64) -> u8 {
    (offset * 31 + socket as u64 * 101) as u8
}
