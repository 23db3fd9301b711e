//! Clients that wait at a listening socket that is about to be closed: they are connected already,
//! and closing would reset them.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{SockFlag, accept4};

use crate::sys;

/// Those who wait at the time it is made; who comes later is not one of them.
#[derive(Debug)]
pub struct Queue {
    listener: OwnedFd,
    left: u32,
}

impl Queue {
    /// The clients who wait at `listener` now. Others may accept some of them, too.
    pub fn new(listener: OwnedFd) -> Result<Self, Errno> {
        sys::set_nonblocking(&listener)?;
        // Unix-domain sockets do not tell: then all until it is empty.
        let left = sys::waiting_clients(&listener).unwrap_or(u32::MAX);
        Ok(Self { listener, left })
    }

    /// The next client; `None`: there is none left. Errors as accept(2), without EAGAIN: the system
    /// has run out of something, and the client still waits.
    pub fn take(&mut self) -> Result<Option<OwnedFd>, Errno> {
        while self.left > 0 {
            match accept(&self.listener) {
                Ok(client) => {
                    self.left -= 1;
                    return Ok(Some(client));
                }
                Err(Errno::EAGAIN) => self.left = 0,
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(errno) if sys::is_shortage(errno) => return Err(errno),
                // It is no listening socket any more: whoever else has it has shut it down.
                Err(_) => self.left = 0,
            }
        }
        Ok(None)
    }
}

/// Those who wait at several sockets, the oldest first. A socket where nobody is left is closed.
#[derive(Debug, Default)]
pub struct Queues(VecDeque<Queue>);

impl Queues {
    /// Adds those who wait at `listener` now.
    pub fn add(&mut self, listener: OwnedFd) {
        // A socket that is not to be had any more has nobody waiting.
        self.0.extend(Queue::new(listener).ok().filter(|queue| queue.left > 0));
    }

    /// Whether nobody is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those who still wait; 0 where that cannot be known.
    pub fn waiting(&self) -> u64 {
        let waiting = |queue: &Queue| {
            let waiting = sys::waiting_clients(&queue.listener).unwrap_or(0);
            u64::from(waiting.min(queue.left))
        };
        self.0.iter().map(waiting).sum()
    }

    /// The next client; `None`: there is none left. Errors as [`Queue::take`].
    pub fn take(&mut self) -> Result<Option<OwnedFd>, Errno> {
        while let Some(queue) = self.0.front_mut() {
            let client = queue.take()?;
            if queue.left == 0 {
                self.0.pop_front();
            }
            if client.is_some() {
                return Ok(client);
            }
        }
        Ok(None)
    }
}

/// Accepts a client from a socket that does not block. Errors as accept(2).
pub fn accept(listener: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    accept4(listener.as_raw_fd(), flags).and_then(sys::own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn only_those_who_waited_are_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let connect =
            || TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
        let early = [connect(), connect()];
        let mut queue = Queue::new(listener.try_clone().expect("dup").into()).expect("a queue");
        let late = connect();
        assert!(queue.take().expect("accept").is_some() && queue.take().expect("accept").is_some());
        assert!(queue.take().expect("accept").is_none());
        assert!(listener.accept().is_ok(), "the late one is still there");
        drop((early, late));
    }

    #[test]
    fn a_queue_whose_socket_listens_no_more_is_empty() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let mut queue = Queue::new(listener.try_clone().expect("dup").into()).expect("a queue");
        queue.left = 1;
        let how = nix::sys::socket::Shutdown::Both;
        nix::sys::socket::shutdown(listener.as_raw_fd(), how).expect("shut down");
        assert!(queue.take().expect("no error that lasts").is_none());
        assert_eq!(queue.left, 0);
    }

    #[test]
    fn a_unix_domain_queue_is_taken_until_it_is_empty() {
        let path = std::env::temp_dir().join(format!("nsplice-queue-{}", std::process::id()));
        let listener = UnixListener::bind(&path).expect("bind");
        let clients = [UnixStream::connect(&path), UnixStream::connect(&path)];
        std::fs::remove_file(&path).expect("remove");
        let mut queue = Queue::new(listener.into()).expect("a queue");
        let taken = std::iter::from_fn(|| queue.take().expect("accept")).count();
        assert_eq!(taken, clients.len());
    }
}
