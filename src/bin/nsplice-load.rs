//! Load for measurements: the client or the server of a TCP workload, in any network namespace.
//!
//! One thread, one epoll, one buffer for all connections and no allocation per operation: client,
//! server and forwarder share the machine, so what this program wastes the forwarder lacks. It
//! always ends: after its time, or (server) when standard input ends. Results are JSON lines on
//! standard output.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use argh::FromArgs;
use nix::sched::{CloneFlags, setns};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    self, AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, sockopt,
};
use serde_json::{Value, json};

/// Bytes of one read or write of a bulk transfer: large enough to make the calls few, small
/// enough to stay in a core's second-level cache.
const BUFFER_BYTES: usize = 256 << 10;
/// Events taken from the kernel at a time.
const EVENTS: usize = 256;
/// Token of the listening socket; connections count from 0.
const LISTENER: u64 = u64::MAX;
/// Token of standard input.
const STDIN: u64 = u64::MAX - 1;
/// Longest wait for events, so that the clock is looked at.
const TICK_MS: u16 = 50;
/// A client that has seen this many failed connections gives up.
const ERRORS_MAX: u64 = 1000;

/// Load for measurements of TCP forwarders.
#[derive(FromArgs)]
struct Load {
    #[argh(subcommand)]
    side: Side,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Side {
    Server(Server),
    Client(Client),
}

/// Answer clients until standard input ends or the time is up.
#[derive(FromArgs)]
#[argh(subcommand, name = "server")]
struct Server {
    /// address to listen at; with port 0 the kernel chooses, the first line of output tells
    #[argh(option)]
    listen: SocketAddr,
    /// file of the network namespace to enter
    #[argh(option)]
    netns: Option<String>,
    /// sink (read), discard (drop unread), echo (the same bytes) or rr (--size for --size bytes)
    #[argh(option)]
    mode: Mode,
    /// bytes of a request and of its response (64)
    #[argh(option, default = "64")]
    size: usize,
    /// longest time to run, in seconds (600)
    #[argh(option, default = "600.0")]
    seconds: f64,
}

/// Load a server for a time and print what it did.
#[derive(FromArgs)]
#[argh(subcommand, name = "client")]
struct Client {
    /// address of the server, or of the forwarder before it
    #[argh(option)]
    connect: SocketAddr,
    /// file of the network namespace to enter
    #[argh(option)]
    netns: Option<String>,
    /// bulk (send as fast as possible), rr (request/response) or crr (connect, rr, close)
    #[argh(option)]
    work: Work,
    /// connections at a time (1)
    #[argh(option, default = "1")]
    connections: usize,
    /// bytes of a request and of its response (64)
    #[argh(option, default = "64")]
    size: usize,
    /// time that is measured, in seconds (3)
    #[argh(option, default = "3.0")]
    seconds: f64,
    /// time before it that is not measured, in seconds (0.5)
    #[argh(option, default = "0.5")]
    warmup: f64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Sink,
    /// As `Sink`, but the kernel drops the bytes: leaves a core that a forwarder can use.
    Discard,
    Echo,
    Rr,
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "sink" => Ok(Mode::Sink),
            "discard" => Ok(Mode::Discard),
            "echo" => Ok(Mode::Echo),
            "rr" => Ok(Mode::Rr),
            _ => Err("not sink, discard, echo or rr".into()),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Bulk,
    Rr,
    Crr,
}

impl std::str::FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bulk" => Ok(Work::Bulk),
            "rr" => Ok(Work::Rr),
            "crr" => Ok(Work::Crr),
            _ => Err("not bulk, rr or crr".into()),
        }
    }
}

fn main() -> ExitCode {
    let result = match argh::from_env::<Load>().side {
        Side::Server(options) => serve(&options),
        Side::Client(options) => Run::new(&options).and_then(Run::finish),
    };
    match result {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Moves this thread, the only one, into the namespace at `path`.
fn enter(path: Option<&str>) -> io::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let file = File::open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("--netns {path}: {error}")))?;
    Ok(setns(file, CloneFlags::CLONE_NEWNET)?)
}

/// What is left to receive and to send on a connection before its next step.
struct Conn {
    stream: TcpStream,
    to_receive: usize,
    to_send: usize,
    /// Bytes read and not yet echoed (echo mode only).
    echo: Vec<u8>,
    /// Whether the kernel tells when the socket can be written to.
    watches_out: bool,
    /// When the operation under way began.
    began: Instant,
}

