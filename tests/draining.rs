//! Ending without loss: --drain-timeout.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use support::streams::{accept, connect, is_next};
use support::{Exit, Forwarder, Launch, Netns, Process, eventually, namespaces};

/// Longer than any test.
const LONG: &str = "600";
/// The status of connections that were cut.
const CUT: Option<i32> = Some(8);
const HANDOFFS: [&str; 2] = ["socket", "connections"];

#[derive(Clone, Copy, Debug)]
enum To {
    Listener,
    Connector,
    Group,
}

struct Stage {
    clients: Netns,
    server: TcpListener,
    forwarder: Forwarder,
}

impl Stage {
    fn new(clients: Netns, targets: &Netns, handoff: &str, drain_timeout: &str) -> Self {
        let with = |launch: Launch| launch.option("--drain-timeout", drain_timeout);
        Self::with(clients, targets, handoff, with)
    }

    /// With room for some only: as many as it is told, or as there are descriptors for.
    fn limited(clients: Netns, targets: &Netns, handoff: &str, descriptors: Option<u64>) -> Self {
        Self::with(clients, targets, handoff, |launch| {
            let launch = launch.option("--workers", "2").option("--drain-timeout", LONG);
            match descriptors {
                Some(descriptors) => launch.descriptors(descriptors),
                None => launch.option("--max-connections", "20"),
            }
        })
    }

    fn with(
        clients: Netns,
        targets: &Netns,
        handoff: &str,
        options: impl FnOnce(Launch) -> Launch,
    ) -> Self {
        let server = targets.listen("127.0.0.1:0");
        let launch = Launch::nsplice()
            .option("--handoff", handoff)
            .listen_netns(&clients)
            .connect_netns(targets)
            .listen(([127, 0, 0, 1], 0))
            .connect(server.local_addr().unwrap());
        Self { clients, server, forwarder: options(launch).start() }
    }

    fn connection(&self) -> (TcpStream, TcpStream) {
        let address = self.forwarder.address();
        let mut pair = (self.clients.enter(|| connect(address)), accept(&self.server));
        ping(&mut pair);
        pair
    }

    fn signal(&self, to: To) {
        match to {
            To::Listener => self.forwarder.listener.signal(Signal::SIGTERM),
            To::Connector => self.forwarder.connector().signal(Signal::SIGTERM),
            To::Group => {
                killpg(Pid::from_raw(self.forwarder.listener.pid), Signal::SIGTERM).unwrap();
            }
        }
    }

    fn wait_until_closed(&self) {
        let port = self.forwarder.address().port();
        eventually("nobody listens any more", || (!self.clients.listens(port)).then_some(()));
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

#[track_caller]
fn assert_reset(stream: &mut TcpStream) {
    let error = stream.read(&mut [0; 16]).expect_err("neither bytes nor a clean end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

#[track_caller]
fn assert_cut(exit: &Exit, count: usize) {
    let text = format!("Error: connections cut at the end: {count}\n");
    assert_eq!((exit.code(), exit.stderr.as_str()), (CUT, text.as_str()), "{exit:?}");
    assert_eq!(exit.summary()["stopped"], count, "{exit:?}");
}

#[test]
fn whoever_gets_the_signal_live_connections_go_on_to_their_end() {
    for handoff in HANDOFFS {
        for to in [To::Listener, To::Connector, To::Group] {
            namespaces!(clients, targets);
            let stage = Stage::new(clients, &targets, handoff, LONG);
            let mut connections = [stage.connection(), stage.connection()];
            stage.signal(to);
            stage.wait_until_closed();
            connections.iter_mut().for_each(ping);
            let [(client, mut server), other] = connections;
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
            drop((client, server, other));
            let exit = stage.forwarder.finish();
            exit.assert_clean();
            assert_eq!(exit.summary()["completed"], 2, "--handoff {handoff}, {to:?}: {exit:?}");
        }
    }
}

#[test]
fn what_is_left_when_the_time_is_over_is_reset() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let stage = Stage::new(clients, &targets, handoff, "0.3");
        let (mut client, mut server) = stage.connection();
        stage.signal(To::Listener);
        assert_reset(&mut client);
        assert_reset(&mut server);
        assert_cut(&stage.forwarder.finish(), 1);
    }
}

#[test]
fn clients_for_whom_there_was_no_room_until_the_end_are_cut_too() {
    const LIMIT: usize = 20;
    const WAITING: usize = 30;
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let stage = Stage::with(clients, &targets, handoff, |launch| {
            launch.option("--max-connections", "20").option("--drain-timeout", "0.3")
        });
        let mut held: Vec<_> = (0..LIMIT).map(|_| stage.connection()).collect();
        let address = stage.forwarder.address();
        let mut waiting: Vec<_> =
            stage.clients.enter(|| (0..WAITING).map(|_| connect(address)).collect());
        stage.signal(To::Listener);
        waiting.iter_mut().for_each(assert_reset);
        held.iter_mut().for_each(|(client, _)| assert_reset(client));
        let exit = stage.forwarder.finish();
        assert_cut(&exit, LIMIT + WAITING);
        assert_eq!(exit.summary()["connections"], LIMIT + WAITING, "--handoff {handoff}: {exit:?}");
    }
}

/// Whoever gave the listening socket may give it to another one then.
#[test]
fn clients_who_wait_at_a_socket_that_others_have_are_left_to_them() {
    const WAITING: usize = 5;
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let (server, listener) = (targets.listen("127.0.0.1:0"), clients.listen("127.0.0.1:0"));
        let forwarder = Launch::nsplice()
            .option("--handoff", handoff)
            .option("--max-connections", "1")
            .option("--drain-timeout", "0.3")
            .listen_fd(&listener)
            .connect_netns(&targets)
            .connect(server.local_addr().unwrap())
            .start();
        let address = listener.local_addr().unwrap();
        let mut held = (clients.enter(|| connect(address)), accept(&server));
        ping(&mut held);
        let mut waiting: Vec<_> =
            clients.enter(|| (0..WAITING).map(|_| connect(address)).collect());
        forwarder.listener.signal(Signal::SIGTERM);
        assert_reset(&mut held.0);
        assert_cut(&forwarder.finish(), 1);
        let mut others: Vec<_> = waiting.iter().map(|_| accept(&listener)).collect();
        waiting.iter_mut().zip(&mut others).for_each(|(client, other)| {
            other.write_all(b"here").unwrap();
            client.read_exact(&mut [0; 4]).unwrap();
        });
    }
}

