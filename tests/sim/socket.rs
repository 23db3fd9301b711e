//! A socket of the forwarder, seen from the kernel: what has arrived, what can be sent, and how
//! the peer at the other end goes on.
//!
//! Bytes are not stored. A byte is its stream and its offset, and what moves is a range of them,
//! so a byte lost, doubled, out of order or from another flow is always seen, at no cost.

use std::collections::VecDeque;

use nix::errno::Errno;

use crate::plan::{Ending, Peer};
use crate::rng::Rng;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Unborn,
    Open,
    Closed,
}

/// What a peer did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Sent,
    Announced,
    Fin,
    Rst,
    Room,
}

#[derive(Debug)]
pub struct Socket {
    pub peer: Peer,
    pub status: Status,
    pub is_connected: bool,
    /// Requests the worker has not seen the last completion of.
    pub in_flight: u32,
    /// Token of its last watch.
    pub watch: Option<nsplice::engine::Token>,

    /// Bytes the peer has sent, and those of them that were read.
    pub arrived: u64,
    pub read: u64,
    pub fin: bool,
    pub rst: bool,
    /// The kernel refused a request: memory is short. The socket is as good as before.
    pub was_refused: bool,
    /// A failure nobody has been told of: it is told once.
    pub error: Option<Errno>,
    /// Marks of the peer that were announced; the last of them counts until it was read.
    announced: usize,
    urgent: Option<u64>,
    /// Where the bytes were that the worker read as urgent and has not passed on.
    pub urgent_read: VecDeque<u64>,

    /// Bytes the socket can take now.
    pub room: u64,
    /// Bytes it has taken, those of them that are acknowledged, and when all will be.
    pub taken: u64,
    acked: u64,
    acked_at_ms: u64,
    pub is_shut: bool,
    pub is_reset: bool,
    /// More was promised to what it took last, and may be waited for.
    pub keeps_back: bool,

    /// The worker has read the end of the stream.
    pub told_end: bool,
    /// ... and knew of no failure until then.
    pub told_end_first: bool,
    /// ... or, reading, was told the failure: it has read all it can.
    pub told_last: bool,
    /// The first failure the worker was told of.
    pub told_error: Option<Errno>,
    /// The first that is not only a consequence of another.
    pub told_cause: Option<Errno>,
    /// A watch has reported the failure.
    pub told_by_watch: bool,
    /// Asked how it failed, it said nothing.
    pub told_nothing: bool,
}

impl Socket {
    pub fn new(peer: Peer) -> Self {
        Self {
            status: Status::Unborn,
            is_connected: false,
            in_flight: 0,
            watch: None,
            arrived: 0,
            read: 0,
            fin: false,
            rst: false,
            was_refused: false,
            error: None,
            announced: 0,
            urgent: None,
            urgent_read: VecDeque::new(),
            room: peer.first_room,
            taken: 0,
            acked: 0,
            acked_at_ms: 0,
            is_shut: false,
            is_reset: false,
            keeps_back: false,
            told_end: false,
            told_end_first: false,
            told_last: false,
            told_error: None,
            told_cause: None,
            told_by_watch: false,
            told_nothing: false,
            peer,
        }
    }

    /// poll(2): POLLIN.
    pub fn is_readable(&self) -> bool {
        self.arrived > self.read || self.fin || self.rst
    }

    /// poll(2): POLLOUT.
    pub fn is_writable(&self) -> bool {
        self.rst || self.is_shut || self.room > 0
    }

    /// poll(2): POLLERR, gone once the failure was told.
    pub fn has_failed(&self) -> bool {
        self.error.is_some()
    }

    /// The worker was told, one way or another.
    pub fn is_known_to_have_failed(&self) -> bool {
        self.told_error.is_some() || self.told_by_watch
    }

    /// It failed, or seems to have.
    pub fn is_faulty(&self) -> bool {
        self.rst || self.was_refused
    }

    /// It takes nothing now, and never will.
    pub fn is_stuck(&self) -> bool {
        !self.rst && self.room == 0 && !self.can_grow()
    }

    /// What a read finds: bytes, the end (0), or a failure; as `tcp_recvmsg` decides it.
    pub fn look(&mut self) -> Result<u64, Errno> {
        match self.arrived - self.read {
            0 if self.fin => Ok(0),
            0 => match self.error.take() {
                Some(errno) => Err(errno),
                None if self.rst => Ok(0),
                None => Err(Errno::EAGAIN),
            },
            len => Ok(len),
        }
    }

    /// ioctl(2): SIOCATMARK. True also before the urgent byte has arrived.
    pub fn is_at_mark(&self) -> bool {
        self.urgent == Some(self.read)
    }

    /// poll(2): POLLPRI. An urgent byte has arrived, here or ahead.
    pub fn has_urgent(&self) -> bool {
        self.urgent.is_some_and(|mark| self.arrived > mark)
    }

    /// The next byte to be read is urgent, and is there.
    pub fn is_next_urgent(&self) -> bool {
        self.is_at_mark() && self.has_urgent()
    }

    /// An urgent byte may come, or has come.
    pub fn expects_urgent(&self) -> bool {
        self.urgent.is_some() || self.announced < self.peer.marks.len()
    }

