//! What a worker's thread shares with the crew and with its siblings.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::sys::eventfd::EventFd;

use crate::worker::Moved;

/// What others may use of a worker.
pub(super) struct Shared {
    wake: EventFd,
    /// Connections it has, those it was given and has not yet seen included.
    load: AtomicU32,
    /// Most it may have at a time.
    limit: u32,
    /// Connections of siblings that it is to go on with; `None`: it has ended.
    inbox: Mutex<Option<Vec<Moved<OwnedFd>>>>,
}

impl Shared {
    /// `wake`: what the worker waits for.
    pub(super) fn new(wake: EventFd, limit: u32) -> Self {
        Self { wake, load: AtomicU32::new(0), limit, inbox: Mutex::new(Some(Vec::new())) }
    }

    /// Has the worker look what there is.
    pub(super) fn wake(&self) {
        // Full: it has not looked since.
        let _ = self.wake.write(1);
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
    /// those it may have: so there is room for those that come to itself, and all have no more than
    /// all may have.
    #[must_use]
    pub(super) fn put(&self, moved: Moved<OwnedFd>) -> Option<Moved<OwnedFd>> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *inbox {
            Some(inbox) if self.load() + (inbox.len() as u32) < self.limit / 2 => inbox.push(moved),
            _ => return Some(moved),
        }
        drop(inbox);
        self.wake();
        None
    }

    /// What siblings have given.
    pub(super) fn take(&self) -> Vec<Moved<OwnedFd>> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Takes no more; false if there is something that was not taken.
    pub(super) fn close(&self) -> bool {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let is_empty = inbox.as_ref().is_none_or(Vec::is_empty);
        if is_empty {
            *inbox = None;
        }
        is_empty
    }
}

impl AsFd for Shared {
    /// What the worker waits for.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
