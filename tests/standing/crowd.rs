//! Many connections at once, moved along by one thread.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

use crate::support::streams::{Pattern, accept, connect};
use crate::support::{Netns, PATIENCE};

/// Bytes of a write or a read.
const PIECE_BYTES: usize = 64 << 10;

/// So small that what is on its way is mostly in the forwarder.
const SOCKET_BYTES: usize = 16 << 10;

/// One end of a connection: what it still has to send and to receive.
pub struct End {
    stream: TcpStream,
    sending: Pattern,
    receiving: Pattern,
}

impl End {
    /// Sends what fits in. Returns how many bytes.
    fn send(&mut self, buffer: &mut [u8]) -> usize {
        if self.sending.is_done() {
            return 0;
        }
        let count = self.sending.peek(buffer);
        let sent = done(self.stream.write(&buffer[..count]));
        self.sending.at += sent as u64;
        sent
    }

    /// Receives and checks what is there. Returns how many bytes.
    fn receive(&mut self, buffer: &mut [u8]) -> usize {
        if self.receiving.is_done() {
            return 0;
        }
        let received = done(self.stream.read(buffer));
        self.receiving.check(&buffer[..received]).unwrap();
        received
    }

    fn is_done(&self) -> bool {
        self.sending.is_done() && self.receiving.is_done()
    }
}

fn done(result: std::io::Result<usize>) -> usize {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        result => result.unwrap(),
    }
}

/// Connections, each with `len` bytes to move in each direction.
pub struct Crowd {
    clients: Vec<End>,
    servers: Vec<End>,
    len: u64,
}

impl Crowd {
    pub fn new(
        count: u64,
        len: u64,
        netns: &Netns,
        address: SocketAddr,
        listener: &TcpListener,
    ) -> Self {
        setsockopt(listener, sockopt::RcvBuf, &SOCKET_BYTES).unwrap();
        let (mut clients, mut servers) = (Vec::new(), Vec::new());
        for id in 0..count {
            let mut client = netns.enter(|| connect(address));
            setsockopt(&client, sockopt::SndBuf, &SOCKET_BYTES).unwrap();
            // Which end is which is not to be told by the order in which they come.
            client.write_all(&id.to_le_bytes()).unwrap();
            clients.push(end(client, Pattern::new(2 * id, len), Pattern::new(2 * id + 1, len)));
            let mut server = accept(listener);
            let mut id = [0; 8];
            server.read_exact(&mut id).unwrap();
            let id = u64::from_le_bytes(id);
            servers.push(end(server, Pattern::new(2 * id + 1, len), Pattern::new(2 * id, len)));
        }
        Self { clients, servers, len }
    }

    /// Both sides send, and nobody receives, until nothing can be sent for a while. Returns
    /// whether every connection has more to send.
    pub fn fill(&mut self) -> bool {
        let mut buffer = vec![0; PIECE_BYTES];
        let mut last = Instant::now();
        while last.elapsed() < Duration::from_millis(500) {
            let ends = self.clients.iter_mut().chain(&mut self.servers);
            let sent: usize = ends.map(|end| end.send(&mut buffer)).sum();
            if sent > 0 {
                last = Instant::now();
            } else {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        !self.clients.iter().chain(&self.servers).any(|end| end.sending.is_done())
    }

    /// Moves all that is left. Panics at a wrong byte, or when nothing moves.
    pub fn finish(&mut self) {
        let mut buffer = vec![0; PIECE_BYTES];
        let mut last = Instant::now();
        let mut ends: Vec<_> = self.clients.iter_mut().chain(&mut self.servers).collect();
        while !ends.is_empty() {
            let mut moved = 0;
            for end in &mut ends {
                moved += end.receive(&mut buffer) + end.send(&mut buffer);
            }
            ends.retain(|end| !end.is_done());
            if moved > 0 {
                last = Instant::now();
            }
            assert!(last.elapsed() < PATIENCE, "{} ends wait for ever", ends.len());
        }
    }

    /// Bytes there are to be moved, both ways.
    pub fn bytes(&self) -> u64 {
        2 * self.len * self.clients.len() as u64
    }
}

fn end(stream: TcpStream, sending: Pattern, receiving: Pattern) -> End {
    stream.set_nonblocking(true).unwrap();
    End { stream, sending, receiving }
}
