//! A connection under load, of either side.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

/// What is left to receive and to send on a connection before its next step.
pub(crate) struct Conn {
    pub(crate) stream: TcpStream,
    pub(crate) to_receive: usize,
    pub(crate) to_send: usize,
    /// Bytes read and not yet echoed (echo mode only).
    echo: Vec<u8>,
    /// Whether the kernel tells when the socket can be written to.
    pub(crate) watches_out: bool,
    /// When the operation under way began.
    pub(crate) began: Instant,
    /// Whether a client's connection is open and asked for nothing.
    pub(crate) rests: bool,
}

/// How a read or a write left the connection.
pub(crate) enum Progress {
    /// The bytes that were to be moved have been.
    Done,
    /// The socket takes or has no more for now.
    Blocked,
    /// The peer has ended the connection.
    Ended,
}

impl Conn {
    pub(crate) fn new(stream: TcpStream) -> Self {
        let (to_receive, to_send, echo, watches_out) = (0, 0, Vec::new(), false);
        Self { stream, to_receive, to_send, echo, watches_out, began: Instant::now(), rests: false }
    }

    /// Sends what is left to send, from `buffer`, whose content does not matter.
    pub(crate) fn send(&mut self, buffer: &[u8]) -> io::Result<Progress> {
        while self.to_send > 0 {
            match self.stream.write(&buffer[..self.to_send.min(buffer.len())]) {
                Ok(n) => self.to_send -= n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(Progress::Blocked);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Progress::Done)
    }

    /// Receives what is left to receive. One read is enough to know in the usual case.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Progress> {
        while self.to_receive > 0 {
            let want = self.to_receive.min(buffer.len());
            match self.stream.read(&mut buffer[..want]) {
                Ok(0) => return Ok(Progress::Ended),
                Ok(n) => self.to_receive -= n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(Progress::Blocked);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Progress::Done)
    }

    /// Echoes what is there; stops reading while the peer does not read.
    pub(crate) fn echo(&mut self, buffer: &mut [u8]) -> io::Result<Progress> {
        if self.echo.is_empty() {
            match self.stream.read(buffer) {
                Ok(0) => return Ok(Progress::Ended),
                Ok(n) => self.echo.extend_from_slice(&buffer[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        while !self.echo.is_empty() {
            match self.stream.write(&self.echo) {
                Ok(n) => drop(self.echo.drain(..n)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(Progress::Blocked);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Progress::Done)
    }

    /// Asks the kernel to tell of room for output only while some is wanted.
    pub(crate) fn watch(
        &mut self,
        epoll: &Epoll,
        token: u64,
        input: bool,
        output: bool,
    ) -> io::Result<()> {
        if output != self.watches_out {
            self.watches_out = output;
            let mut event = EpollEvent::new(interest(input, output), token);
            epoll.modify(&self.stream, &mut event)?;
        }
        Ok(())
    }
}

pub(crate) fn interest(input: bool, output: bool) -> EpollFlags {
    let mut flags = EpollFlags::empty();
    flags.set(EpollFlags::EPOLLIN, input);
    flags.set(EpollFlags::EPOLLOUT, output);
    flags
}
