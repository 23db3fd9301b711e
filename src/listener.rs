//! The listener process: the parent. It binds in the listen side's namespace and hands over,
//! once, the listening socket (or the only client), or each connection it accepts.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::SockaddrStorage;
use nix::unistd::write;

use self::binding::{bind_and_listen, cannot_listen, listen_at, own_address, socket_address};
pub use self::outbox::Outbox;
use self::outbox::{accept_batch, give, have_room};
use crate::config::{Config, Handoff};
use crate::error::{Error, Kind, Result};
use crate::handoff::{Channel, Message};
use crate::limits::Limits;
use crate::log::{self, Log};
use crate::netns::{self, Follower};
use crate::process::{ListenPart, Wake, wait_any};
use crate::queue::Queues;
use crate::socket::{prepare, reset};
use crate::sys::{SharedCounters, listen, set_nonblocking};
use crate::takeover::{Answer, Takeover};

mod binding;
mod ending;
mod outbox;

/// How long accepting pauses after the system ran out of something.
const PAUSE_MS: u16 = 100;

/// How long an address may still be taken by what a killed process has left behind.
const LEFT_BEHIND: Duration = Duration::from_millis(500);
/// How long to wait before it is tried again.
const BIND_AGAIN: Duration = Duration::from_millis(10);

/// What the listener is given at the fork.
pub struct Part<'a> {
    /// What was asked for.
    pub config: &'a Config,
    /// What to hand over.
    pub handoff: Handoff,
    /// Where connections come from.
    pub listen: ListenPart,
    /// To the connector.
    pub control: &'a Channel,
    /// To each worker.
    pub outboxes: Vec<Outbox>,
    /// Connections each worker has ended.
    pub ended: SharedCounters,
    /// Connections cut here.
    pub cut: SharedCounters,
    /// SIGINT and SIGTERM.
    pub signals: &'a SignalFd,
    /// Who is told the address once connections are accepted.
    pub ready: Option<OwnedFd>,
}

/// The way to each worker, if connections are handed over.
pub fn outboxes(workers: Vec<Channel>, limits: &Limits) -> Vec<Outbox> {
    let pairs = workers.into_iter().zip(&limits.connections);
    pairs.map(|(channel, &limit)| Outbox::new(channel, limit)).collect()
}

/// Serves until told to stop, until another process has taken over and the last connection is
/// over, or until the connector is gone, which the caller finds out about.
pub fn run(part: Part) -> Result<u8> {
    if !expect(part.control, part.signals, Message::Ready)? {
        return Ok(0);
    }
    // Before the log's thread is there, so that it is in that namespace, too.
    if let ListenPart::Bind(_, Some(netns)) = &part.listen {
        netns::enter(netns)?;
    }
    let control = part.control;
    log::with(part.config.verbose, |log| {
        let served = serve(part, log);
        // Before the last lines are waited for. It may be gone already.
        let _ = control.send(Message::Stop, &[]);
        served
    })
}

fn serve(part: Part, log: Log) -> Result<u8> {
    let (control, signals) = (part.control, part.signals);
    let mut serving = Serving {
        control,
        signals,
        handoff: part.handoff,
        config: part.config,
        listener: None,
        queues: Queues::default(),
        outboxes: part.outboxes,
        ended: part.ended,
        cut: part.cut,
        follower: None,
        takeover: None,
        bound: None,
        is_ours: matches!(part.listen, ListenPart::Bind(..)),
        log,
    };
    let address = match part.listen {
        ListenPart::Accepted(client) => {
            send(control, Message::Connections, &[client.as_fd()])?;
            own_address(&client)
        }
        ListenPart::Listener(listener) => serving.accept_from(listener)?,
        ListenPart::Bind(address, netns) => {
            if let Some(netns) = netns {
                let log = serving.log.clone();
                serving.follower = Follower::start(netns, part.config.netns_gone, log)?;
            }
            serving.takeover =
                part.config.takeover.as_deref().map(Takeover::prepare).transpose()?;
            let Some(listener) = serving.listening_socket(address)? else { return Ok(0) };
            serving.accept_from(listener)?
        }
    };
    if !expect(control, signals, Message::Accepting)? {
        return Ok(0);
    }
    if let Some(takeover) = &mut serving.takeover {
        takeover.publish()?;
    }
    announce(address.as_ref(), &serving.log, part.ready);
    serving.serve()
}

