//! What a worker's thread shares with the crew and with its siblings.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::worker::Moved;

/// What others may use of a worker.
pub(super) struct Shared {
    wake: OwnedFd,
    /// Connections it has, those it was given and has not yet seen included.
    load: AtomicU32,
    /// Most it may have at a time.
    limit: u32,
    /// Connections of siblings that it is to go on with.
    inbox: Inbox<Moved<OwnedFd>>,
}

impl Shared {
    /// Together with what the worker waits for. That is a pipe: while an eventfd is written to, the
    /// kernel puts off what it has to tell by another (tests/kernel/reading.rs). Errors as pipe(2).
    pub(super) fn new(limit: u32) -> Result<(Self, OwnedFd), Errno> {
        let (woken, wake) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok((Self { wake, load: AtomicU32::new(0), limit, inbox: Inbox::new() }, woken))
    }

    /// Has the worker look what there is.
    pub(super) fn wake(&self) {
        // Full: it has not looked since.
        let _ = nix::unistd::write(&self.wake, &[0]);
    }

    pub(super) fn load(&self) -> u32 {
        self.load.load(Ordering::Relaxed)
    }

    /// Counts connections, or, with a number that wraps, that there are fewer.
    pub(super) fn count(&self, more: u32) {
        self.load.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn has_room(&self) -> bool {
        self.load() < self.limit
    }

    /// Gives the worker a sibling's connection; returns it if the worker has ended, or has half of
    /// those it may have: so it also has room for one that it has accepted and not yet counted, and
    /// for the one that it accepts.
    #[must_use]
    pub(super) fn put(&self, moved: Moved<OwnedFd>) -> Option<Moved<OwnedFd>> {
        let refused = self.inbox.put(moved, || {
            let has_room = !self.is_half_full();
            self.count(u32::from(has_room));
            has_room
        });
        if refused.is_none() {
            self.wake();
        }
        refused
    }

    /// Whether it takes no connections of siblings.
    pub(super) fn is_half_full(&self) -> bool {
        self.limit < 3 || self.load() >= self.limit / 2
    }

    /// What siblings have given.
    pub(super) fn take(&self) -> Vec<Moved<OwnedFd>> {
        self.inbox.take()
    }

    /// Takes no more; false if there is something that was not taken.
    pub(super) fn close(&self) -> bool {
        self.inbox.close()
    }

    /// Takes no more, whatever there is: the program ends.
    pub(super) fn give_up(&self) {
        while !self.inbox.close() {
            drop(self.inbox.take());
        }
    }
}

/// What is given by some and taken by one; `None`: that one has ended.
struct Inbox<T>(Mutex<Option<Vec<T>>>);

impl<T> Inbox<T> {
    fn new() -> Self {
        Self(Mutex::new(Some(Vec::new())))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is not taken: there is no room, or nobody takes any more.
    fn put(&self, item: T, has_room: impl FnOnce() -> bool) -> Option<T> {
        match &mut *self.lock() {
            Some(items) if has_room() => {
                items.push(item);
                None
            }
            _ => Some(item),
        }
    }

    fn take(&self) -> Vec<T> {
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// False if there is something to take.
    fn close(&self) -> bool {
        let mut items = self.lock();
        let is_empty = items.as_ref().is_none_or(Vec::is_empty);
        if is_empty {
            *items = None;
        }
        is_empty
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_into_an_inbox_is_taken_before_it_closes() {
        let inbox = Inbox::new();
        assert_eq!([1, 2].map(|item| inbox.put(item, || true)), [None, None]);
        assert_eq!(inbox.put(3, || false), Some(3), "there is no room");
        assert!(!inbox.close());
        assert_eq!(inbox.take(), [1, 2]);
        assert!(inbox.close());
        assert_eq!(inbox.put(4, || true), Some(4), "nobody would take it");
        assert!(inbox.take().is_empty());
        assert!(inbox.close());
    }
}