#[test]
fn clients_who_are_on_their_way_to_a_worker_at_the_end_are_cut_too() {
    // More than the channels hold.
    const CLIENTS: usize = 1_000;
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let stage = Stage::new(clients, &targets, handoff, "0.3");
        let connector = stage.forwarder.connector();
        connector.stop();
        let address = stage.forwarder.address();
        let mut waiting: Vec<_> =
            stage.clients.enter(|| (0..CLIENTS).map(|_| connect(address)).collect());
        stage.signal(To::Listener);
        let port = address.port();
        if handoff == "connections" {
            stage.wait_until_closed();
        }
        let is_over = || {
            // It waits for the connector, and for nothing else but signals.
            (stage.forwarder.listener.count_fds("socket") == 0).then_some(())
        };
        eventually("the time is over", is_over);
        connector.signal(Signal::SIGCONT);
        waiting.iter_mut().for_each(assert_reset);
        assert!(!stage.clients.listens(port));
        assert_cut(&stage.forwarder.finish(), CLIENTS);
    }
}

#[test]
fn clients_who_are_on_their_way_are_reset_without_time_to_drain_too() {
    const CLIENTS: usize = 1_000;
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let stage =
            Stage::with(clients, &targets, handoff, |launch| launch.option("--workers", "1"));
        let sockets = || stage.forwarder.listener.count_fds("socket");
        let idle = sockets();
        let connector = stage.forwarder.connector();
        connector.stop();
        let address = stage.forwarder.address();
        // One after the other, so that each takes a message of its own.
        let connect_slowly = || {
            thread::sleep(Duration::from_micros(200));
            connect(address)
        };
        let mut waiting: Vec<_> =
            stage.clients.enter(|| (0..CLIENTS).map(|_| connect_slowly()).collect());
        if handoff == "connections" {
            // What is not sent any more stays.
            let mut looks = 0;
            eventually("the listener cannot send all it has accepted", || {
                looks = if sockets() > idle { looks + 1 } else { 0 };
                (looks > 50).then_some(())
            });
        }
        stage.signal(To::Listener);
        eventually("the listener waits for the connector", || (sockets() == 0).then_some(()));
        connector.signal(Signal::SIGCONT);
        waiting.iter_mut().for_each(assert_reset);
        stage.forwarder.finish().assert_clean();
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    for handoff in HANDOFFS {
        for to in [To::Listener, To::Connector, To::Group] {
            namespaces!(clients, targets);
            let stage = Stage::new(clients, &targets, handoff, LONG);
            let (mut client, mut server) = stage.connection();
            stage.signal(to);
            stage.wait_until_closed();
            // Until then it may pass for a repetition of the first.
            eventually("a second signal counts", || {
                stage.signal(to);
                client.set_nonblocking(true).unwrap();
                let how = client.read(&mut [0]).map_err(|error| error.kind());
                (how != Err(ErrorKind::WouldBlock)).then(|| {
                    assert_eq!(how, Err(ErrorKind::ConnectionReset), "--handoff {handoff}, {to:?}");
                })
            });
            assert_reset(&mut server);
            assert_cut(&stage.forwarder.finish(), 1);
        }
    }
}

#[test]
fn without_time_to_drain_in_it_ends_at_once_and_well() {
    namespaces!(clients, targets);
    let stage = Stage::new(clients, &targets, "socket", "0");
    let (mut client, mut server) = stage.connection();
    stage.signal(To::Listener);
    // What is cut looks like it.
    assert_reset(&mut client);
    assert_reset(&mut server);
    let exit = stage.forwarder.finish();
    exit.assert_clean();
    assert_eq!(exit.summary()["stopped"], 1, "{exit:?}");
}