fn send(control: &Channel, message: Message, sockets: &[BorrowedFd<'_>]) -> Result<()> {
    match control.send(message, sockets) {
        // A connector that is gone is noticed by who waits for its next message.
        Ok(()) | Err(Errno::EPIPE) => Ok(()),
        Err(errno) => Err(Error::system(Kind::Process, "cannot hand over the socket", errno, "")),
    }
}

/// Waits for `message`; false when told to stop, also by the connector, or when that is gone.
fn expect(control: &Channel, signals: &SignalFd, message: Message) -> Result<bool> {
    match wait_any(control, signals, &[], PollTimeout::NONE)? {
        Wake::Control => match control.receive() {
            Ok(Some(received)) if received.message == message => Ok(true),
            // It was told to end, or has to.
            Ok(Some(received)) if received.message == Message::Stop => Ok(false),
            Ok(None) | Err(Errno::ECONNRESET) => Ok(false),
            other => {
                Err(Error::new(Kind::Process, format!("the connector is confused: {other:?}")))
            }
        },
        Wake::Signal | Wake::Own => Ok(false),
    }
}

fn announce(address: Option<&SockaddrStorage>, log: &Log, ready: Option<OwnedFd>) {
    let address = address.map_or_else(|| "unknown".to_owned(), SockaddrStorage::to_string);
    if let Some(ready) = ready {
        // Whoever asked to be told and did not wait for it is nothing to fail for.
        let _ = write(ready, format!("{address}\n").as_bytes());
    }
    if log.is_verbose() {
        log.line(&format!("listening on {address}"));
    }
}

/// The listener at work.
struct Serving<'a> {
    control: &'a Channel,
    signals: &'a SignalFd,
    handoff: Handoff,
    config: &'a Config,
    /// What connections are accepted from here; or, when the connector accepts them, a copy for
    /// the process that may take over.
    listener: Option<OwnedFd>,
    /// Clients who wait at sockets that are not accepted from any more.
    queues: Queues,
    outboxes: Vec<Outbox>,
    ended: SharedCounters,
    cut: SharedCounters,
    follower: Option<Follower>,
    takeover: Option<Takeover>,
    /// Where it listens, if that is an internet address.
    bound: Option<SocketAddr>,
    /// No other program has the listening socket, unless one takes over.
    is_ours: bool,
    log: Log,
}

