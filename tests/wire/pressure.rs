//! A reader that stops costs a bounded amount of memory, and no time.

use std::io::{ErrorKind, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use super::stage::Way;
use super::stage::{NSPLICE, NSPLICE_ON_EPOLL};
use crate::support::streams::{accept, connect};
use crate::support::{Forwarder, Launch, Netns, PATIENCE, Process, namespaces};

const CONNECTIONS: usize = 4;

/// Sizes of the four sockets' buffers, least, first and largest.
const SOCKET_BUFFERS: &str = "4096 65536 65536";
const SOCKET_BUFFER_BYTES: usize = 65536;

/// Capacity of a pipe.
const PIPE: &str = "64K";
const PIPE_BYTES: usize = 64 << 10;

/// What may be on the way of one connection: four sockets' buffers, and a pipe or a smaller buffer.
const ON_THE_WAY_BYTES_MAX: usize = 4 * SOCKET_BUFFER_BYTES + PIPE_BYTES;

/// Ends of pipes that are open: a pipe for each half, and no more.
const PIPE_ENDS_MAX: usize = CONNECTIONS * 2 * 2;

/// What the forwarder's processes may grow by, for all connections. Bytes on the way are in the
/// kernel, or in buffers of which the first few are there from the start.
const RSS_GROWTH_BYTES_MAX: u64 = 4 << 20;

/// How long the forwarder is watched, and the ticks of 10 ms it may take in that time. One that
/// spins takes 200.
const WATCHED: Duration = Duration::from_secs(2);
const TICKS_MAX: u64 = 10;

/// Nothing gets through for this long: all on the way is full.
const BLOCKED: Duration = Duration::from_millis(300);

/// What has happened to the connection whose reader stops.
#[derive(Clone, Copy, Debug)]
enum Before {
    Nothing,
    /// The reader has ended the stream it sends (tests/kernel/polling.rs).
    ReaderHalfClosed,
    /// The sender has ended its stream, which still waits behind the bytes.
    SenderHalfClosed,
    /// The sender is gone: the bytes are to be delivered, then a reset.
    SenderReset,
}

#[test]
fn a_stopped_reader_costs_no_time_and_bounded_memory() {
    check(Before::Nothing);
}

#[test]
fn a_stopped_reader_that_has_half_closed_costs_no_time_and_bounded_memory() {
    check(Before::ReaderHalfClosed);
}

#[test]
fn a_stopped_reader_of_a_half_closed_sender_costs_no_time_and_bounded_memory() {
    check(Before::SenderHalfClosed);
}

#[test]
fn a_stopped_reader_of_a_sender_that_has_reset_costs_no_time_and_bounded_memory() {
    check(Before::SenderReset);
}

/// In each transfer, with each engine, both engines at a time; clients and servers are the readers
/// in turn.
fn check(before: Before) {
    std::thread::scope(|scope| {
        for ways in [&NSPLICE[..], &NSPLICE_ON_EPOLL] {
            scope.spawn(move || ways.iter().for_each(|&way| check_way(way, before)));
        }
    });
}

fn check_way(way: Way, before: Before) {
    let Way::Nsplice { engine, transfer, handoff: "socket", .. } = way else { return };
    namespaces!(clients, targets);
    for netns in [&clients, &targets] {
        netns.sysctl("net/ipv4/tcp_rmem", SOCKET_BUFFERS);
        netns.sysctl("net/ipv4/tcp_wmem", SOCKET_BUFFERS);
    }
    let listener = targets.listen("127.0.0.1:0");
    let launch = engine.into_iter().fold(Launch::nsplice(), Launch::engine);
    let forwarder = launch
        .option("--transfer", transfer)
        .option("--pipe-size", PIPE)
        .listen_netns(&clients)
        .connect_netns(&targets)
        .listen(([127, 0, 0, 1], 0))
        .connect(listener.local_addr().unwrap())
        .start();
    stop_reading(&forwarder, &clients, &listener, before, transfer);
    forwarder.stop().assert_clean();
}

fn stop_reading(
    forwarder: &Forwarder,
    clients: &Netns,
    listener: &TcpListener,
    before: Before,
    transfer: &str,
) {
    let processes = forwarder.processes();
    let rss_bytes = || processes.iter().map(Process::rss_bytes).sum::<u64>();
    let idle_bytes = rss_bytes();
    let pipe_ends = || processes.iter().map(|process| process.count_fds("pipe")).sum::<usize>();
    let idle_pipe_ends = pipe_ends();
    let mut open = Vec::new();
    for number in 0..CONNECTIONS {
        let client = clients.enter(|| connect(forwarder.address()));
        let server = accept(listener);
        let (sender, reader) = if number % 2 == 0 { (client, server) } else { (server, client) };
        if let Before::ReaderHalfClosed = before {
            reader.shutdown(Shutdown::Write).unwrap();
        }
        let sent = send_until_blocked(&sender);
        assert!(sent < ON_THE_WAY_BYTES_MAX, "{transfer}: {sent} bytes are on the way");
        // The one that told the address may have been open still.
        let pipe_ends = pipe_ends().saturating_sub(idle_pipe_ends);
        assert!(pipe_ends <= PIPE_ENDS_MAX, "{transfer}: {pipe_ends} ends of pipes");
        match before {
            Before::Nothing | Before::ReaderHalfClosed => open.push(sender),
            Before::SenderHalfClosed => {
                sender.shutdown(Shutdown::Write).unwrap();
                open.push(sender);
            }
            Before::SenderReset => {
                let linger = libc::linger { l_onoff: 1, l_linger: 0 };
                let option = nix::sys::socket::sockopt::Linger;
                nix::sys::socket::setsockopt(&sender, option, &linger).unwrap();
            }
        }
        open.push(reader);
    }
    let ticks = || processes.iter().map(Process::cpu_ticks).sum::<u64>();
    let ticks_before = ticks();
    std::thread::sleep(WATCHED);
    let (taken, grown) = (ticks() - ticks_before, rss_bytes().saturating_sub(idle_bytes));
    assert!(taken < TICKS_MAX, "{transfer}: {taken} ticks in {WATCHED:?}, {before:?}");
    assert!(grown < RSS_GROWTH_BYTES_MAX, "{transfer}: {grown} bytes more, {before:?}");
}

/// Returns how many bytes went.
fn send_until_blocked(mut stream: &TcpStream) -> usize {
    let block = vec![7; 256 << 10];
    stream.set_write_timeout(Some(BLOCKED)).unwrap();
    let mut sent = 0;
    loop {
        match stream.write(&block) {
            Ok(n) => sent += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("write after {sent}: {error}"),
        }
        if sent >= ON_THE_WAY_BYTES_MAX {
            break;
        }
    }
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    sent
}
