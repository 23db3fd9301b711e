//! The clients and the servers of a relay: one thread and one epoll each, whatever the number of
//! connections, and no allocation per message.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};

use crate::PATIENCE;
use crate::contenders::begin_connect;

/// Bytes of one read or write at most: few calls, and it stays in a core's second-level cache.
const BUFFER_BYTES: usize = 256 << 10;

/// Events taken from the kernel at a time.
const EVENTS: usize = 64;

/// The token of the servers' listener.
const LISTENER: u64 = u64::MAX;

/// What client and server do on a connection, again and again.
#[derive(Clone, Copy, Debug)]
pub struct Exchange {
    pub request_bytes: usize,
    pub response_bytes: usize,
    /// The server has the kernel drop requests unread: that leaves a relay more of the machine it
    /// shares with its peers.
    pub drops: bool,
    /// Each exchange has a connection of its own, which the client closes first.
    pub reconnects: bool,
}

/// The clients, which decide how much is done.
pub struct Clients {
    address: SocketAddr,
    reconnects: bool,
    ends: Ends,
    /// Exchanges still to do on each connection.
    left: Vec<u64>,
}

impl Clients {
    /// As many clients as `connections`. They connect when there is something to do.
    pub fn new(address: SocketAddr, connections: usize, exchange: Exchange) -> io::Result<Self> {
        let Exchange { request_bytes, response_bytes, reconnects, .. } = exchange;
        let mut ends = Ends::new(request_bytes, response_bytes, MsgFlags::empty())?;
        ends.open.resize_with(connections, || None);
        Ok(Self { address, reconnects, ends, left: vec![0; connections] })
    }

    pub fn connections(&self) -> usize {
        self.left.len()
    }

    /// Does `count` exchanges on every connection.
    pub fn run(&mut self, count: u64) -> io::Result<()> {
        self.left.fill(count);
        for index in 0..self.left.len() {
            self.ask(index)?;
        }
        let mut events = [EpollEvent::empty(); EVENTS];
        let timeout = EpollTimeout::try_from(PATIENCE).expect("seconds fit");
        while self.left.iter().any(|&left| left > 0) {
            let count = self.ends.wait(&mut events, timeout)?;
            if count == 0 {
                return Err(io::Error::new(ErrorKind::TimedOut, "nothing moves"));
            }
            for event in &events[..count] {
                self.advance(event.data() as usize)?;
            }
        }
        Ok(())
    }

    fn advance(&mut self, index: usize) -> io::Result<()> {
        match self.ends.advance(index)? {
            Step::Part => return Ok(()),
            Step::Ended => return Err(ErrorKind::UnexpectedEof.into()),
            Step::Received => self.left[index] -= 1,
        }
        if self.reconnects {
            self.ends.open[index] = None;
        }
        if self.left[index] > 0 { self.ask(index) } else { Ok(()) }
    }

    fn ask(&mut self, index: usize) -> io::Result<()> {
        if self.ends.open[index].is_none() {
            self.ends.add(index, begin_connect(self.address)?)?;
        }
        self.ends.send(index)
    }
}

/// Answers clients in a thread of its own, until the listener fails or the program ends.
pub fn serve(listener: TcpListener, exchange: Exchange) -> io::Result<()> {
    let Exchange { request_bytes, response_bytes, drops, .. } = exchange;
    let receive = if drops { MsgFlags::MSG_TRUNC } else { MsgFlags::empty() };
    let mut ends = Ends::new(response_bytes, request_bytes, receive)?;
    let mut free = Vec::new();
    // Accepted sockets inherit it.
    setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
    listener.set_nonblocking(true)?;
    ends.epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut events = [EpollEvent::empty(); EVENTS];
    loop {
        let count = ends.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..count] {
            if event.data() == LISTENER {
                accept(&listener, &mut ends, &mut free)?;
                continue;
            }
            let index = event.data() as usize;
            match ends.advance(index)? {
                Step::Part => {}
                Step::Received => ends.send(index)?,
                Step::Ended => {
                    ends.open[index] = None;
                    free.push(index);
                }
            }
        }
    }
}

fn accept(listener: &TcpListener, ends: &mut Ends, free: &mut Vec<usize>) -> io::Result<()> {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        stream.set_nonblocking(true)?;
        let index = free.pop().unwrap_or_else(|| {
            ends.open.push(None);
            ends.open.len() - 1
        });
        ends.add(index, stream)?;
    }
}

/// One side's ends of all connections.
struct Ends {
    open: Vec<Option<End>>,
    epoll: Epoll,
    sends_bytes: usize,
    receives_bytes: usize,
    receive: MsgFlags,
    buffer: Vec<u8>,
}

/// One end of a connection. It sends and receives in turn.
struct End {
    stream: TcpStream,
    sending: bool,
    /// Bytes to move until the turn changes.
    left_bytes: usize,
    /// Whether epoll tells when the socket can take bytes.
    watches_out: bool,
}

/// What an event has brought.
enum Step {
    /// Nothing to be told of.
    Part,
    /// All that was to be received.
    Received,
    /// The end of the stream.
    Ended,
}

impl Ends {
    fn new(sends_bytes: usize, receives_bytes: usize, receive: MsgFlags) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let buffer = vec![b'n'; BUFFER_BYTES];
        Ok(Self { open: Vec::new(), epoll, sends_bytes, receives_bytes, receive, buffer })
    }

    fn wait(&self, events: &mut [EpollEvent], timeout: EpollTimeout) -> io::Result<usize> {
        loop {
            match self.epoll.wait(events, timeout) {
                Err(Errno::EINTR) => {}
                count => return Ok(count?),
            }
        }
    }

    /// Adds a connection, which first waits for something to receive.
    fn add(&mut self, index: usize, stream: TcpStream) -> io::Result<()> {
        self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
        let left_bytes = self.receives_bytes;
        self.open[index] = Some(End { stream, sending: false, left_bytes, watches_out: false });
        Ok(())
    }

    /// Begins to send, after which it will receive.
    fn send(&mut self, index: usize) -> io::Result<()> {
        if let Some(end) = &mut self.open[index] {
            (end.sending, end.left_bytes) = (true, self.sends_bytes);
        }
        self.advance(index).map(drop)
    }

    /// One receive or one send, so that all connections get their turn.
    fn advance(&mut self, index: usize) -> io::Result<Step> {
        let Some(end) = &mut self.open[index] else { return Ok(Step::Part) };
        let fd = end.stream.as_raw_fd();
        let chunk = &mut self.buffer[..end.left_bytes.min(BUFFER_BYTES)];
        let moved = match end.sending {
            true => send(fd, chunk, MsgFlags::MSG_NOSIGNAL),
            false => recv(fd, chunk, self.receive),
        };
        match moved {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(Step::Ended),
            Ok(count) => end.left_bytes -= count,
            Err(Errno::EAGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
        if end.left_bytes == 0 && !end.sending {
            return Ok(Step::Received);
        }
        if end.left_bytes == 0 {
            (end.sending, end.left_bytes) = (false, self.receives_bytes);
        }
        if end.watches_out != end.sending {
            end.watches_out = end.sending;
            let mut flags = EpollFlags::EPOLLIN;
            flags.set(EpollFlags::EPOLLOUT, end.sending);
            self.epoll.modify(&end.stream, &mut EpollEvent::new(flags, index as u64))?;
        }
        Ok(Step::Part)
    }
}
