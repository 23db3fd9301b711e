//! It keeps standing: with processes that are stopped or killed, with no room left, with thousands
//! who wait or say nothing.

#![allow(clippy::unwrap_used)]

mod support;

#[path = "standing/crowd.rs"]
mod crowd;
#[path = "standing/forged.rs"]
mod forged;
#[path = "standing/shortage.rs"]
mod shortage;
#[path = "standing/unread.rs"]
mod unread;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use crowd::Crowd;
use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use support::streams::{accept, connect, is_next};
use support::{Forwarder, Launch, Netns, Process, TempDir, eventually, namespaces, skip};

const HANDOFFS: [&str; 2] = ["socket", "connections"];

/// A server whose queue holds any crowd of these tests.
fn server(targets: &Netns) -> TcpListener {
    let listener = targets.listen("127.0.0.1:0");
    let backlog = nix::sys::socket::Backlog::new(4096).unwrap();
    nix::sys::socket::listen(&listener, backlog).unwrap();
    listener
}

fn launch(clients: &Netns, targets: &Netns, server: &TcpListener, handoff: &str) -> Launch {
    Launch::nsplice()
        .option("--handoff", handoff)
        .listen_netns(clients)
        .connect_netns(targets)
        .listen(([127, 0, 0, 1], 0))
        .connect(server.local_addr().unwrap())
}

/// Limits the memory of TCP sockets, of which the machine has only so much for all programs: without
/// it the kernel resets connections, also those of other tests.
fn limit_buffers(netns: &Netns, bytes: u32) {
    for name in ["net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem"] {
        netns.sysctl(name, &format!("4096 16384 {bytes}"));
    }
}

/// Told to stop, it ends when the last connection has.
fn drained(launch: Launch) -> Launch {
    launch.option("--drain-timeout", "60")
}

/// Clients who have said something.
fn clients_of(netns: &Netns, address: SocketAddr, count: usize) -> Vec<TcpStream> {
    netns.enter(|| {
        let mut clients: Vec<_> = (0..count).map(|_| connect(address)).collect();
        clients.iter_mut().for_each(|client| client.write_all(b"hello").unwrap());
        clients
    })
}

/// Answers the next client.
fn answer(server: &TcpListener) -> TcpStream {
    let mut stream = accept(server);
    let mut message = [0; 5];
    stream.read_exact(&mut message).unwrap();
    stream.write_all(&message).unwrap();
    stream
}

#[track_caller]
fn assert_answered(client: &mut TcpStream) {
    let mut message = [0; 5];
    client.read_exact(&mut message).unwrap();
    assert_eq!(&message, b"hello");
}

fn cpu_ticks(forwarder: &Forwarder) -> u64 {
    forwarder.processes().iter().map(Process::cpu_ticks).sum()
}

/// Panics if the processes take more than 5 % of a processor for a while.
#[track_caller]
fn assert_quiet(forwarder: &Forwarder, seconds: u64) {
    let before = cpu_ticks(forwarder);
    std::thread::sleep(Duration::from_secs(seconds));
    let taken = cpu_ticks(forwarder) - before;
    assert!(taken < 5 * seconds, "{taken} ticks in {seconds} s, with nothing to do");
}

#[test]
fn clients_of_a_stopped_connector_are_served_when_it_goes_on() {
    const CLIENTS: usize = 3_000;
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let server = server(&targets);
        let forwarder = launch(&clients, &targets, &server, handoff).start();
        forwarder.connector().stop();
        let mut waiting = clients_of(&clients, forwarder.address(), CLIENTS);
        forwarder.connector().signal(Signal::SIGCONT);
        let answered: Vec<_> = (0..CLIENTS).map(|_| answer(&server)).collect();
        waiting.iter_mut().for_each(assert_answered);
        drop((waiting, answered));
        let exit = forwarder.stop();
        exit.assert_clean();
        assert_eq!(exit.summary()["connections"], CLIENTS, "--handoff {handoff}");
    }
}

#[test]
fn after_a_kill_the_address_can_be_had_at_once() {
    for handoff in HANDOFFS {
        for (connector, listener) in [(true, false), (false, true), (true, true)] {
            namespaces!(clients, targets);
            let server = server(&targets);
            let first = launch(&clients, &targets, &server, handoff).start();
            let address = first.address();
            let mut client = clients_of(&clients, address, 1);
            let answered = answer(&server);
            assert_answered(&mut client[0]);
            let killed = Instant::now();
            if connector {
                first.connector().signal(Signal::SIGKILL);
            }
            if listener {
                first.listener.signal(Signal::SIGKILL);
            }
            // Without waiting for what is left to be gone.
            let again = launch(&clients, &targets, &server, handoff).listen(address).start();
            println!("--handoff {handoff}: another one listens after {:?}", killed.elapsed());
            let exit = first.finish();
            println!("--handoff {handoff}: both are gone after {:?}", killed.elapsed());
            assert_ne!(exit.code(), Some(0), "{exit:?}");
            let mut new = clients_of(&clients, address, 1);
            let newly_answered = answer(&server);
            assert_answered(&mut new[0]);
            drop((client, answered, new, newly_answered));
            again.stop();
        }
    }
}

