//! `--handoff connections`: accepted connections on their way to the workers.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use crate::handoff::{Channel, Message};
use crate::queue;
use crate::sys::{self, SharedCounters};

/// Connections accepted before those accepted so far are handed over.
const BATCH: usize = 64;

/// Connections in a message: a worker takes all of them or none, by the descriptors it has left.
const MESSAGE: usize = 16;

/// Accepted connections on their way to a worker.
pub struct Outbox {
    pub(super) channel: Channel,
    waiting: Vec<OwnedFd>,
    /// The channel takes no more until the worker has taken some.
    pub(super) is_full: bool,
    /// Connections the worker was given (wrapping, like its count of those it ended).
    given: u32,
    /// Most it may have at a time.
    limit: u32,
}

impl Outbox {
    pub(super) fn new(channel: Channel, limit: u32) -> Self {
        Self { channel, waiting: Vec::new(), is_full: false, given: 0, limit }
    }

    /// Takes note that there is room again: the next look tells how much.
    pub(super) fn hear(&self) {
        while let Ok(Some(_)) = self.channel.receive() {}
    }

    fn load(&self, index: usize, ended: &SharedCounters) -> u32 {
        self.given.wrapping_sub(ended.get(index))
    }

    /// Resets what is waiting; returns how many.
    pub(super) fn reset(&mut self) -> u32 {
        let cut = self.waiting.drain(..).map(|client| {
            // It fails where the client did so first.
            let _ = sys::reset(&client);
        });
        cut.count() as u32
    }

    /// Hands over what is waiting, as far as the worker's channel takes it.
    pub(super) fn flush(&mut self) -> std::result::Result<(), Errno> {
        while !self.waiting.is_empty() {
            let batch = self.waiting.len().min(MESSAGE);
            let sockets: Vec<_> = self.waiting[..batch].iter().map(OwnedFd::as_fd).collect();
            let result = self.channel.send(Message::Connections, &sockets);
            self.is_full = result == Err(Errno::EAGAIN);
            result?;
            // Our copies must go: they would keep the connections open.
            self.waiting.drain(..batch);
        }
        Ok(())
    }
}

/// However the listener ends, nobody who was accepted is to see an orderly end.
impl Drop for Outbox {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Whether a worker has room for a connection. If none has, each says when it has.
pub(super) fn have_room(outboxes: &[Outbox], ended: &SharedCounters) -> bool {
    let has_room = |(index, outbox): (usize, &Outbox)| outbox.load(index, ended) < outbox.limit;
    let have_room = || outboxes.iter().enumerate().any(has_room);
    if have_room() {
        return true;
    }
    (0..outboxes.len()).for_each(|index| ended.ask(index));
    have_room()
}

/// Accepts what is there and what there is room for, up to a batch; fails when the system has run
/// out of something.
pub(super) fn accept_batch(
    listener: &OwnedFd,
    outboxes: &mut [Outbox],
    ended: &SharedCounters,
) -> std::result::Result<(), Errno> {
    for _ in 0..BATCH {
        if !have_room(outboxes, ended) {
            break;
        }
        match queue::accept(listener) {
            Ok(client) => give(client, outboxes, ended),
            Err(Errno::EAGAIN) => break,
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Puts a client into the outbox for the worker with the fewest connections, of those who have
/// room if any has.
pub(super) fn give(client: OwnedFd, outboxes: &mut [Outbox], ended: &SharedCounters) {
    let load = |(index, outbox): &(usize, &mut Outbox)| {
        let load = outbox.load(*index, ended);
        (load >= outbox.limit, load)
    };
    if let Some((_, outbox)) = outboxes.iter_mut().enumerate().min_by_key(load) {
        outbox.given = outbox.given.wrapping_add(1);
        outbox.waiting.push(client);
    }
}
