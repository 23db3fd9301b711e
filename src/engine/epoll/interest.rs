//! What is waited for, where, and by whom: the two sets, and the requests behind what they report.

use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};

use crate::engine::Token;
use crate::engine::set::Set;

/// Reports taken with one call of each set; more wait for the next.
pub(super) const EVENTS: usize = 256;

const CHANGE: EpollFlags = EpollFlags::EPOLLOUT.union(EpollFlags::EPOLLET);

/// A state that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// A client can be accepted.
    HasClient,
    /// The socket is connected, or cannot be.
    Connected,
    /// There is something to read, or an urgent byte is announced.
    Readable,
    /// There is something to read; that an urgent byte is announced is known.
    Announced,
}

impl State {
    fn events(self) -> EpollFlags {
        match self {
            // A client wakes one of the workers that wait, the one that has waited longest.
            State::HasClient => EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE,
            State::Connected => EpollFlags::EPOLLOUT,
            State::Readable => EpollFlags::EPOLLIN | EpollFlags::EPOLLPRI,
            State::Announced => EpollFlags::EPOLLIN,
        }
    }
}

/// Where the requests of one side of a slot are made, or all of one token.
#[derive(Clone, Copy, Debug)]
struct Place {
    fd: RawFd,
    /// What `states` was last told to report of the descriptor.
    armed: State,
    /// A request waits for that.
    is_waiting: bool,
}

const NOWHERE: Place = Place { fd: -1, armed: State::Readable, is_waiting: false };

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
    /// By slot and side.
    flows: Vec<[Place; 2]>,
    /// Listening socket, channel and commands.
    others: [Place; 3],
    events: Box<[EpollEvent]>,
}

impl Interest {
    /// Errors as epoll_create(2) and epoll_ctl(2).
    pub(super) fn new() -> Result<Self, Errno> {
        let (mut states, changes) = (Set::new()?, Set::new()?);
        let fd = changes.as_raw_fd();
        // No request has this name, so it stands for the other set.
        states.join(fd, EpollFlags::EPOLLIN, Token::Ignored.encode())?;
        let events = vec![EpollEvent::empty(); EVENTS].into();
        Ok(Self { states, changes, flows: Vec::new(), others: [NOWHERE; 3], events })
    }

    /// Has `token` reported when the descriptor is in the state `wanted`. Errors as epoll_ctl(2):
    /// ENOMEM, ENOSPC.
    pub(super) fn wait_for(&mut self, token: Token, fd: RawFd, wanted: State) -> Result<(), Errno> {
        let place = *self.place(token);
        if place.fd != fd || place.armed != wanted || !self.states.has(fd) {
            self.states.join(fd, wanted.events(), token.encode())?;
        }
        *self.place(token) = Place { fd, armed: wanted, is_waiting: true };
        Ok(())
    }

    /// Has `token` reported whenever the descriptor changes. Errors as epoll_ctl(2).
    pub(super) fn watch(&mut self, token: Token, fd: RawFd) -> Result<(), Errno> {
        self.place(token).fd = fd;
        self.changes.join(fd, CHANGE, token.encode())
    }

    /// The request has what it waited for. Its descriptor stays in the set: most often the next
    /// request wants the same.
    pub(super) fn done(&mut self, token: Token) {
        self.place(token).is_waiting = false;
    }

    /// Ends a request early, or one that has what it waited for and of which the next is to wait
    /// behind all others. False if it does not wait for anything here.
    pub(super) fn leave(&mut self, token: Token) -> bool {
        let place = self.place(token);
        let (fd, is_waiting) = (place.fd, std::mem::take(&mut place.is_waiting));
        if is_waiting {
            // Also because what wakes an exclusive wait wakes no other.
            self.states.leave(fd);
        }
        is_waiting
    }

    /// Ends a watch; false if there is none.
    pub(super) fn unwatch(&mut self, token: Token) -> bool {
        let fd = self.place(token).fd;
        self.changes.leave(fd)
    }

    /// The descriptor is to be closed. That is not left to close(2): another process may have the
    /// socket, and then it would stay in the sets.
    pub(super) fn forget(&mut self, fd: RawFd) {
        self.states.leave(fd);
        self.changes.leave(fd);
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
            let token = Token::decode(self.events[index].data());
            let events = self.events[index].events();
            if token == Token::Ignored {
                has_changes = true;
                continue;
            }
            let Place { fd, is_waiting, armed } = *self.place(token);
            // TCP announces an urgent byte when its segment comes, also while others before it are
            // missing. Until they are there, nothing can be read.
            if is_waiting && armed == State::Readable && events == EpollFlags::EPOLLPRI {
                let announced = State::Announced;
                if self.states.join(fd, announced.events(), token.encode()).is_ok() {
                    self.place(token).armed = announced;
                    continue;
                }
            }
            let events = match armed {
                State::Announced => events | EpollFlags::EPOLLPRI,
                _ => events,
            };
            if is_waiting {
                reports.push(Report { token, fd, events });
            } else {
                self.states.leave(fd);
            }
        }
        if has_changes {
            let count = self.changes.wait(&mut self.events, EpollTimeout::ZERO)?;
            for index in 0..count {
                let token = Token::decode(self.events[index].data());
                let (fd, events) = (self.place(token).fd, self.events[index].events());
                reports.push(Report { token, fd, events });
            }
        }
        Ok(())
    }

    fn place(&mut self, token: Token) -> &mut Place {
        match token {
            Token::Flow { index, op, .. } => {
                let index = index as usize;
                if index >= self.flows.len() {
                    self.flows.resize(index + 1, [NOWHERE; 2]);
                }
                // Requests without a side are not made here.
                &mut self.flows[index][op.side().map_or(0, |side| side.index())]
            }
            Token::Accept => &mut self.others[0],
            Token::Handoff => &mut self.others[1],
            // The clock is not waited for here.
            Token::Command | Token::Tick | Token::Ignored => &mut self.others[2],
        }
    }
}
