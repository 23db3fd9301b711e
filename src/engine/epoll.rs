//! The epoll engine, for hosts that do not let a program use io_uring: two epoll sets, used by one
//! thread.
//!
//! Receiving and sending are done at once, without waiting; their completions are there before
//! the next [`Engine::wait`]. What has to wait is in one of two sets. In the first each report is
//! of the *state* of a descriptor (level-triggered): a request that is not in flight any more
//! leaves its descriptor there, because the next one mostly wants the same, and costs a call only
//! when something is reported that nobody waits for. In the second it is a *change* that is
//! reported, once (edge-triggered): so a socket that is watched and stays writable, or stays
//! half-closed, does not wake the worker again and again.
//!
//! A request for which the kernel has no memory is not lost: it completes a little later, as if
//! there was something to do, and whoever asked finds out by trying.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollFlags, EpollTimeout};
use nix::sys::socket::{self as net, SockFlag, SockaddrStorage, accept4};

use self::buffers::Buffers;
use self::interest::{EVENTS, Interest, Report, State};
use self::timers::Timers;
use super::{Buffer, Completion, Engine, Outcome, Setup, Sleep, Start, Token, calls};
use crate::config::SocketOptions;
use crate::error::{Error, Kind};
use crate::flow::Op;
use crate::pipe::{Pipe, PipePool};

mod buffers;
mod interest;
mod timers;

/// After this time a request that could not be made because the kernel has no memory for it
/// completes nevertheless.
const NO_MEMORY_PAUSE: Duration = Duration::from_millis(10);

/// An engine on epoll.
pub struct Epoll {
    interest: Interest,
    reports: Vec<Report>,
    timers: Timers,
    /// The listening socket, once it does not block.
    listening: Option<RawFd>,
    inbox: VecDeque<Completion<OwnedFd>>,
    buffers: Buffers,
    pipes: PipePool,
    target: Option<SockaddrStorage>,
    sockets: SocketOptions,
    busy_poll: Duration,
}

impl Epoll {
    fn push(&mut self, token: Token, outcome: Outcome<OwnedFd>) {
        self.inbox.push_back(Completion { token, outcome });
    }

    /// Has `token` complete when the descriptor is in the state `wanted`.
    fn wait_for(&mut self, token: Token, fd: RawFd, wanted: State) {
        if let Err(errno) = self.interest.wait_for(token, fd, wanted) {
            self.timers.add(token, NO_MEMORY_PAUSE, errno);
        }
    }

    /// What a request waits for has come.
    fn reported(&mut self, Report { token, fd, events }: Report) {
        let has = |event| events.contains(event);
        let outcome = match token {
            Token::Accept => {
                let result = accept4(fd, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC);
                if result == Err(Errno::EAGAIN) {
                    return; // A sibling was faster.
                }
                // The next wait is to begin at the end of the listening socket's queue.
                self.interest.leave(token);
                Outcome::Accepted(result.and_then(crate::sys::own))
            }
            Token::Flow { op: Op::Watch(_), .. } => {
                let (writable, failed) = (has(EpollFlags::EPOLLOUT), has(EpollFlags::EPOLLERR));
                Outcome::Watched { writable, failed, armed: true }
            }
            Token::Flow { op: Op::Connect, .. } => {
                self.interest.done(token);
                // A second connect(2) would tell, too, but it drops what a target had sent before
                // it reset the connection.
                let failed = has(EpollFlags::EPOLLERR);
                Outcome::Done(if failed { crate::sys::take_error(fd) } else { Ok(()) })
            }
            Token::Flow { .. } => {
                self.interest.done(token);
                Outcome::Readable(Ok(has(EpollFlags::EPOLLPRI)))
            }
            Token::Handoff | Token::Command | Token::Tick | Token::Ignored => {
                self.interest.done(token);
                Outcome::Done(Ok(()))
            }
        };
        self.push(token, outcome);
    }

