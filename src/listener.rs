//! The listener process: the parent. It binds in the listen side's namespace and hands over,
//! once, the listening socket (or the only client), or each connection it accepts.

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, accept4, bind, getsockname,
    listen, setsockopt, socket, sockopt,
};
use nix::unistd::write;

use crate::config::{Handoff, NetnsGone};
use crate::error::{Error, Kind, Result};
use crate::handoff::{Channel, MAX_SOCKETS, Message};
use crate::log;
use crate::netns::{self, Follower};
use crate::process::{ListenPart, Wake, wait_any};
use crate::sys::{SharedCounters, set_nonblocking};

/// Connections accepted before those accepted so far are handed over.
const BATCH: usize = 64;

/// How long accepting pauses after the system ran out of something.
const PAUSE_MS: u16 = 100;

/// What the listener is given at the fork.
pub struct Part<'a> {
    /// Log the address.
    pub verbose: bool,
    /// What to hand over.
    pub handoff: Handoff,
    /// Where connections come from.
    pub listen: ListenPart,
    /// What to do when its namespace's name goes.
    pub netns_gone: NetnsGone,
    /// To the connector.
    pub control: &'a Channel,
    /// To each worker.
    pub workers: Vec<Channel>,
    /// Connections each worker has ended.
    pub ended: SharedCounters,
    /// SIGINT and SIGTERM.
    pub signals: &'a SignalFd,
    /// Who is told the address once connections are accepted.
    pub ready: Option<OwnedFd>,
}

/// Serves until told to stop or until the connector is gone, which the caller finds out about.
pub fn run(part: Part) -> Result<u8> {
    let (control, signals) = (part.control, part.signals);
    if !expect(control, signals, Message::Ready)? {
        return Ok(0);
    }
    let (source, follower) = open(part.listen, part.netns_gone)?;
    let bound = getsockname::<SockaddrStorage>(source.as_raw_fd());
    let address =
        bound.as_ref().map_or_else(|_| "unknown".to_owned(), |address| address.to_string());
    let mut serving = Serving {
        control,
        signals,
        handoff: part.handoff,
        listener: None,
        outboxes: part.workers.iter().map(Outbox::new).collect(),
        ended: &part.ended,
        follower,
        address: bound.ok().as_ref().and_then(socket_address),
    };
    match source {
        Source::Client(client) => send(control, Message::Connections, &[client.as_fd()])?,
        Source::Listener(listener) => serving.accept_from(listener)?,
    }
    if !expect(control, signals, Message::Accepting)? {
        return Ok(0);
    }
    announce(&address, part.verbose, part.ready);
    serving.serve()
}

enum Source {
    Listener(OwnedFd),
    Client(OwnedFd),
}

impl AsRawFd for Source {
    fn as_raw_fd(&self) -> i32 {
        let (Source::Listener(fd) | Source::Client(fd)) = self;
        fd.as_raw_fd()
    }
}

fn open(listen: ListenPart, netns_gone: NetnsGone) -> Result<(Source, Option<Follower>)> {
    match listen {
        ListenPart::Accepted(client) => Ok((Source::Client(client), None)),
        ListenPart::Listener(listener) => Ok((Source::Listener(listener), None)),
        ListenPart::Bind(address, netns) => {
            let mut follower = None;
            if let Some(netns) = netns {
                netns::enter(&netns)?;
                follower = Follower::start(netns, netns_gone)?;
            }
            Ok((Source::Listener(listen_at(address)?), follower))
        }
    }
}

/// Listens at `address` in the namespace this process is in.
fn listen_at(address: SocketAddr) -> Result<OwnedFd> {
    bind_and_listen(address).map_err(|errno| {
        let cause = match errno {
            Errno::EADDRINUSE => "another socket listens there",
            Errno::EADDRNOTAVAIL => {
                "no interface of the listen side's namespace has this address; is it up?"
            }
            Errno::EACCES => "ports below net.ipv4.ip_unprivileged_port_start need root",
            _ => "",
        };
        Error::system(Kind::Socket, format!("-l {address}: cannot listen"), errno, cause)
    })
}

fn bind_and_listen(address: SocketAddr) -> std::result::Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let listener = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    // Accepted sockets inherit these two (kernel-fact 18).
    setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
    setsockopt(&listener, sockopt::OobInline, &true)?;
    if address.is_ipv6() {
        setsockopt(&listener, sockopt::Ipv6V6Only, &false)?;
    }
    bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&listener, Backlog::MAXCONN)?;
    Ok(listener)
}

/// The same address as the standard library has it; `None` if it is no internet address.
fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|&address| SocketAddr::V4(address.into()));
    v4.or_else(|| address.as_sockaddr_in6().map(|&address| SocketAddr::V6(address.into())))
}