impl Serving<'_> {
    /// A socket that listens at `address`: a predecessor's or a new one; `None`: interrupted.
    fn listening_socket(&mut self, address: SocketAddr) -> Result<Option<OwnedFd>> {
        if let Some(takeover) = &mut self.takeover {
            match takeover.ask(self.control, self.signals)? {
                Answer::Nobody => {}
                Answer::Interrupted => return Ok(None),
                Answer::Socket(listener) => {
                    takeover.check(&listener, address)?;
                    // From now on it is as it would be if it had been made here.
                    let is_as_new = reset(&listener)
                        .and_then(|()| prepare(&listener, &self.config.sockets))
                        .and_then(|()| listen(&listener, self.config.backlog));
                    return is_as_new.map(|()| Some(listener)).map_err(|errno| {
                        let what = format!("-l {address}: cannot set up the socket that came");
                        Error::system(Kind::Socket, what, errno, "")
                    });
                }
            }
        }
        self.listen_soon(address)
    }

    /// Listens at `address`, also if a process that was killed has it for a moment: its rings are
    /// torn down after it is gone (tests/kernel/cancelling.rs). `None`: interrupted.
    fn listen_soon(&self, address: SocketAddr) -> Result<Option<OwnedFd>> {
        let since = Instant::now();
        loop {
            match bind_and_listen(address, self.config) {
                Err(Errno::EADDRINUSE) if since.elapsed() < LEFT_BEHIND => {}
                result => {
                    if since.elapsed() >= BIND_AGAIN && result.is_ok() {
                        let ms = since.elapsed().as_millis();
                        self.log.line(&format!("-l {address} was taken for another {ms} ms"));
                    }
                    return result.map(Some).map_err(|errno| cannot_listen(address, errno));
                }
            }
            let timeout = PollTimeout::try_from(BIND_AGAIN).unwrap_or(PollTimeout::ZERO);
            if wait_any(self.control, self.signals, &[], timeout)? != Wake::Own {
                return Ok(None);
            }
        }
    }

    /// Has connections accepted from `listener`, here or in the connector, and from no other.
    /// Returns its address.
    fn accept_from(&mut self, listener: OwnedFd) -> Result<Option<SockaddrStorage>> {
        let address = own_address(&listener);
        self.bound = address.as_ref().and_then(socket_address);
        match self.handoff {
            Handoff::Socket => {
                send(self.control, Message::Listener, &[listener.as_fd()])?;
                // Nothing here may keep the port open without need.
                self.listener = self.takeover.is_some().then_some(listener);
            }
            Handoff::Connections => {
                set_nonblocking(&listener).map_err(|errno| {
                    Error::system(Kind::Socket, "cannot make the listener non-blocking", errno, "")
                })?;
                match self.listener.replace(listener) {
                    None => send(self.control, Message::Start, &[])?,
                    Some(before) => self.queues.add(before),
                }
            }
        }
        Ok(address)
    }

    /// Takes those who wait in the queues, as far as there is room for them. Returns whether some
    /// are left.
    fn take_queues(&mut self) -> bool {
        while !self.queues.is_empty() {
            if !have_room(&self.outboxes, &self.ended) {
                return true;
            }
            let client = match self.queues.take() {
                Ok(client) => client,
                Err(errno) => {
                    self.cannot_accept(errno);
                    return true;
                }
            };
            let give = |client| give(client, &mut self.outboxes, &self.ended);
            client.into_iter().for_each(give);
        }
        false
    }

    fn serve(mut self) -> Result<u8> {
        let mut paused = false;
        loop {
            let are_waiting = self.take_queues();
            let blocked = self.flush();
            let is_waiting = blocked || paused || are_waiting;
            let may_accept = !is_waiting && have_room(&self.outboxes, &self.ended);
            let timeout =
                if is_waiting { PAUSE_MS.into() } else { Follower::timeout(&self.follower) };
            match self.wait(may_accept, timeout)? {
                Wake::Own => self.outboxes.iter().for_each(Outbox::hear),
                Wake::Signal => return self.end(Ok(0)),
                Wake::Control if self.is_told_to_end() => return self.end(Ok(0)),
                Wake::Control => return Ok(0),
            }
            if let Some((takeover, listener)) = self.takeover.as_mut().zip(self.listener.as_ref())
                && takeover.serve(listener)
            {
                return ending::Ending::succeeded(self).run();
            }
            if let Err(error) = self.follow() {
                return self.end(Err(error));
            }
            // Those who wait in the queues come first; one may have been added just now.
            let may_accept = !blocked && self.queues.is_empty();
            if let Some(listener) = self.listener.as_ref().filter(|_| may_accept)
                && self.handoff == Handoff::Connections
            {
                let result = accept_batch(listener, &mut self.outboxes, &self.ended);
                paused = result.is_err();
                if let Err(errno) = result {
                    self.cannot_accept(errno);
                }
            }
        }
    }

    /// Hands over what waits. Returns whether some still has to.
    fn flush(&mut self) -> bool {
        let mut blocked = false;
        for outbox in &mut self.outboxes {
            // Later: when its channel takes more; or when less is in flight or there is memory,
            // which a pause helps. A connector that is gone is told by the control channel.
            blocked |= outbox.flush().is_err();
        }
        blocked
    }

    fn wait(&self, may_accept: bool, timeout: PollTimeout) -> Result<Wake> {
        let mut own: Vec<(&dyn AsFd, PollFlags)> = Vec::new();
        for outbox in &self.outboxes {
            let room = if outbox.is_full { PollFlags::POLLOUT } else { PollFlags::empty() };
            own.push((&outbox.channel, PollFlags::POLLIN | room));
        }
        if let Some(listener) = &self.listener
            && may_accept
            && self.handoff == Handoff::Connections
        {
            own.push((listener, PollFlags::POLLIN));
        }
        own.extend(self.follower.iter().flat_map(Follower::fds));
        own.extend(self.takeover.iter().map(Takeover::fd));
        wait_any(self.control, self.signals, &own, timeout)
    }

    /// Listens where the name of the namespace leads now.
    fn follow(&mut self) -> Result<()> {
        let Some((mut follower, address)) = self.follower.take().zip(self.bound) else {
            return Ok(());
        };
        if let Some(netns) = follower.look()? {
            match netns::enter(&netns).and_then(|()| listen_at(address, self.config)) {
                Ok(listener) => {
                    self.accept_from(listener)?;
                    follower.went_to(netns);
                }
                Err(error) => follower.cannot_go(error),
            }
        }
        self.follower = Some(follower);
        Ok(())
    }

    fn cannot_accept(&self, errno: Errno) {
        let text = || format!("cannot accept: {errno:?}: {}", errno.desc());
        self.log.failure("cannot accept", text);
    }

    /// Whether the connector, which may be the one that gets the signal, says so; if not, it is
    /// gone.
    fn is_told_to_end(&self) -> bool {
        let received = self.control.receive();
        matches!(received, Ok(Some(received)) if received.message == Message::Stop)
    }

    /// Ends with `result`: at once, or when the connections have.
    fn end(self, result: Result<u8>) -> Result<u8> {
        match self.config.drain_timeout_ms {
            0 => result,
            ms => ending::Ending::ordered(self, Duration::from_millis(ms.into())).run().and(result),
        }
    }
}
