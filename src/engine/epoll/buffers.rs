//! The buffers the engine receives into.
//!
//! The one that was given back last is taken first: it is still in the cache. There are as many as
//! were ever in use at a time, in steps.

use crate::engine::Buffer;
use crate::flow::half::BUFFER_BYTES;

/// Buffers a worker can have: 160 MiB when all are in use, as many as a ring has.
const MAX_BUFFERS: u16 = 8192;

/// Buffers made at a time, so that a worker that has warmed up asks for no more.
const STEP_BUFFERS: u16 = 64;

const BYTES: usize = BUFFER_BYTES as usize;

#[derive(Default)]
pub(super) struct Buffers {
    /// By the numbers of the buffers in it, [`STEP_BUFFERS`] in each.
    steps: Vec<Box<[u8]>>,
    free: Vec<u16>,
}

impl Buffers {
    /// The number of a buffer nobody has; `None` if all there can be are in use, or there is no
    /// memory.
    pub(super) fn take(&mut self) -> Option<u16> {
        let made = self.steps.len() as u16 * STEP_BUFFERS;
        if self.free.is_empty() && made < MAX_BUFFERS {
            let mut step = Vec::new();
            step.try_reserve_exact(usize::from(STEP_BUFFERS) * BYTES).ok()?;
            step.resize(usize::from(STEP_BUFFERS) * BYTES, 0);
            self.steps.push(step.into());
            // Room for all of them is made here, and not when they are given back.
            self.free.reserve(usize::from(made + STEP_BUFFERS));
            self.free.extend((made..made + STEP_BUFFERS).rev());
        }
        self.free.pop()
    }

    pub(super) fn give_back(&mut self, id: u16) {
        self.free.push(id);
    }

    /// All of the buffer `id`.
    pub(super) fn memory(&mut self, id: u16) -> &mut [u8] {
        let (step, start) = position(id);
        &mut self.steps[step][start..start + BYTES]
    }

    /// The bytes of `buffer` that are not yet sent.
    pub(super) fn bytes(&self, buffer: &Buffer) -> &[u8] {
        let (step, start) = position(buffer.id());
        let range = buffer.range();
        &self.steps[step][start + range.start as usize..start + range.end as usize]
    }
}

fn position(id: u16) -> (usize, usize) {
    (usize::from(id / STEP_BUFFERS), usize::from(id % STEP_BUFFERS) * BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_buffer_is_had_twice_and_there_is_an_end() {
        let mut buffers = Buffers::default();
        let taken: std::collections::BTreeSet<u16> =
            std::iter::from_fn(|| buffers.take()).collect();
        assert_eq!(taken.len(), 8192);
        for id in [0, 63, 64, 8191] {
            buffers.memory(id).fill(id as u8);
        }
        for id in [0, 63, 64, 8191] {
            let mut buffer = Buffer::received(id, BUFFER_BYTES);
            assert_eq!(buffers.bytes(&buffer), [id as u8; BYTES]);
            buffer.consume(BUFFER_BYTES - 2);
            assert_eq!(buffers.bytes(&buffer), [id as u8; 2]);
        }
        buffers.give_back(7);
        assert_eq!((buffers.take(), buffers.take()), (Some(7), None));
    }
}
