//! After many connections nothing is left of them: no descriptor, no pipe, no memory.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};

use support::streams::{accept, connect, exchange};
use support::{Forwarder, Launch, Netns, Process, eventually, namespaces};

/// Connections at a time; the warm-up has as many, so that it fills whatever is kept for reuse.
const THREADS: usize = 4;
const WARM_UP: usize = 1_000;
const CONNECTIONS: usize = 20_000;

const WORKERS: usize = 2;

/// Ends of pipes that the connector may keep for reuse: what all connections at a time can have
/// needed in each worker, for both directions. Which worker needed how many is chance.
const PIPE_ENDS_MAX: usize = WORKERS * THREADS * 2 * 2;

/// What a process's resident memory may grow by between the warm-up and the end. A leak of 64 bytes
/// for each connection would be more; the allocator's own coming and going is less.
const RSS_GROWTH_BYTES: u64 = 1 << 20;

/// The numbers of an idle process that connections must not change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Footprint {
    /// Open descriptors by kind: `socket`, `pipe`, `anon_inode`, ...
    fds: BTreeMap<String, usize>,
    threads: usize,
}

impl Footprint {
    fn of(process: Process) -> Self {
        let mut fds = BTreeMap::new();
        for target in process.fds() {
            let kind = target.split(':').next().unwrap_or_default().to_owned();
            *fds.entry(kind).or_default() += 1;
        }
        Self { fds, threads: process.thread_names().len() }
    }

    fn count(&self, kind: &str) -> usize {
        self.fds.get(kind).copied().unwrap_or(0)
    }

    /// Whether nothing but pipes kept for reuse has been added to it.
    fn is_as_before(&self, before: &Self) -> bool {
        let without_pipes = |footprint: &Self| {
            let mut footprint = footprint.clone();
            footprint.fds.remove("pipe");
            footprint
        };
        without_pipes(self) == without_pipes(before)
            && self.count("pipe") <= before.count("pipe").max(PIPE_ENDS_MAX)
    }
}

#[test]
fn short_connections_leave_nothing_with_the_socket_handed_over() {
    endure("socket", CONNECTIONS, short_clients, short_server);
}

#[test]
fn short_connections_leave_nothing_with_connections_handed_over() {
    endure("connections", CONNECTIONS, short_clients, short_server);
}

#[test]
fn bulk_connections_leave_nothing() {
    for handoff in ["socket", "connections"] {
        endure(handoff, 400, bulk_clients, bulk_server);
    }
}

/// Warms a forwarder up, notes its footprint, runs `count` connections, and compares.
fn endure(
    handoff: &str,
    count: usize,
    clients_do: fn(SocketAddr, usize),
    server_does: fn(&TcpListener, usize),
) {
    namespaces!(clients, targets);
    for netns in [&clients, &targets] {
        // Closed connections keep their port for a minute.
        netns.sysctl("net/ipv4/ip_local_port_range", "10240 65535");
    }
    let listener = targets.listen("127.0.0.1:9");
    let forwarder = Launch::nsplice()
        .option("--handoff", handoff)
        .option("--workers", WORKERS.to_string())
        .listen_netns(&clients)
        .connect_netns(&targets)
        .listen(([127, 0, 0, 1], 7))
        .connect(listener.local_addr().unwrap())
        .start();
    let processes = [forwarder.listener, forwarder.connector()];
    let idle = processes.map(Footprint::of);

    let warm_up = WARM_UP.min(count);
    run(&clients, &listener, &forwarder, warm_up, clients_do, server_does);
    let warm = processes.map(|process| {
        let sockets = idle[usize::from(process == processes[1])].count("socket");
        eventually("the sockets of the warm-up are closed", || {
            let now = Footprint::of(process);
            (now.count("socket") == sockets).then_some(now)
        })
    });
    let rss_bytes = processes.map(|process| process.rss_bytes());

    run(&clients, &listener, &forwarder, count, clients_do, server_does);
    for (index, process) in processes.into_iter().enumerate() {
        let what = format!("process {index} is as before, {:?}", warm[index]);
        eventually(&what, || Footprint::of(process).is_as_before(&warm[index]).then_some(()));
        let (before, after) = (rss_bytes[index], process.rss_bytes());
        assert!(
            after <= before + RSS_GROWTH_BYTES,
            "process {index} grew from {before} to {after} bytes over {count} connections"
        );
    }
    let exit = forwarder.stop();
    exit.assert_clean();
    let summary = exit.summary();
    assert_eq!(summary["completed"], warm_up + count, "{summary}");
    assert_eq!(summary["failed"], 0, "{summary}");
}

/// Runs `count` connections with some threads on either side.
fn run(
    clients: &Netns,
    listener: &TcpListener,
    forwarder: &Forwarder,
    count: usize,
    clients_do: fn(SocketAddr, usize),
    server_does: fn(&TcpListener, usize),
) {
    let (share, address) = (count / THREADS, forwarder.address());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(move || server_does(listener, share));
            scope.spawn(move || clients.enter(|| clients_do(address, share)));
        }
    });
}

/// Connect, 64 bytes each way, close.
fn short_clients(address: SocketAddr, count: usize) {
    let mut message = [7; 64];
    for _ in 0..count {
        let mut stream = connect(address);
        stream.write_all(&message).unwrap();
        stream.read_exact(&mut message).unwrap();
    }
}

fn short_server(listener: &TcpListener, count: usize) {
    let mut message = [0; 64];
    for _ in 0..count {
        let mut stream = accept(listener);
        stream.read_exact(&mut message).unwrap();
        stream.write_all(&message).unwrap();
        assert_eq!(stream.read(&mut message).unwrap(), 0);
    }
}

const BULK_BYTES: u64 = 1_000_000;

fn bulk_clients(address: SocketAddr, count: usize) {
    for _ in 0..count {
        let mut stream = connect(address);
        exchange(&stream, 1, 2, BULK_BYTES);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}

fn bulk_server(listener: &TcpListener, count: usize) {
    for _ in 0..count {
        let mut stream = accept(listener);
        exchange(&stream, 2, 1, BULK_BYTES);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}