/// How a read or a write left the connection.
enum Progress {
    /// The bytes that were to be moved have been.
    Done,
    /// The socket takes or has no more for now.
    Blocked,
    /// The peer has ended the connection.
    Ended,
}

impl Conn {
    fn new(stream: TcpStream) -> Self {
        let (to_receive, to_send, echo, watches_out) = (0, 0, Vec::new(), false);
        Self { stream, to_receive, to_send, echo, watches_out, began: Instant::now() }
    }

    /// Sends what is left to send, from `buffer`, whose content does not matter.
    fn send(&mut self, buffer: &[u8]) -> io::Result<Progress> {
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
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Progress> {
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
    fn echo(&mut self, buffer: &mut [u8]) -> io::Result<Progress> {
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
    fn watch(&mut self, epoll: &Epoll, token: u64, input: bool, output: bool) -> io::Result<()> {
        if output != self.watches_out {
            self.watches_out = output;
            let mut event = EpollEvent::new(interest(input, output), token);
            epoll.modify(&self.stream, &mut event)?;
        }
        Ok(())
    }
}

fn interest(input: bool, output: bool) -> EpollFlags {
    let mut flags = EpollFlags::empty();
    flags.set(EpollFlags::EPOLLIN, input);
    flags.set(EpollFlags::EPOLLOUT, output);
    flags
}

/// Runs the server: prints its address, answers, returns the report.
fn serve(options: &Server) -> io::Result<Value> {
    enter(options.netns.as_deref())?;
    let listener = TcpListener::bind(options.listen)?;
    // Longer than std's: many clients may connect at once.
    socket::listen(&listener, socket::Backlog::new(4096).map_err(io::Error::from)?)?;
    socket::setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
    listener.set_nonblocking(true)?;
    println!("{}", json!({ "listening": listener.local_addr()?.to_string() }));
    io::stdout().flush()?;

    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    // A regular file or /dev/null cannot be waited for; then only the time ends the server.
    let _ = epoll.add(io::stdin().as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, STDIN));

    let end = Instant::now() + Duration::from_secs_f64(options.seconds);
    let mut conns: Vec<Option<Conn>> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let mut buffer = vec![0u8; BUFFER_BYTES];
    let mut events = [EpollEvent::empty(); EVENTS];
    let mut accepted = 0u64;
    while Instant::now() < end {
        let count = wait(&epoll, &mut events)?;
        for event in &events[..count] {
            match event.data() {
                STDIN => return Ok(json!({ "accepted": accepted })),
                LISTENER => {
                    accepted += accept(&listener, &epoll, options, &mut conns, &mut free)?;
                }
                token => {
                    let slot = &mut conns[token as usize];
                    let Some(conn) = slot else { continue };
                    // A connection's end or fault ends that connection alone.
                    if !answer(conn, token, &epoll, options, &mut buffer).unwrap_or(false) {
                        *slot = None;
                        free.push(token as usize);
                    }
                }
            }
        }
    }
    Ok(json!({ "accepted": accepted }))
}

/// Takes all waiting connections; returns how many.
fn accept(
    listener: &TcpListener,
    epoll: &Epoll,
    options: &Server,
    conns: &mut Vec<Option<Conn>>,
    free: &mut Vec<usize>,
) -> io::Result<u64> {
    let mut accepted = 0;
    while let Ok((stream, _)) = listener.accept() {
        accepted += 1;
        stream.set_nonblocking(true)?;
        let token = free.pop().unwrap_or_else(|| {
            conns.push(None);
            conns.len() - 1
        });
        epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token as u64))?;
        let conn = conns[token].insert(Conn::new(stream));
        conn.to_receive = options.size;
    }
    Ok(accepted)
}