#[test]
fn who_may_not_have_pipes_copies_and_loses_nothing() {
    const CONNECTIONS: u64 = 1_500;
    const LEN: u64 = 400 << 10;
    const NOBODY: u32 = 65534;
    let uids = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    if uids.split_whitespace().nth(2) == Some("1") {
        skip!("there is no other user in this user namespace");
    }
    namespaces!(both);
    let directory = TempDir::new();
    let file = directory.path().join("nsplice");
    // By a process of its own: see tests/lifecycle.rs.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_nsplice")).arg(&file).status();
    assert!(copied.unwrap().success());
    // What is on its way is to be in pipes.
    limit_buffers(&both, 64 << 10);
    let server = server(&both);
    let forwarder = drained(Launch::nsplice())
        .run_as(NOBODY, file)
        .inside(&both)
        .listen(([127, 0, 0, 1], 0))
        .connect(server.local_addr().unwrap())
        .start();
    let mut crowd = Crowd::new(CONNECTIONS, LEN, &both, forwarder.address(), &server);
    // All at once, so that all pipes there can be are in use.
    crowd.fill();
    let started = Instant::now();
    crowd.finish();
    let (bytes, seconds) = (crowd.bytes(), started.elapsed().as_secs_f64());
    println!("{:.1} MB/s over {CONNECTIONS} connections", bytes as f64 / 1e6 / seconds);
    drop(crowd);
    let exit = forwarder.stop();
    let summary = exit.summary();
    assert_eq!(summary["completed"], CONNECTIONS, "{summary}");
    let missing = ["no_pipe", "small_pipes"].map(|name| summary[name].as_u64().unwrap());
    assert!(missing.iter().sum::<u64>() > 0, "{summary}");
}

/// `None`: the connection was reset.
#[track_caller]
fn reset_or<T>(result: std::io::Result<T>) -> Option<T> {
    const RESET: [ErrorKind; 2] = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
    match result {
        Err(error) if RESET.contains(&error.kind()) => None,
        result => Some(result.unwrap()),
    }
}

#[test]
fn without_a_port_to_connect_from_clients_are_reset_until_there_is_one() {
    namespaces!(clients, targets);
    let server = server(&targets);
    let port = server.local_addr().unwrap().port();
    let first = if port < 50_000 { 50_000 } else { 40_000 };
    targets.sysctl("net/ipv4/ip_local_port_range", &format!("{first} {}", first + 9));
    let forwarder = launch(&clients, &targets, &server, "socket").start();
    // Either way a client is told at once.
    let connection = || {
        let connected = clients.enter(|| TcpStream::connect(forwarder.address()));
        let mut client = reset_or(connected.and_then(|mut client| {
            client.write_all(b"hello")?;
            client.set_nonblocking(true)?;
            Ok(client)
        }))?;
        let answered = eventually("it is answered or reset", || {
            if is_next(&server, 0) {
                return Some(Some(answer(&server)));
            }
            let how = client.read(&mut [0]);
            let is_told = !matches!(&how, Err(e) if e.kind() == ErrorKind::WouldBlock);
            is_told.then(|| reset_or(how).map(|_| panic!("a clean end")))
        });
        answered.map(|stream| (client, stream))
    };
    let held: Vec<_> = std::iter::from_fn(connection).take(50).collect();
    assert!(!held.is_empty() && held.len() <= 10, "{} connections from 10 ports", held.len());
    assert!(connection().is_none());
    // By resets, so that no port is kept for late packets.
    for (client, stream) in held {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&stream, sockopt::Linger, &linger).unwrap();
        drop((stream, client));
    }
    eventually("there is a port again", || connection().map(drop));
    let summary = forwarder.stop().summary();
    assert!(summary["errors"]["connect EADDRNOTAVAIL"].as_u64() >= Some(2), "{summary}");
}

#[test]
fn an_urgent_byte_ahead_of_what_is_missing_costs_nothing() {
    namespaces!(clients, targets);
    let server = server(&targets);
    let forwarder = launch(&clients, &targets, &server, "socket").start();
    let mut client = clients.enter(|| connect(forwarder.address()));
    let mut target = accept(&server);
    // TCP announces the byte to who waits for something to read, and nothing can be read.
    forged::urgent_behind_a_gap(&clients, &client, 5);
    assert_quiet(&forwarder, 2);
    client.write_all(b"hello").unwrap();
    let mut message = [0; 5];
    target.read_exact(&mut message).unwrap();
    assert_eq!(&message, b"hello");
    // The client knows nothing of the byte, so the connection is not to be used any more.
    drop((client, target));
    forwarder.stop().assert_clean();
}

