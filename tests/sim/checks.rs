//! What must hold at each call of the engine, and what the worker has been told so far.

use nix::errno::Errno;
use nsplice::engine::Token;
use nsplice::flow::{Op, Side, TURN_BYTES};

use crate::memory::{Pipe, PipeState, Received};
use crate::requests::{Kind, Posted, Report, Request};
use crate::socket::{Socket, Status};
use crate::world::{Connection, Entered, Stage, World, other, side};

/// An error of the socket, not of a request.
fn is_failure(errno: Errno) -> bool {
    !matches!(errno, Errno::EAGAIN | Errno::EINTR | Errno::ECANCELED | Errno::ENOBUFS)
}

/// Checks of calls.
impl World {
    /// A request names its flow and its socket rightly, and is the only one of its kind.
    pub fn check_request(&mut self, request: &Request) {
        let Request { token, socket, kind, .. } = *request;
        assert!(self.sockets[socket].status == Status::Open, "{token:?} on a closed socket");
        let is_same = |other: Token| other == token;
        let in_queue = |posted: &&Posted| is_same(posted.token) && posted.is_last;
        let count = self.requests.iter().filter(|request| is_same(request.token)).count()
            + self.posted.iter().filter(in_queue).count()
            + self.inbox.iter().filter(in_queue).count()
            + self.entered.iter().filter(|entered| entered.begins(token)).count();
        assert!(count == 0, "too many requests {token:?} in flight");
        let Token::Flow { index, generation, op } = token else {
            assert!(kind == Kind::Accept && socket == self.listener(), "{token:?} is {kind:?}");
            // The queue of the listening socket is as it was: it would fail at once, for ever.
            assert!(!self.is_exhausted, "accepting goes on without a pause");
            return;
        };
        let fits = match (op, kind) {
            (Op::Connect, Kind::Connect) => side(socket) == Side::Connect,
            (Op::Recv(half), Kind::Recv) | (Op::Readable(half), Kind::Readable) => {
                side(socket) == half
            }
            (Op::Send(half), Kind::Send { .. }) => side(socket) == !half,
            (Op::Watch(watched), Kind::Watch { .. }) => side(socket) == watched,
            (Op::Pause, Kind::Pause { .. }) => true,
            _ => false,
        };
        assert!(fits, "{token:?} is {kind:?} on socket {socket}");
        self.check_name(socket / 2, (index, generation));
        match kind {
            Kind::Send { buffer, start, len, .. } => self.check_send(socket, buffer, start, len),
            Kind::Recv | Kind::Readable => self.check_idle(socket, kind),
            Kind::Pause { ms, .. } => self.check_pause(socket / 2, ms),
            _ => {}
        }
    }

    /// A slot's generation belongs to one connection.
    fn check_name(&mut self, connection: usize, name: (u32, u32)) {
        match self.connections[connection].name {
            Some(known) => {
                assert!(known == name, "connection {connection} is {known:?}, not {name:?}")
            }
            None => {
                let is_taken = self.connections.iter().any(|other| other.name == Some(name));
                assert!(!is_taken, "two connections are called {name:?}");
                self.connections[connection].name = Some(name);
                self.connections[connection].stage = Stage::Served;
            }
        }
    }

    /// A flow sends from its own buffers only, and no more than is in them.
    fn check_send(&mut self, socket: usize, buffer: u16, start: u32, len: u32) {
        let received = self.buffers.get(buffer);
        let received = received.unwrap_or_else(|| panic!("buffer {buffer} is sent, but is free"));
        let (bytes, sends) = (received.bytes, received.sends);
        assert!(bytes.source == other(socket), "buffer {buffer} of {bytes:?} goes to {socket}");
        assert!(sends == 0, "buffer {buffer} is sent twice at a time");
        let end = u64::from(start) + u64::from(len);
        assert!(len > 0 && end == bytes.len, "{len} bytes are sent from {start} of {bytes:?}");
    }

    /// A half that waits for something to read holds nothing of what others may need, but for a
    /// buffer that is being sent.
    fn check_idle(&self, socket: usize, kind: Kind) {
        let holds = |pipe: &Pipe| pipe.state == PipeState::Out && pipe.source == Some(socket);
        assert!(!self.pipes.iter().any(holds), "socket {socket} waits with a pipe");
        let is_ahead = |received: &Received| kind == Kind::Readable && received.sends > 0;
        let holds = |received: &Received| received.bytes.source == socket && !is_ahead(received);
        assert!(!self.buffers.used().any(holds), "socket {socket} waits with a buffer");
    }

