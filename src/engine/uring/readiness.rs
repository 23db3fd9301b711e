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
//! not. A failure is no byte, and a receive of what came before it does not tell of it: a socket
//! that is reported to have failed leaves the set.

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

/// Reports taken with one reading, at most and at least; more wait for the next. Between them it is
/// as many as give each socket the same share (see [`reports`]).
const REPORTS: usize = 256;
const REPORTS_MIN: u32 = 16;

/// Sockets that a turn tells of which are waited for apart: the kernel does twenty tasks in an
/// entry, and each takes two.
const APART_IN_TURN: u32 = 10;

/// Receives that make a turn one with many: one alone gains nothing by a reading.
const MANY_RECEIVES: u32 = 2;

/// Short messages in a row, beside reports that nobody waited for, after which a socket joins the
/// set: it takes calls, which a connection with one exchange is not to pay.
const MESSAGES_TO_JOIN: u8 = 4;

/// The most that counts of them. After as many reports that nobody waited for it leaves the set.
const MESSAGES_MAX: u8 = 8;

/// A reading that has had nothing to report for so many turns is made anew. After 128 wake-ups for
/// nothing, of which a turn brings one at most, the kernel would give it to a worker of its own.
const TURNS_TO_READ: u32 = 100;

/// What a set reports of a socket. Failures and the end come without being asked for.
const EVENTS: EpollFlags =
    EpollFlags::EPOLLIN.union(EpollFlags::EPOLLPRI).union(EpollFlags::EPOLLET);

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
    /// What comes is reported; nothing was there before.
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
    /// See [`MESSAGES_TO_JOIN`].
    messages: u8,
}

const NOWHERE: Place = Place { fd: -1, generation: 0, state: State::Out, messages: 0 };

/// Connections whose places are not moved when there are more. Memory is used as they come.
const ROOM: usize = 1 << 12;

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
    /// Requests of flows that wait for something to read elsewhere.
    apart: u32,
    /// Since the last turn.
    receives: u32,
    /// Most receives are made in turns with many.
    many: Mostly,
    failure: Option<Errno>,
    /// Turns that [`READ`] has been in flight.
    turns_read: u32,
    news: VecDeque<Report>,
}

impl Readiness {
    /// `can_read`: the ring reads sets.
    pub(super) fn new(can_read: bool) -> Self {
        Self {
            // Without one, waiting costs more, and works as well.
            set: can_read.then(Set::new).and_then(Result::ok),
            places: Vec::with_capacity(ROOM),
            events: vec![EpollEvent::empty(); REPORTS].into(),
            is_reading: false,
            awaited: 0,
            apart: 0,
            receives: 0,
            many: Mostly::default(),
            failure: None,
            turns_read: 0,
            news: VecDeque::with_capacity(REPORTS),
        }
    }

    /// A turn begins. Returns the request to read the set, or to end that, if there is need: to be
    /// submitted after all others, for what these receive is not to be reported. The engine must
    /// keep `self` until the ring is gone.
    ///
    /// # Errors
    /// What the last reading failed with. Nothing that is waited for would ever be reported.
    pub(super) fn turn(&mut self) -> Result<Option<squeue::Entry>, Errno> {
        let receives = std::mem::take(&mut self.receives);
        self.many.note_each(receives, receives >= MANY_RECEIVES);
        if let Some(errno) = self.failure {
            return Err(errno);
        }
        if self.is_reading {
            self.turns_read += 1;
            let is_old = self.turns_read.is_multiple_of(TURNS_TO_READ);
            let cancel = opcode::AsyncCancel::new(READ).build().flags(squeue::Flags::SKIP_SUCCESS);
            return Ok(is_old.then(|| cancel.user_data(Token::Ignored.encode())));
        }
        let Some(set) = self.set.as_ref().filter(|_| self.awaited > 0) else { return Ok(None) };
        (self.is_reading, self.turns_read) = (true, 0);
        let events = self.events.as_mut_ptr().cast();
        let reports = reports(self.awaited, self.apart);
        let read = opcode::EpollWait::new(Fd(set.as_raw_fd()), events, reports);
        Ok(Some(read.build().user_data(READ)))
    }

