//! The buffers a ring receives into: one mapping, handed to the kernel piece by piece.
//!
//! The kernel takes a buffer only when there is something to receive ("provided buffers"), so
//! an idle connection has none. Buffers that were never needed are address space, not memory. Some
//! are not handed to it: what is received at once goes there.

#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;
use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::RECEIVED_BY_CALLS;
use crate::engine::{Buffer, calls};
use crate::flow::half::BUFFER_BYTES;

/// Buffers a ring can have: 160 MiB when all are in use. A power of two.
const MAX_BUFFERS: u16 = 8192;

/// Buffers besides those, which the kernel is not given, for receives that are made at once: of one
/// turn, while those of the last are being sent. Where full sinks hold them all, the ring receives.
const OWN_BUFFERS: u16 = 2 * RECEIVED_BY_CALLS as u16;

/// Buffers provided at the start, and again for each so many receives that found none in a turn.
/// Few, because the kernel uses them in turn: all that are provided take memory, and pass through
/// the cache.
const STEP_BUFFERS: u16 = 8;

/// The buffer group's number in its ring; a ring has only one.
pub(super) const GROUP: u16 = 0;

/// A private anonymous mapping.
struct Mapping {
    start: NonNull<c_void>,
    bytes: usize,
}

impl Mapping {
    fn new(bytes: usize) -> Result<Self, Errno> {
        let length = NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)?
        };
        Ok(Self { start, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and its owner keeps it until the ring is gone.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

/// A ring's buffers.
pub(super) struct Buffers {
    memory: Mapping,
    entries: Mapping,
    /// Where the next buffer is put; the kernel's copy is in the first entry.
    tail: u16,
    /// Buffers the kernel has been given for the first time.
    provided: u16,
    /// Those of them that no receive of this turn which found none has been promised.
    promised: u16,
    /// Those of the others that nobody has. The last is taken first: it is still in the cache.
    own: Vec<u16>,
}

impl Buffers {
    pub(super) fn new() -> Result<Self, Errno> {
        let count = usize::from(MAX_BUFFERS + OWN_BUFFERS);
        let memory = Mapping::new(count * BUFFER_BYTES as usize)?;
        let entries = Mapping::new(usize::from(MAX_BUFFERS) * size_of::<BufRingEntry>())?;
        let own = (MAX_BUFFERS..MAX_BUFFERS + OWN_BUFFERS).rev().collect();
        Ok(Self { memory, entries, tail: 0, provided: 0, promised: 0, own })
    }

    /// Makes them known to `ring`. They must outlive it.
    pub(super) fn register(&mut self, ring: &io_uring::IoUring) -> std::io::Result<()> {
        let address = self.entries.start.as_ptr() as u64;
        // SAFETY: the mapping has MAX_BUFFERS entries, and whoever owns both drops the ring first.
        unsafe { ring.submitter().register_buf_ring_with_flags(address, MAX_BUFFERS, GROUP, 0)? };
        self.grow();
        Ok(())
    }

    /// Provides one buffer more for a receive that found none and is to be tried again; false if
    /// there can be no more.
    pub(super) fn promise(&mut self) -> bool {
        if self.promised == 0 {
            self.promised = self.grow();
        }
        let has_any = self.promised > 0;
        self.promised -= u16::from(has_any);
        has_any
    }

    /// A turn begins. What was promised in the last one is there, for whoever receives first.
    pub(super) fn turn(&mut self) {
        self.promised = 0;
    }

    /// Returns how many more there are.
    fn grow(&mut self) -> u16 {
        let more = STEP_BUFFERS.min(MAX_BUFFERS - self.provided);
        for id in self.provided..self.provided + more {
            self.provide(id);
        }
        self.provided += more;
        more
    }

    /// Gives a buffer back to where it is from.
    pub(super) fn give_back(&mut self, buffer: Buffer) {
        if buffer.id() < MAX_BUFFERS {
            self.provide(buffer.id());
        } else {
            self.own.push(buffer.id());
        }
    }

    /// Receives at once into a buffer of its own; `None` if all are in use. Otherwise as
    /// [`calls::receive`].
    pub(super) fn receive(
        &mut self,
        socket: &OwnedFd,
    ) -> Option<(Result<Option<Buffer>, Errno>, bool)> {
        let id = self.own.pop()?;
        let start = self.address(id).cast_mut();
        // SAFETY: the place is inside the mapping, and nobody has the buffer.
        let memory = unsafe { std::slice::from_raw_parts_mut(start, BUFFER_BYTES as usize) };
        let (result, more) = calls::receive(socket, id, memory);
        if !matches!(result, Ok(Some(_))) {
            self.own.push(id);
        }
        Some((result, more))
    }

    /// Sends what is left of `buffer` at once. Otherwise as [`calls::send`].
    pub(super) fn send(&self, socket: &OwnedFd, buffer: &Buffer, more: bool) -> Result<u32, Errno> {
        let length = buffer.len() as usize;
        // SAFETY: the bytes are inside the mapping, and whoever has the buffer has lent it.
        let bytes = unsafe { std::slice::from_raw_parts(self.bytes(buffer), length) };
        calls::send(socket, bytes, more)
    }

    fn provide(&mut self, id: u16) {
        let first = self.entries.start.as_ptr().cast::<BufRingEntry>();
        // SAFETY: the masked index is inside the mapping. The kernel reads an entry only after
        // the tail has passed it, and this thread alone writes entries and the tail.
        unsafe {
            let entry = &mut *first.add(usize::from(self.tail & (MAX_BUFFERS - 1)));
            entry.set_addr(self.address(id) as u64);
            entry.set_len(BUFFER_BYTES);
            entry.set_bid(id);
            self.tail = self.tail.wrapping_add(1);
            let tail = BufRingEntry::tail(first).cast::<AtomicU16>();
            (*tail).store(self.tail, Ordering::Release);
        }
    }

    /// Where the bytes of `buffer` that are left begin.
    pub(super) fn bytes(&self, buffer: &Buffer) -> *const u8 {
        self.address(buffer.id()).wrapping_add(buffer.range().start as usize)
    }

    fn address(&self, id: u16) -> *const u8 {
        let offset = usize::from(id) * BUFFER_BYTES as usize;
        self.memory.start.as_ptr().cast::<u8>().wrapping_add(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_more_as_receives_found_none() {
        let mut buffers = Buffers::new().expect("a mapping");
        buffers.grow();
        for found_none in [56, 1, 0, 8] {
            let before = buffers.provided;
            assert!((0..found_none).all(|_| buffers.promise()));
            let more = buffers.provided - before;
            assert!((found_none..found_none + STEP_BUFFERS).contains(&more), "{more}");
            buffers.turn();
        }
        while buffers.provided < MAX_BUFFERS {
            assert!(buffers.promise());
        }
        buffers.turn();
        assert!(!buffers.promise(), "there are no more");
    }
}