    /// A flow pauses to let bytes arrive, of which each pause is longer than the one before, and
    /// all together are not longer than they may be.
    fn check_pause(&self, connection: usize, ms: u32) {
        let Connection { paused_ms, .. } = self.connections[connection];
        let left = u64::from(self.plan.grace_ms) - paused_ms;
        let ms = u64::from(ms);
        assert!(0 < ms && ms <= left, "a pause of {ms} ms, and {left} are left");
        let expected = left.min(128).min(1 + paused_ms / 8);
        assert!(ms == expected, "a pause of {ms} ms after {paused_ms}, not {expected}");
        let ids = [2 * connection, 2 * connection + 1];
        let knows = |id: usize| self.sockets[id].is_known_to_have_failed();
        assert!(ids.iter().any(|&id| knows(id)), "a pause, but nothing has failed");
        for source in ids.into_iter().filter(|&id| self.sockets[id].told_last && knows(id)) {
            let is_done = self.is_passed_on(source) && self.unsent(other(source)) == 0;
            assert!(!is_done, "a pause, but all of {source} was delivered");
        }
    }

    /// Whether all bytes that could be read from a socket went to the other one.
    fn is_passed_on(&self, source: usize) -> bool {
        self.sockets[other(source)].taken == self.sockets[source].arrived
    }

    fn unsent(&self, socket: usize) -> u64 {
        self.sockets[socket].unsent(self.now_ms)
    }

    pub fn check_fill(&mut self, socket: usize, pipe: usize, len: u64) {
        let (source, pipe) = (&self.sockets[socket], &self.pipes[pipe]);
        assert!(source.status == Status::Open, "fill from closed socket {socket}");
        assert!(pipe.state == PipeState::Out, "fill of a pipe that is {:?}", pipe.state);
        assert!(pipe.content.is_none(), "fill of a dirty pipe: {:?}", pipe.content);
        assert!(len > 0 && len <= pipe.capacity, "fill of {len} bytes into {pipe:?}");
        // What was left of its budget, the new one of its turn, another when it is told of a free
        // buffer; the last fill may pass the end.
        let connection = &self.connections[socket / 2];
        let budget = 3 * u64::from(TURN_BYTES) + pipe.capacity;
        assert!(connection.filled <= budget, "connection {} takes all the time", socket / 2);
        // Those that only wait for their turn take no more than one may, so that others wait for no
        // more: the last of them begins before that much is taken.
        let others = self.connections.iter().enumerate().filter(|(index, _)| *index != socket / 2);
        let in_turn = others.filter(|(_, other)| !other.is_woken);
        let taken = in_turn.map(|(_, other)| other.filled).sum::<u64>();
        let is_exempt = connection.is_woken || self.plan.buffers < 64;
        assert!(is_exempt || taken < u64::from(TURN_BYTES), "a turn of more than {taken} bytes");
        self.shared_fills += u64::from(taken > 0 && !is_exempt);
    }

    /// The end of a stream is passed on once, after all of its bytes, and only if it was one.
    pub fn check_shutdown(&self, socket: usize) {
        let (sink, source) = (&self.sockets[socket], &self.sockets[other(socket)]);
        assert!(sink.status == Status::Open && sink.is_connected, "shutdown of a dead socket");
        assert!(!sink.is_shut, "socket {socket} is shut down twice");
        let is_dead = sink.is_known_to_have_failed();
        assert!(!is_dead, "socket {socket} is shut down, but it is known to have failed");
        assert!(source.fin, "socket {socket} is shut down, but its source has not ended well");
        assert!(source.told_end, "socket {socket} is shut down before the end was read");
        let (len, taken) = (source.peer.len, sink.taken);
        assert!(taken == len, "socket {socket} is shut down with {taken} bytes of {len}");
        // What a watch alone has told may have come after the end: then the end is read, as here.
        let is_clean = source.told_error.is_none();
        assert!(is_clean, "socket {socket} is shut down, but its source is known to have failed");
    }

