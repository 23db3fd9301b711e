//! Every byte arrives, in order, whatever way it takes through the forwarder.
//!
//! Two namespaces that nothing else joins; 200 connections at a time, each both ways at once, from
//! one byte to 100 MB; both ends compare every byte.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use support::calls::data_segments_in;
use support::exchanges::{Exchange, run_clients, serve};
use support::streams::{Random, accept, connect};
use support::{Exit, Forwarder, Launch, Netns, Program, namespaces, skip};

/// Connections open at a time, and so many in all: they begin together.
const CONNECTIONS: usize = 200;

const IPV4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const IPV6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// One test for each combination of the ways a byte can take; each does both address families.
macro_rules! matrix {
    ($($name:ident: $handoff:literal $transfer:literal $workers:literal;)+) => {
        $(
            #[test]
            fn $name() {
                for ip in [IPV4, IPV6] {
                    namespaces!(clients, targets);
                    let launch = Launch::nsplice()
                        .option("--handoff", $handoff)
                        .option("--transfer", $transfer)
                        .option("--workers", $workers);
                    let exchanges = mixed_sizes(&format!("{} {ip}", stringify!($name)));
                    let exit = forward(launch, CONNECTIONS, ip, &clients, &targets, &exchanges);
                    check_summary(&exit, &exchanges);
                }
            }
        )+
    };
}

matrix! {
    socket_auto_1_worker: "socket" "auto" "1";
    socket_auto_2_workers: "socket" "auto" "2";
    socket_copy_1_worker: "socket" "copy" "1";
    socket_copy_2_workers: "socket" "copy" "2";
    socket_splice_1_worker: "socket" "splice" "1";
    socket_splice_2_workers: "socket" "splice" "2";
    connections_auto_1_worker: "connections" "auto" "1";
    connections_auto_2_workers: "connections" "auto" "2";
    connections_copy_1_worker: "connections" "copy" "1";
    connections_copy_2_workers: "connections" "copy" "2";
    connections_splice_1_worker: "connections" "splice" "1";
    connections_splice_2_workers: "connections" "splice" "2";
}

/// The same load through the tool that nsplice replaces: the harness asks for nothing special. Its
/// backlog of 16 takes no more at a time.
#[test]
fn the_reference_passes_the_same_streams() {
    if let Err(reason) = Program::Reference.path() {
        skip!("{reason}");
    }
    namespaces!(clients, targets);
    let launch = Launch::new(Program::Reference);
    forward(launch, 12, IPV4, &clients, &targets, &mixed_sizes("reference"));
}

#[test]
fn auto_copies_short_messages_also_after_bulk() {
    const MESSAGES: u64 = 200;
    namespaces!(clients, targets);
    let listener = targets.listen("127.0.0.1:0");
    let forwarder = Launch::nsplice()
        .option("--summary", "json")
        .listen_netns(&clients)
        .connect_netns(&targets)
        .listen((IPV4, 0))
        .connect(listener.local_addr().unwrap())
        .start();
    let client = clients.enter(|| connect(forwarder.address()));
    let server = accept(&listener);
    exchange(&client, 1, 2, 4 << 20, &server);
    for message in 0..MESSAGES {
        exchange(&client, message, message, 100, &server);
    }
    drop((client, server));
    let summary = forwarder.stop().summary();
    // A receive and a send for each message each way, but for the first few.
    let copied = summary["copy_operations"].as_u64().unwrap();
    assert!(copied > 4 * MESSAGES * 9 / 10, "{summary}");
}

/// A short first segment would have the peer's TCP believe that its path is a short one.
#[test]
fn what_auto_copies_of_a_large_message_is_no_segment_of_its_own() {
    // Three buffers of the forwarder, and less than a segment of the loopback.
    const LEN: usize = 24 << 10;
    namespaces!(clients, targets);
    let listener = targets.listen("127.0.0.1:0");
    let forwarder = Launch::nsplice()
        .listen_netns(&clients)
        .connect_netns(&targets)
        .listen((IPV4, 0))
        .connect(listener.local_addr().unwrap())
        .start();
    for _ in 0..20 {
        let mut client = clients.enter(|| connect(forwarder.address()));
        let mut server = accept(&listener);
        client.write_all(&[b'm'; LEN]).unwrap();
        server.read_exact(&mut [0; LEN]).unwrap();
        assert_eq!(data_segments_in(&server), 1);
    }
    forwarder.stop();
}

/// So many bytes each way, at once.
fn exchange(client: &TcpStream, up: u64, down: u64, len: u64, server: &TcpStream) {
    std::thread::scope(|scope| {
        scope.spawn(|| support::streams::exchange(server, down, up, len));
        support::streams::exchange(client, up, down, len);
    });
}

