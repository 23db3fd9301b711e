//! Restart without loss: --takeover.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::exchanges::{Exchange, run_clients, serve};
use support::streams::{accept, connect, read_to_end};
use support::{Forwarder, Launch, Netns, TempDir, eventually, namespaces};

const HANDOFFS: [&str; 2] = ["socket", "connections"];

/// Where the processes of a test follow one another.
struct Line {
    directory: TempDir,
    clients: Netns,
    targets: Netns,
    server: TcpListener,
}

impl Line {
    fn new(clients: Netns, targets: Netns) -> Self {
        let server = targets.listen("127.0.0.1:0");
        Self { directory: TempDir::new(), clients, targets, server }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("takeover")
    }

    /// One of the processes. The first may listen at any port.
    fn launch(&self, address: SocketAddr, handoff: &str) -> Launch {
        Launch::nsplice()
            .listen_netns(&self.clients)
            .connect_netns(&self.targets)
            .listen(address)
            .connect(self.server.local_addr().unwrap())
            .option("--handoff", handoff)
            .option("--takeover", self.path())
    }

    /// A connection through whoever takes it.
    fn connection(&self, address: SocketAddr) -> (TcpStream, TcpStream) {
        let client = self.clients.enter(|| connect(address));
        (client, accept(&self.server))
    }

    /// Only the socket at the path, or nothing, is left in the directory.
    #[track_caller]
    fn assert_files(&self, wanted: &[&str]) {
        let names = std::fs::read_dir(self.directory.path()).unwrap();
        let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, wanted);
    }
}

fn any() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

#[track_caller]
fn assert_works((client, server): &mut (TcpStream, TcpStream)) {
    let mut message = *b"ping";
    client.write_all(&message).unwrap();
    server.read_exact(&mut message).unwrap();
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut message).unwrap();
    assert_eq!(&message, b"pong");
}

/// Short connections, many at a time, one batch after the other until `stop`; returns how many.
fn storm(line: &Line, address: SocketAddr, stop: &AtomicBool, done: &AtomicUsize) {
    const BATCH: u64 = 400;
    let exchanges: Vec<_> =
        (0..BATCH).map(|seed| Exchange { seed, up: 64, down: 64 + seed }).collect();
    while !stop.load(Ordering::Relaxed) {
        std::thread::scope(|scope| {
            scope.spawn(|| serve(&line.server, exchanges.len()));
            line.clients.enter(|| run_clients(address, &exchanges, 32));
        });
        done.fetch_add(exchanges.len(), Ordering::Relaxed);
    }
}

/// Connections a second for which it has to be seen: five times as many come on two idle cores.
const STORM_PER_SECOND: f64 = 2_000.0;

/// Every exchange checks that each byte arrives, in both directions, and each end; a client that
/// is refused or reset is a panic.
#[test]
fn nobody_is_refused_or_reset_in_a_storm_of_connections() {
    namespaces!(_clients);
    for handoffs in
        [["socket"; 4], ["connections"; 4], ["socket", "connections", "socket", "socket"]]
    {
        // On a machine busy with other programs it may be less of one.
        let is_storm = (0..3).any(|_| take_over_in_a_storm(handoffs) >= STORM_PER_SECOND);
        assert!(is_storm, "{handoffs:?}: never {STORM_PER_SECOND} connections a second");
    }
}

