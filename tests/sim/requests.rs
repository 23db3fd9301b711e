//! Requests: what each comes to, given the state of the world and bad luck.

use nix::errno::Errno;
use nsplice::engine::Token;
use nsplice::flow::half::BUFFER_BYTES;

use crate::memory::Extent;
use crate::plan::Order;
use crate::socket::{Socket, Status};
use crate::world::{Stage, World, other, trace};

/// A request in the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub token: Token,
    pub socket: usize,
    pub kind: Kind,
    pub is_cancelled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Accept,
    Connect,
    Recv,
    Readable,
    /// `len` bytes from `start` on, of a buffer.
    Send {
        buffer: u16,
        start: u32,
        len: u32,
        more: bool,
    },
    /// `has_changed`: there may be something to report.
    Watch {
        has_changed: bool,
    },
    Pause {
        ms: u32,
        /// Once it is submitted.
        due_ms: u64,
    },
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// A connection's number.
    Accepted(Result<usize, Errno>),
    Done(Result<(), Errno>),
    /// A buffer and the bytes in it.
    Received {
        result: Result<Option<(u16, u32)>, Errno>,
        more: bool,
    },
    /// Whether an urgent byte has arrived.
    Readable(Result<bool, Errno>),
    Sent(Result<u32, Errno>),
    Watched {
        writable: bool,
        failed: bool,
    },
}

/// A completion under way.
#[derive(Clone, Copy, Debug)]
pub struct Posted {
    pub token: Token,
    pub socket: usize,
    pub kind: Kind,
    pub report: Report,
    /// The request is over.
    pub is_last: bool,
    /// A late report of a watch that is over, and its flow too.
    pub is_ghost: bool,
}

impl Posted {
    /// Whether it, posted earlier than `next`, must be delivered before it.
    pub fn comes_before(&self, next: &Posted, order: Order) -> bool {
        match order {
            Order::Kernel => true,
            Order::Socket => self.socket == next.socket,
        }
    }
}

/// An outcome, and whether it is the request's last.
type Outcome = Option<(Report, bool)>;

fn last(report: Report) -> Outcome {
    Some((report, true))
}

impl World {
    /// Lets the request at `index` come to something, if it can; true if it did. `must`: not by
    /// bad luck alone.
    pub fn execute(&mut self, index: usize, must: bool) -> bool {
        let request = self.requests[index];
        let outcome = if request.is_cancelled && (must || self.rng.percent(60)) {
            last(cancelled(request.kind))
        } else {
            let mishap = !must && self.mishap();
            match request.kind {
                Kind::Accept => self.accept(mishap),
                Kind::Connect => self.finish_connect(request.socket),
                Kind::Recv => self.receive(request.socket, mishap),
                Kind::Readable => self.poll(request.socket, mishap),
                Kind::Send { buffer, start, len, more } => {
                    let outcome = self.send(request.socket, buffer, start, len, mishap);
                    let is_taken =
                        matches!(outcome, Some((Report::Sent(Ok(all)), _)) if all == len);
                    self.sockets[request.socket].keeps_back |= more && is_taken;
                    outcome
                }
                Kind::Watch { has_changed } => self.watch(index, has_changed, mishap),
                Kind::Pause { due_ms, .. } if due_ms > self.now_ms => None,
                Kind::Pause { .. } => last(Report::Done(Ok(()))),
            }
        };
        let Some((report, is_last)) = outcome else { return false };
        trace!(self, "    {:?} on {}: {report:?}, last: {is_last}", request.kind, request.socket);
        if is_last {
            self.requests.swap_remove(index);
        }
        let Request { token, socket, kind, .. } = request;
        self.posted.push_back(Posted { token, socket, kind, report, is_last, is_ghost: false });
        true
    }

    fn accept(&mut self, mishap: bool) -> Outcome {
        if self.plan.accept_errors > 0 {
            self.plan.accept_errors -= 1;
            return last(Report::Accepted(Err(self.plan.accept_error)));
        }
        if mishap {
            return last(Report::Accepted(Err(Errno::ECONNABORTED)));
        }
        let waiting =
            self.connections.iter().position(|connection| connection.stage == Stage::Waiting)?;
        self.connections[waiting].stage = Stage::AtDoor;
        last(Report::Accepted(Ok(waiting)))
    }

    fn finish_connect(&mut self, socket: usize) -> Outcome {
        last(Report::Done(self.connections[socket / 2].connected?))
    }

