//! `--handoff connections`: accepted connections on their way to the workers.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use crate::handoff::{Channel, MAX_SOCKETS, Message};
use crate::queue;
use crate::sys::SharedCounters;

/// Connections accepted before those accepted so far are handed over.
const BATCH: usize = 64;

/// Accepted connections on their way to a worker.
pub(super) struct Outbox {
    pub(super) channel: Channel,
    waiting: Vec<OwnedFd>,
    /// The channel takes no more until the worker has taken some.
    pub(super) is_full: bool,
    /// Connections the worker was given (wrapping, like its count of those it ended).
    given: u32,
}

impl Outbox {
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel, waiting: Vec::new(), is_full: false, given: 0 }
    }

    /// Hands over what is waiting, as far as the worker's channel takes it.
    pub(super) fn flush(&mut self) -> std::result::Result<(), Errno> {
        while !self.waiting.is_empty() {
            let batch = self.waiting.len().min(MAX_SOCKETS);
            let sockets: Vec<_> = self.waiting[..batch].iter().map(OwnedFd::as_fd).collect();
            let result = self.channel.send(Message::Connections, &sockets);
            self.is_full = result == Err(Errno::EAGAIN);
            result?;
            // Our copies must go: they would keep the connections open (kernel-fact 14).
            self.waiting.drain(..batch);
        }
        Ok(())
    }
}

/// Accepts what is there, up to a batch, each for the worker with the fewest connections; fails
/// when the system has run out of something.
pub(super) fn accept_batch(
    listener: &OwnedFd,
    outboxes: &mut [Outbox],
    ended: &SharedCounters,
) -> std::result::Result<(), Errno> {
    for _ in 0..BATCH {
        match queue::accept(listener) {
            Ok(client) => give(client, outboxes, ended),
            Err(Errno::EAGAIN) => break,
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Puts a client into the outbox for the worker with the fewest connections.
pub(super) fn give(client: OwnedFd, outboxes: &mut [Outbox], ended: &SharedCounters) {
    let load =
        |(index, outbox): &(usize, &mut Outbox)| outbox.given.wrapping_sub(ended.get(*index));
    if let Some((_, outbox)) = outboxes.iter_mut().enumerate().min_by_key(load) {
        outbox.given = outbox.given.wrapping_add(1);
        outbox.waiting.push(client);
    }
}