    /// [`READ`] has completed: with a number of reports, or a failure.
    pub(super) fn on_read(&mut self, result: Result<u32, Errno>) {
        self.is_reading = false;
        match result {
            Ok(count) => (0..count as usize).for_each(|index| self.on_report(self.events[index])),
            Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOMEM | Errno::ECANCELED) => {}
            Err(errno) => self.failure = Some(errno),
        }
    }

    /// A receive is made.
    pub(super) fn receiving(&mut self, token: Token, socket: &OwnedFd) {
        self.receives += 1;
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

    /// It has completed. `more`: the kernel says that it left something.
    pub(super) fn received(&mut self, token: Token, result: Result<u32, Errno>, more: bool) {
        // Only TCP says so, and that is what joins the set.
        let is_empty = !more && result.is_ok_and(|length| (1..BUFFER_BYTES).contains(&length));
        let is_many = self.many.is();
        let Some(place) = self.place(token).filter(|place| place.state != State::Barred) else {
            return;
        };
        place.messages = if is_empty { (place.messages + 1).min(MESSAGES_MAX) } else { 0 };
        place.state = match place.state {
            State::Out if is_many && place.messages >= MESSAGES_TO_JOIN => return self.join(token),
            State::Out => State::Out,
            _ if is_empty => State::Empty,
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
        let is_many = self.many.is();
        let Some(place) = self.place(token).filter(|place| place.fd == fd) else { return false };
        match place.state {
            State::Readable { urgent } => {
                place.state = State::Unknown;
                self.news.push_back((token, Ok(urgent)));
            }
            State::Empty if is_many => {
                place.state = State::Awaited;
                self.awaited += 1;
            }
            State::Empty => {
                self.leave(token);
                return false;
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
        // The name of whoever joined. That flow may be gone, and its slot another's by now.
        let token = Token::decode(event.data());
        let events = event.events();
        let urgent = events.contains(EpollFlags::EPOLLPRI);
        let Some(place) = self.place(token) else { return };
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
        if let Some(set) = &mut self.set {
            set.leave(fd);
        }
    }

    fn tell(&mut self, token: Token, result: Result<bool, Errno>) {
        if let Some(place) = self.place(token) {
            place.state = State::Unknown;
        }
        self.awaited -= 1;
        self.news.push_back((token, result));
    }

    /// Has what comes reported. It takes memory, and there is a limit (epoll(7)); other sockets
    /// than TCP's do not tell whether a receive left something.
    fn join(&mut self, token: Token) {
        let Token::Flow { index, generation, op } = token else { return };
        let (Some(side), Some(&mut Place { fd, .. })) = (op.side(), self.place(token)) else {
            return;
        };
        let name = Token::Flow { index, generation, op: Op::Readable(side) }.encode();
        let set = self.set.as_mut().filter(|_| crate::sys::is_tcp(fd));
        let has_joined = set.is_some_and(|set| set.join(fd, EVENTS, name).is_ok());
        if let Some(place) = self.place(token) {
            place.state = if has_joined { State::Empty } else { State::Barred };
        }
    }

    /// The place of the flow's side, if it has received something.
    fn place(&mut self, token: Token) -> Option<&mut Place> {
        let (index, side, generation) = position(token)?;
        let place = &mut self.places.get_mut(index)?[side];
        let is_member = self.set.as_ref().is_some_and(|set| set.has(place.fd));
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
fn reports(awaited: u32, apart: u32) -> u32 {
    let fair = awaited.saturating_mul(APART_IN_TURN) / apart.max(1);
    fair.clamp(REPORTS_MIN, REPORTS as u32)
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
        let mut readiness = Readiness::new(false);
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
