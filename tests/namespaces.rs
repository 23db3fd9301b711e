//! Namespaces whose names come and go: --wait-netns.

#![allow(clippy::unwrap_used)]

mod support;

#[path = "namespaces/names.rs"]
mod names;

use std::io::{Read, Write};
use std::net::TcpListener;

use names::{Names, Sleeper};
use nix::sys::signal::Signal;
use support::streams::{accept, connect};
use support::{Forwarder, Launch, Netns, eventually, namespaces, skip};

/// Asks through the forwarder, as a client in `clients`, what only the server at `listener` knows.
#[track_caller]
fn assert_reaches(forwarder: &Forwarder, clients: &Netns, listener: &TcpListener) {
    let mut client = clients.enter(|| connect(forwarder.address()));
    let mut server = accept(listener);
    let mut message = *b"ping";
    client.write_all(&message).unwrap();
    server.read_exact(&mut message).unwrap();
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut message).unwrap();
    assert_eq!(&message, b"pong");
}

fn launch(listener: &TcpListener) -> Launch {
    Launch::nsplice()
        .listen(([127, 0, 0, 1], 0))
        .connect(listener.local_addr().unwrap())
        .option("--wait-netns", "600")
}

/// It has looked, and waits for events.
fn wait_until_waiting(forwarder: &Forwarder) {
    let is_waiting = || {
        let inotify = |fd: &String| fd.contains("inotify");
        forwarder.listener.fds().iter().any(inotify).then_some(())
    };
    eventually("it waits for the namespace", is_waiting);
    assert_looks_again(forwarder);
}

/// It has looked again since this call, and was not content.
fn assert_looks_again(forwarder: &Forwarder) {
    let before = forwarder.listener.voluntary_switches();
    let has_slept = || (forwarder.listener.voluntary_switches() > before + 1).then_some(());
    eventually("it looks again", has_slept);
    assert!(forwarder.listener.children().is_empty(), "it has not waited: {}", forwarder.stderr());
}

#[test]
fn both_namespaces_are_waited_for_also_in_directories_that_are_not_there_yet() {
    namespaces!(clients, targets);
    let names = Names::new();
    let listener = targets.listen("127.0.0.1:0");
    let starting = launch(&listener)
        .option("-f", names.path("late/clients"))
        .option("-t", names.path("later/still/targets"))
        .begin();
    wait_until_waiting(&starting.forwarder);
    names.link("late/clients", &clients);
    assert_looks_again(&starting.forwarder);
    names.link("later/still/targets", &targets);
    let forwarder = starting.ready();
    assert_reaches(&forwarder, &clients, &listener);
    forwarder.stop().assert_clean();
}

/// As `ip netns add` makes a name: an empty file first, which the namespace is mounted on then.
#[test]
fn a_file_is_not_taken_for_a_namespace_before_one_is_mounted_on_it() {
    namespaces!(clients, targets);
    let names = Names::new();
    let listener = targets.listen("127.0.0.1:0");
    let starting =
        launch(&listener).listen_netns(&clients).option("-t", names.path("targets")).begin();
    wait_until_waiting(&starting.forwarder);
    names.empty_file("targets");
    assert_looks_again(&starting.forwarder);
    if let Err(error) = names.mount("targets", &targets) {
        skip!("nothing can be mounted: {error}");
    }
    let forwarder = starting.ready();
    assert_reaches(&forwarder, &clients, &listener);
    forwarder.stop().assert_clean();
}

#[test]
fn a_process_is_waited_for() {
    namespaces!(clients, targets);
    let listener = targets.listen("127.0.0.1:0");
    let pid = Sleeper::unused_pid();
    let starting =
        launch(&listener).listen_netns(&clients).option("-t", format!("pid:{pid}")).begin();
    wait_until_waiting(&starting.forwarder);
    let _process = match targets.enter(|| Sleeper::with_pid(pid)) {
        Ok(process) => process,
        Err(error) => skip!("no process with a chosen id to be had: {error}"),
    };
    let forwarder = starting.ready();
    assert_reaches(&forwarder, &clients, &listener);
    forwarder.stop().assert_clean();
}

#[test]
fn a_signal_ends_the_wait_with_status_0() {
    namespaces!(targets);
    let names = Names::new();
    let listener = targets.listen("127.0.0.1:0");
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let starting = launch(&listener).option("-t", names.path("never")).begin();
        wait_until_waiting(&starting.forwarder);
        starting.forwarder.listener.signal(signal);
        starting.forwarder.finish().assert_clean();
    }
}

#[test]
fn when_the_time_is_over_it_says_what_it_waited_for() {
    let names = Names::new();
    names.empty_file("empty");
    let never = |option: &str, name: &str, seconds: &str| {
        let launch = Launch::nsplice().listen(([127, 0, 0, 1], 0)).connect(([127, 0, 0, 1], 1));
        launch.option("--wait-netns", seconds).option(option, name).run()
    };
    let path = |name: &str| names.path(name).to_str().unwrap().to_owned();
    for (option, name, cause) in [
        ("-t", path("missing"), "ENOENT"),
        ("-f", path("missing/deeper"), "ENOENT"),
        ("-f", path("empty"), "not a network namespace"),
        // Above the largest process id there can be.
        ("-t", "pid:4194305".to_owned(), "no such process"),
    ] {
        let exit = never(option, &name, "0.3");
        assert_eq!(exit.code(), Some(3), "{exit:?}");
        for part in [option, &name, cause, "waited 0.3 s for it (--wait-netns)\n"] {
            assert!(exit.stderr.contains(part), "no {part:?} in {:?}", exit.stderr);
        }
    }
    // What can never become a namespace is not waited for.
    std::os::unix::fs::symlink(names.path("loop"), names.path("loop")).unwrap();
    let exit = never("-t", &path("loop"), "86400");
    assert_eq!(exit.code(), Some(3), "{exit:?}");
    assert!(exit.stderr.contains("ELOOP"), "{exit:?}");
}
