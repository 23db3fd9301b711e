//! Connections that copy are brought together in one worker while that can carry them, those that
//! splice are shared by all, and both go on there as if nothing had been.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};
use nsplice::config::SocketOptions;
use nsplice::engine::epoll::Epoll;
use nsplice::engine::{Engine, Setup, Sleep, Start, Token};
use nsplice::flow::{Op, Side};
use serde_json::Value;
use support::calls::{SIOCATMARK, int_ioctl};
use support::streams::{self, accept, connect, read_to_end};
use support::{Forwarder, Launch, Netns, Process, eventually, namespaces, skip};

/// Connections at a time: of so many each worker gets some.
const CONNECTIONS: usize = 24;

/// Exchanges after which a connection has been moved, if it is.
const EXCHANGES: u8 = 24;

/// How many workers there are, unless their number is given.
fn cpus() -> usize {
    Process::of(std::process::id() as i32).unwrap().cpus().len()
}

struct Pair {
    client: TcpStream,
    target: TcpStream,
}

impl Pair {
    fn open(clients: &Netns, forwarder: &Forwarder, server: &TcpListener) -> Self {
        let client = clients.enter(|| connect(forwarder.address()));
        let target = accept(server);
        setsockopt(&target, sockopt::OobInline, &true).unwrap();
        Self { client, target }
    }

    fn exchange(&mut self, salt: u8) {
        for (from, to) in [(&self.client, &self.target), (&self.target, &self.client)] {
            let message = [salt; 64];
            let (mut from, mut to) = (from, to);
            from.write_all(&message).unwrap();
            let mut got = [0; 64];
            to.read_exact(&mut got).unwrap();
            assert_eq!(got, message);
        }
    }

    /// Ends both streams, one after the other.
    fn end(&mut self) {
        self.client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut self.target).how, "eof");
        self.target.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut self.client).how, "eof");
    }
}

fn start(clients: &Netns, targets: &Netns, options: &[&str]) -> (Forwarder, TcpListener) {
    let server = targets.listen("127.0.0.1:0");
    let launch = Launch::nsplice()
        .listen_netns(clients)
        .connect_netns(targets)
        .listen(([127, 0, 0, 1], 0))
        .connect(server.local_addr().unwrap())
        .option("--summary", "json");
    let launch = options.chunks(2).fold(launch, |launch, pair| launch.option(pair[0], pair[1]));
    (launch.start(), server)
}

fn open(clients: &Netns, forwarder: &Forwarder, server: &TcpListener) -> Vec<Pair> {
    (0..CONNECTIONS).map(|_| Pair::open(clients, forwarder, server)).collect()
}

fn exchange_all(pairs: &mut [Pair]) {
    for round in 0..EXCHANGES {
        for (index, pair) in pairs.iter_mut().enumerate() {
            pair.exchange(round.wrapping_mul(31) ^ index as u8);
        }
    }
}

/// One number of each worker's.
fn by_worker(summary: &Value, name: &str) -> Vec<u64> {
    summary["workers"].as_array().unwrap().iter().map(|own| own[name].as_u64().unwrap()).collect()
}

/// Each connection ended in one worker, and nothing went wrong.
fn assert_complete(summary: &Value) {
    assert_eq!(summary["completed"], CONNECTIONS, "{summary}");
    assert_eq!(summary["connections"], CONNECTIONS, "{summary}");
    assert_eq!(summary["failed"], 0, "{summary}");
}

#[test]
fn connections_that_copy_are_brought_together() {
    if cpus() == 1 {
        skip!("one CPU, so there is one worker");
    }
    namespaces!(clients, targets);
    let (forwarder, server) = start(&clients, &targets, &[]);
    let descriptors = forwarder.connector().fds().len();
    let mut pairs = open(&clients, &forwarder, &server);
    exchange_all(&mut pairs);
    // What comes afterwards comes as without a move: an urgent byte, the ends of both streams.
    for Pair { client, target } in &mut pairs {
        send(client.as_raw_fd(), b"..!", MsgFlags::MSG_OOB).unwrap();
        let mut got = [0; 2];
        target.read_exact(&mut got).unwrap();
        eventually("the mark", || (int_ioctl(target, SIOCATMARK).unwrap() == 1).then_some(()));
        target.read_exact(&mut got[..1]).unwrap();
        assert_eq!(got, *b"!.");
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(target).how, "eof");
        target.write_all(b"late").unwrap();
        target.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(client).bytes, 4);
    }
    drop(pairs);
    eventually("the descriptors are closed", || {
        (forwarder.connector().fds().len() == descriptors).then_some(())
    });
    let exit = forwarder.stop();
    exit.assert_clean();
    let summary = exit.summary();
    assert_complete(&summary);
    let (came, ended) = (by_worker(&summary, "connections"), by_worker(&summary, "completed"));
    // There are hosts so busy that one worker gets all.
    let all = came.iter().max().unwrap();
    assert_eq!(ended.iter().sum::<u64>(), *ended.iter().max().unwrap(), "{summary}");
    assert!(*all == CONNECTIONS as u64 || summary["moves"].as_u64().unwrap() > 0, "{summary}");
}