/// Returns the connections a second.
fn take_over_in_a_storm(handoffs: [&str; 4]) -> f64 {
    let [clients, targets] = [Netns::new(), Netns::new()].map(Result::unwrap);
    let line = Line::new(clients, targets);
    let mut running = line.launch(any(), handoffs[0]).start();
    let address = running.address();
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let started = Instant::now();
    let mut exits = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| storm(&line, address, &stop, &done));
        for handoff in &handoffs[1..] {
            let before = done.load(Ordering::Relaxed);
            eventually("the storm goes on", || {
                (done.load(Ordering::Relaxed) > before).then_some(())
            });
            let successor = line.launch(address, handoff).start();
            exits.push(std::mem::replace(&mut running, successor).finish());
        }
        let before = done.load(Ordering::Relaxed);
        eventually("the storm goes on", || (done.load(Ordering::Relaxed) > before).then_some(()));
        stop.store(true, Ordering::Relaxed);
    });
    let rate = done.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64();
    println!("{handoffs:?}: {rate:.0} connections a second");
    exits.push(running.stop());
    let mut connections = 0;
    for exit in &exits {
        exit.assert_clean();
        let summary = exit.summary();
        assert_eq!(summary["completed"], summary["connections"], "{summary}");
        assert!(summary["connections"].as_u64() > Some(0), "it had no part: {summary}");
        connections += summary["connections"].as_u64().unwrap();
    }
    assert_eq!(connections, done.load(Ordering::Relaxed) as u64, "{handoffs:?}");
    line.assert_files(&[]);
    rate
}

/// One client at a time: if the old process were woken for it and then accepted no more, there would
/// be no other client to wake the new one.
#[test]
fn a_client_who_comes_at_the_very_moment_is_served_without_another_one() {
    const TAKEOVERS: usize = 100;
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let line = Line::new(clients, targets);
        let mut running = line.launch(any(), handoff).option("--workers", "2").start();
        let address = running.address();
        let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
        let longest = std::thread::scope(|scope| {
            let visitor = scope.spawn(|| {
                let mut longest = Duration::ZERO;
                while !stop.load(Ordering::Relaxed) {
                    let came = Instant::now();
                    assert_works(&mut line.connection(address));
                    longest = longest.max(came.elapsed());
                    done.fetch_add(1, Ordering::Relaxed);
                }
                longest
            });
            for _ in 0..TAKEOVERS {
                let successor = line.launch(address, handoff).option("--workers", "2").start();
                // The next one would find and serve who was left.
                let before = done.load(Ordering::Relaxed);
                eventually("one more is served", || {
                    (done.load(Ordering::Relaxed) > before + 1).then_some(())
                });
                std::mem::replace(&mut running, successor).finish().assert_clean();
            }
            stop.store(true, Ordering::Relaxed);
            visitor.join().unwrap()
        });
        println!("--handoff {handoff}: {} clients, the longest {longest:?}", done.into_inner());
        running.stop().assert_clean();
    }
}

#[test]
fn a_connection_of_the_old_process_goes_on_until_it_ends_by_itself() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let line = Line::new(clients, targets);
        let old = line.launch(any(), handoff).start();
        let mut lasting = line.connection(old.address());
        assert_works(&mut lasting);
        // Any port will do: what counts is whose socket it is.
        let new = line.launch(any(), handoff).start();
        assert_eq!(new.address(), old.address());
        assert_works(&mut lasting);
        assert_works(&mut line.connection(new.address()));
        assert!(old.listener.is_alive() && old.connector().is_alive());
        drop(lasting);
        let before = old.finish();
        // The end of the old one is not the end of the path.
        line.assert_files(&["takeover"]);
        assert_works(&mut line.connection(new.address()));
        let after = new.stop();
        line.assert_files(&[]);
        // The second connection may be either's: the old one accepts until it has heard. It ends
        // by itself, so nothing of its was cut; the last one's stop may cut what is just closing.
        before.assert_clean();
        after.assert_clean();
        let [before, after] = [before.summary(), after.summary()];
        assert_eq!(before["completed"], before["connections"], "{before}");
        assert_eq!(after["failed"], 0, "{after}");
        let connections = |summary: &serde_json::Value| summary["connections"].as_u64().unwrap();
        assert_eq!(connections(&before) + connections(&after), 3, "{before} {after}");
    }
}

#[test]
fn a_signal_ends_the_old_process_with_its_connections() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let line = Line::new(clients, targets);
        let old = line.launch(any(), handoff).start();
        let mut lasting = line.connection(old.address());
        assert_works(&mut lasting);
        let new = line.launch(any(), handoff).start();
        old.stop().assert_clean();
        assert_ne!(read_to_end(&mut lasting.0).how, "WouldBlock");
        assert_works(&mut line.connection(new.address()));
        new.stop().assert_clean();
    }
}

