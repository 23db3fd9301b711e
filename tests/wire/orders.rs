//! Ten thousand connections that end in every order leave nothing behind.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

use nix::sys::socket::{setsockopt, sockopt};

use super::stage::{LISTEN, TIME_WAIT, tcp_states};
use crate::support::streams::{Random, accept, connect};
use crate::support::{Launch, Process, eventually, namespaces};

const CONNECTIONS: usize = 10_000;

/// At a time, on either side.
const THREADS: usize = 4;

const WORKERS: usize = 2;

/// Ends of pipes that the connector may keep for reuse: two pipes for each connection at a time,
/// in each worker, as it is chance which one served how many.
const PIPE_ENDS_MAX: usize = WORKERS * THREADS * 2 * 2;

/// Who ends a connection, and how. The client tells the server with its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    ClientCloses,
    ServerCloses,
    BothClose,
    ClientHalfCloses,
    ServerHalfCloses,
    ClientResets,
    ServerResets,
    BothReset,
    ClientHalfClosesServerResets,
    ServerHalfClosesClientResets,
}

const ORDERS: [Order; 10] = [
    Order::ClientCloses,
    Order::ServerCloses,
    Order::BothClose,
    Order::ClientHalfCloses,
    Order::ServerHalfCloses,
    Order::ClientResets,
    Order::ServerResets,
    Order::BothReset,
    Order::ClientHalfClosesServerResets,
    Order::ServerHalfClosesClientResets,
];

/// What one end does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Close,
    Reset,
    /// Ends its stream, then reads to the other one's end.
    HalfClose,
    /// Reads to the end, then closes.
    Await,
    AwaitThenReset,
}

impl Order {
    /// What the client and the server do.
    fn parts(self) -> (Part, Part) {
        match self {
            Self::ClientCloses => (Part::Close, Part::Await),
            Self::ServerCloses => (Part::Await, Part::Close),
            Self::BothClose => (Part::Close, Part::Close),
            Self::ClientHalfCloses => (Part::HalfClose, Part::Await),
            Self::ServerHalfCloses => (Part::Await, Part::HalfClose),
            Self::ClientResets => (Part::Reset, Part::Await),
            Self::ServerResets => (Part::Await, Part::Reset),
            Self::BothReset => (Part::Reset, Part::Reset),
            Self::ClientHalfClosesServerResets => (Part::HalfClose, Part::AwaitThenReset),
            Self::ServerHalfClosesClientResets => (Part::AwaitThenReset, Part::HalfClose),
        }
    }
}

/// How a connection ends is the other rows' matter; here any end will do, but it must come.
fn play(mut stream: TcpStream, part: Part) {
    let await_end = |stream: &mut TcpStream| {
        let mut buffer = [0; 4096];
        while stream.read(&mut buffer).is_ok_and(|n| n > 0) {}
    };
    match part {
        Part::Close => {}
        Part::Reset => linger(&stream),
        Part::HalfClose => {
            let _ = stream.shutdown(Shutdown::Write);
            await_end(&mut stream);
        }
        Part::Await => await_end(&mut stream),
        Part::AwaitThenReset => {
            await_end(&mut stream);
            linger(&stream);
        }
    }
}

fn linger(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(stream, sockopt::Linger, &linger).unwrap();
}

/// Each connection carries up to 20 kB each way, so that buffers and pipes are in use as well.
fn clients(address: SocketAddr, count: usize, seed: u64) {
    let mut random = Random(seed);
    for _ in 0..count {
        let order = (random.next() % ORDERS.len() as u64) as u8;
        let bytes = random.log_uniform(1, 20_000) as u16;
        let mut stream = connect(address);
        let [low, high] = bytes.to_le_bytes();
        stream.write_all(&[order, low, high]).unwrap();
        stream.write_all(&vec![order; bytes.into()]).unwrap();
        stream.read_exact(&mut vec![0; bytes.into()]).unwrap();
        play(stream, ORDERS[usize::from(order)].parts().0);
    }
}

fn servers(listener: &TcpListener, count: usize) {
    for _ in 0..count {
        let mut stream = accept(listener);
        let mut header = [0; 3];
        stream.read_exact(&mut header).unwrap();
        let mut bytes = vec![0; u16::from_le_bytes([header[1], header[2]]).into()];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
        // The client resets only after it has all of this, so the header is never cut off.
        play(stream, ORDERS[usize::from(header[0])].parts().1);
    }
}

#[test]
fn with_the_socket_handed_over_ten_thousand_ends_leave_nothing() {
    end_all("socket");
}

#[test]
fn with_connections_handed_over_ten_thousand_ends_leave_nothing() {
    end_all("connections");
}

fn end_all(handoff: &str) {
    namespaces!(client_netns, target_netns);
    for netns in [&client_netns, &target_netns] {
        // Closed connections keep their port for a minute.
        netns.sysctl("net/ipv4/ip_local_port_range", "10240 65535");
    }
    let listener = target_netns.listen("127.0.0.1:9");
    let forwarder = Launch::nsplice()
        .option("--handoff", handoff)
        .option("--workers", WORKERS.to_string())
        .listen_netns(&client_netns)
        .connect_netns(&target_netns)
        .listen(([127, 0, 0, 1], 7))
        .connect(listener.local_addr().unwrap())
        .start();
    let processes = forwarder.processes();
    let idle: Vec<_> = processes.iter().map(open).collect();

    let (share, address) = (CONNECTIONS / THREADS, forwarder.address());
    std::thread::scope(|scope| {
        let (listener, client_netns) = (&listener, &client_netns);
        for seed in 0..THREADS as u64 {
            scope.spawn(move || servers(listener, share));
            scope.spawn(move || client_netns.enter(|| clients(address, share, seed)));
        }
    });

    for (netns, side) in [(&client_netns, "listen"), (&target_netns, "connect")] {
        // Clients and servers have closed all of theirs: what is left is the forwarder's.
        eventually(&format!("no connection is left on the {side} side"), || {
            let gone = |state: &u8| matches!(*state, TIME_WAIT | LISTEN);
            tcp_states(netns).iter().all(gone).then_some(())
        });
    }
    for (process, idle) in processes.iter().zip(idle) {
        eventually(&format!("{process:?} is as idle as before, {idle:?}"), || {
            let now = open(process);
            (now.others == idle.others && now.pipe_ends <= idle.pipe_ends.max(PIPE_ENDS_MAX))
                .then_some(())
        });
    }
    let exit = forwarder.stop();
    exit.assert_clean();
    assert_eq!(exit.summary()["connections"], CONNECTIONS, "{exit:?}");
}

/// What a process has open. Empty pipes may be kept for the next connection.
#[derive(Debug)]
struct Open {
    pipe_ends: usize,
    others: usize,
}

fn open(process: &Process) -> Open {
    let (pipes, others): (Vec<_>, Vec<_>) =
        process.fds().into_iter().partition(|target| target.starts_with("pipe:"));
    Open { pipe_ends: pipes.len(), others: others.len() }
}
