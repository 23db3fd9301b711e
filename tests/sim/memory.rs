//! The engine's buffers and pipes, and which bytes are in them.

use crate::rng::Rng;

/// A range of bytes of the stream that the socket `source` reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub source: usize,
    pub start: u64,
    pub len: u64,
}

impl Extent {
    /// Without its first `len` bytes.
    pub fn after(self, len: u64) -> Self {
        Self { start: self.start + len, len: self.len - len, ..self }
    }
}

/// A buffer in the worker's hands.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    pub bytes: Extent,
    /// Sends from it that the worker has not seen the completion of.
    pub sends: u32,
}

/// Buffers by number; `None`: free.
#[derive(Debug)]
pub struct Buffers {
    received: Vec<Option<Received>>,
    free: Vec<u16>,
}

impl Buffers {
    pub fn new(count: u16) -> Self {
        Self { received: vec![None; usize::from(count)], free: (0..count).collect() }
    }

    pub fn are_all_free(&self) -> bool {
        self.free.len() == self.received.len()
    }

    pub fn are_all_used(&self) -> bool {
        self.free.is_empty()
    }

    pub fn used(&self) -> impl Iterator<Item = &Received> {
        self.received.iter().flatten()
    }

    /// Puts bytes into any of the free buffers.
    pub fn fill(&mut self, rng: &mut Rng, bytes: Extent) -> u16 {
        let id = self.free.swap_remove(rng.index(self.free.len()));
        self.received[usize::from(id)] = Some(Received { bytes, sends: 0 });
        id
    }

    pub fn get(&mut self, id: u16) -> Option<&mut Received> {
        self.received.get_mut(usize::from(id))?.as_mut()
    }

    /// Takes a buffer back; `None` if it was not out.
    pub fn give_back(&mut self, id: u16) -> Option<Received> {
        let received = self.received.get_mut(usize::from(id))?.take()?;
        self.free.push(id);
        Some(received)
    }
}

/// A pipe.
#[derive(Clone, Copy, Debug)]
pub struct Pipe {
    pub capacity: u64,
    pub content: Option<Extent>,
    /// The socket it was filled from last by those who have it.
    pub source: Option<usize>,
    pub state: PipeState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PipeState {
    InPool,
    Out,
    Closed,
}

impl Pipe {
    pub fn pending(&self) -> u64 {
        self.content.map_or(0, |bytes| bytes.len)
    }
}
