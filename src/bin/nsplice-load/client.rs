//! The client: loads a server for a time and measures.

use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};
use nix::unistd;
use serde_json::{Value, json};

use crate::conn::{Conn, Progress, interest};
use crate::histogram::Histogram;
use crate::{BUFFER_BYTES, Client, EVENTS, Work, prepare, wait};

/// A client that has seen this many failed connections gives up.
const ERRORS_MAX: u64 = 1000;
/// Connections that are opened at a time before the load begins: few enough for the shortest
/// backlog in use (netns_tcp_bridge has 16), past which a connection waits for a second.
const OPENING_MAX: usize = 16;
/// Longest time to open all of them.
const OPENING_TIMEOUT: Duration = Duration::from_secs(60);

/// Token of standard input; connections count from 0.
const STDIN: u64 = u64::MAX;

/// Loads the server for the time asked for and prints the report.
pub(crate) fn run(options: &Client) -> io::Result<()> {
    let mut run = Run::new(options)?;
    say(&run.measure()?)?;
    if options.progress {
        // Whoever takes measurements at this line sees connections, not their end.
        io::copy(&mut io::stdin(), &mut io::sink())?;
    }
    Ok(())
}

/// A client's run.
struct Run<'a> {
    options: &'a Client,
    epoll: Epoll,
    conns: Vec<Option<Conn>>,
    buffer: Vec<u8>,
    /// Whether connections still rest after their first operation, until all are open.
    opening: bool,
    /// Connections at rest.
    resting: usize,
    /// Bytes sent (bulk) or operations done, from the start.
    done: u64,
    errors: u64,
    last_error: Option<io::Error>,
    latencies: Histogram,
    start: Start,
}

/// What there was when the measured time began.
struct Start {
    time: Instant,
    /// Bytes sent (bulk) or operations.
    done: u64,
    cpu_seconds: f64,
    opening_seconds: f64,
}

impl<'a> Run<'a> {
    fn new(options: &'a Client) -> io::Result<Self> {
        prepare(options.netns.as_deref(), options.cpu)?;
        Ok(Self {
            options,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            conns: (0..options.connections).map(|_| None).collect(),
            buffer: vec![b'n'; BUFFER_BYTES],
            opening: true,
            resting: 0,
            done: 0,
            errors: 0,
            last_error: None,
            latencies: Histogram::new(),
            start: Start { time: Instant::now(), done: 0, cpu_seconds: 0.0, opening_seconds: 0.0 },
        })
    }

    /// Opens the connections, loads the server for the time asked for and reports.
    fn measure(&mut self) -> io::Result<Value> {
        let began = Instant::now();
        self.open_all(began + OPENING_TIMEOUT)?;
        let opening_seconds = began.elapsed().as_secs_f64();
        if self.options.work != Work::Idle {
            self.opening = false;
            for index in 0..self.conns.len() {
                self.begin(index)?;
            }
            self.run_until(Instant::now() + Duration::from_secs_f64(self.options.warmup))?;
        }
        if self.options.progress {
            say(&json!({ "measuring": true, "opening_seconds": opening_seconds }))?;
            // A regular file or /dev/null cannot be waited for; then nobody asks.
            let asked = EpollEvent::new(EpollFlags::EPOLLIN, STDIN);
            let _ = self.epoll.add(io::stdin().as_fd(), asked);
        }
        self.latencies = Histogram::new();
        let (done, cpu_seconds, time) = (self.done, cpu_seconds()?, Instant::now());
        self.start = Start { time, done, cpu_seconds, opening_seconds };
        self.run_until(time + Duration::from_secs_f64(self.options.seconds))?;
        self.report()
    }

    /// Opens all connections, a few at a time, until each has been answered.
    fn open_all(&mut self, deadline: Instant) -> io::Result<()> {
        let mut opened = 0;
        // A connection of `crr` never rests: the next one is what the work measures.
        let closes = self.options.work == Work::Crr;
        while self.resting < self.conns.len() && !(closes && opened == self.conns.len()) {
            while opened < self.conns.len() && (closes || opened < self.resting + OPENING_MAX) {
                self.open(opened)?;
                opened += 1;
            }
            if Instant::now() >= deadline {
                let (answered, all, seconds) =
                    (self.resting, self.conns.len(), OPENING_TIMEOUT.as_secs());
                let what = format!("{answered} of {all} connections answered within {seconds} s");
                return Err(io::Error::new(ErrorKind::TimedOut, what));
            }
            self.handle_events()?;
        }
        Ok(())
    }

