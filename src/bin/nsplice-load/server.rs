//! The server: one thread that answers all clients.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{self, MsgFlags, sockopt};
use serde_json::{Value, json};

use crate::conn::{Conn, Progress};
use crate::{BUFFER_BYTES, EVENTS, Mode, Server, prepare, wait};

/// Token of the listening socket; connections count from 0.
const LISTENER: u64 = u64::MAX;
/// Token of standard input.
const STDIN: u64 = u64::MAX - 1;

/// Runs the server: prints its address, answers, returns the report.
pub(crate) fn serve(options: &Server) -> io::Result<Value> {
    prepare(options.netns.as_deref(), options.cpu)?;
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
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(accepted),
            // The client has gone; the next one waits behind it.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
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
