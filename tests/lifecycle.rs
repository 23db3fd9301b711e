//! How the two processes begin and end: signals, deaths, and starts that cannot work.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use support::streams::{accept, connect};
use support::{Forwarder, Launch, Netns, Process, TempDir, eventually, namespaces, skip};

/// A forwarder with one connection through it that has just been used in both directions.
struct Running {
    forwarder: Forwarder,
    /// Client and server; they stay open.
    _connection: (TcpStream, TcpStream),
}

fn running(clients: &Netns, targets: &Netns, handoff: &str) -> Running {
    let listener = targets.listen("127.0.0.1:0");
    let forwarder = Launch::nsplice()
        .option("--handoff", handoff)
        .listen_netns(clients)
        .connect_netns(targets)
        .listen(([127, 0, 0, 1], 0))
        .connect(listener.local_addr().unwrap())
        .start();
    let mut client = clients.enter(|| connect(forwarder.address()));
    let mut server = accept(&listener);
    let mut message = *b"ping";
    client.write_all(&message).unwrap();
    server.read_exact(&mut message).unwrap();
    server.write_all(&message).unwrap();
    client.read_exact(&mut message).unwrap();
    Running { forwarder, _connection: (client, server) }
}

#[derive(Clone, Copy, Debug)]
enum To {
    Listener,
    Connector,
    /// As a terminal does it: both get the signal.
    Group,
}

#[test]
fn a_signal_to_either_process_or_to_both_ends_both_with_status_0() {
    for handoff in ["socket", "connections"] {
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            for to in [To::Listener, To::Connector, To::Group] {
                let case = format!("--handoff {handoff}, {signal} to {to:?}");
                namespaces!(clients, targets);
                let running = running(&clients, &targets, handoff);
                let address = running.forwarder.address();
                send(&running.forwarder, signal, to);
                let exit = running.forwarder.finish();
                assert_eq!((exit.code(), exit.stderr.as_str()), (Some(0), ""), "{case}");
                assert_eq!(exit.summary()["connections"], 1, "{case}");
                let bound = clients.enter(|| TcpListener::bind(address));
                assert!(bound.is_ok(), "{case}: the port is not free again: {bound:?}");
            }
        }
    }
}

fn send(forwarder: &Forwarder, signal: Signal, to: To) {
    match to {
        To::Listener => forwarder.listener.signal(signal),
        To::Connector => forwarder.connector().signal(signal),
        To::Group => killpg(Pid::from_raw(forwarder.listener.pid), signal).unwrap(),
    }
}

#[test]
fn a_signal_before_any_connection_ends_both_with_status_0() {
    namespaces!(clients, targets);
    let forwarder = Launch::nsplice()
        .listen_netns(&clients)
        .connect_netns(&targets)
        .listen(([127, 0, 0, 1], 0))
        .connect(([127, 0, 0, 1], 1))
        .start();
    forwarder.stop().assert_clean();
}

#[test]
fn a_killed_connector_ends_the_listener_with_status_7_and_the_cause() {
    for handoff in ["socket", "connections"] {
        namespaces!(clients, targets);
        let running = running(&clients, &targets, handoff);
        let pid = running.forwarder.connector().pid;
        send(&running.forwarder, Signal::SIGKILL, To::Connector);
        let exit = running.forwarder.finish();
        assert_eq!(exit.code(), Some(7), "--handoff {handoff}: {exit:?}");
        assert_one_error(&exit.stderr, &[&pid.to_string(), "SIGKILL"]);
    }
}

#[test]
fn a_killed_listener_ends_the_connector() {
    for handoff in ["socket", "connections"] {
        namespaces!(clients, targets);
        let running = running(&clients, &targets, handoff);
        send(&running.forwarder, Signal::SIGKILL, To::Listener);
        // That the connector is gone is what `finish` checks.
        let exit = running.forwarder.finish();
        assert_eq!(exit.code(), None, "--handoff {handoff}: {exit:?}");
    }
}

/// How long it takes after the kill of one process until the other is gone, and the port is free.
fn times_after_a_kill(handoff: &str, to: To) -> [Duration; 2] {
    let [clients, targets] = [Netns::new(), Netns::new()].map(Result::unwrap);
    let running = running(&clients, &targets, handoff);
    let address = running.forwarder.address();
    let processes = running.forwarder.processes();
    let killed = Instant::now();
    send(&running.forwarder, Signal::SIGKILL, to);
    let gone = thread::scope(|scope| {
        let are_gone = || (!processes.iter().any(Process::is_alive)).then(|| killed.elapsed());
        let gone = scope.spawn(move || eventually("both processes are gone", are_gone));
        let is_free = || TcpListener::bind(address).ok().map(|_| killed.elapsed());
        let free = clients.enter(|| eventually("the port is free", is_free));
        [gone.join().unwrap(), free]
    });
    assert_ne!(running.forwarder.finish().code(), Some(0));
    gone
}

#[test]
fn after_a_kill_the_other_process_is_gone_and_the_port_is_free_within_100_ms() {
    const LIMIT: Duration = Duration::from_millis(100);
    namespaces!(_clients);
    for handoff in ["socket", "connections"] {
        for to in [To::Listener, To::Connector] {
            // On a machine busy with other tests not every time.
            let mut times = [(); 5].map(|()| times_after_a_kill(handoff, to).into_iter().max());
            times.sort();
            println!("--handoff {handoff}, SIGKILL to {to:?}: gone and free after {times:?}");
            assert!(times[2] < Some(LIMIT), "--handoff {handoff}, SIGKILL to {to:?}: {times:?}");
        }
    }
}

