//! Readiness of many sockets at once: an epoll set that the ring reads.
//!
//! A wait of a socket's own costs two requests for each message (`Uring::readable`). In a worker
//! whose turns have many messages, the sockets they come on are in a set instead. The kernel notes
//! there what something has come for, and one request for all reads it, once a turn, with the
//! state each socket is in then: also whether an urgent byte is announced.
//!
//! The set reports changes (edge-triggered): what is there already is not reported again. So a
//! socket is waited for here only after a receive that left nothing in it, and otherwise by a wait
//! of its own. Both the receives and the reading of the set are done by the thread that enters the
//! kernel, one after the other, and complete in that order (tests/kernel/reading.rs): a report that
//! comes before a receive's completion is of bytes that this has taken, one that comes after it is
//! not.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use io_uring::types::Fd;
use io_uring::{opcode, squeue};
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use crate::engine::Token;
use crate::engine::set::Set;
use crate::flow::Op;
use crate::flow::half::BUFFER_BYTES;
use crate::mostly::Mostly;

/// Names the request that reads the set. No token is encoded so.
pub(super) const READ: u64 = u64::MAX;

/// Reports taken with one reading; more wait for the next.
const REPORTS: usize = 256;

/// Receives that make a turn one with many: one alone gains nothing by a reading. Turns without
/// any, in which flows wait and send, do not count.
const MANY_RECEIVES: u32 = 2;

/// Short messages in a row, beside reports that nobody waited for, after which a socket joins the
/// set: it takes calls, which a connection with one exchange is not to pay.
const MESSAGES_TO_JOIN: u8 = 4;

/// The most that counts of them. After as many reports that nobody waited for it leaves the set.
const MESSAGES_MAX: u8 = 8;

/// What a set reports of a socket. Failures and the end come without being asked for.
const EVENTS: EpollFlags =
    EpollFlags::EPOLLIN.union(EpollFlags::EPOLLPRI).union(EpollFlags::EPOLLET);

/// What must be among the events of a report for something to be there to be read. An urgent byte
/// may be announced before those that come first.
const READABLE: EpollFlags =
    EpollFlags::EPOLLIN.union(EpollFlags::EPOLLERR).union(EpollFlags::EPOLLHUP);

/// What is known of a socket in the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// There may be something to read.
    Unknown,
    /// What comes is reported; nothing was there before.
    Empty,
    /// A request waits for that.
    Awaited,
    /// It has come, and nobody has asked for it yet.
    Readable { urgent: bool },
    /// The socket cannot be in the set.
    Apart,
}

/// Where the receives of one side of a slot are made.
#[derive(Clone, Copy, Debug)]
struct Place {
    fd: RawFd,
    state: State,
    /// See [`MESSAGES_TO_JOIN`].
    messages: u8,
}

const NOWHERE: Place = Place { fd: -1, state: State::Unknown, messages: 0 };

/// What [`Readiness::next`] tells: the request, and whether an urgent byte has arrived.
pub(super) type Report = (Token, Result<bool, Errno>);

/// A set, and what is known of its sockets.
pub(super) struct Readiness {
    /// `None`: the kernel does not read sets in a ring (before Linux 6.15), or has no more.
    set: Option<Set>,
    /// By slot and side.
    places: Vec<[Place; 2]>,
    /// Where the kernel writes reports while [`READ`] is in flight.
    events: Box<[EpollEvent]>,
    is_reading: bool,
    /// Requests that wait here.
    awaited: u32,
    /// Since the last turn.
    receives: u32,
    many: Mostly,
    failure: Option<Errno>,
    news: VecDeque<Report>,
}

impl Readiness {
    /// `can_read`: the ring reads sets.
    pub(super) fn new(can_read: bool) -> Self {
        Self {
            // Without one, waiting costs more, and works as well.
            set: can_read.then(Set::new).and_then(Result::ok),
            places: Vec::new(),
            events: vec![EpollEvent::empty(); REPORTS].into(),
            is_reading: false,
            awaited: 0,
            receives: 0,
            many: Mostly::default(),
            failure: None,
            news: VecDeque::with_capacity(REPORTS),
        }
    }

    /// A turn begins. Returns the request to read the set, if there is need: to be submitted after
    /// all others, for what these receive is not to be reported. The engine must keep `self` until
    /// the ring is gone.
    ///
    /// # Errors
    /// What the last reading failed with. Nothing that is waited for would ever be reported.
    pub(super) fn turn(&mut self) -> Result<Option<squeue::Entry>, Errno> {
        let receives = std::mem::take(&mut self.receives);
        if receives > 0 {
            self.many.note(receives >= MANY_RECEIVES);
        }
        if let Some(errno) = self.failure {
            return Err(errno);
        }
        let is_wanted = self.awaited > 0 && !self.is_reading;
        let Some(set) = self.set.as_ref().filter(|_| is_wanted) else { return Ok(None) };
        self.is_reading = true;
        let events = self.events.as_mut_ptr().cast();
        let read = opcode::EpollWait::new(Fd(set.as_raw_fd()), events, REPORTS as u32);
        Ok(Some(read.build().user_data(READ)))
    }