    fn receive(&mut self, socket: usize, mishap: bool) -> Outcome {
        let failed = |errno| last(Report::Received { result: Err(errno), more: false });
        if mishap {
            return failed(self.failed(socket, &[Errno::EINTR, Errno::EAGAIN]));
        }
        // The kernel chooses the buffer before it looks for something to receive.
        if self.buffers.are_all_used() {
            return failed(Errno::ENOBUFS);
        }
        let Socket { read, .. } = self.sockets[socket];
        let is_urgent = self.sockets[socket].is_next_urgent();
        assert!(!is_urgent, "urgent mark lost: byte {read} of {socket} is received as any other");
        let most = match self.sockets[socket].look() {
            Ok(0) => {
                let more = self.rng.percent(50);
                return last(Report::Received { result: Ok(None), more });
            }
            Ok(available) => available.min(u64::from(BUFFER_BYTES)),
            Err(errno) => return failed(errno),
        };
        let most = match self.sockets[socket].before_mark() {
            Some(before) => most.min(before),
            None => most,
        };
        let len = self.some_of(most);
        let start = self.sockets[socket].take_from(len);
        let bytes = Extent { source: socket, start, len };
        let buffer = self.buffers.fill(&mut self.rng, bytes);
        // A missing one is cured by the next receive. The kernel counts bytes and the end, so there
        // are no false alarms; one would keep back what was received, or hide an urgent byte to come.
        let more = self.sockets[socket].is_readable() && !self.rng.percent(10);
        last(Report::Received { result: Ok(Some((buffer, len as u32))), more })
    }

    fn poll(&mut self, socket: usize, mishap: bool) -> Outcome {
        let source = &self.sockets[socket];
        let (is_readable, urgent) = (source.is_readable(), source.has_urgent());
        if mishap {
            // A wait that cannot be made, a signal, a false alarm; but see `receive`.
            let result = match source.expects_urgent() {
                false => self.rng.pick(&[Err(Errno::ENOMEM), Err(Errno::EINTR), Ok(false)]),
                true if is_readable => self.rng.pick(&[Err(Errno::ENOMEM), Err(Errno::EINTR)]),
                true => Err(Errno::EINTR),
            };
            return last(Report::Readable(result));
        }
        if is_readable { last(Report::Readable(Ok(urgent))) } else { None }
    }

    fn send(&mut self, socket: usize, buffer: u16, start: u32, len: u32, mishap: bool) -> Outcome {
        if mishap && self.rng.percent(30) {
            return last(Report::Sent(Err(Errno::EINTR)));
        }
        let bytes = self.buffers.get(buffer).expect("checked when it was given back").bytes;
        let rest = bytes.after(u64::from(start));
        let given = Extent { len: u64::from(len), ..rest };
        let result = self.put(socket, given, mishap);
        last(Report::Sent(result.map(|len| len as u32)))
    }

    /// Offers bytes to a socket; returns how many it takes.
    pub fn put(&mut self, socket: usize, given: Extent, mishap: bool) -> Result<u64, Errno> {
        let room = self.sockets[socket].look_for_room()?;
        if mishap {
            // Memory is short: as if the socket were full, until it is writable again.
            self.sockets[socket].put(0, given.len, self.now_ms);
            return Err(self.failed(socket, &[Errno::EAGAIN]));
        }
        let len = self.some_of(room.min(given.len));
        self.check_delivery(socket, given);
        self.sockets[socket].put(len, given.len, self.now_ms);
        Ok(len)
    }

    /// A watch of a closed socket may still have something to say.
    pub fn haunt(&mut self, socket: usize) {
        if let Some(token) = self.sockets[socket].watch
            && self.mishap()
        {
            let is_last = self.rng.percent(50);
            let kind = Kind::Watch { has_changed: false };
            let report = Report::Watched { writable: true, failed: true };
            self.ghosts.push(Posted { token, socket, kind, report, is_last, is_ghost: true });
        }
    }

    fn watch(&mut self, index: usize, has_changed: bool, mishap: bool) -> Outcome {
        let socket = &self.sockets[self.requests[index].socket];
        let (writable, failed) = (socket.is_writable(), socket.has_failed());
        let level = Report::Watched { writable, failed };
        if has_changed {
            self.requests[index].kind = Kind::Watch { has_changed: false };
            let is_worth_telling = writable || failed || socket.fin;
            if mishap {
                // There is something in the socket's error queue.
                return Some((Report::Watched { writable, failed: true }, false));
            }
            return is_worth_telling.then_some((level, mishap));
        }
        if !mishap {
            return None;
        }
        match self.rng.below(3) {
            0 => last(Report::Watched { writable: false, failed: false }),
            1 => Some((Report::Watched { writable: true, failed }, false)),
            _ => Some((level, false)),
        }
    }

    /// Bytes reach a sink: they must be the next ones of the stream it is to get.
    pub fn check_delivery(&self, socket: usize, bytes: Extent) {
        let Socket { status, taken, .. } = self.sockets[socket];
        assert!(status == Status::Open, "bytes for closed socket {socket}");
        assert!(
            bytes.source == other(socket) && bytes.start == taken,
            "wrong bytes: socket {socket} has got {taken} bytes of {} and now gets {bytes:?}",
            other(socket)
        );
    }
}

/// How a request ends that was cancelled.
fn cancelled(kind: Kind) -> Report {
    let errno = Errno::ECANCELED;
    match kind {
        Kind::Accept => Report::Accepted(Err(errno)),
        Kind::Connect => Report::Done(Err(errno)),
        Kind::Readable => Report::Readable(Err(errno)),
        Kind::Pause { .. } => Report::Done(Ok(())),
        Kind::Recv => Report::Received { result: Err(errno), more: false },
        Kind::Send { .. } => Report::Sent(Err(errno)),
        Kind::Watch { .. } => Report::Watched { writable: false, failed: false },
    }
}
