//! Many connections at a time, each with its own sizes, in both directions at once.
//!
//! One thread drives all clients ([`run_clients`]) and one all servers ([`serve`]). Each end checks
//! every byte it receives and that the stream ends where it must.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::PATIENCE;
use super::streams::{Pattern, connect};

/// One connection of [`run_clients`]: how many bytes go up to the server and down from it.
#[derive(Clone, Copy, Debug)]
pub struct Exchange {
    pub seed: u64,
    pub up: u64,
    pub down: u64,
}

impl Exchange {
    /// What a client sends first, so that the server knows what to expect and to send.
    fn header(&self) -> [u8; 24] {
        let mut header = [0; 24];
        header[..8].copy_from_slice(&self.seed.to_le_bytes());
        header[8..16].copy_from_slice(&self.up.to_le_bytes());
        header[16..].copy_from_slice(&self.down.to_le_bytes());
        header
    }

    fn parse(header: &[u8]) -> Self {
        let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        Self { seed: word(0), up: word(8), down: word(16) }
    }
}

/// One end of an exchange under way.
struct Talk {
    stream: TcpStream,
    exchange: Exchange,
    /// What the other end's header still lacks here, or this end's there.
    header: Vec<u8>,
    incoming: Pattern,
    outgoing: Pattern,
    got_end: bool,
    sent_end: bool,
}

impl Talk {
    fn client(stream: TcpStream, exchange: Exchange) -> Self {
        let (incoming, outgoing) =
            (Pattern::new(!exchange.seed, exchange.down), Pattern::new(exchange.seed, exchange.up));
        let header = exchange.header().to_vec();
        Self { stream, exchange, header, incoming, outgoing, got_end: false, sent_end: false }
    }

    /// A server's end, before the client has said what it is to be.
    fn server(stream: TcpStream) -> Self {
        let exchange = Exchange { seed: 0, up: 0, down: 0 };
        let none = Pattern::new(0, 0);
        let (incoming, outgoing, header) = (none.clone(), none, Vec::new());
        Self { stream, exchange, header, incoming, outgoing, got_end: false, sent_end: false }
    }

    /// Reads the client's header; `true` once it is complete.
    fn read_header(&mut self) -> Result<bool, String> {
        let mut rest = [0; 24];
        let want = 24 - self.header.len();
        match self.stream.read(&mut rest[..want]) {
            Ok(0) => return Err("the stream ends within the header".into()),
            Ok(n) => self.header.extend_from_slice(&rest[..n]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.to_string()),
        }
        if self.header.len() < 24 {
            return Ok(false);
        }
        let exchange = Exchange::parse(&self.header);
        self.exchange = exchange;
        self.incoming = Pattern::new(exchange.seed, exchange.up);
        self.outgoing = Pattern::new(!exchange.seed, exchange.down);
        Ok(true)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<(), String> {
        match self.stream.read(buffer) {
            Ok(0) if self.incoming.is_done() => self.got_end = true,
            Ok(0) => {
                return Err(format!("ends after {} of {}", self.incoming.at, self.incoming.len));
            }
            Ok(n) => self.incoming.check(&buffer[..n])?,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(format!("read after {}: {error}", self.incoming.at)),
        }
        Ok(())
    }

    fn write(&mut self, buffer: &mut [u8]) -> Result<(), String> {
        let n = self.outgoing.peek(buffer);
        if n > 0 {
            match self.stream.write(&buffer[..n]) {
                Ok(n) => self.outgoing.at += n as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(format!("write after {}: {error}", self.outgoing.at)),
            }
        }
        if self.outgoing.is_done() {
            self.stream.shutdown(Shutdown::Write).map_err(|error| format!("shutdown: {error}"))?;
            self.sent_end = true;
        }
        Ok(())
    }

    fn interest(&self) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, !self.got_end);
        flags.set(EpollFlags::EPOLLOUT, !self.sent_end);
        flags
    }
}

