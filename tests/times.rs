//! How long things may take: --connect-timeout, --idle-timeout, --half-close-timeout, --keepalive,
//! --user-timeout; and --backlog, where connections wait meanwhile.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::Signal;
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};
use support::streams::{accept, bounded, connect};
use support::{Exit, Forwarder, Launch, Netns, Process, eventually, namespaces};

/// Long enough that a busy machine does not take it for silence.
const LIMIT: &str = "1";
const LIMIT_S: f64 = 1.0;

/// What began at `since` has been cut after [`LIMIT`], an eighth of it at most, and what a busy machine
/// takes.
#[track_caller]
fn assert_in_time(since: Instant) {
    let seconds = since.elapsed().as_secs_f64();
    assert!((LIMIT_S..4.0 * LIMIT_S).contains(&seconds), "cut after {seconds} s");
}

/// A forwarder with these options, and a server behind it.
struct Stage {
    clients: Netns,
    server: TcpListener,
    forwarder: Forwarder,
}

impl Stage {
    fn new(clients: Netns, targets: &Netns, options: &[(&str, &str)]) -> Self {
        let server = targets.listen("127.0.0.1:0");
        let launch = Launch::nsplice()
            .listen_netns(&clients)
            .connect_netns(targets)
            .listen(([127, 0, 0, 1], 0))
            .connect(server.local_addr().unwrap());
        let with = |launch: Launch, &(name, value): &(&str, &str)| launch.option(name, value);
        let forwarder = options.iter().fold(launch, with).start();
        Self { clients, server, forwarder }
    }

    /// A connection that has been used in both directions.
    fn connection(&self) -> (TcpStream, TcpStream) {
        let address = self.forwarder.address();
        let client = self.clients.enter(|| connect(address));
        let mut pair = (client, accept(&self.server));
        ping(&mut pair);
        pair
    }

    fn stop(self) -> Exit {
        let exit = self.forwarder.stop();
        exit.assert_clean();
        exit
    }
}

#[track_caller]
fn ping((client, server): &mut (TcpStream, TcpStream)) {
    let mut message = *b"ping";
    client.write_all(&message).unwrap();
    server.read_exact(&mut message).unwrap();
    server.write_all(&message).unwrap();
    client.read_exact(&mut message).unwrap();
}