/// Several do not; README.md says who needs it.
#[test]
fn one_worker_keeps_the_order_of_connections() {
    for handoff in ["socket", "connections"] {
        namespaces!(clients, targets);
        let listener = targets.listen("127.0.0.1:0");
        let forwarder = Launch::nsplice()
            .option("--workers", "1")
            .option("--handoff", handoff)
            .listen_netns(&clients)
            .connect_netns(&targets)
            .listen((IPV4, 0))
            .connect(listener.local_addr().unwrap())
            .start();
        let address = forwarder.address();
        for _ in 0..20 {
            let made: Vec<_> = clients.enter(|| (0..20).map(|_| connect(address)).collect());
            for (number, mut client) in made.iter().enumerate() {
                client.write_all(&[number as u8]).unwrap();
            }
            for number in 0..made.len() {
                let mut first = [0];
                accept(&listener).read_exact(&mut first).unwrap();
                assert_eq!(usize::from(first[0]), number, "--handoff {handoff}");
            }
        }
        forwarder.stop();
    }
}

#[test]
fn auto_splices_bulk_transfers() {
    namespaces!(clients, targets);
    let exchanges = [Exchange { seed: 1, up: 50_000_000, down: 50_000_000 }];
    let exit = forward(Launch::nsplice(), 1, IPV4, &clients, &targets, &exchanges);
    let summary = exit.summary();
    assert!(summary["splice_operations"].as_u64().unwrap() > 0, "{summary}");
    // All but the first reads, which show that the transfer is a bulk one.
    assert!(summary["spliced_bytes"].as_u64().unwrap() > 80_000_000, "{summary}");
}

#[test]
fn auto_never_splices_small_messages() {
    namespaces!(clients, targets);
    let listener = targets.listen("127.0.0.1:0");
    let forwarder = start(Launch::nsplice(), IPV4, &clients, &targets, &listener);
    let mut client = clients.enter(|| connect(forwarder.address()));
    let mut server = accept(&listener);
    // The larger ones with room for a header.
    for length in [64, (16 << 10) + 64] {
        let mut message = vec![0u8; length];
        for round in 0..1000u32 {
            message[..4].copy_from_slice(&round.to_le_bytes());
            client.write_all(&message).unwrap();
            server.read_exact(&mut message).unwrap();
            server.write_all(&message).unwrap();
            client.read_exact(&mut message).unwrap();
            assert_eq!(message[..4], round.to_le_bytes());
        }
    }
    drop((client, server));
    let exit = forwarder.stop();
    exit.assert_clean();
    let summary = exit.summary();
    assert_eq!(summary["splice_operations"], 0, "{summary}");
    assert_eq!(summary["bytes_to_target"], 1_000 * (64 + 16_448), "{summary}");
}

/// Sizes from 1 byte to 100 MB, small ones as likely as large ones; the same in every run.
fn mixed_sizes(name: &str) -> Vec<Exchange> {
    let mut random =
        Random(name.bytes().fold(0, |seed, byte| seed.wrapping_mul(31) ^ u64::from(byte)));
    let mut exchanges: Vec<_> = (1..CONNECTIONS)
        .map(|_| Exchange {
            seed: random.next(),
            up: random.log_uniform(1, 1_000_000),
            down: random.log_uniform(1, 1_000_000),
        })
        .collect();
    // The large one begins among the others, and goes both ways.
    let large = Exchange { seed: random.next(), up: 100_000_000, down: 100_000_000 };
    exchanges.insert(CONNECTIONS / 2, large);
    exchanges
}

fn start(
    launch: Launch,
    ip: IpAddr,
    clients: &Netns,
    targets: &Netns,
    listener: &TcpListener,
) -> Forwarder {
    let address = SocketAddr::new(ip, 0);
    let target = listener.local_addr().unwrap();
    launch.listen_netns(clients).connect_netns(targets).listen(address).connect(target).start()
}

/// Runs all exchanges through a forwarder and ends it.
fn forward(
    launch: Launch,
    at_a_time: usize,
    ip: IpAddr,
    clients: &Netns,
    targets: &Netns,
    exchanges: &[Exchange],
) -> Exit {
    let listener = targets.listen((ip, 0));
    let forwarder = start(launch, ip, clients, targets, &listener);
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&listener, exchanges.len()));
        clients.enter(|| run_clients(forwarder.address(), exchanges, at_a_time));
    });
    forwarder.assert_no_kernel_workers();
    forwarder.stop()
}

fn check_summary(exit: &Exit, exchanges: &[Exchange]) {
    exit.assert_clean();
    let summary = exit.summary();
    let count = exchanges.len() as u64;
    // Before its bytes a client sends 24 that say what it is going to do.
    let up: u64 = exchanges.iter().map(|exchange| exchange.up + 24).sum();
    let down: u64 = exchanges.iter().map(|exchange| exchange.down).sum();
    assert_eq!(summary["connections"], count, "{summary}");
    assert_eq!(summary["completed"], count, "{summary}");
    assert_eq!(summary["failed"], 0, "{summary}");
    assert_eq!(summary["bytes_to_target"], up, "{summary}");
    assert_eq!(summary["bytes_to_client"], down, "{summary}");
}
