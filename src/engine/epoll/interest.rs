//! What is waited for, where, and by whom: the two sets, and the requests behind what they report.

use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};

use super::set::Set;
use crate::engine::Token;

/// Reports taken with one call; more wait for the next.
const EVENTS: usize = 256;

const NOTHING: EpollFlags = EpollFlags::empty();
const CHANGE: EpollFlags = EpollFlags::EPOLLOUT.union(EpollFlags::EPOLLET);

/// What is waited for at a descriptor.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// The request that waits for a state.
    waiting: Option<Token>,
    /// The request that is told changes.
    watching: Option<Token>,
    /// What `states` reports.
    armed: EpollFlags,
}

const EMPTY: Entry = Entry { waiting: None, watching: None, armed: NOTHING };

/// What a request waits for has come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Report {
    pub(super) token: Token,
    pub(super) fd: RawFd,
    pub(super) events: EpollFlags,
}

pub(super) struct Interest {
    states: Set,
    /// In `states` itself.
    changes: Set,
    /// By descriptor.
    entries: Vec<Entry>,
    /// The descriptors of each slot's requests, by side, to find what is to be cancelled.
    places: Vec<[RawFd; 2]>,
    events: Box<[EpollEvent]>,
}

impl Interest {
    /// Errors as epoll_create(2) and epoll_ctl(2).
    pub(super) fn new() -> Result<Self, Errno> {
        let (states, changes) = (Set::new()?, Set::new()?);
        states.change(changes.as_raw_fd(), NOTHING, EpollFlags::EPOLLIN)?;
        let events = vec![EpollEvent::empty(); EVENTS].into();
        Ok(Self { states, changes, entries: Vec::new(), places: Vec::new(), events })
    }

    /// Has `token` reported when the descriptor is in one of the states `wanted`. Errors as
    /// epoll_ctl(2): ENOMEM, ENOSPC.
    pub(super) fn wait_for(
        &mut self,
        token: Token,
        fd: RawFd,
        wanted: EpollFlags,
    ) -> Result<(), Errno> {
        self.place(token, fd);
        let armed = self.entry(fd).armed;
        let result = self.states.change(fd, armed, wanted);
        let entry = self.entry(fd);
        match result {
            Ok(()) => (entry.waiting, entry.armed) = (Some(token), wanted),
            Err(_) => entry.armed = NOTHING,
        }
        result
    }

    /// Has `token` reported whenever the descriptor changes. Errors as epoll_ctl(2).
    pub(super) fn watch(&mut self, token: Token, fd: RawFd) -> Result<(), Errno> {
        self.place(token, fd);
        self.changes.change(fd, NOTHING, CHANGE)?;
        self.entry(fd).watching = Some(token);
        Ok(())
    }

    /// The request has what it waited for. Its descriptor stays in the set: most often the next
    /// request wants the same.
    pub(super) fn done(&mut self, fd: RawFd) {
        self.entry(fd).waiting = None;
    }

    /// The request has what it waited for, and the next one is to wait behind all others.
    pub(super) fn done_and_leave(&mut self, fd: RawFd) {
        self.done(fd);
        self.disarm(fd);
    }

    /// Ends a request early; false if it does not wait for anything here.
    pub(super) fn cancel(&mut self, token: Token) -> bool {
        match token {
            Token::Flow { index, op, .. } => {
                let place = self.places.get(index as usize);
                let fd = place.zip(op.side()).map(|(place, side)| place[side.index()]);
                fd.is_some_and(|fd| self.take_back(token, fd))
            }
            // Few, and seldom.
            _ => (0..self.entries.len()).any(|fd| self.take_back(token, fd as RawFd)),
        }
    }

    /// The descriptor is to be closed. That is not left to close(2): another process may have the
    /// socket, and then it would stay in the sets.
    pub(super) fn forget(&mut self, fd: RawFd) {
        if self.entry(fd).watching.is_some() {
            let _ = self.changes.change(fd, CHANGE, NOTHING);
        }
        self.disarm(fd);
        *self.entry(fd) = EMPTY;
    }

    /// Adds what there is to report to `reports`, after waiting for it. Errors as epoll_wait(2).
    pub(super) fn wait(
        &mut self,
        reports: &mut Vec<Report>,
        timeout: EpollTimeout,
    ) -> Result<(), Errno> {
        let mut has_changes = false;
        let count = self.states.wait(&mut self.events, timeout)?;
        for index in 0..count {
            let (fd, events) = (self.events[index].data() as RawFd, self.events[index].events());
            if fd == self.changes.as_raw_fd() {
                has_changes = true;
                continue;
            }
            match self.entry(fd).waiting {
                Some(token) => reports.push(Report { token, fd, events }),
                None => self.disarm(fd),
            }
        }
        if has_changes {
            let count = self.changes.wait(&mut self.events, EpollTimeout::ZERO)?;
            let of = |event: &EpollEvent| (event.data() as RawFd, event.events());
            for (fd, events) in self.events[..count].iter().map(of) {
                let watching = self.entries.get(fd as usize).and_then(|entry| entry.watching);
                reports.extend(watching.map(|token| Report { token, fd, events }));
            }
        }
        Ok(())
    }

    fn entry(&mut self, fd: RawFd) -> &mut Entry {
        let index = fd as usize;
        if index >= self.entries.len() {
            self.entries.resize(index + 1, EMPTY);
        }
        &mut self.entries[index]
    }

    /// Remembers where the request is made.
    fn place(&mut self, token: Token, fd: RawFd) {
        if let Token::Flow { index, op, .. } = token
            && let Some(side) = op.side()
        {
            let index = index as usize;
            if index >= self.places.len() {
                self.places.resize(index + 1, [-1; 2]);
            }
            self.places[index][side.index()] = fd;
        }
    }

    /// Reports nothing of the descriptor's state any more.
    fn disarm(&mut self, fd: RawFd) {
        let armed = std::mem::replace(&mut self.entry(fd).armed, NOTHING);
        // It is there, and leaving needs no memory.
        let _ = self.states.change(fd, armed, NOTHING);
    }

    /// Ends the request early if it is made there.
    fn take_back(&mut self, token: Token, fd: RawFd) -> bool {
        let Some(entry) = self.entries.get_mut(fd as usize) else { return false };
        if entry.watching == Some(token) {
            entry.watching = None;
            let _ = self.changes.change(fd, CHANGE, NOTHING);
            return true;
        }
        entry.waiting.take_if(|waiting| *waiting == token).is_some()
    }
}