    /// Whether the connection may be ended whatever its state.
    pub fn is_cut(&self, connection: usize) -> bool {
        self.is_stopping || self.connections[connection].has_expired
    }

    /// A reset is passed on, or a failure to connect, after all that came before it.
    pub fn check_reset(&self, socket: usize) {
        assert!(self.sockets[socket].status == Status::Open, "reset of closed socket {socket}");
        let connection = &self.connections[socket / 2];
        if connection.stage == Stage::AtDoor {
            assert!(self.is_stopping || self.plan.single, "client {socket} is turned away");
            return;
        }
        let (own, source) = (&self.sockets[socket], &self.sockets[other(socket)]);
        let is_shut = own.is_shut;
        assert!(!is_shut || source.is_faulty(), "socket {socket} is reset after its end");
        // What went wrong with it itself, and what is not to look like an end.
        if self.is_cut(socket / 2) || own.is_known_to_have_failed() {
            return;
        }
        let is_connecting = connection.stage == Stage::Served && !connection.is_open;
        if is_connecting && side(socket) == Side::Connect {
            let is_in_vain = source.told_by_watch || connection.told_unreachable.is_some();
            assert!(is_in_vain, "target {socket} is reset without a reason");
            return;
        }
        if connection.stage == Stage::Refused || connection.told_unreachable.is_some() {
            return;
        }
        let has_failed = source.is_faulty();
        assert!(has_failed, "socket {socket} is reset, but the other one has not failed");
        let is_known = source.is_known_to_have_failed();
        assert!(is_known, "socket {socket} is reset, but the worker cannot know a reason");
        assert!(!source.is_shut || !is_shut, "socket {socket} is reset after both streams ended");
        let is_grace_over = connection.paused_ms >= u64::from(self.plan.grace_ms);
        let Socket { taken, .. } = *own;
        if !own.rst && !is_grace_over {
            let is_told = is_shut || own.was_refused || !source.told_end_first;
            assert!(is_told, "socket {socket} is reset, and not told the end that came before");
            // A source whose request was refused is read no more, whatever still arrives.
            let len = if source.was_refused { source.read } else { source.arrived };
            assert!(taken == len, "socket {socket} is reset with {taken} bytes of {len}");
            let unsent = self.unsent(socket);
            assert!(unsent == 0, "socket {socket} is reset with {unsent} bytes unsent");
            assert!(!own.keeps_back, "socket {socket} is reset while it keeps bytes back");
        }
    }

    /// No request is in flight on a socket that another engine is to have, and nothing that was read
    /// is still to be sent.
    pub fn check_leave(&self, socket: usize) {
        let in_flight = self.sockets[socket].in_flight;
        assert!(in_flight == 0, "socket {socket} leaves with {in_flight} requests in flight");
        let (read, sent) = (self.sockets[socket].read, self.sockets[other(socket)].taken);
        assert!(read == sent, "socket {socket} leaves when {sent} of {read} bytes are sent");
    }

    /// No request is in flight on a socket that is closed, and the flow had a reason to end.
    pub fn check_close(&self, socket: usize) {
        assert!(!self.is_closing(socket), "socket {socket} is closed twice");
        let in_flight = self.sockets[socket].in_flight;
        if socket == self.listener() {
            // The cancellation is ahead of it in the queue, and takes effect at once.
            assert!(in_flight == 0 || self.accept_cancelled, "closed while accepting");
            return;
        }
        assert!(in_flight == 0, "socket {socket} is closed with {in_flight} requests in flight");
        if self.connections[socket / 2].stage == Stage::AtDoor {
            // The target that was given may have found no client.
            let is_told = self.sockets[socket].is_reset || side(socket) == Side::Connect;
            assert!(is_told, "client {socket} is turned away without a word");
        } else if self.is_closing(other(socket)) {
            self.check_end(socket / 2);
        }
    }

    pub fn is_closing(&self, socket: usize) -> bool {
        let closes = |entered: &Entered| matches!(entered, Entered::Close(id) if *id == socket);
        self.sockets[socket].status == Status::Closed || self.entered.iter().any(closes)
    }

