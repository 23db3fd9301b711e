//! Readiness of sockets with short messages: an epoll set.
//!
//! A wait of a socket's own costs two requests for each message (`Uring::readable`). A socket that
//! has had some short messages is in a set instead. The kernel notes there what something has come
//! for, and one epoll_wait(2) for all tells it, once a turn, with the state each socket is in then:
//! also whether an urgent byte is announced.
//!
//! The set reports changes (edge-triggered): what is there already is not reported again, but when
//! a socket joins. So in the set it is waited for only after a receive that left nothing in it, and
//! otherwise by a wait of its own. The ring tells whether a receive left something. A plain recv(2)
//! does not: if it did not fill its buffer, it left nothing of what had come before the last
//! report, unless that told of more than bytes; an urgent byte ends a receive that is before it,
//! and the end of the stream is left by one that has bytes. What comes after a report is reported
//! anew (tests/kernel/reading.rs).
//!
//! Receives are noted when they are taken from the ring, which is before the set is read: so no
//! report is of bytes that a receive has taken which is not known yet. A failure is no byte, and a
//! receive of what came before it does not tell of it: a socket that is reported to have failed
//! leaves the set.
//!
//! A thread that waits for the set does not see what the ring has for it: of that an eventfd in the
//! set tells, the *bell*; the ring's own descriptor does not.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::engine::set::Set;
use crate::engine::{Sleep, Token};
use crate::flow::Op;
use crate::flow::half::BUFFER_BYTES;

/// Names the bell in reports. No token is encoded so.
const BELL: u64 = u64::MAX;

/// Reports taken with one reading, at most and at least; more wait for the next. Between them it is
/// as many as give each socket the same share (see [`reports`]).
const REPORTS: usize = 256;
const REPORTS_MIN: u32 = 16;

/// Sockets that a turn tells of which are waited for apart: the kernel does twenty tasks in an
/// entry, and each takes two.
const APART_IN_TURN: u32 = 10;

/// Short messages in a row, beside reports that nobody waited for, after which a socket joins the
/// set: that takes calls, which a connection with one exchange is not to pay.
const MESSAGES_TO_JOIN: u8 = 2;

/// The most that counts of them. After as many reports that nobody waited for it leaves the set.
const MESSAGES_MAX: u8 = 8;

/// What the set reports of a socket: bytes, urgent ones, and the end. Failures come without being
/// asked for.
const EVENTS: EpollFlags = EpollFlags::EPOLLIN
    .union(EpollFlags::EPOLLPRI)
    .union(EpollFlags::EPOLLRDHUP)
    .union(EpollFlags::EPOLLET);

/// What must be among the events of a report for something to be there to be read. An urgent byte
/// may be announced before those that come first.
const READABLE: EpollFlags = EpollFlags::EPOLLIN.union(FAILED);

/// The socket has failed, or has something in its error queue.
const FAILED: EpollFlags = EpollFlags::EPOLLERR.union(EpollFlags::EPOLLHUP);

/// What is known of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It is not in the set.
    Out,
    /// It cannot be.
    Barred,
    /// It is in the set, and there may be something to read.
    Unknown,
    /// What comes is reported; nothing was there before, or it will be reported, too.
    Empty,
    /// A request waits for that.
    Awaited,
    /// It has come, and nobody has asked for it yet.
    Readable { urgent: bool },
}

/// The socket that one side of a slot's flow receives from.
#[derive(Clone, Copy, Debug)]
struct Place {
    fd: RawFd,
    /// The flow's, as far as it tells one from those before it.
    generation: u16,
    state: State,
    /// The last report told of bytes alone.
    has_bytes_alone: bool,
    /// See [`MESSAGES_TO_JOIN`].
    messages: u8,
}

const NOWHERE: Place =
    Place { fd: -1, generation: 0, state: State::Out, has_bytes_alone: true, messages: 0 };

/// Connections whose places are not moved when there are more. Memory is used as they come.
const ROOM: usize = 1 << 12;

/// What [`Readiness::next`] tells: the request, and whether an urgent byte has arrived.
pub(super) type Report = (Token, Result<bool, Errno>);

/// A set, and what is known of its sockets.
pub(super) struct Readiness {
    set: Set,
    bell: EventFd,
    /// By slot and side.
    places: Vec<[Place; 2]>,
    /// Where the kernel writes reports.
    events: Box<[EpollEvent]>,
    /// Requests that wait here.
    awaited: u32,
    /// Requests of flows that wait for something to read elsewhere.
    apart: u32,
    news: VecDeque<Report>,
}

