//! The passing of time: what happens in the world while the worker waits.
//!
//! Things happen in two steps, as in the kernel. A request is *executed* at some moment, which
//! decides its outcome; its completion is *delivered* at that moment or later. What the worker
//! does by itself (fill, drain, shutdown, ...) happens at once, between the two.

use std::time::Duration;

use nix::errno::Errno;
use nsplice::engine::Sleep;

use crate::plan::{Entry, Order};
use crate::requests::{Kind, Report};
use crate::socket::{Change, Socket, Status};
use crate::world::{Entered, Stage, World, trace};

/// More than a worker's pause after a failed accept.
const PAUSE: Duration = Duration::from_millis(101);

impl World {
    /// One wait of the worker: submits, and lets things happen.
    pub fn wait(&mut self, sleep: Sleep) {
        trace!(self, "wait {sleep:?}");
        self.turn_calls = 0;
        self.is_exhausted = false;
        self.waits_alone += 1;
        for connection in &mut self.connections {
            (connection.filled, connection.is_woken) = (0, false);
        }
        self.submit();
        self.now_ms += self.rng.below(u64::from(self.weather.tempo_ms) + 1);
        self.pass();
        self.is_quiescent = false;
        while sleep != Sleep::No && self.inbox.is_empty() {
            if self.hurry() {
                self.deliver_starved();
                continue;
            }
            if sleep != Sleep::Forever && self.plan.waits_for_pause {
                std::thread::sleep(PAUSE);
                self.has_paused = true;
            } else {
                trace!(self, "    nothing can happen");
                self.is_quiescent = true;
            }
            break;
        }
    }

    /// Hands what was entered to the kernel, in order.
    pub fn submit(&mut self) {
        for entered in std::mem::take(&mut self.entered) {
            match entered {
                Entered::Begin(mut request) => {
                    if let Kind::Pause { ms, due_ms } = &mut request.kind {
                        *due_ms = self.now_ms + u64::from(*ms);
                    }
                    self.requests.push(request);
                }
                Entered::Cancel(token) => {
                    for request in self.requests.iter_mut().filter(|r| r.token == token) {
                        request.is_cancelled = true;
                    }
                }
                Entered::Close(socket) => self.sockets[socket].status = Status::Closed,
            }
        }
    }

    /// Some time passes.
    fn pass(&mut self) {
        let executes_first = self.rng.percent(30);
        if executes_first {
            self.execute_some();
        }
        for connection in 0..self.connections.len() {
            if self.rng.percent(self.weather.advance) {
                self.advance(connection);
            }
        }
        if !executes_first {
            self.execute_some();
        }
        self.deliver_some();
        self.deliver_starved();
        if !self.ghosts.is_empty() && self.rng.percent(10) {
            self.inbox.extend(self.ghosts.pop());
        }
    }

    fn execute_some(&mut self) {
        // From anywhere on, so that the order of submission means nothing.
        let count = self.requests.len();
        let first = if count > 0 { self.rng.index(count) } else { 0 };
        for index in (0..count).map(|at| (first + at) % count).rev() {
            if self.rng.percent(self.weather.execute) && index < self.requests.len() {
                self.execute(index, false);
            }
        }
    }

    fn deliver_some(&mut self) {
        let count = self.posted.len();
        for _ in 0..count {
            if !self.rng.percent(self.weather.deliver) {
                if self.weather.order == Order::Kernel {
                    return;
                }
                continue;
            }
            let index = self.rng.index(self.posted.len());
            self.deliver(index);
        }
    }

    /// Receives do not wait, so the kernel makes them while they are submitted, and what came of
    /// them is known before anything else is done: no buffer is given back in between.
    fn deliver_starved(&mut self) {
        let report = Report::Received { result: Err(Errno::ENOBUFS), more: false };
        while let Some(index) = self.posted.iter().position(|posted| posted.report == report) {
            self.deliver(index);
        }
    }

