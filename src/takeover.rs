//! Restart without loss: a new process gets the listening socket of the one it replaces.
//!
//! A process waits at a path for its successor. When one comes, it is sent the listening socket;
//! when that one accepts connections, waits at the path itself and has said so, the first one
//! accepts no more and ends with its last connection. The socket is open in one of them all the
//! time, and a client in its queue is served by whoever takes it from there: nobody is refused.
//! If the successor ends before it has said so, nothing has happened.
//!
//! Only processes of the same user and root's get a socket, or are taken one from.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, UnixAddr, accept4, bind, connect,
    getsockname, getsockopt, listen, socket, sockopt,
};
use nix::unistd::geteuid;

use crate::error::{Error, Kind, Result};
use crate::handoff::{Channel, Message};
use crate::process::{Wake, wait_any};
use crate::sys;

/// Longest time the other process may take to answer, which it does at once unless it is stopped.
const ANSWER: Duration = Duration::from_secs(10);

/// Pause before another attempt when the other process was just being replaced itself.
const PAUSE_MS: u16 = 20;

/// Successors that may wait; they are served one after the other.
const BACKLOG: i32 = 16;

/// What came of asking for a listening socket.
#[derive(Debug)]
pub enum Answer {
    /// Nobody waits at the path.
    Nobody,
    /// Here it is.
    Socket(OwnedFd),
    /// A signal came first, or the connector is gone.
    Interrupted,
}

/// A process's place in the succession.
#[derive(Debug)]
pub struct Takeover {
    path: PathBuf,
    /// Where a successor comes to.
    door: OwnedFd,
    /// What the door's file is called until it takes its place.
    unpublished: Option<PathBuf>,
    /// Device and number of that file.
    file: (u64, u64),
    predecessor: Option<Channel>,
    successor: Option<Channel>,
}

impl Takeover {
    /// Prepares to wait at `path`, which stays as it is until [`Takeover::publish`].
    pub fn prepare(path: &Path) -> Result<Self> {
        let path = path.to_owned();
        match fs::symlink_metadata(&path) {
            Ok(file) if !file.file_type().is_socket() => {
                let text = format!("{}: there is a file that is no socket", named(&path));
                return Err(Error::new(Kind::Socket, text));
            }
            _ => {}
        }
        let mut name = path.clone().into_os_string();
        name.push(format!(".{}", std::process::id()));
        let name = PathBuf::from(name);
        // What a process with the same id has left.
        let _ = fs::remove_file(&name);
        let door = listening_socket(&name).map_err(|errno| {
            let what = format!("{}: cannot make a socket {}", named(&path), name.display());
            let cause = match errno {
                Errno::ENAMETOOLONG => "the path is too long for a socket's",
                Errno::ENOENT => "there is no such directory",
                _ => "",
            };
            Error::system(Kind::Socket, what, errno, cause)
        })?;
        sys::netns_cookie(&door).map_err(|errno| {
            let _ = fs::remove_file(&name);
            let cause = "it needs Linux 5.14";
            let what = format!("{}: cannot tell network namespaces apart", named(&path));
            Error::system(Kind::Kernel, what, errno, cause)
        })?;
        let file = file_id(&name).unwrap_or_default();
        let unpublished = Some(name);
        Ok(Self { path, door, unpublished, file, predecessor: None, successor: None })
    }

    /// Asks the process that waits at the path for its listening socket.
    pub fn ask(&mut self, control: &Channel, signals: &SignalFd) -> Result<Answer> {
        let deadline = Instant::now() + ANSWER;
        while let Some(channel) = self.call()? {
            match self.wait_for_answer(&channel, deadline, control, signals)? {
                Answer::Nobody => {}
                answer => {
                    self.predecessor = Some(channel);
                    return Ok(answer);
                }
            }
            // It was ending, or had its successor already: in a moment the path is that one's.
            if wait_any(control, signals, &[], PAUSE_MS.into())? != Wake::Own {
                return Ok(Answer::Interrupted);
            }
        }
        Ok(Answer::Nobody)
    }

