//! Ten thousand connections that end in every order leave nothing behind.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use super::stage::{LISTEN, TIME_WAIT, tcp_states};
use crate::support::streams::{Random, connect};
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

/// When the ends begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// When the server has answered.
    Answered,
    /// While both send, at some byte.
    Midway,
    /// When nothing more goes to the server, which reads nothing.
    Full,
    /// Before a word is said: mostly there is no connection to the server yet.
    AtOnce,
}

impl Moment {
    const ALL: [Self; 4] = [Self::Answered, Self::Midway, Self::Full, Self::AtOnce];

    fn random(random: &mut Random) -> Self {
        match random.next() % 100 {
            0..2 => Self::Full,
            2..15 => Self::AtOnce,
            15..50 => Self::Midway,
            _ => Self::Answered,
        }
    }
}

/// Each connection carries up to 20 kB each way, so that buffers and pipes are in use as well.
fn clients(address: SocketAddr, count: usize, seed: u64) {
    let mut random = Random(seed);
    for _ in 0..count {
        let order = (random.next() % ORDERS.len() as u64) as u8;
        let moment = Moment::random(&mut random);
        let bytes = random.log_uniform(1, 20_000) as u16;
        let read = random.next() % u64::from(bytes);
        let mut part = ORDERS[usize::from(order)].parts().0;
        let mut stream = connect(address);
        let [low, high] = bytes.to_le_bytes();
        let header = [order, moment as u8, low, high];
        match moment {
            Moment::Answered => {
                stream.write_all(&header).unwrap();
                stream.write_all(&vec![order; bytes.into()]).unwrap();
                stream.read_exact(&mut vec![0; bytes.into()]).unwrap();
            }
            // The server may end it at any time.
            Moment::Midway => {
                let _ = stream.write_all(&[&header[..], &vec![order; bytes.into()]].concat());
                let _ = stream.read_exact(&mut vec![0; read as usize]);
            }
            Moment::Full => {
                let _ = stream.write_all(&header);
                stream.set_nonblocking(true).unwrap();
                while stream.write(&[order; 64 << 10]).is_ok() {}
                stream.set_nonblocking(false).unwrap();
            }
            // The server does not know what it is to do.
            Moment::AtOnce if part == Part::Await => part = Part::Close,
            Moment::AtOnce if part == Part::AwaitThenReset => part = Part::Reset,
            Moment::AtOnce => {}
        }
        play(stream, part);
    }
}

/// Ends the servers, also when a client has failed.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Serves clients until `is_over`.
fn servers(listener: &TcpListener, is_over: &AtomicBool, seed: u64) {
    let mut random = Random(seed);
    while !is_over.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(10u16)).unwrap();
        // Another thread may have been faster.
        let Ok((stream, _)) = listener.accept() else { continue };
        stream.set_nonblocking(false).unwrap();
        serve(stream, random.next());
    }
}

fn serve(mut stream: TcpStream, random: u64) {
    let mut header = [0; 4];
    if stream.read_exact(&mut header).is_err() {
        return;
    }
    let bytes = usize::from(u16::from_le_bytes([header[2], header[3]]));
    match Moment::ALL[usize::from(header[1])] {
        Moment::Answered => {
            let mut read = vec![0; bytes];
            stream.read_exact(&mut read).unwrap();
            stream.write_all(&read).unwrap();
        }
        Moment::Midway => {
            let _ = stream.write_all(&vec![header[0]; bytes]);
            let _ = stream.read_exact(&mut vec![0; random as usize % bytes]);
        }
        Moment::Full | Moment::AtOnce => {}
    }
    play(stream, ORDERS[usize::from(header[0])].parts().1);
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
    listener.set_nonblocking(true).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = SetOnDrop(&is_over);
        let (listener, client_netns, is_over) = (&listener, &client_netns, &is_over);
        let ends = (0..THREADS as u64).map(|seed| {
            scope.spawn(move || servers(listener, is_over, !seed));
            scope.spawn(move || client_netns.enter(|| clients(address, share, seed)))
        });
        let ends: Vec<_> = ends.collect();
        ends.into_iter().for_each(|end| end.join().unwrap());

        for (netns, side) in [(client_netns, "listen"), (&target_netns, "connect")] {
            // Clients have closed all of theirs, and servers do, also of those who said nothing:
            // what is left is the forwarder's.
            eventually(&format!("no connection is left on the {side} side"), || {
                let gone = |state: &u8| matches!(*state, TIME_WAIT | LISTEN);
                tcp_states(netns).iter().all(gone).then_some(())
            });
        }
    });
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