/// What comes next is a reset, and no byte.
#[track_caller]
fn assert_reset(stream: &mut TcpStream) {
    let error = stream.read(&mut [0; 16]).expect_err("neither bytes nor a clean end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

/// Uses one connection until the other one is reset, and then again.
#[track_caller]
fn assert_reset_beside(cut: &mut TcpStream, busy: &mut (TcpStream, TcpStream)) {
    cut.set_nonblocking(true).unwrap();
    let how = eventually("the other connection is cut", || {
        ping(busy);
        let how = cut.read(&mut [0]).map_err(|error| error.kind());
        (how != Err(ErrorKind::WouldBlock)).then_some(how)
    });
    assert_eq!(how, Err(ErrorKind::ConnectionReset));
    ping(busy);
}

#[test]
fn a_target_that_does_not_answer_is_given_up() {
    namespaces!(clients, targets);
    let stage = Stage::new(clients, &targets, &[("--connect-timeout", LIMIT)]);
    let mut ready = stage.connection();
    // A queue of length 0 holds one; the next one's packets are dropped.
    listen(&stage.server, Backlog::new(0).unwrap()).unwrap();
    let address = stage.server.local_addr().unwrap();
    let filler = targets.enter(|| connect(address));
    let since = Instant::now();
    let mut client = stage.clients.enter(|| connect(stage.forwarder.address()));
    assert_reset(&mut client);
    assert_in_time(since);
    ping(&mut ready);
    drop((client, ready, filler));
    let exit = stage.forwarder.stop();
    assert!(exit.stderr.contains("ETIMEDOUT"), "{exit:?}");
    let summary = exit.summary();
    assert_eq!(summary["errors"]["connect ETIMEDOUT"], 1, "{summary}");
}

#[test]
fn a_connection_without_a_byte_is_reset_on_both_sides_and_a_busy_one_is_not() {
    namespaces!(clients, targets);
    let stage = Stage::new(clients, &targets, &[("--idle-timeout", LIMIT)]);
    let since = Instant::now();
    let (mut client, mut server) = stage.connection();
    let mut busy = stage.connection();
    assert_reset_beside(&mut client, &mut busy);
    assert_in_time(since);
    assert_reset(&mut server);
    let (client, mut server) = busy;
    drop(client);
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
    drop(server);
    let summary = stage.stop().summary();
    assert_eq!(summary["errors"]["idle timeout"], 1, "{summary}");
    assert_eq!(summary["completed"], 1, "{summary}");
}

#[test]
fn a_half_closed_connection_has_a_limit_of_its_own() {
    namespaces!(clients, targets);
    let stage = Stage::new(clients, &targets, &[("--half-close-timeout", LIMIT)]);
    let mut silent = stage.connection();
    let mut busy = stage.connection();
    let (mut client, mut server) = stage.connection();
    let since = Instant::now();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
    assert_reset_beside(&mut client, &mut busy);
    assert_in_time(since);
    // Its stream had ended: there is nothing to reset. It learns it when it sends.
    eventually("the server cannot send any more", || server.write_all(b"late").err());
    ping(&mut silent);
    drop((silent, busy));
    let summary = stage.stop().summary();
    assert_eq!(summary["errors"]["half-close timeout"], 1, "{summary}");
}

#[test]
fn a_reset_does_not_wait_longer_for_a_reader_that_stopped() {
    namespaces!(clients, targets);
    let stage = Stage::new(clients, &targets, &[("--reset-timeout", "0.3")]);
    let (mut client, mut server) = stage.connection();
    // Until everything on the way is full.
    client.set_nonblocking(true).unwrap();
    let block = [7; 1 << 16];
    let is_full = |client: &mut TcpStream| {
        let since = Instant::now();
        while since.elapsed() < Duration::from_millis(500) {
            if client.write(&block).is_ok() {
                return None;
            }
            thread::sleep(Duration::from_millis(10));
        }
        Some(())
    };
    eventually("all is full", || is_full(&mut client));
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&client, sockopt::Linger, &linger).unwrap();
    drop(client);
    eventually("the reader that stopped is reset", || {
        let mut fds = [PollFd::new(server.as_fd(), PollFlags::empty())];
        poll(&mut fds, 0_u8).unwrap();
        fds[0].revents().filter(|events| events.contains(PollFlags::POLLERR)).map(drop)
    });
    // What it had received is still there.
    let mut received = 0;
    let error = loop {
        match server.read(&mut [0; 1 << 16]) {
            Ok(length) => received += length,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "after {received} bytes");
    assert!(received > 0);
    let summary = stage.stop().summary();
    assert_eq!((summary["failed"].as_u64(), summary["completed"].as_u64()), (Some(1), Some(0)));
}

#[test]
fn a_target_that_cannot_be_reached_is_counted_by_what_was_said() {
    // An address for documentation, to which there is no route.
    namespaces!(clients, targets);
    let forwarder = Launch::nsplice()
        .listen_netns(&clients)
        .connect_netns(&targets)
        .listen(([127, 0, 0, 1], 0))
        .connect(SocketAddr::from(([192, 0, 2, 1], 80)))
        .start();
    // It may be reset before an option of it could be set.
    let mut client = clients.enter(|| TcpStream::connect(forwarder.address())).unwrap();
    assert_reset(&mut client);
    let exit = forwarder.stop();
    let summary = exit.summary();
    assert_eq!(summary["errors"]["connect ENETUNREACH"], 1, "{summary}");
    assert_eq!(summary["failed"], 1, "{summary}");
}

#[test]
fn a_peer_that_takes_nothing_is_given_up_after_the_user_timeout() {
    namespaces!(clients, targets);
    let stage = Stage::new(clients, &targets, &[("--user-timeout", LIMIT)]);
    let (mut client, server) = stage.connection();
    let chunk = [0; 64 << 10];
    let error = std::iter::from_fn(|| Some(client.write_all(&chunk)))
        .find_map(Result::err)
        .expect("it ends with an error");
    let is_reset = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind());
    assert!(is_reset, "{error}");
    drop((client, server));
    let summary = stage.stop().summary();
    assert_eq!(summary["errors"]["target ETIMEDOUT"], 1, "{summary}");
}

/// The times left of the keepalive timers that run in the namespace, in hundredths of a second.
fn keepalive_timers(netns: &Netns) -> Vec<u64> {
    let table = netns.enter(|| fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
    let timer = |line: &str| {
        // Timer 2 is the one for probes; then its time, hexadecimal.
        let left = line.split_whitespace().nth(5)?.strip_prefix("02:")?;
        u64::from_str_radix(left, 16).ok()
    };
    table.lines().filter_map(timer).collect()
}

#[test]
fn silent_peers_are_probed_as_asked() {
    const HOUR: u64 = 3600 * 100;
    for (value, longest) in
        [(None, Some(3 * HOUR)), (Some("60,10,6"), Some(6000)), (Some("off"), None)]
    {
        for handoff in ["socket", "connections"] {
            namespaces!(clients, targets);
            let mut options = vec![("--handoff", handoff)];
            options.extend(value.map(|value| ("--keepalive", value)));
            let stage = Stage::new(clients, &targets, &options);
            let connection = stage.connection();
            for netns in [&stage.clients, &targets] {
                let case = format!("--keepalive {value:?} --handoff {handoff}");
                // Acknowledging may run another timer for a moment.
                let timers = eventually(&case, || {
                    let timers = keepalive_timers(netns);
                    (timers.len() == usize::from(longest.is_some())).then_some(timers)
                });
                assert!(timers.iter().all(|&left| Some(left) <= longest), "{case}: {timers:?}");
            }
            drop(connection);
            stage.stop();
        }
    }
}

#[test]
fn as_many_as_the_backlog_says_wait() {
    const BACKLOG: usize = 5;
    const CLIENTS: usize = 20;
    namespaces!(clients, targets);
    // With cookies a client believes it is connected whose handshake nobody remembers.
    clients.sysctl("net/ipv4/tcp_syncookies", "0");
    let stage = Stage::new(clients, &targets, &[("--backlog", "5")]);
    let processes = stage.forwarder.processes();
    processes.iter().for_each(Process::stop);
    let address = stage.forwarder.address();
    let waiting = stage.clients.enter(|| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| begin_connecting(address)).collect();
        let is_connected = |client: &&TcpStream| client.peer_addr().is_ok();
        (clients.iter().filter(is_connected).count(), clients)
    });
    let (connected, clients) = waiting;
    // The kernel lets one more wait than it is told.
    assert_eq!(connected, BACKLOG + 1);
    processes.iter().for_each(|process| process.signal(Signal::SIGCONT));
    // Those that did not get in ask again.
    let servers: Vec<_> = (0..CLIENTS).map(|_| accept(&stage.server)).collect();
    drop((clients, servers));
    stage.stop();
}

/// A client whose connection may still be on its way.
fn begin_connecting(address: SocketAddr) -> TcpStream {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
    use std::os::fd::AsRawFd;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    let _ = connect(socket.as_raw_fd(), &SockaddrStorage::from(address));
    bounded(socket.into())
}