impl Readiness {
    /// Errors as epoll_create(2), eventfd(2), epoll_ctl(2).
    pub(super) fn new() -> Result<Self, Errno> {
        let mut set = Set::new()?;
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        // Edge-triggered: it tells of each time it is rung, and need not be read.
        set.join(bell.as_raw_fd(), EpollFlags::EPOLLIN | EpollFlags::EPOLLET, BELL)?;
        Ok(Self {
            set,
            bell,
            places: Vec::with_capacity(ROOM),
            events: vec![EpollEvent::empty(); REPORTS].into(),
            awaited: 0,
            apart: 0,
            news: VecDeque::with_capacity(REPORTS),
        })
    }

    /// What the ring rings to end [`Readiness::read`].
    pub(super) fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// Whether a request waits here.
    pub(super) fn is_awaited(&self) -> bool {
        self.awaited > 0
    }

    /// Takes reports, after waiting for them, or for the bell, as long as `sleep` allows. All
    /// receives that have completed must be known. Errors as epoll_wait(2).
    pub(super) fn read(&mut self, sleep: Sleep) -> Result<(), Errno> {
        let timeout = match sleep {
            Sleep::No => EpollTimeout::ZERO,
            Sleep::ForMs(ms) => EpollTimeout::try_from(ms).unwrap_or(EpollTimeout::MAX),
            Sleep::Forever => EpollTimeout::NONE,
        };
        let room = reports(self.awaited, self.apart);
        let count = match self.set.wait(&mut self.events[..room], timeout) {
            Err(Errno::EINTR) => 0,
            count => count?,
        };
        (0..count).for_each(|index| self.on_report(self.events[index]));
        Ok(())
    }

    /// A receive is made.
    pub(super) fn receiving(&mut self, token: Token, socket: &OwnedFd) {
        let Some((index, side, generation)) = position(token) else { return };
        if index >= self.places.len() {
            self.places.resize(index + 1, [NOWHERE; 2]);
        }
        let place = &mut self.places[index][side];
        let fd = socket.as_raw_fd();
        if (place.fd, place.generation) != (fd, generation) {
            *place = Place { fd, generation, ..NOWHERE };
        }
    }

    /// It has completed. `left`: whether it left something, if that is known.
    pub(super) fn received(
        &mut self,
        token: Token,
        result: Result<u32, Errno>,
        left: Option<bool>,
    ) {
        let is_short = result.is_ok_and(|length| (1..BUFFER_BYTES).contains(&length));
        let is_empty = is_short && left != Some(true);
        let Some(place) = self.place(token).filter(|place| place.state != State::Barred) else {
            return;
        };
        place.messages = if is_empty { (place.messages + 1).min(MESSAGES_MAX) } else { 0 };
        place.state = match place.state {
            State::Out if place.messages >= MESSAGES_TO_JOIN => return self.join(token),
            State::Out => State::Out,
            _ if is_empty && (left.is_some() || place.has_bytes_alone) => State::Empty,
            _ => State::Unknown,
        };
    }

    /// Waits for something to read, which [`Readiness::next`] tells. False if that is to be done
    /// elsewhere; [`Readiness::waited_apart`] when it has been.
    pub(super) fn wait_for(&mut self, token: Token, socket: &OwnedFd) -> bool {
        let is_here = self.waits_here(token, socket.as_raw_fd());
        // The worker's own channels wait elsewhere, too, and take no flow's share.
        self.apart += u32::from(!is_here && position(token).is_some());
        is_here
    }

    /// A wait elsewhere is over.
    pub(super) fn waited_apart(&mut self) {
        self.apart = self.apart.saturating_sub(1);
    }

    fn waits_here(&mut self, token: Token, fd: RawFd) -> bool {
        let Some(place) = self.place(token).filter(|place| place.fd == fd) else { return false };
        match place.state {
            State::Readable { urgent } => {
                place.state = State::Unknown;
                self.news.push_back((token, Ok(urgent)));
            }
            State::Empty => {
                place.state = State::Awaited;
                self.awaited += 1;
            }
            _ => return false,
        }
        true
    }

    /// Ends a wait early; it is told by [`Readiness::next`]. False if there is none here.
    pub(super) fn cancel(&mut self, token: Token) -> bool {
        let is_wait = matches!(token, Token::Flow { op: Op::Readable(_), .. });
        let is_awaited = |place: &mut Place| place.state == State::Awaited;
        let is_here = is_wait && self.place(token).is_some_and(is_awaited);
        if is_here {
            self.tell(token, Err(Errno::ECANCELED));
        }
        is_here
    }

    /// The socket is to be closed.
    pub(super) fn forget(&mut self, socket: &OwnedFd) {
        self.set.leave(socket.as_raw_fd());
    }