#[test]
fn the_engines_take_over_from_each_other() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let line = Line::new(clients, targets);
        let mut running = line.launch(any(), handoff).engine("epoll").start();
        let address = running.address();
        for engine in ["auto", "epoll"] {
            let successor = line.launch(address, handoff).engine(engine).start();
            std::mem::replace(&mut running, successor).finish().assert_clean();
            for _ in 0..10 {
                assert_works(&mut line.connection(address));
            }
        }
        running.stop().assert_clean();
    }
}

#[test]
fn the_port_is_free_after_the_end_whoever_is_killed() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let line = Line::new(clients, targets);
        let forwarder = line.launch(any(), handoff).start();
        let port = forwarder.address().port();
        let path = line.path();
        let mode = std::fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "another user can connect to it");
        forwarder.connector().signal(Signal::SIGKILL);
        assert_eq!(forwarder.finish().code(), Some(7));
        eventually("the port is free", || (!line.clients.listens(port)).then_some(()));
        line.assert_files(&[]);
        // One that is killed leaves its file, which is in nobody's way.
        let forwarder = line.launch(any(), handoff).start();
        forwarder.listener.signal(Signal::SIGKILL);
        assert_eq!(forwarder.finish().code(), None);
        line.assert_files(&["takeover"]);
        assert!(std::fs::symlink_metadata(&path).unwrap().file_type().is_socket());
        let forwarder = line.launch(any(), handoff).start();
        assert_works(&mut line.connection(forwarder.address()));
        forwarder.stop().assert_clean();
    }
}

/// The start of a process that must not work; the one that runs goes on.
#[track_caller]
fn assert_refused(line: &Line, running: &Forwarder, launch: Launch, text: &str) {
    let exit = launch.run();
    assert_eq!(exit.code(), Some(4), "{exit:?}");
    let wanted = format!("Error: --takeover {}: {text}", line.path().display());
    assert!(exit.stderr.starts_with(&wanted), "{:?} is not {wanted:?}", exit.stderr);
    assert_eq!(exit.stderr.lines().count(), 1, "{exit:?}");
    assert_works(&mut line.connection(running.address()));
    line.assert_files(&["takeover"]);
}

#[test]
fn a_socket_that_is_not_what_was_asked_for_is_refused_and_the_old_process_goes_on() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets, others);
        let mut line = Line::new(clients, targets);
        let running = line.launch(any(), handoff).start();
        let address = running.address();
        let mut other = address;
        other.set_ip([127, 0, 0, 2].into());
        let text = format!("the process there listens at {address}, not at {other}");
        assert_refused(&line, &running, line.launch(other, handoff), &text);
        let clients = std::mem::replace(&mut line.clients, others);
        let elsewhere = line.launch(address, handoff);
        line.clients = clients;
        let text = "the process there listens in another network namespace";
        assert_refused(&line, &running, elsewhere, text);
        // Nobody was told to go.
        let successor = line.launch(address, handoff).start();
        running.finish().assert_clean();
        successor.stop().assert_clean();
    }
}

#[test]
fn what_is_at_the_path_and_is_none_of_ours_stays() {
    namespaces!(clients, targets);
    let line = Line::new(clients, targets);
    std::fs::write(line.path(), "precious").unwrap();
    let exit = line.launch(any(), "socket").run();
    assert_eq!(exit.code(), Some(4), "{exit:?}");
    assert!(exit.stderr.contains("there is a file that is no socket"), "{exit:?}");
    assert_eq!(std::fs::read(line.path()).unwrap(), b"precious");
    std::fs::remove_file(line.path()).unwrap();

    let _other = std::os::unix::net::UnixListener::bind(line.path()).unwrap();
    let exit = line.launch(any(), "socket").run();
    assert_eq!(exit.code(), Some(4), "{exit:?}");
    assert!(exit.stderr.contains("the socket there is another program's"), "{exit:?}");
    line.assert_files(&["takeover"]);
}
