//! Waiting for what a name stands for to appear, to go, or to become another namespace.
//!
//! Nothing tells all of it. inotify tells that a file came or went, but not that a namespace was
//! mounted on one, as `ip netns add` does after it has made an empty file; that is an event of
//! the mount table. In /proc, where `pid:N` is, files come and go without any event. So each
//! change that is told, and a slow clock besides, is a reason to look again.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signalfd::SignalFd;

use super::{OpenNetns, cannot_open, find, places};
use crate::config::{Netns, NetnsGone, NetnsSource};
use crate::error::{Error, Kind, Result};
use crate::log::Log;

/// Looking again takes microseconds, so four times a second costs nothing that could be measured.
const LOOK_AGAIN_MS: u16 = 250;

/// Waits for each of `named` to be a namespace, all together at most `ms`. Returns false if a
/// signal came first; fails as opening it does when it does not appear, and at once for a name
/// that no waiting helps.
pub fn wait<'a>(
    named: impl Iterator<Item = &'a Netns>,
    ms: u32,
    signals: &SignalFd,
) -> Result<bool> {
    let deadline = Instant::now() + Duration::from_millis(ms.into());
    if ms > 0 {
        for netns in named.filter(|netns| netns.is_named()) {
            if !wait_for(netns, deadline, signals).map_err(|error| {
                let seconds = f64::from(ms) / 1000.0;
                let text = format!("{error}; waited {seconds} s for it (--wait-netns)");
                Error::new(error.kind(), text)
            })? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn wait_for(netns: &Netns, deadline: Instant, signals: &SignalFd) -> Result<bool> {
    let mut events = Events::new(netns)?;
    loop {
        // In this order: what changes after the look is an event.
        events.renew();
        match find(netns) {
            Ok(_) => return Ok(true),
            Err(errno) if !is_absent(errno) || Instant::now() >= deadline => {
                return Err(cannot_open(netns, errno));
            }
            Err(_) => {}
        }
        let left = deadline
            .saturating_duration_since(Instant::now())
            .min(Duration::from_millis(LOOK_AGAIN_MS.into()));
        let [files, mounts] = events.fds();
        let mut fds = [(signals as &dyn AsFd, PollFlags::POLLIN), files, mounts]
            .map(|(fd, flags)| PollFd::new(fd.as_fd(), flags));
        // A failure is one more reason to look again.
        let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO));
        if fds[0].any().unwrap_or(false) {
            return Ok(false);
        }
    }
}

/// Whether a namespace that cannot be found for this reason may still appear: there is no file, no
/// directory for it, or a file that nothing is mounted on yet.
fn is_absent(errno: Errno) -> bool {
    matches!(errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ENOTTY | Errno::ESRCH)
}

/// Follows what the name of an entered namespace stands for.
#[derive(Debug)]
pub struct Follower {
    policy: NetnsGone,
    /// Kept open, so that no later namespace gets its number.
    entered: Arc<OpenNetns>,
    events: Events,
    is_gone: bool,
    /// Why the namespace that the name stands for is not used yet.
    failure: Option<Error>,
    log: Log,
}

impl Follower {
    /// A follower of `entered`, if there is a name to follow and something to do about it.
    pub fn start(entered: OpenNetns, policy: NetnsGone, log: Log) -> Result<Option<Self>> {
        if policy == NetnsGone::Keep || !entered.netns.is_named() {
            return Ok(None);
        }
        let mut events = Events::new(&entered.netns)?;
        events.renew();
        let entered = Arc::new(entered);
        Ok(Some(Self { policy, entered, events, is_gone: false, failure: None, log }))
    }

    /// How long to poll at most with this follower, or with none.
    pub fn timeout(follower: &Option<Self>) -> PollTimeout {
        if follower.is_some() { PollTimeout::from(LOOK_AGAIN_MS) } else { PollTimeout::NONE }
    }

    /// When to [`look`](Self::look), besides after the [`timeout`](Self::timeout).
    pub fn fds(&self) -> [(&dyn AsFd, PollFlags); 2] {
        self.events.fds()
    }

    /// The namespace to go on in, if the name has come to stand for another one; an error if that,
    /// or that there is none, is to end the program.
    pub fn look(&mut self) -> Result<Option<Arc<OpenNetns>>> {
        self.events.renew();
        let netns = &self.entered.netns;
        match find(netns) {
            Ok(found) if found.is_same(&self.entered) => {
                self.is_gone = false;
                Ok(None)
            }
            Ok(_) if self.policy == NetnsGone::Exit => {
                Err(ended(netns, "the name has become another namespace's"))
            }
            Ok(found) => Ok(Some(Arc::new(found))),
            Err(errno) if is_absent(errno) => {
                if self.policy == NetnsGone::Exit {
                    return Err(ended(netns, "the name was deleted"));
                }
                if !std::mem::replace(&mut self.is_gone, true) {
                    let text = || format!("{netns}: the name was deleted; waiting for it");
                    self.log.failure("a namespace's name was deleted", text);
                }
                Ok(None)
            }
            // Out of descriptors, say: that tells nothing about the name.
            Err(_) => Ok(None),
        }
    }

    /// Takes note that new connections are in this namespace now.
    pub fn went_to(&mut self, netns: Arc<OpenNetns>) {
        let text = || format!("{}: new connections are in the new namespace now", netns.netns);
        self.log.failure("connections are in a new namespace", text);
        self.log.enter(Arc::clone(&netns));
        self.entered = netns;
        self.is_gone = false;
        self.failure = None;
    }

    /// Takes note that there can be none yet; [`look`](Self::look) will return it again.
    pub fn cannot_go(&mut self, error: Error) {
        if self.failure.as_ref() != Some(&error) {
            self.log.failure("cannot follow a namespace", || format!("{error}; trying again"));
            self.failure = Some(error);
        }
    }
}

fn ended(netns: &Netns, why: &str) -> Error {
    Error::new(Kind::Netns, format!("{netns}: {why} (--netns-gone exit)"))
}

/// Tells when it is worth looking again what a name stands for.
#[derive(Debug)]
struct Events {
    source: NetnsSource,
    inotify: Inotify,
    mounts: File,
}

impl Events {
    fn new(netns: &Netns) -> Result<Self> {
        let cannot = |what: &str, errno, cause: &str| {
            Error::system(Kind::Kernel, format!("{netns}: cannot {what}"), errno, cause)
        };
        let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
        let inotify = Inotify::init(flags).map_err(|errno| {
            cannot("watch its directory", errno, "fs.inotify.max_user_instances is too low")
        })?;
        let mounts = File::open("/proc/self/mountinfo").map_err(|error| {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
            cannot("watch for what is mounted", errno, "is /proc there?")
        })?;
        Ok(Self { source: netns.source.clone(), inotify, mounts })
    }

    /// What to poll for. The mount table says once that it has changed.
    fn fds(&self) -> [(&dyn AsFd, PollFlags); 2] {
        [(&self.inotify, PollFlags::POLLIN), (&self.mounts, PollFlags::POLLPRI)]
    }

    /// Takes the events that are there, and sees to it that what happens from now on is one: in
    /// the nearest directory there is to each place of the name.
    fn renew(&mut self) {
        // What is still there after this is one more reason to look again.
        let _ = self.inotify.read_events();
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        for place in places(&self.source) {
            for directory in place.ancestors().skip(1) {
                let here = directory.as_os_str().is_empty();
                let directory = if here { Path::new(".") } else { directory };
                // One that is watched already stays so. One that is not there, or may not be
                // read, is told by those above it, or by the clock.
                if self.inotify.add_watch(directory, flags).is_ok() {
                    break;
                }
            }
        }
    }
}