/// Runs all exchanges as the client, `at_a_time` of them; returns when both ends of each have seen
/// the other's last byte and end. Call it inside the namespace of the clients.
pub fn run_clients(address: SocketAddr, exchanges: &[Exchange], at_a_time: usize) {
    let mut waiting = exchanges.iter();
    let mut table = Table::new();
    loop {
        while table.live < at_a_time {
            let Some(exchange) = waiting.next() else { break };
            let mut talk = Talk::client(connect(address), *exchange);
            talk.stream.write_all(&talk.header).unwrap();
            table.add(talk);
        }
        if table.live == 0 {
            return;
        }
        table.turn(None);
    }
}

/// Serves `count` exchanges as the server.
pub fn serve(listener: &TcpListener, count: usize) {
    listener.set_nonblocking(true).unwrap();
    let mut table = Table::new();
    table.watch(listener);
    let mut accepted = 0;
    while accepted < count || table.live > 0 {
        accepted += table.turn(Some(listener));
    }
    assert_eq!(accepted, count, "connections that nobody asked for");
}

/// Many ends of exchanges, driven by one thread.
struct Table {
    epoll: Epoll,
    talks: Vec<Option<Talk>>,
    live: usize,
    buffer: Vec<u8>,
    last_event: Instant,
}

const LISTENER: u64 = u64::MAX;

impl Table {
    fn new() -> Self {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let buffer = vec![0; 256 << 10];
        Self { epoll, talks: Vec::new(), live: 0, buffer, last_event: Instant::now() }
    }

    fn watch(&self, listener: &TcpListener) {
        self.epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER)).unwrap();
    }

    fn add(&mut self, talk: Talk) {
        talk.stream.set_nonblocking(true).unwrap();
        let flags = if talk.header.len() < 24 { EpollFlags::EPOLLIN } else { talk.interest() };
        let event = EpollEvent::new(flags, self.talks.len() as u64);
        self.epoll.add(&talk.stream, event).unwrap();
        self.talks.push(Some(talk));
        self.live += 1;
    }

    /// Waits for events and handles them; returns how many connections were accepted.
    fn turn(&mut self, listener: Option<&TcpListener>) -> usize {
        let mut events = [EpollEvent::empty(); 256];
        let count = self.epoll.wait(&mut events, EpollTimeout::from(1000u16)).unwrap();
        if count > 0 {
            self.last_event = Instant::now();
        }
        let idle = self.last_event.elapsed();
        assert!(idle < PATIENCE, "{} exchanges stall: {}", self.live, self.progress());
        let mut accepted = 0;
        for event in &events[..count] {
            if event.data() == LISTENER {
                while let Ok((stream, _)) = listener.unwrap().accept() {
                    self.add(Talk::server(stream));
                    accepted += 1;
                }
                continue;
            }
            let slot = event.data() as usize;
            let Some(talk) = &mut self.talks[slot] else { continue };
            if let Err(error) = step(talk, event.events(), &self.epoll, slot, &mut self.buffer) {
                panic!("{:?}: {error}", talk.exchange);
            }
            if talk.got_end && talk.sent_end {
                self.talks[slot] = None;
                self.live -= 1;
            }
        }
        accepted
    }

    fn progress(&self) -> String {
        let describe = |talk: &Talk| {
            let (incoming, outgoing) = (&talk.incoming, &talk.outgoing);
            let (got, sent) = ((incoming.at, incoming.len), (outgoing.at, outgoing.len));
            format!("received {got:?} sent {sent:?}")
        };
        let talks: Vec<_> = self.talks.iter().flatten().take(5).map(describe).collect();
        talks.join("; ")
    }
}

/// One step of one end, after an event.
fn step(
    talk: &mut Talk,
    events: EpollFlags,
    epoll: &Epoll,
    slot: usize,
    buffer: &mut [u8],
) -> Result<(), String> {
    let before = if talk.header.len() < 24 { EpollFlags::EPOLLIN } else { talk.interest() };
    if talk.header.len() < 24 {
        if !talk.read_header()? {
            return Ok(());
        }
    } else {
        if !talk.got_end && events != EpollFlags::EPOLLOUT {
            talk.read(buffer)?;
        }
        if !talk.sent_end && events.contains(EpollFlags::EPOLLOUT) {
            talk.write(buffer)?;
        }
    }
    if talk.interest() != before {
        let mut event = EpollEvent::new(talk.interest(), slot as u64);
        epoll.modify(&talk.stream, &mut event).map_err(|error| error.to_string())?;
    }
    Ok(())
}