#[test]
fn clients_who_wait_to_be_accepted_are_served() {
    const CLIENTS: usize = 100;
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let stage = Stage::new(clients, &targets, handoff, LONG);
        let processes = stage.forwarder.processes();
        processes.iter().for_each(Process::stop);
        let address: SocketAddr = stage.forwarder.address();
        let waiting = stage.clients.enter(|| {
            let mut clients: Vec<_> = (0..CLIENTS).map(|_| connect(address)).collect();
            clients.iter_mut().for_each(|client| client.write_all(b"hello").unwrap());
            clients
        });
        // The order to end is the first thing they hear.
        stage.signal(To::Group);
        processes.iter().for_each(|process| process.signal(Signal::SIGCONT));
        let servers = (0..CLIENTS).map(|_| accept(&stage.server));
        for mut server in servers {
            let mut message = [0; 5];
            server.read_exact(&mut message).unwrap();
            server.write_all(&message).unwrap();
        }
        for mut client in waiting {
            let mut message = Vec::new();
            client.read_to_end(&mut message).unwrap();
            assert_eq!(message, b"hello", "--handoff {handoff}");
        }
        let exit = stage.forwarder.finish();
        exit.assert_clean();
        assert_eq!(exit.summary()["completed"], CLIENTS, "--handoff {handoff}: {exit:?}");
    }
}

#[test]
fn clients_who_wait_are_served_as_there_is_room_for_them() {
    const LIMIT: usize = 20;
    const WAITING: usize = 50;
    for handoff in HANDOFFS {
        for descriptors in [None, Some(64)] {
            namespaces!(clients, targets);
            let stage = Stage::limited(clients, &targets, handoff, descriptors);
            let address: SocketAddr = stage.forwarder.address();
            let all: Vec<_> =
                stage.clients.enter(|| (0..LIMIT + WAITING).map(|_| connect(address)).collect());
            // Each closes when its server has, which makes room for another.
            let read = |mut client: TcpStream| {
                let mut message = Vec::new();
                client.read_to_end(&mut message).map(|_| message)
            };
            let all: Vec<_> =
                all.into_iter().map(|client| thread::spawn(move || read(client))).collect();
            let mut held: VecDeque<_> = VecDeque::new();
            while is_next(&stage.server, 1000) {
                held.push_back(accept(&stage.server));
            }
            let limit = held.len();
            assert!((1..=LIMIT).contains(&limit), "{limit} at a time");
            stage.signal(To::Listener);
            // Long enough to have obeyed, as a rule.
            thread::sleep(Duration::from_millis(300));
            for _ in 0..LIMIT + WAITING {
                assert!(held.len() <= limit, "{} at a time, not {limit}", held.len());
                if held.is_empty() {
                    held.push_back(accept(&stage.server));
                }
                let mut server = held.pop_front().unwrap();
                server.write_all(b"hello").unwrap();
                drop(server);
                while is_next(&stage.server, 0) {
                    held.push_back(accept(&stage.server));
                }
            }
            for client in all {
                let message = client.join().unwrap().unwrap();
                assert_eq!(message, b"hello", "--handoff {handoff}, {descriptors:?}");
            }
            let exit = stage.forwarder.finish();
            exit.assert_clean();
            let summary = exit.summary();
            assert_eq!(summary["completed"], LIMIT + WAITING, "--handoff {handoff}: {exit:?}");
        }
    }
}

#[test]
fn the_connector_drains_without_its_listener() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let stage = Stage::new(clients, &targets, handoff, LONG);
        let mut connection = stage.connection();
        let connector = stage.forwarder.connector();
        stage.forwarder.listener.signal(Signal::SIGKILL);
        stage.wait_until_closed();
        ping(&mut connection);
        assert!(connector.is_alive(), "--handoff {handoff}");
        drop(connection);
        // That the connector is gone is what `finish` checks.
        let exit = stage.forwarder.finish();
        assert_eq!(exit.stderr, "Error: the listener process died\n", "--handoff {handoff}");
        assert_eq!(exit.summary()["completed"], 1, "--handoff {handoff}: {exit:?}");
    }
}

/// What is left of the time is what is left of it.
#[test]
fn a_listener_that_is_killed_while_it_drains_does_not_begin_the_time_anew() {
    const DRAIN: Duration = Duration::from_secs(2);
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let stage = Stage::new(clients, &targets, handoff, "2");
        let (mut client, _server) = stage.connection();
        let began = Instant::now();
        stage.signal(To::Listener);
        stage.wait_until_closed();
        thread::sleep(DRAIN * 3 / 4);
        stage.forwarder.listener.signal(Signal::SIGKILL);
        assert_reset(&mut client);
        let taken = began.elapsed();
        assert!(taken < DRAIN * 3 / 2, "--handoff {handoff}: {taken:?}");
        stage.forwarder.finish();
    }
}