    /// What has come.
    pub(super) fn next(&mut self) -> Option<Report> {
        self.news.pop_front()
    }

    /// How often [`Readiness::next`] has something to tell.
    pub(super) fn news(&self) -> usize {
        self.news.len()
    }

    fn on_report(&mut self, event: EpollEvent) {
        if event.data() == BELL {
            return;
        }
        // The name of whoever joined. That flow may be gone, and its slot another's by now.
        let token = Token::decode(event.data());
        let events = event.events();
        let urgent = events.contains(EpollFlags::EPOLLPRI);
        let Some(place) = self.place(token) else { return };
        place.has_bytes_alone = events == EpollFlags::EPOLLIN;
        let mut leaves = events.intersects(FAILED);
        match place.state {
            _ if !events.intersects(READABLE) => {}
            State::Awaited => self.tell(token, Ok(urgent)),
            State::Empty | State::Readable { .. } => place.state = State::Readable { urgent },
            State::Unknown => {
                place.messages = place.messages.saturating_sub(1);
                leaves |= place.messages == 0;
            }
            State::Out | State::Barred => {}
        }
        if leaves {
            self.leave(token);
        }
    }

    /// Nothing of the socket is reported any more. What was and is not told yet, a wait of its own
    /// will tell.
    fn leave(&mut self, token: Token) {
        let Some(place) = self.place(token) else { return };
        (place.state, place.messages) = (State::Out, 0);
        let fd = place.fd;
        self.set.leave(fd);
    }

    fn tell(&mut self, token: Token, result: Result<bool, Errno>) {
        if let Some(place) = self.place(token) {
            place.state = State::Unknown;
        }
        self.awaited -= 1;
        self.news.push_back((token, result));
    }

    /// Has what comes, and what is there, reported. It takes memory, and there is a limit
    /// (epoll(7)). Only plain TCP gives a receive all that it has.
    fn join(&mut self, token: Token) {
        let Token::Flow { index, generation, op } = token else { return };
        let (Some(side), Some(&mut Place { fd, .. })) = (op.side(), self.place(token)) else {
            return;
        };
        let name = Token::Flow { index, generation, op: Op::Readable(side) }.encode();
        let has_joined = crate::sys::is_plain_tcp(fd) && self.set.join(fd, EVENTS, name).is_ok();
        if let Some(place) = self.place(token) {
            place.state = if has_joined { State::Empty } else { State::Barred };
            place.has_bytes_alone = true;
        }
    }

    /// The place of the flow's side, if it has received something.
    fn place(&mut self, token: Token) -> Option<&mut Place> {
        let (index, side, generation) = position(token)?;
        let place = &mut self.places.get_mut(index)?[side];
        let is_member = self.set.has(place.fd);
        if !is_member && place.state != State::Barred {
            // Its socket was closed: what is known is of a flow long ago.
            place.state = State::Out;
        }
        (place.fd >= 0 && place.generation == generation).then_some(place)
    }
}

/// How many reports a reading takes: as great a share of the requests that wait here as a turn
/// tells of those that wait apart. Else these would be left behind, for the others are served in
/// each turn.
fn reports(awaited: u32, apart: u32) -> usize {
    let fair = awaited.saturating_mul(APART_IN_TURN) / apart.max(1);
    fair.clamp(REPORTS_MIN, REPORTS as u32) as usize
}

/// Slot, side, and the low bits of the generation.
fn position(token: Token) -> Option<(usize, usize, u16)> {
    let Token::Flow { index, generation, op } = token else { return None };
    Some((index as usize, op.side()?.index(), generation as u16))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Side;

    #[test]
    fn who_waits_here_and_who_waits_apart_have_the_same_share_of_a_turn() {
        assert_eq!(reports(10, 0), 100, "alone: all, and more");
        assert_eq!(reports(5000, 0), 256);
        assert_eq!(reports(5000, 1000), 50, "ten of a thousand, fifty of five thousand");
        assert_eq!(reports(100, 5000), 16, "not too few to be worth a reading");
    }

    #[test]
    fn only_flows_that_wait_apart_count_until_they_are_told() {
        let mut readiness = Readiness::new().expect("a set");
        let (socket, _) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
        let socket = OwnedFd::from(socket);
        for token in [Token::Command, Token::Handoff, Token::Command] {
            assert!(!readiness.wait_for(token, &socket));
        }
        assert_eq!(readiness.apart, 0);
        let op = Op::Readable(Side::Listen);
        assert!(!readiness.wait_for(Token::Flow { index: 0, generation: 0, op }, &socket));
        assert_eq!(readiness.apart, 1);
        readiness.waited_apart();
        assert_eq!(readiness.apart, 0);
    }
}