#[test]
fn readers_that_stop_cost_nothing_until_they_go_on() {
    const LEN: u64 = 8 << 20;
    for transfer in ["auto", "copy"] {
        namespaces!(clients, targets);
        limit_buffers(&clients, 256 << 10);
        limit_buffers(&targets, 256 << 10);
        let server = server(&targets);
        let launch = drained(launch(&clients, &targets, &server, "socket"));
        let forwarder = launch.option("--transfer", transfer).start();
        let mut crowd = Crowd::new(100, LEN, &clients, forwarder.address(), &server);
        assert!(crowd.fill(), "all was sent, and nobody waits");
        let rss_bytes = || forwarder.processes().iter().map(Process::rss_bytes).sum::<u64>();
        let before = rss_bytes();
        assert_quiet(&forwarder, 5);
        let grown = rss_bytes().saturating_sub(before);
        assert!(grown < 1 << 20, "{grown} bytes more, with nothing to do");
        crowd.finish();
        drop(crowd);
        let summary = forwarder.stop().summary();
        assert_eq!(summary["completed"], 100, "{summary}");
    }
}

#[test]
fn among_thousands_who_say_nothing_a_new_client_is_served_at_once() {
    const SILENT: usize = 5_000;
    namespaces!(clients, targets);
    let server = server(&targets);
    let forwarder = launch(&clients, &targets, &server, "socket").start();
    let address = forwarder.address();
    let silent: Vec<_> =
        (0..SILENT).map(|_| (clients.enter(|| connect(address)), accept(&server))).collect();
    assert_quiet(&forwarder, 1);
    let serve_new = || {
        let started = Instant::now();
        let mut client = clients_of(&clients, address, 1).remove(0);
        let answered = answer(&server);
        assert_answered(&mut client);
        drop((client, answered));
        started.elapsed()
    };
    let mut times: Vec<_> = (0..9).map(|_| serve_new()).collect();
    times.sort();
    println!("served after {times:?}");
    assert!(times[times.len() / 2] < Duration::from_millis(100), "{times:?}");
    drop(silent);
    forwarder.stop().assert_clean();
}

/// A client that closes when its server has, after the answer.
struct Patient {
    stream: TcpStream,
    received: usize,
}

impl Patient {
    /// Whether it was served and has closed.
    fn is_over(&mut self) -> bool {
        let mut buffer = [0; 16];
        match self.stream.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Ok(0) => {
                assert_eq!(self.received, 5, "the connection ends before the answer");
                true
            }
            result => {
                self.received += result.unwrap();
                false
            }
        }
    }
}

/// Serves clients until it serves no more; then those who wait cost nothing and nobody is lost.
fn hold_to_the_limit(
    launch: Launch,
    clients: &Netns,
    server: &TcpListener,
    least: usize,
    limit: usize,
) {
    const WAITING: usize = 50;
    let total = limit + WAITING;
    let forwarder = drained(launch).start();
    let patient = |stream: TcpStream| {
        stream.set_nonblocking(true).unwrap();
        Patient { stream, received: 0 }
    };
    let all = clients_of(clients, forwarder.address(), total);
    let mut all: Vec<_> = all.into_iter().map(patient).collect();
    // How many there is room for the program decides.
    let mut held = Vec::new();
    while is_next(server, 1000) {
        held.push(answer(server));
    }
    let count = held.len();
    assert!((least..=limit).contains(&count), "{count} at a time, of {least} to {limit}");
    println!("{} at a time", held.len());
    assert_quiet(&forwarder, 3);
    let lines = forwarder.stderr().lines().count();
    assert!(lines < 5, "{}", forwarder.stderr());
    // Each that ends makes room for another.
    drop(held);
    eventually("all clients are served", || {
        while is_next(server, 0) {
            drop(answer(server));
        }
        all.retain_mut(|client| !client.is_over());
        all.is_empty().then_some(())
    });
    let exit = forwarder.stop();
    let summary = exit.summary();
    assert_eq!(summary["completed"], total, "{summary}");
}

#[test]
fn the_soft_limit_of_descriptors_is_none() {
    const CLIENTS: usize = 200;
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let server = server(&targets);
        let launch = launch(&clients, &targets, &server, handoff);
        let forwarder = launch.soft_and_hard_descriptors(64, 4096).start();
        for process in forwarder.processes() {
            let limits = std::fs::read_to_string(format!("/proc/{}/limits", process.pid)).unwrap();
            let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
            let words: Vec<_> = line.unwrap().split_whitespace().take(2).collect();
            assert_eq!(words, ["4096", "4096"]);
        }
        let mut all = clients_of(&clients, forwarder.address(), CLIENTS);
        let held: Vec<_> = (0..CLIENTS).map(|_| answer(&server)).collect();
        all.iter_mut().for_each(assert_answered);
        drop((all, held));
        forwarder.stop().assert_clean();
    }
}

#[test]
fn clients_wait_when_there_are_no_descriptors_left() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let server = server(&targets);
        let launch = launch(&clients, &targets, &server, handoff).descriptors(64);
        hold_to_the_limit(launch, &clients, &server, 10, 32);
    }
}

#[test]
fn clients_wait_when_there_are_as_many_as_there_may_be() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let server = server(&targets);
        let launch = launch(&clients, &targets, &server, handoff).option("--max-connections", "20");
        hold_to_the_limit(launch, &clients, &server, 20, 20);
    }
}