    /// The socket; [`Answer::Nobody`] if the other process has gone.
    fn wait_for_answer(
        &self,
        channel: &Channel,
        deadline: Instant,
        control: &Channel,
        signals: &SignalFd,
    ) -> Result<Answer> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.error("the process there does not answer; is it stopped?"));
            }
            let own: &[(&dyn AsFd, PollFlags)] = &[(channel, PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            if wait_any(control, signals, own, timeout)? != Wake::Own {
                return Ok(Answer::Interrupted);
            }
            match channel.receive() {
                Err(Errno::EAGAIN) => {}
                Ok(None) | Err(Errno::ECONNRESET) => return Ok(Answer::Nobody),
                Ok(Some(received)) if received.message == Message::Listener => {
                    let lost = || self.error("RLIMIT_NOFILE is too low to receive the socket");
                    return received
                        .sockets
                        .into_iter()
                        .next()
                        .map(Answer::Socket)
                        .ok_or_else(lost);
                }
                other => {
                    return Err(self.error(&format!("the process there is confused: {other:?}")));
                }
            }
        }
    }

    /// Waits at the path from now on, and lets the predecessor go: connections are accepted here.
    pub fn publish(&mut self) -> Result<()> {
        if let Some(name) = &self.unpublished {
            fs::rename(name, &self.path)
                .map_err(|error| self.error(&format!("cannot put the socket there: {error}")))?;
            self.unpublished = None;
        }
        if let Some(predecessor) = self.predecessor.take() {
            // One that is gone needs no telling.
            let _ = predecessor.send(Message::Accepting, &[]);
        }
        Ok(())
    }

    /// What to wait for before [`Takeover::serve`].
    pub fn fd(&self) -> (&dyn AsFd, PollFlags) {
        match &self.successor {
            Some(successor) => (successor, PollFlags::POLLIN),
            None => (&self.door, PollFlags::POLLIN),
        }
    }

    /// Gives `listener` to a successor that asks for it; true once one accepts connections.
    pub fn serve(&mut self, listener: &OwnedFd) -> bool {
        match &self.successor {
            None => self.successor = self.answer(listener),
            Some(successor) => match successor.receive() {
                Ok(Some(received)) if received.message == Message::Accepting => return true,
                Err(Errno::EAGAIN) => {}
                // It has failed to start: the next one may come.
                _ => self.successor = None,
            },
        }
        false
    }

    fn answer(&self, listener: &OwnedFd) -> Option<Channel> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = match accept4(self.door.as_raw_fd(), flags).and_then(sys::own) {
            Ok(fd) => fd,
            Err(errno) => {
                if errno != Errno::EAGAIN {
                    // No descriptor, say: it goes on waiting, and so does this process a little.
                    std::thread::sleep(Duration::from_millis(PAUSE_MS.into()));
                }
                return None;
            }
        };
        if !is_trusted(&fd) {
            return None;
        }
        let channel = Channel::from(fd);
        // One that is not told ends with a sentence, or asks again.
        channel.send(Message::Listener, &[listener.as_fd()]).ok()?;
        Some(channel)
    }

    /// A channel to the process that waits at the path.
    fn call(&self) -> Result<Option<Channel>> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let called = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
            .and_then(|fd| connect(fd.as_raw_fd(), &UnixAddr::new(&self.path)?).map(|()| fd));
        match called {
            Ok(fd) if is_trusted(&fd) => Ok(Some(Channel::from(fd))),
            Ok(_) => Err(self.error("the process there is another user's")),
            // Nothing there, or what a process that was killed has left.
            Err(Errno::ENOENT | Errno::ECONNREFUSED) => Ok(None),
            Err(errno) => {
                let cause = match errno {
                    Errno::EPROTOTYPE => "the socket there is another program's",
                    Errno::EAGAIN => "too many wait there; is the process stopped?",
                    _ => "",
                };
                let what = format!("{}: cannot ask there", named(&self.path));
                Err(Error::system(Kind::Socket, what, errno, cause))
            }
        }
    }

    /// Fails unless `listener`, which came from the predecessor, is what `-l` and `-f` ask for.
    pub fn check(&self, listener: &OwnedFd, address: SocketAddr) -> Result<()> {
        let unusable = |errno| {
            let what = format!("{}: cannot use the socket that came", named(&self.path));
            Error::system(Kind::Socket, what, errno, "is it a listening TCP socket?")
        };
        let bound: SockaddrStorage = getsockname(listener.as_raw_fd()).map_err(unusable)?;
        let mut wanted = address;
        if wanted.port() == 0 {
            let v4 = bound.as_sockaddr_in().map(|address| address.port());
            let port = v4.or_else(|| bound.as_sockaddr_in6().map(|address| address.port()));
            wanted.set_port(port.unwrap_or(0));
        }
        if bound != SockaddrStorage::from(wanted)
            || !getsockopt(listener, sockopt::AcceptConn).map_err(unusable)?
        {
            return Err(
                self.error(&format!("the process there listens at {bound}, not at {address}"))
            );
        }
        let family = AddressFamily::Inet;
        let here = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .and_then(sys::netns_cookie)
            .map_err(unusable)?;
        if sys::netns_cookie(listener).map_err(unusable)? != here {
            return Err(self.error("the process there listens in another network namespace"));
        }
        Ok(())
    }

    fn error(&self, text: &str) -> Error {
        Error::new(Kind::Socket, format!("{}: {text}", named(&self.path)))
    }
}

/// Takes away the file, unless a successor's has its place. The door is still open then, so no
/// other file has its number.
impl Drop for Takeover {
    fn drop(&mut self) {
        let path = self.unpublished.as_ref().unwrap_or(&self.path);
        if file_id(path) == Some(self.file) {
            let _ = fs::remove_file(path);
        }
    }
}

fn file_id(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

fn named(path: &Path) -> String {
    format!("--takeover {}", path.display())
}

/// A socket at `path` that only this user can connect to.
fn listening_socket(path: &Path) -> std::result::Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let door = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(door.as_raw_fd(), &UnixAddr::new(path)?)?;
    // Before listen(2): until then nobody can connect.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
    listen(&door, Backlog::new(BACKLOG)?)?;
    Ok(door)
}

/// Whether a process of this user, or root's, is at the other end.
fn is_trusted(socket: &OwnedFd) -> bool {
    getsockopt(socket, sockopt::PeerCredentials)
        .is_ok_and(|peer| peer.uid() == geteuid().as_raw() || peer.uid() == 0)
}