    /// Takes what has completed, after waiting for it as long as `sleep` allows.
    fn poll(&mut self, sleep: Sleep) -> Result<(), Errno> {
        let timeout = self.timeout(sleep);
        let mut reports = std::mem::take(&mut self.reports);
        let result = self.interest.wait(&mut reports, timeout);
        for report in reports.drain(..) {
            self.reported(report);
        }
        self.reports = reports;
        while let Some((token, errno)) = self.timers.expired() {
            self.push(token, ended(token, errno));
        }
        match result {
            Err(Errno::EINTR) => Ok(()),
            result => result,
        }
    }

    fn timeout(&self, sleep: Sleep) -> EpollTimeout {
        let limit = match sleep {
            Sleep::No => return EpollTimeout::ZERO,
            Sleep::ForMs(ms) => Some(Duration::from_millis(ms.into())),
            Sleep::Forever => None,
        };
        let Some(time) = limit.into_iter().chain(self.timers.left()).min() else {
            return EpollTimeout::NONE;
        };
        // Rounded up: a timer is over when the wait is.
        EpollTimeout::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(EpollTimeout::MAX)
    }

    fn receive(&mut self, socket: &OwnedFd) -> (Result<Option<Buffer>, Errno>, bool) {
        let Some(id) = self.buffers.take() else { return (Err(Errno::ENOBUFS), false) };
        let (result, more) = calls::receive(socket, id, self.buffers.memory(id));
        if !matches!(result, Ok(Some(_))) {
            self.buffers.give_back(id);
        }
        (result, more)
    }
}

/// What a request comes to that ends before what it waits for: cancelled, or refused.
fn ended(token: Token, errno: Errno) -> Outcome<OwnedFd> {
    match token {
        Token::Accept => Outcome::Accepted(Err(errno)),
        Token::Flow { op: Op::Readable(_), .. } => Outcome::Readable(Err(errno)),
        Token::Flow { op: Op::Watch(_), .. } => {
            // Refused: whoever wants to send has to try.
            let writable = errno != Errno::ECANCELED;
            Outcome::Watched { writable, failed: false, armed: false }
        }
        // It has done what it is for when its time is up.
        Token::Flow { op: Op::Pause, .. } => Outcome::Done(Ok(())),
        _ => Outcome::Done(Err(errno)),
    }
}

impl Start for Epoll {
    const NAME: &'static str = "epoll";

    fn start(setup: &Setup) -> Result<Self, Error> {
        let refused =
            |errno| Error::system(Kind::Kernel, "cannot set up epoll", errno, calls::NO_EPOLL);
        Ok(Self {
            interest: Interest::new().map_err(refused)?,
            reports: Vec::with_capacity(2 * EVENTS),
            timers: Timers::default(),
            listening: None,
            inbox: VecDeque::with_capacity(2 * EVENTS),
            buffers: Buffers::default(),
            pipes: PipePool::new(setup.pipe_size_bytes, setup.pipes),
            target: setup.target.map(SockaddrStorage::from),
            sockets: setup.sockets,
            busy_poll: Duration::from_micros(setup.busy_poll_us.into()),
        })
    }
}

impl Engine for Epoll {
    type Socket = OwnedFd;
    type Pipe = Pipe;

    fn accept(&mut self, token: Token, listener: &OwnedFd) {
        let fd = listener.as_raw_fd();
        if self.listening != Some(fd) {
            self.listening = Some(fd);
            // A sibling may be faster, and then accepting must not wait. Another program that
            // has the socket finds it changed, too: there is no such flag for a single call.
            let _ = crate::sys::set_nonblocking(listener);
        }
        self.wait_for(token, fd, State::HasClient);
    }

    fn connect(&mut self, token: Token, socket: &OwnedFd) {
        let fd = socket.as_raw_fd();
        let target = self.target.as_ref().ok_or(Errno::EDESTADDRREQ);
        match target.and_then(|target| net::connect(fd, target)) {
            Err(Errno::EINPROGRESS) => self.wait_for(token, fd, State::Connected),
            result => self.push(token, Outcome::Done(result)),
        }
    }

    fn recv(&mut self, token: Token, socket: &OwnedFd) {
        let (result, more) = self.receive(socket);
        self.push(token, Outcome::Received { result, more });
    }

    fn readable(&mut self, token: Token, socket: &OwnedFd) {
        self.wait_for(token, socket.as_raw_fd(), State::Readable);
    }

