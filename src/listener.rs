//! The listener process: the parent. It binds in the listen side's namespace and hands over,
//! once, the listening socket (or the only client), or each connection it accepts.

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, accept4, bind, getsockname,
    listen, setsockopt, socket, sockopt,
};
use nix::unistd::write;

use crate::config::Handoff;
use crate::error::{Error, Kind, Result};
use crate::handoff::{Channel, MAX_SOCKETS, Message};
use crate::process::{ListenPart, Wake, wait_any};
use crate::sys::{SharedCounters, set_nonblocking};
use crate::{log, netns};

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
    let socket = open(part.listen)?;
    let address = getsockname::<SockaddrStorage>(socket.as_raw_fd())
        .map_or_else(|_| "unknown".to_owned(), |address| address.to_string());
    let hand_over = match (part.handoff, &socket) {
        (_, Source::Client(client)) => control.send(Message::Connections, &[client.as_fd()]),
        (Handoff::Socket, Source::Listener(listener)) => {
            control.send(Message::Listener, &[listener.as_fd()])
        }
        (Handoff::Connections, Source::Listener(_)) => control.send(Message::Start, &[]),
    };
    if let Err(errno) = hand_over
        && errno != Errno::EPIPE
    {
        return Err(Error::system(Kind::Process, "cannot hand over the socket", errno, ""));
    }
    let listener = match (part.handoff, socket) {
        (Handoff::Connections, Source::Listener(listener)) => Some(listener),
        // The connector has it now: nothing here must keep the port or the connection open.
        (_, socket) => {
            drop(socket);
            None
        }
    };
    if !expect(control, signals, Message::Accepting)? {
        return Ok(0);
    }
    announce(&address, part.verbose, part.ready);
    match listener {
        None => while wait_any(control, signals, &[], PollTimeout::NONE)? == Wake::Own {},
        Some(listener) => {
            set_nonblocking(&listener).map_err(|errno| {
                Error::system(Kind::Socket, "cannot make the listener non-blocking", errno, "")
            })?;
            accept_connections(&listener, &part.workers, &part.ended, control, signals)?;
        }
    }
    Ok(0)
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

fn open(listen: ListenPart) -> Result<Source> {
    match listen {
        ListenPart::Accepted(client) => Ok(Source::Client(client)),
        ListenPart::Listener(listener) => Ok(Source::Listener(listener)),
        ListenPart::Bind(address, netns) => {
            if let Some(netns) = &netns {
                netns::enter(netns)?;
            }
            let listener = bind_and_listen(address).map_err(|errno| {
                let cause = match errno {
                    Errno::EADDRINUSE => "another socket listens there",
                    Errno::EADDRNOTAVAIL => {
                        "no interface of the listen side's namespace has this address; is it up?"
                    }
                    Errno::EACCES => "ports below net.ipv4.ip_unprivileged_port_start need root",
                    _ => "",
                };
                Error::system(Kind::Socket, format!("-l {address}: cannot listen"), errno, cause)
            })?;
            Ok(Source::Listener(listener))
        }
    }
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

impl Outbox<'_> {
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

fn accept_connections(
    listener: &OwnedFd,
    workers: &[Channel],
    ended: &SharedCounters,
    control: &Channel,
    signals: &SignalFd,
) -> Result<()> {
    let mut outboxes: Vec<Outbox> =
        workers.iter().map(|channel| Outbox { channel, waiting: Vec::new(), given: 0 }).collect();
    let mut paused = false;
    let mut failure = None;
    loop {
        let mut blocked = false;
        let mut own: Vec<(&dyn AsFd, PollFlags)> = Vec::new();
        for outbox in &mut outboxes {
            match outbox.flush() {
                Ok(()) => continue,
                Err(Errno::EAGAIN) => own.push((outbox.channel, PollFlags::POLLOUT)),
                // Too much in flight, or no memory: a pause helps, no change of the channel does.
                // A connector that is gone is told by the control channel.
                Err(_) => {}
            }
            blocked = true;
        }
        if !blocked && !paused {
            own.push((listener, PollFlags::POLLIN));
        }
        let timeout =
            if blocked || paused { PollTimeout::from(PAUSE_MS) } else { PollTimeout::NONE };
        if wait_any(control, signals, &own, timeout)? != Wake::Own {
            return Ok(());
        }
        if !blocked {
            let result = accept_batch(listener, &mut outboxes, ended);
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