#[test]
fn connections_that_splice_are_shared_evenly() {
    if cpus() == 1 {
        skip!("one CPU, so there is one worker");
    }
    namespaces!(clients, targets);
    let (forwarder, server) = start(&clients, &targets, &[]);
    let pairs: Vec<_> = (0..8).map(|_| Pair::open(&clients, &forwarder, &server)).collect();
    for (seed, Pair { client, target }) in pairs.iter().enumerate() {
        let seed = seed as u64;
        std::thread::scope(|scope| {
            scope.spawn(|| streams::send(&mut &*client, seed, 64 << 20));
            streams::receive(&mut &*target, seed, 64 << 20);
        });
    }
    for Pair { client, target } in &pairs {
        client.shutdown(Shutdown::Write).unwrap();
        target.shutdown(Shutdown::Write).unwrap();
        assert_eq!((read_to_end(&mut &*target).how, read_to_end(&mut &*client).how), eofs());
    }
    let exit = forwarder.stop();
    exit.assert_clean();
    let summary = exit.summary();
    assert_eq!((&summary["completed"], &summary["failed"]), (&8.into(), &0.into()), "{summary}");
    let (came, ended) = (by_worker(&summary, "connections"), by_worker(&summary, "completed"));
    // Those that came to one worker are shared by all; each worker begins with itself.
    let most = came.iter().map(|count| count.div_ceil(ended.len() as u64)).sum::<u64>();
    assert!(ended.iter().all(|&count| count <= most), "{summary}");
}

fn eofs() -> (String, String) {
    ("eof".to_owned(), "eof".to_owned())
}

#[test]
fn so_many_workers_as_were_asked_for_share_connections() {
    namespaces!(clients, targets);
    for options in [["--workers", "2"], ["--handoff", "connections"]] {
        let (forwarder, server) = start(&clients, &targets, &options);
        let mut pairs = open(&clients, &forwarder, &server);
        exchange_all(&mut pairs);
        drop(pairs);
        let exit = forwarder.stop();
        let summary = exit.summary();
        assert_eq!(summary["moves"], 0, "{options:?}: {summary}");
        let (came, left) = (by_worker(&summary, "connections"), ends(&summary));
        assert_eq!(came, left, "{options:?}: {summary}");
    }
}

/// Connections that ended, by worker.
fn ends(summary: &Value) -> Vec<u64> {
    let [completed, failed, stopped] =
        ["completed", "failed", "stopped"].map(|name| by_worker(summary, name));
    (0..completed.len()).map(|index| completed[index] + failed[index] + stopped[index]).collect()
}

#[test]
fn an_end_in_the_middle_of_moves_leaves_nobody_behind() {
    namespaces!(clients, targets);
    for round in 0..12 {
        let (forwarder, server) = start(&clients, &targets, &[]);
        let mut pairs = open(&clients, &forwarder, &server);
        // Connections move after some eight exchanges: so while this goes on.
        let until = Instant::now() + Duration::from_micros(500 * round);
        let mut salt = 0;
        while Instant::now() < until {
            for pair in &mut pairs {
                pair.exchange(salt);
            }
            salt = salt.wrapping_add(1);
        }
        // What is on its way keeps the worker moving connections when the order comes.
        pairs.iter_mut().for_each(|pair| pair.client.write_all(&[1; 64]).unwrap());
        let exit = forwarder.stop();
        exit.assert_clean();
        for Pair { client, target } in &mut pairs {
            for (name, stream) in [("client", client), ("target", target)] {
                assert_eq!(read_to_end(stream).how, "ConnectionReset", "{round}: {name}");
            }
        }
        let summary = exit.summary();
        let count = summary["connections"].as_u64().unwrap();
        assert_eq!((count, ends(&summary).iter().sum()), (CONNECTIONS as u64, count), "{summary}");
        assert_eq!(summary["stopped"], count, "{summary}");
    }
}

#[test]
fn a_program_that_drains_goes_on_until_the_last_of_those_that_were_moved() {
    namespaces!(clients, targets);
    let (forwarder, server) = start(&clients, &targets, &["--drain-timeout", "30"]);
    let mut pairs = open(&clients, &forwarder, &server);
    exchange_all(&mut pairs[..CONNECTIONS / 2]);
    forwarder.connector().signal(Signal::SIGTERM);
    // Half of them are to move yet, some to a worker that has none left, and has ended.
    let (first, second) = pairs.split_at_mut(CONNECTIONS / 2);
    for pair in first {
        pair.exchange(7);
        pair.end();
    }
    exchange_all(second);
    for pair in second {
        pair.end();
    }
    let exit = forwarder.finish();
    exit.assert_clean();
    assert_complete(&exit.summary());
}