    /// Delivers the completion at `index`, or the one that must come before it.
    fn deliver(&mut self, index: usize) {
        let order = self.weather.order;
        let wanted = &self.posted[index];
        let first = self.posted.iter().position(|posted| posted.comes_before(wanted, order));
        let posted = self.posted.remove(first.unwrap_or(index)).expect("an index of it");
        self.inbox.push_back(posted);
    }

    /// Makes something happen, to end a wait; false if nothing can.
    fn hurry(&mut self) -> bool {
        if !self.posted.is_empty() {
            let index = self.rng.index(self.posted.len());
            self.deliver(index);
            return true;
        }
        let anywhere = self.rng.index(self.requests.len().max(1));
        for at in 0..self.requests.len() {
            let index = (anywhere + at) % self.requests.len();
            if self.execute(index, true) {
                return true;
            }
        }
        let anywhere = self.rng.index(self.connections.len());
        let count = self.connections.len();
        (0..count).any(|at| self.advance((anywhere + at) % count)) || self.skip_time()
    }

    /// The next thing that happens is the end of a pause.
    fn skip_time(&mut self) -> bool {
        let due = self.requests.iter().filter_map(|request| match request.kind {
            Kind::Pause { due_ms, .. } => Some(due_ms),
            _ => None,
        });
        let next = due.min();
        self.now_ms = next.unwrap_or(self.now_ms).max(self.now_ms);
        trace!(self, "    it is {} ms", self.now_ms);
        next.is_some()
    }

    /// One of the peers of a connection does something.
    fn advance(&mut self, index: usize) -> bool {
        let has_advanced = self.advance_any(index);
        if has_advanced {
            self.waits_alone = 0;
        }
        has_advanced
    }

    fn advance_any(&mut self, index: usize) -> bool {
        let may_arrive = self.plan.entry == Entry::Accepted && self.may_arrive(index);
        let connection = &mut self.connections[index];
        match (connection.stage, connection.connect) {
            (Stage::Away, _) if may_arrive => {
                trace!(self, "    connection {index} arrives");
                connection.stage = Stage::Waiting;
                return true;
            }
            (Stage::Served, Some(result))
                if connection.is_connecting && connection.connected.is_none() =>
            {
                // Meanwhile the client goes on, or goes away.
                if self.rng.percent(40) && self.advance_peer(2 * index) {
                    return true;
                }
                trace!(self, "    connection {index}: connecting comes to {result:?}");
                match result {
                    Ok(()) => self.connect(index),
                    Err(Errno::ECONNRESET) => {
                        self.connections[index].connected = Some(result);
                        self.sockets[2 * index + 1].reset_at_once();
                    }
                    Err(_) => self.connections[index].connected = Some(result),
                }
                return true;
            }
            _ => {}
        }
        let first = 2 * index + usize::from(self.rng.percent(50));
        self.advance_peer(first) || self.advance_peer(first ^ 1)
    }

    /// Some come only when all before them are gone, to find their slots empty.
    pub fn may_arrive(&self, index: usize) -> bool {
        if self.plan.target_given && index > 0 && self.connections[0].stage == Stage::Away {
            // The target that was given is the first one's.
            return false;
        }
        !self.plan.connections[index].is_late
            || self.sockets[..2 * index].iter().all(|socket| socket.status != Status::Open)
    }

    fn advance_peer(&mut self, socket: usize) -> bool {
        let Some(change) = self.sockets[socket].advance(&mut self.rng, self.now_ms) else {
            return false;
        };
        if self.is_traced {
            let Socket { arrived, room, .. } = self.sockets[socket];
            println!("    peer of {socket}: {change:?} (sent {arrived}, room {room})");
        }
        // POLLRDHUP and POLLERR are in every mask (tests/kernel/polling.rs); POLLIN is not watched.
        if !matches!(change, Change::Sent | Change::Announced) {
            for request in &mut self.requests {
                if request.socket == socket
                    && let Kind::Watch { has_changed } = &mut request.kind
                {
                    *has_changed = true;
                }
            }
        }
        true
    }
}