/// Exactly one line that begins as promised and names what it must.
#[track_caller]
fn assert_one_error(stderr: &str, must_name: &[&str]) {
    assert!(stderr.starts_with("Error: ") && stderr.ends_with('\n'), "{stderr:?}");
    assert_eq!(stderr.lines().count(), 1, "{stderr:?}");
    for name in must_name {
        assert!(stderr.contains(name), "{stderr:?} does not name {name:?}");
    }
}

/// A start that cannot work.
struct Failure {
    launch: Launch,
    status: i32,
    /// Option, object, cause.
    names: Vec<String>,
}

fn failure(launch: Launch, status: i32, names: &[&str]) -> Failure {
    Failure { launch, status, names: names.iter().map(|&name| name.to_owned()).collect() }
}

#[test]
fn a_start_that_cannot_work_ends_both_processes_with_the_cause() {
    namespaces!(clients, targets);
    let taken = clients.listen("127.0.0.1:0");
    let directory = TempDir::new();
    for failure in failures(&clients, &targets, &taken, &directory) {
        let exit = failure.launch.run();
        let names: Vec<_> = failure.names.iter().map(String::as_str).collect();
        assert_eq!(exit.code(), Some(failure.status), "{names:?}: {exit:?}");
        assert_one_error(&exit.stderr, &names);
    }
}

/// A number that no descriptor of the program has: it inherits none but the standard ones.
const NOT_OPEN: &str = "700";

fn failures(
    clients: &Netns,
    targets: &Netns,
    taken: &TcpListener,
    directory: &TempDir,
) -> Vec<Failure> {
    let target = ([127, 0, 0, 1], 1);
    let any = ([127, 0, 0, 1], 0);
    let taken = taken.local_addr().unwrap();
    let plain = directory.path().join("plain");
    std::fs::write(&plain, "no namespace").unwrap();
    let missing: PathBuf = directory.path().join("missing");
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    // Sockets of the wrong kind. The program gets copies of its own.
    let datagram = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let (connected, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let idle = clients.listen("127.0.0.1:0");

    let base = || Launch::nsplice().connect(target);
    let to_targets = || base().connect_netns(targets);
    let listening = || to_targets().listen_netns(clients).listen(any);
    vec![
        failure(base().listen(any).option("-t", &plain), 3, &["-t", &text(&plain)]),
        failure(to_targets().listen(any).option("-f", &plain), 3, &["-f", &text(&plain)]),
        failure(
            to_targets().listen(any).option("-f", &missing),
            3,
            &["-f", &text(&missing), "ENOENT"],
        ),
        failure(base().listen(any).option("-t", &missing), 3, &["-t", &text(&missing), "ENOENT"]),
        // Above the largest process id there can be.
        failure(base().listen(any).option("-t", "pid:4194305"), 3, &["-t", "pid:4194305"]),
        failure(base().listen(any).fd("-T", &datagram), 3, &["-T"]),
        failure(
            to_targets().listen_netns(clients).listen(taken),
            4,
            &["-l", &taken.to_string(), "EADDRINUSE"],
        ),
        failure(
            to_targets().listen_netns(clients).listen(([192, 0, 2, 1], 80)),
            4,
            &["-l", "192.0.2.1:80", "EADDRNOTAVAIL"],
        ),
        failure(to_targets().option("-L", NOT_OPEN), 4, &["-L", NOT_OPEN, "EBADF"]),
        failure(to_targets().option("-S", NOT_OPEN), 4, &["-S", NOT_OPEN, "EBADF"]),
        failure(
            Launch::nsplice().listen_netns(clients).listen(any).option("-C", NOT_OPEN),
            4,
            &["-C", NOT_OPEN, "EBADF"],
        ),
        failure(to_targets().fd("-L", &datagram), 4, &["-L"]),
        failure(to_targets().fd("-L", &connected), 4, &["-L"]),
        failure(to_targets().fd("-S", &idle), 4, &["-S"]),
        failure(listening().option("--ready-fd", NOT_OPEN), 4, &["--ready-fd", NOT_OPEN, "EBADF"]),
    ]
}

/// Without the privilege to enter a namespace, whichever side's.
#[test]
fn missing_privilege_is_told_with_the_option() {
    let uids = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    if uids.split_whitespace().nth(2) == Some("1") {
        skip!("there is no other user in this user namespace");
    }
    namespaces!(clients, targets);
    // Where the program was built another user may not be allowed to look.
    let directory = TempDir::new();
    let file = directory.path().join("nsplice");
    // By a process of its own: a descriptor open for writing here may be inherited by what other
    // tests start meanwhile, and the copy could not be run (ETXTBSY).
    let program = env!("CARGO_BIN_EXE_nsplice");
    let copied = std::process::Command::new("cp").arg(program).arg(&file).status();
    assert!(copied.unwrap().success());
    let nobody = || {
        let launch = Launch::nsplice().run_as(65534, file.clone());
        launch.listen(([127, 0, 0, 1], 0)).connect(([127, 0, 0, 1], 1))
    };
    for (option, launch) in [
        ("-F", nobody().inside(&targets).listen_netns_fd(&clients)),
        ("-T", nobody().inside(&clients).connect_netns_fd(&targets)),
    ] {
        let exit = launch.run();
        assert_eq!(exit.code(), Some(3), "{option}: {exit:?}");
        assert_one_error(&exit.stderr, &[option, "EPERM"]);
    }
}
