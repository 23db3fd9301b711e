//! The client: loads a server for a time and measures.

use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};
use serde_json::{Value, json};

use crate::conn::{Conn, Progress, interest};
use crate::histogram::Histogram;
use crate::{BUFFER_BYTES, Client, EVENTS, Work, enter, wait};

/// A client that has seen this many failed connections gives up.
const ERRORS_MAX: u64 = 1000;

/// A client's run.
pub(crate) struct Run<'a> {
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
    pub(crate) fn new(options: &'a Client) -> io::Result<Self> {
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
    pub(crate) fn finish(mut self) -> io::Result<Value> {
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