    /// Bytes before an urgent mark ahead.
    pub fn before_mark(&self) -> Option<u64> {
        self.urgent.filter(|&mark| mark > self.read).map(|mark| mark - self.read)
    }

    /// Whether the peer sent the next byte to be read as urgent, even if TCP forgot it since.
    pub fn was_next_urgent(&self) -> bool {
        self.peer.marks[..self.announced].contains(&self.read)
    }

    /// Moves `len` bytes to the worker and returns where they begin in the stream.
    pub fn take_from(&mut self, len: u64) -> u64 {
        let start = self.read;
        self.read += len;
        self.urgent = self.urgent.filter(|&mark| mark >= self.read);
        start
    }

    /// What a send finds: room, or a failure; as `tcp_sendmsg` decides it.
    pub fn look_for_room(&mut self) -> Result<u64, Errno> {
        match self.error.take() {
            Some(errno) => Err(errno),
            None if self.rst || self.is_shut => Err(Errno::EPIPE),
            None if self.room == 0 => Err(Errno::EAGAIN),
            None => Ok(self.room),
        }
    }

    /// The socket takes `len` of the bytes it was given; with less than all it is full, so that
    /// its becoming writable is a change.
    pub fn put(&mut self, len: u64, given: u64, now_ms: u64) {
        self.acknowledge(now_ms);
        self.taken += len;
        self.keeps_back &= len == 0;
        if len > 0 {
            self.acked_at_ms = now_ms + u64::from(self.peer.ack_delay_ms.unwrap_or(0));
        }
        self.room = if len < given { 0 } else { self.room - len };
    }

    /// ioctl(2): SIOCOUTQ. What a peer that failed has not acknowledged it never will.
    pub fn unsent(&self, now_ms: u64) -> u64 {
        let answers = !self.rst && self.peer.ack_delay_ms.is_some();
        if answers && now_ms >= self.acked_at_ms { 0 } else { self.taken - self.acked }
    }

    fn acknowledge(&mut self, now_ms: u64) {
        self.acked = self.taken - self.unsent(now_ms);
    }

    /// The peer does one of the things it can; `None` if there is none.
    pub fn advance(&mut self, rng: &mut Rng, now_ms: u64) -> Option<Change> {
        if self.status != Status::Open || !self.is_connected || self.rst {
            return None;
        }
        let change = match (self.next_from_peer(), self.can_grow() && self.room == 0) {
            (Some(change), false) => change,
            (Some(change), true) if rng.percent(50) => change,
            (_, true) => Change::Room,
            (None, false) => return None,
        };
        match change {
            Change::Sent => self.arrive(rng),
            Change::Announced => self.announce(1),
            Change::Fin => self.fin = true,
            Change::Rst => {
                self.acknowledge(now_ms);
                self.rst = true;
                // The name of a reset depends on the state (tests/kernel/endings.rs).
                self.error = Some(match self.fin {
                    _ if self.peer.falls_silent => Errno::ETIMEDOUT,
                    true => Errno::EPIPE,
                    false => Errno::ECONNRESET,
                });
            }
            Change::Room => self.room = self.peer.step.min(self.peer.appetite - self.taken),
        }
        Some(change)
    }

    /// The peer has sent all it has, and reset, before anybody looked: connecting told of it.
    pub fn reset_at_once(&mut self) {
        (self.is_connected, self.rst, self.arrived) = (true, true, self.peer.len);
        self.announce(self.peer.marks.len());
    }

    /// More bytes of the peer arrive, in one go or up to an urgent one.
    fn arrive(&mut self, rng: &mut Rng) {
        let left = self.peer.len - self.arrived;
        let mut end = self.arrived + if rng.percent(50) { left } else { rng.range(1, left) };
        let next = self.peer.marks.get(self.announced).copied();
        if let Some(mark) = next.filter(|&mark| mark < end) {
            match rng.below(4) {
                0 | 1 => end = mark + 1,
                // It is announced by the bytes before it.
                2 => (end, self.announced, self.urgent) = (mark, self.announced + 1, next),
                _ => {}
            }
        }
        let passed = |marks: &[u64]| marks.iter().take_while(|&&mark| mark < end).count();
        self.announce(passed(&self.peer.marks[self.announced..]));
        self.arrived = end;
    }

    /// The next `count` marks are announced: TCP remembers the last.
    fn announce(&mut self, count: usize) {
        self.announced += count;
        if count > 0 {
            self.urgent = Some(self.peer.marks[self.announced - 1]);
        }
    }

    fn next_from_peer(&self) -> Option<Change> {
        if self.arrived < self.peer.len {
            return Some(Change::Sent);
        }
        if self.announced < self.peer.marks.len() {
            return Some(Change::Announced);
        }
        match self.peer.ending {
            Ending::Fin if !self.fin => Some(Change::Fin),
            Ending::Rst => Some(Change::Rst),
            Ending::FinThenRst => Some(if self.fin { Change::Rst } else { Change::Fin }),
            Ending::FinAfterFin if !self.fin && self.is_shut => Some(Change::Fin),
            _ => None,
        }
    }

    fn can_grow(&self) -> bool {
        self.taken < self.peer.appetite
    }
}
