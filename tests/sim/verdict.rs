//! What must hold when nothing can happen any more, and at the end of a schedule.

use nix::errno::Errno;
use nsplice::flow::Side;
use nsplice::stats::Stats;

use crate::memory::PipeState;
use crate::requests::{Kind, Request};
use crate::socket::Status;
use crate::world::{Connection, Stage, World, other};

/// Nothing can happen any more: whoever waits must wait for a peer.
impl World {
    pub fn check_quiescence(&self) {
        for (index, connection) in self.connections.iter().enumerate() {
            if !self.is_alive(index) {
                continue;
            }
            if connection.connected.is_some() {
                self.check_connection(index);
            } else {
                let has_failed = self.sockets[2 * index].rst;
                assert!(!has_failed, "connection {index} connects for a client that has failed");
            }
        }
        let is_waiting = |connection: &Connection| connection.stage == Stage::Waiting;
        if self.connections.iter().any(is_waiting)
            && self.sockets[self.listener()].status == Status::Open
        {
            let is_accept = |request: &&Request| request.kind == Kind::Accept;
            let accepts = self.requests.iter().filter(is_accept).count();
            let pauses = !self.accept_errors.is_empty() && !self.has_paused;
            let is_full = self.served() >= self.plan.max_connections as usize;
            assert!(accepts == 1 || pauses || is_full, "{accepts} accepts, not one");
        }
    }

    fn check_connection(&self, index: usize) {
        let ids = [2 * index, 2 * index + 1];
        let blocked = ids.map(|source| self.is_blocked(source));
        if ids.into_iter().any(|id| self.sockets[id].is_faulty()) {
            // Bytes that cannot be delivered are waited for no longer than the grace.
            let is_starved = self.is_starved();
            assert!(is_starved, "schedule does not end: connection {index} has failed");
            return;
        }
        for (source, is_blocked) in ids.into_iter().zip(blocked) {
            if !is_blocked {
                self.check_half(source);
            }
        }
        assert!(
            !ids.iter().all(|&id| self.sockets[id].is_shut),
            "schedule does not end: connection {index} is over and not closed"
        );
    }

    fn check_half(&self, id: usize) {
        let (source, sink) = (&self.sockets[id], &self.sockets[other(id)]);
        assert!(
            source.read == source.arrived && sink.taken == source.read,
            "schedule does not end: of {} bytes of socket {id}, {} were read and {} delivered",
            source.arrived,
            source.read,
            sink.taken
        );
        assert!(!source.fin || sink.is_shut, "schedule does not end: socket {id} has ended");
        let is_sent = sink.is_shut || !sink.keeps_back;
        assert!(is_sent, "schedule does not end: what came from {id} waits for more");
    }

    /// Whether the half that reads `id` can get no further: its sink takes nothing any more, or
    /// all buffers are held by halves of that kind.
    fn is_blocked(&self, id: usize) -> bool {
        let (source, sink) = (&self.sockets[id], &self.sockets[other(id)]);
        let has_undelivered = source.arrived > sink.taken;
        if has_undelivered && sink.is_stuck() {
            return true;
        }
        source.read == sink.taken && self.is_starved()
    }

    /// Whether all buffers are held by halves that can get no further.
    fn is_starved(&self) -> bool {
        let holder_is_stuck = |id: usize| self.sockets[other(id)].is_stuck();
        self.buffers.are_all_used()
            && self.buffers.used().all(|received| holder_is_stuck(received.bytes.source))
    }

    /// Connections that the worker has.
    pub fn served(&self) -> usize {
        let is_served = |&index: &usize| self.is_alive(index) && !self.is_closing(2 * index);
        (0..self.connections.len()).filter(is_served).count()
    }

    /// Whether the connection has a flow.
    fn is_alive(&self, index: usize) -> bool {
        self.connections[index].stage == Stage::Served
            && self.sockets[2 * index].status == Status::Open
    }
}

/// The worker says that it is done.
impl World {
    /// To be called when the worker is gone.
    pub fn check_all_returned(&self) {
        for (id, socket) in self.sockets.iter().enumerate() {
            assert!(socket.status != Status::Open, "socket {id} is left open");
            assert!(socket.in_flight == 0, "socket {id} is left with requests");
        }
        for (id, pipe) in self.pipes.iter().enumerate() {
            assert!(pipe.state != PipeState::Out, "pipe {id} is not given back");
        }
        assert!(self.buffers.are_all_free(), "not all buffers are given back");
        let is_left = !self.posted.is_empty() || !self.inbox.is_empty();
        assert!(!is_left, "completions are left");
    }

