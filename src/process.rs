//! The two processes: what is opened before the fork, who waits for whom, who says what failed.
//!
//! The parent is the listener and the pid the user sees; the child is the connector. All that
//! was named on the command line is opened and checked before the fork, in the caller's mount
//! namespace. Then each side enters its own network namespace. The control channel between them
//! is also how each notices at once that the other is gone.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use crate::config::{Config, ConnectSide, Forward, Handoff, ListenSide, SocketOptions};
use crate::error::{Error, Kind, Result};
use crate::handoff::{Channel, Message};
use crate::inherited::{self, Inherited};
use crate::limits::Limits;
use crate::netns::{self, OpenNetns};
use crate::sys::SharedCounters;
use crate::{connector, listener, log};

/// Signals that come within this time of the first are repetitions of it, not impatience: some
/// programs signal a process and then its group, and both processes tell.
pub const ONE_ORDER: Duration = Duration::from_millis(200);

/// The listen side, opened.
#[derive(Debug)]
pub enum ListenPart {
    /// Bind this address in this namespace.
    Bind(std::net::SocketAddr, Option<OpenNetns>),
    /// Use this listening socket.
    Listener(OwnedFd),
    /// This is the only client.
    Accepted(OwnedFd),
}

/// The connect side, opened.
#[derive(Debug)]
pub enum ConnectPart {
    /// Connect to this address from this namespace.
    Address(std::net::SocketAddr, Option<OpenNetns>),
    /// Forward the only connection to this socket.
    Connected(OwnedFd),
}

/// What a process waits for besides its own work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The control channel has a message, or was closed.
    Control,
    /// SIGINT or SIGTERM.
    Signal,
    /// The descriptor the process named itself.
    Own,
}

/// The ends of the channels that both processes have before the fork.
struct Channels {
    control: (Channel, Channel),
    /// One for each worker, with `--handoff connections`.
    handoff: Vec<(Channel, Channel)>,
    /// Connections each worker has ended.
    ended: SharedCounters,
    /// Connections the listener has cut.
    cut: SharedCounters,
}

/// Forwards until told to stop, or until the only connection is over. Returns the exit status.
pub fn run(config: &Config) -> Result<u8> {
    abort_on_panic();
    let [forward] = config.forwards.as_slice() else {
        return Err(Error::new(Kind::Mix, "exactly one forward is supported"));
    };
    if config.netns().next().is_none() {
        log::say(
            "No network-namespace-related option specified. \
             Operating in a usual boring TCP forwarder mode.",
        );
    }
    inherited::check_open(&config.named_fds())?;
    let mut inherited = Inherited::default();
    let signals = block_signals().map_err(|errno| {
        Error::system(Kind::Kernel, "cannot block SIGINT and SIGTERM", errno, "")
    })?;
    if !netns::wait(config.netns(), config.wait_netns_ms, &signals)? {
        return Ok(0);
    }
    let (listen, connect) = open_sides(forward, &config.sockets, &mut inherited)?;
    let ready = config.ready_fd.map(|fd| inherited::ready_fd(fd, &mut inherited)).transpose()?;
    inherited.close_originals();

    let homes = connector::worker_homes(config, forward.is_single())?;
    // One connection needs no batches, and no client but the first may be taken from the queue.
    let handoff = if forward.is_single() { Handoff::Socket } else { config.handoff };
    let limits = Limits::of_process(homes.len(), config.max_connections)?;
    let channels = open_channels(handoff, homes.len()).map_err(cannot_open_channels)?;
    let (listener_ends, connector_ends) = channels.handoff.into_iter().unzip();
    let (to_connector, to_listener) = channels.control;
    match crate::sys::fork() {
        Ok(ForkResult::Child) => {
            drop((listen, ready, to_connector));
            drop::<Vec<Channel>>(listener_ends);
            connector::run(connector::Part {
                config,
                homes,
                limits,
                connect,
                single: forward.is_single(),
                control: to_listener,
                handoff: connector_ends,
                ended: channels.ended,
                cut: channels.cut,
                signals,
            })
        }
        Ok(ForkResult::Parent { child }) => {
            drop((connect, to_listener));
            drop::<Vec<Channel>>(connector_ends);
            let served = listener::run(listener::Part {
                config,
                handoff,
                listen,
                control: &to_connector,
                outboxes: listener::outboxes(listener_ends, &limits),
                ended: channels.ended,
                cut: channels.cut,
                signals: &signals,
                ready,
            });
            // It may be gone already.
            let _ = to_connector.send(Message::Stop, &[]);
            drop(to_connector);
            let connector = wait_for(child, &signals);
            served.and(connector)
        }
        Err(errno) => Err(Error::system(Kind::Kernel, "cannot fork", errno, "")),
    }
}

/// A thread that panics ends the process, not a share of its service: with a report, if that can
/// be written, and with a signal that the other process sees.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // The report waits for a reader, who may never come.
        let late = || {
            thread::sleep(log::LAST_LINES);
            std::process::abort();
        };
        if thread::Builder::new().spawn(late).is_ok() || log::is_read() {
            report(panic);
        }
        std::process::abort();
    }));
}