    /// Begins the load of a connection that rests.
    fn begin(&mut self, index: usize) -> io::Result<()> {
        let Some(mut conn) = self.conns[index].take_if(|conn| conn.rests) else { return Ok(()) };
        conn.rests = false;
        self.resting -= 1;
        conn.began = Instant::now();
        self.ask(&mut conn);
        let bulk = self.options.work == Work::Bulk;
        let blocked = bulk || matches!(conn.send(&self.buffer)?, Progress::Blocked);
        conn.watch(&self.epoll, index as u64, !bulk, blocked)?;
        self.conns[index] = Some(conn);
        Ok(())
    }

    fn run_until(&mut self, end: Instant) -> io::Result<()> {
        while Instant::now() < end {
            self.handle_events()?;
        }
        Ok(())
    }

    fn handle_events(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = wait(&self.epoll, &mut events)?;
        for event in &events[..count] {
            match event.data() {
                STDIN => self.answer_stdin()?,
                index => self.handle(index as usize)?,
            }
        }
        Ok(())
    }

    /// Answers each line by what was done so far.
    fn answer_stdin(&mut self) -> io::Result<()> {
        let mut bytes = [0; 64];
        // Not by `Stdin`, which may read lines that the epoll then does not tell of.
        let count = unistd::read(io::stdin(), &mut bytes)?;
        if count == 0 {
            self.epoll.delete(io::stdin().as_fd())?;
        }
        for _ in bytes[..count].iter().filter(|&&byte| byte == b'\n') {
            let mut report = self.report()?;
            report["so_far"] = json!(true);
            say(&report)?;
        }
        Ok(())
    }

    /// What was done in the measured time until now.
    fn report(&self) -> io::Result<Value> {
        let done = self.done - self.start.done;
        let seconds = self.start.time.elapsed().as_secs_f64();
        let rate = done as f64 / seconds;
        let mut report = json!({
            "work": self.options.work.name(), "connections": self.options.connections,
            "seconds": seconds, "opening_seconds": self.start.opening_seconds,
            "client_cpu_seconds": cpu_seconds()? - self.start.cpu_seconds,
            "errors": self.errors,
            "last_error": self.last_error.as_ref().map(ToString::to_string),
        });
        match self.options.work {
            Work::Bulk => {
                report["total_bytes"] = json!(self.done);
                report["bytes"] = json!(done);
                report["gbit_per_second"] = json!(rate * 8.0 / 1e9);
            }
            Work::Rr | Work::Crr => {
                report["size"] = json!(self.options.size);
                report["total_operations"] = json!(self.done);
                report["operations"] = json!(done);
                report["per_second"] = json!(rate);
                for (name, quantile) in [("p50_us", 0.5), ("p99_us", 0.99), ("p999_us", 0.999)] {
                    report[name] = json!(self.latencies.quantile_us(quantile));
                }
            }
            Work::Idle => report["held"] = json!(self.resting),
        }
        Ok(report)
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
            Work::Rr | Work::Crr | Work::Idle => {
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
                self.resting -= usize::from(conn.rests);
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
        if conn.rests {
            // Nothing was asked, so nothing but its end can have come.
            return Err(conn.stream.take_error()?.unwrap_or(ErrorKind::UnexpectedEof.into()));
        }
        if self.options.work == Work::Bulk {
            return self.step_bulk(conn, token);
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
        let mut blocked = false;
        if self.opening {
            self.rest(conn);
        } else {
            conn.began = now;
            self.ask(conn);
            blocked = matches!(conn.send(&self.buffer)?, Progress::Blocked);
        }
        conn.watch(&self.epoll, token, true, blocked)?;
        Ok(true)
    }

    fn step_bulk(&mut self, conn: &mut Conn, token: u64) -> io::Result<bool> {
        if self.opening {
            if let Some(error) = conn.stream.take_error()? {
                return Err(error);
            }
            self.rest(conn);
            conn.watch(&self.epoll, token, false, false)?;
            return Ok(true);
        }
        // One write, so that all connections get their turn.
        match conn.stream.write(&self.buffer) {
            Ok(n) => self.done += n as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    fn rest(&mut self, conn: &mut Conn) {
        conn.rests = true;
        self.resting += 1;
    }
}

/// Prints a line that whoever reads it has at once.
fn say(line: &Value) -> io::Result<()> {
    println!("{line}");
    io::stdout().flush()
}

/// CPU time of this process.
fn cpu_seconds() -> io::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
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