fn send(control: &Channel, message: Message, sockets: &[BorrowedFd<'_>]) -> Result<()> {
    match control.send(message, sockets) {
        // A connector that is gone is noticed by who waits for its next message.
        Ok(()) | Err(Errno::EPIPE) => Ok(()),
        Err(errno) => Err(Error::system(Kind::Process, "cannot hand over the socket", errno, "")),
    }
}

/// Waits for `message`; false when told to stop, or when the connector is gone.
fn expect(control: &Channel, signals: &SignalFd, message: Message) -> Result<bool> {
    match wait_any(control, signals, &[], PollTimeout::NONE)? {
        Wake::Control => match control.receive() {
            Ok(Some(received)) if received.message == message => Ok(true),
            Ok(None) | Err(Errno::ECONNRESET) => Ok(false),
            other => {
                Err(Error::new(Kind::Process, format!("the connector is confused: {other:?}")))
            }
        },
        Wake::Signal | Wake::Own => Ok(false),
    }
}

fn announce(address: &str, verbose: bool, ready: Option<OwnedFd>) {
    if let Some(ready) = ready {
        // Whoever asked to be told and did not wait for it is nothing to fail for.
        let _ = write(ready, format!("{address}\n").as_bytes());
    }
    if verbose {
        log::say_now(&format!("listening on {address}"));
    }
}

/// Accepted connections on their way to a worker.
struct Outbox<'a> {
    channel: &'a Channel,
    waiting: Vec<OwnedFd>,
    /// Connections the worker was given (wrapping, like its count of those it ended).
    given: u32,
}

impl<'a> Outbox<'a> {
    fn new(channel: &'a Channel) -> Self {
        Self { channel, waiting: Vec::new(), given: 0 }
    }

    /// Hands over what is waiting, as far as the worker's channel takes it.
    fn flush(&mut self) -> std::result::Result<(), Errno> {
        while !self.waiting.is_empty() {
            let batch = self.waiting.len().min(MAX_SOCKETS);
            let sockets: Vec<_> = self.waiting[..batch].iter().map(OwnedFd::as_fd).collect();
            self.channel.send(Message::Connections, &sockets)?;
            // Our copies must go: they would keep the connections open (kernel-fact 14).
            self.waiting.drain(..batch);
        }
        Ok(())
    }
}

/// The listener at work.
struct Serving<'a> {
    control: &'a Channel,
    signals: &'a SignalFd,
    handoff: Handoff,
    /// What connections are accepted from here; the connector's with `--handoff socket`.
    listener: Option<OwnedFd>,
    outboxes: Vec<Outbox<'a>>,
    ended: &'a SharedCounters,
    follower: Option<Follower>,
    /// Where it listens, if that is an internet address.
    address: Option<SocketAddr>,
}

impl Serving<'_> {
    /// Has connections accepted from `listener`, here or in the connector, and from no other.
    fn accept_from(&mut self, listener: OwnedFd) -> Result<()> {
        match self.handoff {
            // Only the connector has it then: nothing here must keep the port open.
            Handoff::Socket => send(self.control, Message::Listener, &[listener.as_fd()]),
            Handoff::Connections => {
                set_nonblocking(&listener).map_err(|errno| {
                    Error::system(Kind::Socket, "cannot make the listener non-blocking", errno, "")
                })?;
                if self.listener.replace(listener).is_none() {
                    send(self.control, Message::Start, &[])?;
                }
                Ok(())
            }
        }
    }

    fn serve(&mut self) -> Result<u8> {
        let mut paused = false;
        let mut failure = None;
        loop {
            let mut blocked = false;
            let mut own: Vec<(&dyn AsFd, PollFlags)> = Vec::new();
            for outbox in &mut self.outboxes {
                match outbox.flush() {
                    Ok(()) => continue,
                    Err(Errno::EAGAIN) => own.push((outbox.channel, PollFlags::POLLOUT)),
                    // Too much in flight, or no memory: a pause helps, no change of the channel
                    // does. A connector that is gone is told by the control channel.
                    Err(_) => {}
                }
                blocked = true;
            }
            let may_accept = !blocked && !paused;
            own.extend(self.listener.iter().filter(|_| may_accept).map(readable));
            own.extend(self.follower.iter().flat_map(Follower::fds));
            let timeout =
                if may_accept { Follower::timeout(&self.follower) } else { PAUSE_MS.into() };
            if wait_any(self.control, self.signals, &own, timeout)? != Wake::Own {
                return Ok(0);
            }
            self.follow()?;
            if let Some(listener) = self.listener.as_ref().filter(|_| !blocked) {
                let result = accept_batch(listener, &mut self.outboxes, self.ended);
                paused = result.is_err();
                if let Err(errno) = result
                    && failure != Some(errno)
                {
                    log::say_now(&format!("cannot accept: {errno:?}: {}", errno.desc()));
                }
                failure = result.err();
            }
        }
    }

    /// Listens where the name of the namespace leads now.
    fn follow(&mut self) -> Result<()> {
        let Some((mut follower, address)) = self.follower.take().zip(self.address) else {
            return Ok(());
        };
        if let Some(netns) = follower.look()? {
            match netns::enter(&netns).and_then(|()| listen_at(address)) {
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
}

fn readable(fd: &OwnedFd) -> (&dyn AsFd, PollFlags) {
    (fd, PollFlags::POLLIN)
}

/// Accepts what is there, up to a batch, each for the worker with the fewest connections; fails
/// when the system has run out of something.
fn accept_batch(
    listener: &OwnedFd,
    outboxes: &mut [Outbox],
    ended: &SharedCounters,
) -> std::result::Result<(), Errno> {
    for _ in 0..BATCH {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        match accept4(listener.as_raw_fd(), flags).and_then(crate::sys::own) {
            Ok(client) => {
                let load = |(index, outbox): &(usize, &mut Outbox)| {
                    outbox.given.wrapping_sub(ended.get(*index))
                };
                let least = outboxes.iter_mut().enumerate().min_by_key(load);
                if let Some((_, outbox)) = least {
                    outbox.given = outbox.given.wrapping_add(1);
                    outbox.waiting.push(client);
                }
            }
            Err(Errno::EAGAIN) => break,
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