    /// The worker is told to stop.
    pub fn stop(&mut self) {
        let is_over = |index: &usize| self.sockets[2 * index].status == Status::Closed;
        let ended = (0..self.connections.len()).filter(is_over);
        self.failed_before =
            ended.filter(|&index| self.end(index) == Some(End::Failed)).count() as u64;
        self.is_stopping = true;
    }

    pub fn check_stats(&self, stats: &Stats) {
        let is_counted = |&index: &usize| match self.connections[index].stage {
            Stage::Served | Stage::Refused => true,
            Stage::AtDoor => self.sockets[2 * index].is_reset,
            Stage::Away | Stage::Waiting => false,
        };
        let counted = (0..self.connections.len()).filter(is_counted).count() as u64;
        assert!(stats.connections == counted, "{counted} connections, counted: {stats:?}");
        let ended = stats.completed + stats.failed + stats.stopped;
        assert!(ended == counted, "{counted} connections ended, counted: {stats:?}");

        let ends: Vec<_> = (0..self.connections.len()).map(|index| self.end(index)).collect();
        let complete = ends.iter().filter(|&&end| end == Some(End::Complete)).count() as u64;
        let failed = ends.iter().filter(|&&end| end == Some(End::Failed)).count() as u64;
        // The order to stop overtakes ends that were due.
        let is_right = match self.is_stopping {
            false => stats.failed == failed,
            true => (self.failed_before..=failed).contains(&stats.failed),
        };
        assert!(is_right, "{failed} connections failed, counted: {stats:?}");
        assert!(stats.completed <= complete, "{complete} complete, counted: {stats:?}");
        assert!(self.is_stopping || stats.stopped == 0, "nothing was stopped: {stats:?}");

        let delivered = |side: Side| -> u64 {
            self.sockets[..self.listener()]
                .iter()
                .skip(side.index())
                .step_by(2)
                .map(|s| s.taken)
                .sum()
        };
        let (to_client, to_target) = (delivered(Side::Listen), delivered(Side::Connect));
        assert!(
            (stats.bytes_to_target, stats.bytes_to_client) == (to_target, to_client),
            "{to_target} and {to_client} bytes delivered, counted: {stats:?}"
        );
        let drained = self.drained;
        assert!(stats.spliced_bytes == drained, "{drained} bytes drained, counted: {stats:?}");
        self.check_errors(stats);
    }

    /// Each error counted is the first one that somebody's socket reported.
    fn check_errors(&self, stats: &Stats) {
        let mut possible: Vec<_> =
            self.accept_errors.iter().map(|errno| format!("accept {errno:?}")).collect();
        for index in 0..self.connections.len() {
            possible.extend(self.possible_errors(index));
        }
        for (name, &count) in &stats.errors {
            let most = possible.iter().filter(|possible| *possible == name).count() as u64;
            assert!(count <= most, "{name} is counted {count} times, of at most {most}");
        }
        let counted: u64 = stats.errors.values().sum();
        let expected = stats.failed + self.accept_errors.len() as u64;
        assert!(counted == expected, "{expected} errors, counted: {stats:?}");
    }

    fn possible_errors(&self, index: usize) -> Vec<String> {
        let connection = &self.connections[index];
        let refused = connection.no_socket.filter(|_| connection.stage == Stage::Refused);
        let unreachable = connection.told_unreachable.or(refused);
        let mut names: Vec<_> =
            unreachable.map(|errno| format!("connect {errno:?}")).into_iter().collect();
        if connection.has_expired {
            let by_limit = ["connect ETIMEDOUT", "idle timeout", "half-close timeout"];
            names.extend(by_limit.map(str::to_owned));
        }
        for (who, id) in [("client", 2 * index), ("target", 2 * index + 1)] {
            let socket = &self.sockets[id];
            // A cause that was told after a mere EPIPE may have come in time to be counted.
            let later = socket.told_cause.filter(|_| socket.told_error == Some(Errno::EPIPE));
            let told = socket.told_error.into_iter().chain(later);
            names.extend(told.map(|errno| format!("{who} {errno:?}")));
            // Connecting, what the watch tells is all that is known.
            if (socket.told_by_watch && !connection.is_open) || socket.told_nothing {
                names.push(format!("{who} ECONNRESET"));
            }
        }
        names
    }

    fn end(&self, index: usize) -> Option<End> {
        let [client, target] = [2 * index, 2 * index + 1].map(|id| &self.sockets[id]);
        match self.connections[index].stage {
            Stage::Served | Stage::Refused => {}
            _ => return None,
        }
        if client.is_reset || target.is_reset {
            Some(End::Failed)
        } else if client.is_shut && target.is_shut {
            Some(End::Complete)
        } else {
            Some(End::Stopped)
        }
    }
}

/// How a connection ended, as the world saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    Failed,
    Stopped,
}