    /// [`READ`] has completed: with a number of reports, or a failure.
    pub(super) fn on_read(&mut self, result: Result<u32, Errno>) {
        self.is_reading = false;
        match result {
            Ok(count) => (0..count as usize).for_each(|index| self.on_report(self.events[index])),
            Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOMEM) => {}
            Err(errno) => self.failure = Some(errno),
        }
    }

    /// A receive is made.
    pub(super) fn receiving(&mut self, token: Token, socket: &OwnedFd) {
        self.receives += 1;
        let fd = socket.as_raw_fd();
        let place = self.place(token);
        if place.fd != fd {
            *place = Place { fd, ..NOWHERE };
        }
    }

    /// It has completed. `more`: the kernel says that it left something.
    pub(super) fn received(&mut self, token: Token, result: Result<u32, Errno>, more: bool) {
        // Only TCP says so, and that is what joins the set.
        let is_empty = !more && result.is_ok_and(|length| (1..BUFFER_BYTES).contains(&length));
        let is_many = self.many.is();
        let place = self.place(token);
        if place.state == State::Apart {
            return;
        }
        place.state = State::Unknown;
        place.messages = if is_empty { (place.messages + 1).min(MESSAGES_MAX) } else { 0 };
        let Place { fd, messages, .. } = *place;
        if !is_empty {
            return;
        }
        let is_member = self.set.as_ref().is_some_and(|set| set.has(fd));
        if is_member || is_many && messages >= MESSAGES_TO_JOIN && self.join(token, fd) {
            self.place(token).state = State::Empty;
        }
    }

    /// Waits for something to read, which [`Readiness::next`] tells. False if that is not to be
    /// done here.
    pub(super) fn wait_for(&mut self, token: Token, socket: &OwnedFd) -> bool {
        let is_many = self.many.is();
        let is_member = self.set.as_ref().is_some_and(|set| set.has(socket.as_raw_fd()));
        if !is_member {
            return false;
        }
        let state = &mut self.place(token).state;
        match std::mem::replace(state, State::Unknown) {
            State::Readable { urgent } => self.news.push_back((token, Ok(urgent))),
            State::Empty if is_many => {
                *state = State::Awaited;
                self.awaited += 1;
            }
            _ => return false,
        }
        true
    }

    /// Ends a wait early; it is told by [`Readiness::next`]. False if there is none here.
    pub(super) fn cancel(&mut self, token: Token) -> bool {
        let is_awaited = self.is_awaited(token);
        if is_awaited {
            self.tell(token, Err(Errno::ECANCELED));
        }
        is_awaited
    }

    /// The socket is to be closed.
    pub(super) fn forget(&mut self, socket: &OwnedFd) {
        if let Some(set) = &mut self.set {
            set.leave(socket.as_raw_fd());
        }
    }

    /// What has come.
    pub(super) fn next(&mut self) -> Option<Report> {
        self.news.pop_front()
    }

    /// Whether [`Readiness::next`] has something to tell.
    pub(super) fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    fn on_report(&mut self, event: EpollEvent) {
        // The name of whoever joined. That flow may be gone, and its slot another's by now: then
        // the socket has left the set, and is none that is waited for.
        let token = Token::decode(event.data());
        let events = event.events();
        let Place { fd, state, messages } = *self.place(token);
        let urgent = events.contains(EpollFlags::EPOLLPRI);
        let Some(set) = self.set.as_mut().filter(|set| set.has(fd)) else { return };
        match state {
            _ if !events.intersects(READABLE) => {}
            State::Awaited => self.tell(token, Ok(urgent)),
            State::Empty | State::Readable { .. } => {
                self.place(token).state = State::Readable { urgent };
            }
            State::Unknown if messages <= 1 => {
                set.leave(fd);
                self.place(token).messages = 0;
            }
            State::Unknown => self.place(token).messages = messages - 1,
            State::Apart => {}
        }
    }

    fn tell(&mut self, token: Token, result: Result<bool, Errno>) {
        self.place(token).state = State::Unknown;
        self.awaited -= 1;
        self.news.push_back((token, result));
    }

    fn is_awaited(&self, token: Token) -> bool {
        let Some((index, side)) = position(token) else { return false };
        self.places.get(index).is_some_and(|places| places[side].state == State::Awaited)
    }

    /// Has what comes reported. It takes memory, and there is a limit (epoll(7)); other sockets
    /// than TCP's do not tell whether a receive left something. Returns whether it was done.
    fn join(&mut self, token: Token, fd: RawFd) -> bool {
        let Token::Flow { index, generation, op } = token else { return false };
        let (Some(set), Some(side)) = (&mut self.set, op.side()) else { return false };
        let name = Token::Flow { index, generation, op: Op::Readable(side) };
        let has_joined = crate::sys::is_tcp(fd) && set.join(fd, EVENTS, name.encode()).is_ok();
        if !has_joined {
            self.place(token).state = State::Apart;
        }
        has_joined
    }

    /// The place of a request that a flow makes on a side.
    fn place(&mut self, token: Token) -> &mut Place {
        let (index, side) = position(token).unwrap_or_default();
        if index >= self.places.len() {
            self.places.resize(index + 1, [NOWHERE; 2]);
        }
        &mut self.places[index][side]
    }
}

fn position(token: Token) -> Option<(usize, usize)> {
    let Token::Flow { index, op, .. } = token else { return None };
    Some((index as usize, op.side()?.index()))
}