    /// A flow ends because both streams did, or with a reset, or because it is told to.
    fn check_end(&self, connection: usize) {
        let [client, target] = [2 * connection, 2 * connection + 1].map(|id| &self.sockets[id]);
        let is_reset = client.is_reset || target.is_reset;
        assert!(
            self.is_stopping || is_reset || (client.is_shut && target.is_shut),
            "connection {connection} is closed before its end"
        );
        let is_told_twice = client.is_reset && target.is_reset;
        let has_failed = client.is_faulty() || target.is_faulty();
        let was_open = self.connections[connection].is_open;
        let may_be = has_failed || !was_open || self.is_cut(connection);
        assert!(!is_told_twice || may_be, "both ends of {connection} are reset");
        // A reset is not less of one when it comes after the end of what the other end had to say.
        let is_over = client.is_shut && target.is_shut;
        for (socket, other) in [(client, target), (target, client)] {
            let hears = other.is_reset || other.rst || is_over || self.is_cut(connection);
            let has_failed = socket.is_known_to_have_failed();
            assert!(hears || !has_failed || !was_open, "{connection}: a failure is not passed on");
        }
        let has_word = |socket: &Socket| socket.is_reset || socket.is_shut || socket.rst;
        if was_open {
            assert!(has_word(client), "the client of {connection} is told nothing");
            assert!(has_word(target), "the target of {connection} is told nothing");
        }
    }
}

/// What the worker is told.
impl World {
    pub fn told(&mut self, posted: &Posted) {
        if posted.is_ghost {
            return;
        }
        let socket = posted.socket;
        self.sockets[socket].in_flight -= u32::from(posted.is_last);
        if socket < self.listener() {
            self.connections[socket / 2].is_woken = true;
        }
        if let Report::Accepted(result) = posted.report {
            if let Err(errno) = result
                && !matches!(errno, Errno::ECANCELED | Errno::ECONNABORTED | Errno::EINTR)
            {
                self.accept_errors.push(errno);
                self.is_exhausted = true;
            }
            return;
        }
        match posted.report {
            Report::Done(Err(errno))
                if posted.kind == Kind::Connect
                    && is_failure(errno)
                    && errno != Errno::ECONNRESET =>
            {
                self.connections[socket / 2].told_unreachable = Some(errno);
            }
            Report::Done(result)
                if posted.kind == Kind::Connect && result != Err(Errno::ECANCELED) =>
            {
                if let Err(errno) = result {
                    self.told_error(socket, errno);
                }
                let client = &self.sockets[other(socket)];
                self.connections[socket / 2].is_open = !client.told_by_watch;
                self.connections[socket / 2].delivered_at_tick = None;
            }
            Report::Done(_) => {
                if let Kind::Pause { ms, .. } = posted.kind {
                    self.connections[socket / 2].paused_ms += u64::from(ms);
                }
            }
            Report::Received { result, .. } => {
                self.told_by_read(socket, result.map(|filled| filled.is_none()));
            }
            Report::Sent(result) => {
                if let Kind::Send { buffer, .. } = posted.kind
                    && let Some(received) = self.buffers.get(buffer)
                {
                    received.sends -= 1;
                }
                self.told_by_write(socket, result);
            }
            Report::Watched { failed: true, .. } => {
                self.sockets[socket].told_by_watch |= self.sockets[socket].rst;
            }
            _ => {}
        }
    }

    /// `result`: whether that was the end of the stream.
    pub fn told_by_read(&mut self, socket: usize, result: Result<bool, Errno>) {
        let source = &mut self.sockets[socket];
        let is_failure = result.is_err_and(is_failure);
        source.told_last |= is_failure || result == Ok(true);
        source.told_end_first |= result == Ok(true) && source.told_error.is_none();
        source.told_end |= result == Ok(true);
        if let Err(errno) = result {
            self.told_error(socket, errno);
        }
    }

    /// `result`: bytes delivered.
    pub fn told_by_write(&mut self, socket: usize, result: Result<u32, Errno>) {
        match result {
            Ok(len) => self.connections[socket / 2].delivered += u64::from(len),
            Err(errno) => self.told_error(socket, errno),
        }
    }

    pub fn told_error(&mut self, socket: usize, errno: Errno) {
        if is_failure(errno) {
            self.sockets[socket].told_error.get_or_insert(errno);
            if errno != Errno::EPIPE {
                self.sockets[socket].told_cause.get_or_insert(errno);
            }
        }
    }
}
