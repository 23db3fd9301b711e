//! The connector at work: what it hears from the listener, from its workers and from outside, and
//! how it ends.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::signalfd::SignalFd;

use crate::crew::Crew;
use crate::error::{Error, Kind, Result};
use crate::handoff::{Channel, Message, Received};
use crate::netns::{self, Follower};
use crate::process::{Wake, wait_any};

/// How long to wait before clients are asked for again that the system had no room for.
const PAUSE: Duration = Duration::from_millis(100);

/// The crew, and all that it is told by.
pub(super) struct Serving<'a> {
    crew: &'a mut Crew,
    follower: Option<Follower>,
    /// To the listener; `None`: it is gone.
    control: Option<&'a Channel>,
    signals: &'a SignalFd,
    /// Time for connections to end by themselves; zero: none.
    drain_timeout: Duration,
    /// It began then.
    draining_since: Option<Instant>,
    /// Another program has the listening socket, too.
    is_shared: bool,
    has_announced: bool,
    /// When connections are cut that are still there; without one the listener says when.
    deadline: Option<Instant>,
    /// Why it ends, if that is a failure.
    failure: Option<Error>,
}

impl<'a> Serving<'a> {
    pub(super) fn new(
        crew: &'a mut Crew,
        follower: Option<Follower>,
        control: &'a Channel,
        signals: &'a SignalFd,
        drain_timeout: Duration,
        is_shared: bool,
    ) -> Self {
        Self {
            crew,
            follower,
            control: Some(control),
            signals,
            drain_timeout,
            draining_since: None,
            is_shared,
            has_announced: false,
            deadline: None,
            failure: None,
        }
    }

    /// Starts up with the listener, then serves until the end.
    pub(super) fn run(mut self) -> Result<()> {
        self.tell(Message::Ready)?;
        loop {
            let is_told_to_stop = match self.wait()? {
                Wake::Signal => self.signalled(),
                Wake::Control => self.hear()?,
                Wake::Own => {
                    self.crew.collect();
                    self.follow()
                }
            };
            let is_late = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
            self.crew.serve_queue();
            if is_told_to_stop || is_late || self.crew.is_over() {
                return self.failure.map_or(Ok(()), Err);
            }
            if self.crew.is_accepting() && !std::mem::replace(&mut self.has_announced, true) {
                self.tell(Message::Accepting)?;
            }
        }
    }

    fn wait(&self) -> Result<Wake> {
        let attention = self.crew.attention();
        let mut own: Vec<(&dyn AsFd, PollFlags)> = vec![(&*attention, PollFlags::POLLIN)];
        own.extend(self.follower.iter().flat_map(Follower::fds));
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let pause = self.crew.has_waiting_clients().then_some(PAUSE);
        // Rounded up, so that the time is over then.
        let time = left.into_iter().chain(pause).min().map(|time| time + Duration::from_millis(1));
        let timeout = match time.and_then(|time| PollTimeout::try_from(time).ok()) {
            Some(timeout) => timeout,
            None => Follower::timeout(&self.follower),
        };
        wait_any(self.control, self.signals, &own, timeout)
    }

    /// Whether to stop at once. With time to drain in, the listener says what is to be done: it may
    /// have got the signal as well.
    fn signalled(&mut self) -> bool {
        self.drain_timeout.is_zero() || self.ask_to_end().is_err()
    }

    /// An error: there is no listener to ask.
    fn ask_to_end(&self) -> std::result::Result<(), Errno> {
        self.control.ok_or(Errno::EPIPE)?.send(Message::Stop, &[])
    }

    /// Hears the listener. Returns whether to stop at once.
    fn hear(&mut self) -> Result<bool> {
        let Some(control) = self.control else { return Ok(false) };
        match control.receive() {
            Ok(Some(Received { message: Message::Stop, .. })) => Ok(true),
            Ok(Some(Received { message: message @ (Message::Drain | Message::Leave), .. })) => {
                self.draining_since = Some(Instant::now());
                self.drain(None, message == Message::Leave);
                Ok(false)
            }
            Ok(Some(received)) => hand_on(received, self.crew).map(|()| false),
            Ok(None) | Err(Errno::ECONNRESET) => {
                self.control = None;
                self.failure = Some(Error::new(Kind::Process, "the listener process died"));
                let since = *self.draining_since.get_or_insert_with(Instant::now);
                self.drain(Some(since + self.drain_timeout), self.is_shared);
                Ok(false)
            }
            // What it has sent stays there until there are descriptors for it.
            Err(Errno::EMFILE) => {
                std::thread::sleep(PAUSE);
                Ok(false)
            }
            Err(errno) => Err(lost(errno)),
        }
    }

    /// Takes no more than those who wait now, and ends with the last connection, or at `deadline`.
    fn drain(&mut self, deadline: Option<Instant>, is_shared: bool) {
        self.follower = None;
        self.deadline = deadline;
        self.crew.drain(is_shared);
    }

    /// Has the workers connect from where the name of the namespace leads now. Returns whether to
    /// stop at once.
    fn follow(&mut self) -> bool {
        let Some(follower) = &mut self.follower else { return false };
        match follower.look() {
            Ok(None) => {}
            // This thread first: what it cannot enter is no namespace for some of the workers.
            Ok(Some(netns)) => match netns::enter(&netns).and_then(|()| self.crew.enter(&netns)) {
                Ok(()) => follower.went_to(netns),
                Err(error) => follower.cannot_go(error),
            },
            Err(error) => {
                self.failure = Some(error);
                self.follower = None;
                return self.signalled();
            }
        }
        false
    }

    fn tell(&self, message: Message) -> Result<()> {
        self.control.map_or(Ok(()), |control| control.send(message, &[]).map_err(lost))
    }
}

fn lost(errno: Errno) -> Error {
    Error::system(Kind::Process, "lost the listener process", errno, "")
}

/// Gives the workers what the listener has sent.
fn hand_on(received: Received, crew: &mut Crew) -> Result<()> {
    let missing = || Error::new(Kind::Kernel, "RLIMIT_NOFILE is too low to receive a socket");
    let mut sockets = received.sockets.into_iter();
    match received.message {
        Message::Listener => crew.listen(sockets.next().ok_or_else(missing)?),
        Message::Connections => {
            crew.forward(sockets.next().ok_or_else(missing)?);
            Ok(())
        }
        Message::Start => {
            crew.accept_handoff();
            Ok(())
        }
        other => Err(Error::new(Kind::Process, format!("the listener is confused: {other:?}"))),
    }
}
