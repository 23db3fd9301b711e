//! The client and the server of a relay: one thread and one epoll each, whatever the number of
//! connections, and no allocation per message.

use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::PATIENCE;

/// Bytes of one read or write at most: few calls, and it stays in a core's second-level cache.
const BUFFER_BYTES: usize = 256 << 10;

/// One side of all connections, client or server, on one thread.
pub struct Peers {
    open: Vec<Option<Peer>>,
    epoll: Epoll,
    receive: MsgFlags,
    buffer: Vec<u8>,
}

/// One end of a connection. It sends and receives in turn.
struct Peer {
    stream: TcpStream,
    sends_bytes: usize,
    receives_bytes: usize,
    sending: bool,
    /// Bytes to move until the turn changes.
    left_bytes: usize,
    /// Receptions until nothing more is to be done.
    exchanges: u64,
    /// Whether epoll tells when the socket can take bytes.
    watches_out: bool,
}

impl Peers {
    pub fn new(receive: MsgFlags) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { open: Vec::new(), epoll, receive, buffer: vec![b'n'; BUFFER_BYTES] })
    }

    /// Adds a connection, which first waits for something to receive.
    pub fn add(&mut self, stream: TcpStream, sends: usize, receives: usize) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let token = self.open.len() as u64;
        self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
        self.open.push(Some(Peer {
            stream,
            sends_bytes: sends,
            receives_bytes: receives,
            sending: false,
            left_bytes: receives,
            exchanges: u64::MAX,
            watches_out: false,
        }));
        Ok(())
    }

    /// As a client: `count` exchanges on every connection.
    pub fn ask(&mut self, count: u64) -> io::Result<()> {
        for token in 0..self.open.len() {
            if let Some(peer) = &mut self.open[token] {
                (peer.exchanges, peer.sending, peer.left_bytes) = (count, true, peer.sends_bytes);
            }
            self.step(token)?;
        }
        let timeout = EpollTimeout::try_from(PATIENCE).expect("seconds fit");
        while self.open.iter().flatten().any(|peer| peer.exchanges > 0) {
            if !self.turn(timeout)? {
                return Err(io::Error::new(ErrorKind::TimedOut, "nothing moves"));
            }
        }
        match self.open.iter().all(Option::is_some) {
            true => Ok(()),
            false => Err(ErrorKind::UnexpectedEof.into()),
        }
    }

    /// As a server: answers until all connections have ended.
    pub fn serve(mut self) -> io::Result<()> {
        while self.open.iter().any(Option::is_some) {
            self.turn(EpollTimeout::NONE)?;
        }
        Ok(())
    }

    /// Does what there is to do on every ready connection; false if there was none in time.
    fn turn(&mut self, timeout: EpollTimeout) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); 64];
        let count = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => return Ok(true),
            count => count?,
        };
        for event in &events[..count] {
            self.step(event.data() as usize)?;
        }
        Ok(count > 0)
    }

    /// One receive, one send at most, so that all connections get their turn.
    fn step(&mut self, token: usize) -> io::Result<()> {
        let Some(peer) = &mut self.open[token] else { return Ok(()) };
        match peer.advance(self.receive, &mut self.buffer) {
            Ok(true) | Err(Errno::EAGAIN) => {}
            Ok(false) | Err(Errno::ECONNRESET) => {
                self.open[token] = None;
                return Ok(());
            }
            Err(errno) => return Err(errno.into()),
        }
        if peer.watches_out != peer.sending {
            peer.watches_out = peer.sending;
            let mut flags = EpollFlags::EPOLLIN;
            flags.set(EpollFlags::EPOLLOUT, peer.sending);
            self.epoll.modify(&peer.stream, &mut EpollEvent::new(flags, token as u64))?;
        }
        Ok(())
    }
}

impl Peer {
    /// False at the end of the stream.
    fn advance(&mut self, receive: MsgFlags, buffer: &mut [u8]) -> Result<bool, Errno> {
        let fd = self.stream.as_raw_fd();
        if !self.sending {
            let count = recv(fd, &mut buffer[..self.left_bytes.min(BUFFER_BYTES)], receive)?;
            self.left_bytes -= count;
            if self.left_bytes > 0 || count == 0 {
                return Ok(count > 0);
            }
            self.exchanges -= 1;
            (self.sending, self.left_bytes) = (self.exchanges > 0, self.sends_bytes);
            if !self.sending {
                self.left_bytes = self.receives_bytes;
                return Ok(true);
            }
        }
        let chunk = &buffer[..self.left_bytes.min(BUFFER_BYTES)];
        self.left_bytes -= send(fd, chunk, MsgFlags::MSG_NOSIGNAL)?;
        if self.left_bytes == 0 {
            (self.sending, self.left_bytes) = (false, self.receives_bytes);
        }
        Ok(true)
    }
}