fn open_sides(
    forward: &Forward,
    options: &SocketOptions,
    inherited: &mut Inherited,
) -> Result<(ListenPart, ConnectPart)> {
    let listen = match &forward.listen {
        ListenSide::Bind { address, netns } => {
            let netns = netns.as_ref().map(|netns| netns::open(netns, inherited)).transpose()?;
            ListenPart::Bind(*address, netns)
        }
        ListenSide::Listener(fd) => {
            let socket = inherited.take("-L", *fd)?;
            inherited::check_listener("-L", *fd, &socket, options)?;
            ListenPart::Listener(socket)
        }
        ListenSide::Accepted(fd) => {
            let socket = inherited.take("-S", *fd)?;
            inherited::check_connected("-S", *fd, &socket, options)?;
            ListenPart::Accepted(socket)
        }
    };
    let connect = match &forward.connect {
        ConnectSide::Address { address, netns } => {
            let netns = netns.as_ref().map(|netns| netns::open(netns, inherited)).transpose()?;
            ConnectPart::Address(*address, netns)
        }
        ConnectSide::Connected(fd) => {
            let socket = inherited.take("-C", *fd)?;
            inherited::check_connected("-C", *fd, &socket, options)?;
            ConnectPart::Connected(socket)
        }
    };
    Ok((listen, connect))
}

fn open_channels(handoff: Handoff, workers: usize) -> std::result::Result<Channels, Errno> {
    let handoff = match handoff {
        Handoff::Socket => Vec::new(),
        Handoff::Connections => {
            (0..workers).map(|_| Channel::pair()).collect::<std::result::Result<_, _>>()?
        }
    };
    let (ended, cut) = (SharedCounters::new(workers)?, SharedCounters::new(1)?);
    Ok(Channels { control: Channel::pair()?, handoff, ended, cut })
}

fn cannot_open_channels(errno: Errno) -> Error {
    Error::system(Kind::Kernel, "cannot make socketpairs", errno, "RLIMIT_NOFILE is too low")
}

/// Blocks the signals that end the program, in this thread and all later ones and in the child;
/// they are read from the descriptor instead.
fn block_signals() -> std::result::Result<SignalFd, Errno> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGINT);
    mask.add(Signal::SIGTERM);
    mask.thread_block()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// Waits for whichever comes first. A control channel that is known to be closed is left out.
/// `own` is watched for the events given with it, at most until `timeout` (then [`Wake::Own`] is
/// reported as well).
pub fn wait_any<'a>(
    control: impl Into<Option<&'a Channel>>,
    signals: &SignalFd,
    own: &[(&dyn AsFd, PollFlags)],
    timeout: PollTimeout,
) -> Result<Wake> {
    let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    fds.extend(own.iter().map(|(fd, events)| PollFd::new(fd.as_fd(), *events)));
    let control = control.into();
    fds.extend(control.map(|control| PollFd::new(control.as_fd(), PollFlags::POLLIN)));
    loop {
        match poll(&mut fds, timeout) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::system(Kind::Kernel, "cannot poll", errno, "")),
        }
    }
    let has_come = |fd: Option<&PollFd>| fd.and_then(PollFd::any).unwrap_or(false);
    if has_come(fds.first()) {
        // Read, so that a second signal is a second event.
        let _ = signals.read_signal();
        return Ok(Wake::Signal);
    }
    let is_control = control.is_some() && has_come(fds.last());
    Ok(if is_control { Wake::Control } else { Wake::Own })
}

/// Waits for the connector, which is ending; a second signal kills it. Its failures are its own
/// to explain, unless it was killed.
fn wait_for(connector: Pid, signals: &SignalFd) -> Result<u8> {
    let since = Instant::now();
    let gone = pidfd(connector);
    if let Ok(gone) = &gone {
        let mut fds = [
            PollFd::new(gone.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        while !matches!(poll(&mut fds, PollTimeout::NONE), Err(errno) if errno != Errno::EINTR) {
            if fds[0].any().unwrap_or(false) {
                break;
            }
            let signalled =
                fds[1].any().unwrap_or(false) && matches!(signals.read_signal(), Ok(Some(_)));
            // Some programs signal a process and then its group: that is one order to end.
            if signalled && since.elapsed() > ONE_ORDER {
                let _ = kill(connector, Signal::SIGKILL);
            }
        }
    }
    loop {
        match waitpid(connector, None) {
            Ok(WaitStatus::Exited(_, status)) => return Ok(status as u8),
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                let text = format!("the connector process ({connector}) was killed by {signal}");
                return Err(Error::new(Kind::Process, text));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(Error::system(Kind::Process, "lost the connector", errno, ""));
            }
        }
    }
}

fn pidfd(pid: Pid) -> std::result::Result<OwnedFd, Errno> {
    crate::sys::pidfd_open(pid.as_raw())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::libc;

    fn panicking() -> Command {
        let mut program = Command::new(std::env::current_exe().expect("this program"));
        program.args(["--exact", "process::tests::a_thread_panics", "--ignored", "--nocapture"]);
        program
    }

    #[test]
    fn a_thread_that_panics_ends_the_process_with_a_report() {
        let output = panicking().output().expect("run");
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("on purpose"), "{output:?}");
    }

    #[test]
    fn a_report_that_nobody_reads_is_not_waited_for() {
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let (_read, full) = nix::unistd::pipe2(flags).expect("a pipe");
        while nix::unistd::write(&full, &[0; 4096]).is_ok() {}
        fcntl(&full, FcntlArg::F_SETFL(OFlag::empty())).expect("it blocks");
        let status = panicking().stdout(Stdio::null()).stderr(full).status().expect("run");
        assert_eq!(status.signal(), Some(libc::SIGABRT), "{status:?}");
    }

    #[test]
    #[ignore = "ends the process: run by the others"]
    fn a_thread_panics() {
        super::abort_on_panic();
        let _ = std::thread::spawn(|| panic!("on purpose")).join();
    }
}