/// One step of a server's connection; `false` when it has ended.
fn answer(
    conn: &mut Conn,
    token: u64,
    epoll: &Epoll,
    options: &Server,
    buffer: &mut [u8],
) -> io::Result<bool> {
    let progress = match options.mode {
        // One read, so that all connections get their turn.
        Mode::Sink => match conn.stream.read(buffer)? {
            0 => Progress::Ended,
            _ => Progress::Done,
        },
        Mode::Discard => {
            match socket::recv(conn.stream.as_raw_fd(), buffer, MsgFlags::MSG_TRUNC)? {
                0 => Progress::Ended,
                _ => Progress::Done,
            }
        }
        Mode::Echo => conn.echo(buffer)?,
        Mode::Rr => {
            if conn.to_send == 0 {
                match conn.receive(buffer)? {
                    Progress::Done => {
                        conn.to_receive = options.size;
                        conn.to_send = options.size;
                    }
                    Progress::Blocked => return Ok(true),
                    Progress::Ended => return Ok(false),
                }
            }
            conn.send(buffer)?
        }
    };
    let blocked = matches!(progress, Progress::Blocked);
    conn.watch(epoll, token, !blocked, blocked)?;
    Ok(!matches!(progress, Progress::Ended))
}

/// Waits for events, at most a tick.
fn wait(epoll: &Epoll, events: &mut [EpollEvent]) -> io::Result<usize> {
    match epoll.wait(events, EpollTimeout::from(TICK_MS)) {
        Err(nix::errno::Errno::EINTR) => Ok(0),
        other => Ok(other?),
    }
}

/// A client's run.
struct Run<'a> {
    options: &'a Client,
    epoll: Epoll,
    conns: Vec<Option<Conn>>,
    buffer: Vec<u8>,
    /// Bytes sent (bulk) or operations done, from the start.
    done: u64,
    errors: u64,
    last_error: Option<io::Error>,
    latencies: Histogram,
}

impl<'a> Run<'a> {
    fn new(options: &'a Client) -> io::Result<Self> {
        enter(options.netns.as_deref())?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut run = Self {
            options,
            epoll,
            conns: (0..options.connections).map(|_| None).collect(),
            buffer: vec![b'n'; BUFFER_BYTES],
            done: 0,
            errors: 0,
            last_error: None,
            latencies: Histogram::new(),
        };
        for index in 0..options.connections {
            run.open(index)?;
        }
        Ok(run)
    }

    /// Loads the server for the time asked for and reports.
    fn finish(mut self) -> io::Result<Value> {
        let start = Instant::now();
        let measure = start + Duration::from_secs_f64(self.options.warmup);
        let end = measure + Duration::from_secs_f64(self.options.seconds);
        let (mut before, mut measured_from) = (None, measure);
        let mut events = [EpollEvent::empty(); EVENTS];
        let now = loop {
            let now = Instant::now();
            if now >= end {
                break now;
            }
            if before.is_none() && now >= measure {
                before = Some(self.done);
                measured_from = now;
                self.latencies = Histogram::new();
            }
            let count = wait(&self.epoll, &mut events)?;
            for event in &events[..count] {
                self.handle(event.data() as usize)?;
            }
        };
        let seconds = now.duration_since(measured_from).as_secs_f64();
        let measured = self.done - before.unwrap_or(0);
        Ok(self.report(measured, seconds))
    }

    fn report(&self, measured: u64, seconds: f64) -> Value {
        let rate = measured as f64 / seconds;
        let last_error = self.last_error.as_ref().map(ToString::to_string);
        let (size, connections) = (self.options.size, self.options.connections);
        let common = json!({
            "connections": connections, "seconds": seconds, "errors": self.errors,
            "last_error": last_error,
        });
        let own = match self.options.work {
            Work::Bulk => json!({
                "work": "bulk", "total_bytes": self.done, "bytes": measured,
                "gbit_per_second": rate * 8.0 / 1e9,
            }),
            work => json!({
                "work": if work == Work::Rr { "rr" } else { "crr" }, "size": size,
                "total_operations": self.done, "operations": measured, "per_second": rate,
                "p50_us": self.latencies.quantile_us(0.5),
                "p99_us": self.latencies.quantile_us(0.99),
                "p999_us": self.latencies.quantile_us(0.999),
            }),
        };
        match (common, own) {
            (Value::Object(mut all), Value::Object(own)) => {
                all.extend(own);
                Value::Object(all)
            }
            _ => unreachable!("json!({{..}}) is an object"),
        }
    }