#[test]
fn there_are_never_more_connections_than_there_may_be() {
    namespaces!(clients, targets);
    for most in [2, 4, 6, 16] {
        let (forwarder, server) =
            start(&clients, &targets, &["--max-connections", &most.to_string()]);
        // Each says who it is; most of them wait.
        let open = |index: u8| {
            let mut client = clients.enter(|| connect(forwarder.address()));
            client.write_all(&[index]).unwrap();
            Some(client)
        };
        let mut waiting: Vec<_> = (0..most + 8).map(open).collect();
        let mut served = Vec::new();
        while waiting.iter().any(Option::is_some) {
            while served.len() < usize::from(most) && waiting.iter().any(Option::is_some) {
                let mut target = accept(&server);
                let mut index = [0];
                target.read_exact(&mut index).unwrap();
                let client = waiting[usize::from(index[0])].take().unwrap();
                served.push(Pair { client, target });
            }
            exchange_all(&mut served);
            assert!(!streams::is_next(&server, 20), "more than {most}");
            // One ends, whoever has it; the next one comes.
            drop(served.remove(0));
        }
        let exit = forwarder.stop();
        exit.assert_clean();
        assert_eq!(exit.summary()["connections"], most + 8, "{exit:?}");
    }
}

/// Which of the workers has a connection: the one that wakes for it, while nothing else happens.
fn worker_of(pair: &mut Pair, workers: &[Process]) -> usize {
    let slept = || workers.iter().map(Process::voluntary_switches);
    let before: Vec<_> = slept().collect();
    for salt in 0..3 {
        pair.exchange(salt);
        std::thread::sleep(Duration::from_millis(2));
    }
    let woken = slept().zip(before).map(|(now, before)| now - before);
    woken.enumerate().max_by_key(|&(_, count)| count).unwrap().0
}

#[test]
fn a_worker_that_gave_a_connection_away_has_room_for_another() {
    if cpus() == 1 {
        skip!("one CPU, so there is one worker");
    }
    namespaces!(clients, targets);
    // Each worker has room for eight.
    let most = 8 * cpus();
    let (forwarder, server) = start(&clients, &targets, &["--max-connections", &most.to_string()]);
    let open = || Pair::open(&clients, &forwarder, &server);
    let thread = |index| forwarder.connector().thread(&format!("worker-{index}"));
    let workers: Vec<_> = (0..).map_while(thread).collect();
    let pairs: Vec<_> = (0..most).map(|_| open()).collect();
    // Those of the first worker end: it has room for four that copy with others.
    let is_elsewhere = |mut pair| (worker_of(&mut pair, &workers) > 0).then_some(pair);
    let mut stay: Vec<_> = pairs.into_iter().filter_map(is_elsewhere).collect();
    assert_eq!(stay.len(), most - 8);
    exchange_all(&mut stay);
    stay.extend((0..8).map(|_| open()));
    stay.iter_mut().for_each(|pair| pair.exchange(1));
    let exit = forwarder.stop();
    exit.assert_clean();
    assert_eq!(exit.summary()["moves"], 4, "{exit:?}");
}

/// For io_uring: tests/readiness.rs.
#[test]
fn a_socket_that_was_let_go_is_in_no_set_of_the_epoll_engine() {
    let setup = Setup {
        target: None,
        sockets: SocketOptions::default(),
        pipe_size_bytes: 1 << 20,
        pipes: 1,
        busy_poll_us: 0,
    };
    let mut engine = Epoll::start(&setup).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut far = connect(listener.local_addr().unwrap());
    let near = OwnedFd::from(accept(&listener));
    let [readable, watch] = [Op::Readable(Side::Listen), Op::Watch(Side::Listen)]
        .map(|op| Token::Flow { index: 0, generation: 0, op });
    engine.readable(readable, &near);
    engine.watch(watch, &near);
    far.write_all(b"a message").unwrap();
    let is_told = || {
        engine.wait(Sleep::ForMs(50)).unwrap();
        let told = std::iter::from_fn(|| engine.completion()).map(|done| done.token);
        told.collect::<Vec<_>>().contains(&readable).then_some(())
    };
    eventually("the message", is_told);
    engine.cancel(watch);
    let is_member = || {
        let sets = Process::of(std::process::id() as i32).unwrap().in_sets();
        sets.contains(&near.as_raw_fd())
    };
    assert!(is_member(), "it stays there for the next request");
    engine.let_go(&near);
    assert!(!is_member());
}