    fn send(&mut self, token: Token, socket: &OwnedFd, buffer: &Buffer, more: bool) {
        let result = calls::send(socket, self.buffers.bytes(buffer), more);
        self.push(token, Outcome::Sent(result));
    }

    fn watch(&mut self, token: Token, socket: &OwnedFd) {
        if let Err(errno) = self.interest.watch(token, socket.as_raw_fd()) {
            self.timers.add(token, NO_MEMORY_PAUSE, errno);
        }
    }

    fn pause(&mut self, token: Token, ms: u32) {
        self.timers.add(token, Duration::from_millis(ms.into()), Errno::ETIME);
    }

    fn cancel(&mut self, token: Token) {
        let is_ended = match token {
            Token::Flow { op: Op::Watch(_), .. } => self.interest.unwatch(token),
            // The first two have completed, and a pause is a timer.
            Token::Flow { op: Op::Recv(_) | Op::Send(_) | Op::Pause, .. } => false,
            _ => self.interest.leave(token),
        };
        if is_ended || self.timers.remove(token) {
            self.push(token, ended(token, Errno::ECANCELED));
        }
    }

    fn close(&mut self, socket: OwnedFd) {
        let fd = socket.as_raw_fd();
        self.interest.forget(fd);
        self.listening.take_if(|listening| *listening == fd);
    }

    fn let_go(&mut self, socket: &OwnedFd) {
        self.interest.forget(socket.as_raw_fd());
    }

    fn target_socket(&mut self) -> Result<OwnedFd, Errno> {
        calls::target_socket(self.target.as_ref(), &self.sockets)
    }

    fn shutdown(&mut self, socket: &OwnedFd) {
        calls::shutdown(socket);
    }

    fn reset(&mut self, socket: &OwnedFd) {
        calls::reset(socket);
    }

    fn is_at_mark(&self, socket: &OwnedFd) -> bool {
        calls::is_at_mark(socket)
    }

    fn recv_urgent(&mut self, socket: &OwnedFd) -> Result<Option<u8>, Errno> {
        calls::recv_urgent(socket)
    }

    fn send_urgent(&mut self, socket: &OwnedFd, byte: u8) -> Result<(), Errno> {
        calls::send_urgent(socket, byte)
    }

    fn adopt(&mut self, client: &OwnedFd) {
        crate::socket::adopt(client, &self.sockets);
    }

    fn has_failed(&mut self, socket: &OwnedFd) -> bool {
        calls::has_failed(socket)
    }

    fn failure(&self, socket: &OwnedFd) -> Option<Errno> {
        calls::failure(socket)
    }

    fn unsent(&self, socket: &OwnedFd) -> u32 {
        calls::unsent(socket)
    }

    fn peer(&self, socket: &OwnedFd) -> Option<SockaddrStorage> {
        calls::peer(socket)
    }

    fn give_back(&mut self, buffer: Buffer) {
        self.buffers.give_back(buffer.id());
    }

    fn take_pipe(&mut self) -> Option<(Pipe, u32)> {
        self.pipes.take()
    }

    fn release_pipe(&mut self, pipe: Pipe) {
        self.pipes.give_back(pipe);
    }

    fn fill(&mut self, socket: &OwnedFd, pipe: &mut Pipe, len: u32) -> Result<u32, Errno> {
        pipe.fill(socket, len)
    }

    fn drain(&mut self, pipe: &mut Pipe, socket: &OwnedFd, len: u32) -> Result<u32, Errno> {
        pipe.drain(socket, len)
    }

    fn wait(&mut self, sleep: Sleep) -> Result<(), Errno> {
        let spins = sleep != Sleep::No && !self.busy_poll.is_zero();
        if spins {
            let until = Instant::now() + self.busy_poll;
            while self.inbox.is_empty() && Instant::now() < until {
                self.poll(Sleep::No)?;
            }
        }
        let sleep = if self.inbox.is_empty() { sleep } else { Sleep::No };
        self.poll(sleep)
    }

    fn completion(&mut self) -> Option<Completion<OwnedFd>> {
        self.inbox.pop_front()
    }
}