    /// Begins a connection without waiting for it, and sends its first request if it is there at
    /// once, which on a loopback interface it is.
    fn open(&mut self, index: usize) -> io::Result<()> {
        let began = Instant::now();
        let mut conn = Conn::new(begin_connect(self.options.connect)?);
        conn.began = began;
        self.ask(&mut conn);
        let bulk = self.options.work == Work::Bulk;
        conn.watches_out = bulk || matches!(conn.send(&self.buffer)?, Progress::Blocked);
        let flags = interest(!bulk, conn.watches_out);
        self.epoll.add(&conn.stream, EpollEvent::new(flags, index as u64))?;
        self.conns[index] = Some(conn);
        Ok(())
    }

    /// What the next operation of a connection is.
    fn ask(&self, conn: &mut Conn) {
        match self.options.work {
            Work::Bulk => conn.to_send = usize::MAX,
            Work::Rr | Work::Crr => {
                conn.to_send = self.options.size;
                conn.to_receive = self.options.size;
            }
        }
    }

    /// Does what an event allows; a failed connection is counted and replaced.
    fn handle(&mut self, index: usize) -> io::Result<()> {
        let Some(mut conn) = self.conns[index].take() else { return Ok(()) };
        match self.step(&mut conn, index as u64) {
            Ok(true) => self.conns[index] = Some(conn),
            Ok(false) => {
                drop(conn);
                self.open(index)?;
            }
            Err(error) => {
                self.errors += 1;
                if self.errors >= ERRORS_MAX {
                    return Err(error);
                }
                self.last_error = Some(error);
                drop(conn);
                self.open(index)?;
            }
        }
        Ok(())
    }

    /// One step of a connection; `false` when it is to be replaced.
    fn step(&mut self, conn: &mut Conn, token: u64) -> io::Result<bool> {
        if self.options.work == Work::Bulk {
            // One write, so that all connections get their turn.
            match conn.stream.write(&self.buffer) {
                Ok(n) => self.done += n as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            return Ok(true);
        }
        if matches!(conn.send(&self.buffer)?, Progress::Blocked) {
            conn.watch(&self.epoll, token, true, true)?;
            return Ok(true);
        }
        match conn.receive(&mut self.buffer)? {
            Progress::Blocked => {
                conn.watch(&self.epoll, token, true, false)?;
                return Ok(true);
            }
            Progress::Ended => return Err(io::Error::from(ErrorKind::UnexpectedEof)),
            Progress::Done => {}
        }
        self.done += 1;
        let now = Instant::now();
        self.latencies.add(now.duration_since(conn.began));
        if self.options.work == Work::Crr {
            return Ok(false);
        }
        conn.began = now;
        self.ask(conn);
        let blocked = matches!(conn.send(&self.buffer)?, Progress::Blocked);
        conn.watch(&self.epoll, token, true, blocked)?;
        Ok(true)
    }
}

/// Makes a non-blocking socket and begins its connection.
fn begin_connect(address: SocketAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket::socket(family, SockType::Stream, flags, None)?;
    socket::setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
    match socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(nix::errno::Errno::EINPROGRESS) => Ok(TcpStream::from(fd)),
        Err(errno) => Err(errno.into()),
    }
}

/// Counts durations with a relative error of at most 1/64.
struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    /// Steps for each power of two.
    const STEPS_LOG2: u32 = 6;

    fn new() -> Self {
        Self { counts: vec![0; 64 << Self::STEPS_LOG2], total: 0 }
    }

    fn add(&mut self, duration: Duration) {
        let ns = (duration.as_nanos() as u64).max(1 << Self::STEPS_LOG2);
        let exponent = ns.ilog2() - Self::STEPS_LOG2;
        let step = (ns >> exponent) - (1 << Self::STEPS_LOG2);
        self.counts[((exponent as usize) << Self::STEPS_LOG2) + step as usize] += 1;
        self.total += 1;
    }

    /// The duration that a share `q` of all does not exceed, in microseconds.
    fn quantile_us(&self, q: f64) -> Option<f64> {
        let rank = (self.total as f64 * q).ceil() as u64;
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank && seen > 0
        })?;
        let exponent = bucket >> Self::STEPS_LOG2;
        let step = (bucket & ((1 << Self::STEPS_LOG2) - 1)) + (1 << Self::STEPS_LOG2);
        Some(((step << exponent) as f64) / 1000.0)
    }
}
