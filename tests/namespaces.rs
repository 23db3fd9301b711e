//! Namespaces whose names come and go: --wait-netns and --netns-gone.

#![allow(clippy::unwrap_used)]

mod support;

#[path = "namespaces/names.rs"]
mod names;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use names::{Names, Sleeper};
use nix::sys::signal::Signal;
use support::streams::{accept, connect, is_next};
use support::{Forwarder, Launch, Netns, Process, eventually, namespaces, skip};

/// Asks through the forwarder, as a client in `clients`, what only the server at `listener` knows.
#[track_caller]
fn assert_reaches(forwarder: &Forwarder, clients: &Netns, listener: &TcpListener) {
    Lasting::new(forwarder.address(), clients, listener).assert_works();
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

fn wait_until_looked_again(forwarder: &Forwarder) {
    let before = forwarder.listener.voluntary_switches();
    let has_slept = || (forwarder.listener.voluntary_switches() > before + 2).then_some(());
    eventually("it looks again", has_slept);
}

/// It has looked again since this call, and was not content.
fn assert_looks_again(forwarder: &Forwarder) {
    wait_until_looked_again(forwarder);
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

/// Clients in `clients`, a server in `targets`, and a name for each namespace.
struct Named {
    names: Names,
    clients: Netns,
    targets: Netns,
    server: TcpListener,
}

impl Named {
    fn new(clients: Netns, targets: Netns) -> Self {
        let names = Names::new();
        names.link("clients", &clients);
        names.link("targets", &targets);
        let server = targets.listen("127.0.0.1:0");
        Self { names, clients, targets, server }
    }

    fn launch(&self, gone: &str, handoff: &str) -> Launch {
        self.launch_without_option(handoff).option("--netns-gone", gone)
    }

    fn launch_without_option(&self, handoff: &str) -> Launch {
        Launch::nsplice()
            .option("-f", self.names.path("clients"))
            .option("-t", self.names.path("targets"))
            .option("--handoff", handoff)
            .listen(([127, 0, 0, 1], 0))
            .connect(self.server.local_addr().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.names.path(name).to_str().unwrap().to_owned()
    }
}

const HANDOFFS: [&str; 2] = ["socket", "connections"];

/// A connection that stays open while namespaces change.
struct Lasting {
    client: TcpStream,
    server: TcpStream,
}

impl Lasting {
    fn new(address: SocketAddr, clients: &Netns, listener: &TcpListener) -> Self {
        let client = clients.enter(|| connect(address));
        Self { client, server: accept(listener) }
    }

    #[track_caller]
    fn assert_works(&mut self) {
        let mut message = *b"ping";
        self.client.write_all(&message).unwrap();
        self.server.read_exact(&mut message).unwrap();
        self.server.write_all(b"pong").unwrap();
        self.client.read_exact(&mut message).unwrap();
        assert_eq!(&message, b"pong");
    }
}

#[track_caller]
fn wait_for_line(forwarder: &Forwarder, text: &str) {
    eventually(text, || forwarder.stderr().contains(text).then_some(()));
}

#[test]
fn by_default_it_stays_in_the_namespaces_it_was_started_with() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets, others);
        let named = Named::new(clients, targets);
        let forwarder = named.launch_without_option(handoff).start();
        named.names.delete("clients");
        named.names.link("targets", &others);
        assert_reaches(&forwarder, &named.clients, &named.server);
        forwarder.stop().assert_clean();
    }
}

#[test]
fn it_exits_with_status_3_when_a_name_goes_or_is_another_namespaces() {
    for handoff in HANDOFFS {
        for (name, option) in [("clients", "-f"), ("targets", "-t")] {
            for is_deleted in [true, false] {
                namespaces!(clients, targets, others);
                let named = Named::new(clients, targets);
                let forwarder = named.launch("exit", handoff).start();
                assert_reaches(&forwarder, &named.clients, &named.server);
                let why = if is_deleted {
                    named.names.delete(name);
                    "the name was deleted"
                } else {
                    named.names.link(name, &others);
                    "the name has become another namespace's"
                };
                let exit = forwarder.finish();
                assert_eq!(exit.code(), Some(3), "{exit:?}");
                let path = named.path(name);
                let text = format!("Error: {option} {path}: {why} (--netns-gone exit)\n");
                assert_eq!(exit.stderr, text);
                assert_eq!(exit.summary()["connections"], 1);
            }
        }
    }
}

#[test]
fn it_exits_when_the_process_whose_namespace_it_is_ends() {
    namespaces!(clients, targets);
    let listener = targets.listen("127.0.0.1:0");
    let process = match targets.enter(|| Sleeper::with_pid(Sleeper::unused_pid())) {
        Ok(process) => process,
        Err(error) => skip!("no process with a chosen id to be had: {error}"),
    };
    let forwarder = Launch::nsplice()
        .listen_netns(&clients)
        .option("-t", format!("pid:{}", process.pid()))
        .option("--netns-gone", "exit")
        .listen(([127, 0, 0, 1], 0))
        .connect(listener.local_addr().unwrap())
        .start();
    assert_reaches(&forwarder, &clients, &listener);
    drop(process);
    let exit = forwarder.finish();
    assert_eq!(exit.code(), Some(3), "{exit:?}");
    assert!(exit.stderr.contains("pid:"), "{exit:?}");
}

/// No thread of the process is left in the namespace: it would keep that from ending.
#[track_caller]
fn assert_left(process: Process, netns: &Netns) {
    let old = std::fs::read_link(netns.path()).unwrap();
    let threads = format!("/proc/{}/task", process.pid);
    eventually("all threads have left the namespace", || {
        let mut threads = std::fs::read_dir(&threads).unwrap();
        let is_elsewhere = |thread: std::fs::DirEntry| {
            std::fs::read_link(thread.path().join("ns/net")).is_ok_and(|netns| netns != old)
        };
        threads.all(|thread| is_elsewhere(thread.unwrap())).then_some(())
    });
}

#[test]
fn it_listens_in_the_new_namespace_and_live_connections_go_on() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets, others);
        let named = Named::new(clients, targets);
        let forwarder = named.launch("reopen", handoff).start();
        let address = forwarder.address();
        let mut lasting = Lasting::new(address, &named.clients, &named.server);
        lasting.assert_works();
        // Until there is another namespace, the old one is the only one there is.
        named.names.delete("clients");
        wait_for_line(&forwarder, "the name was deleted; waiting for it");
        assert_reaches(&forwarder, &named.clients, &named.server);
        named.names.link("clients", &others);
        eventually("it listens there", || others.listens(address.port()).then_some(()));
        assert_reaches(&forwarder, &others, &named.server);
        let is_closed = || (!named.clients.listens(address.port())).then_some(());
        eventually("it no longer listens in the old one", is_closed);
        lasting.assert_works();
        drop(lasting);
        assert_left(forwarder.listener, &named.clients);
        let exit = forwarder.stop();
        assert_eq!(exit.code(), Some(0), "{exit:?}");
        assert_eq!(exit.summary()["connections"], 3);
        assert_eq!(exit.stderr.lines().count(), 2, "{exit:?}");
    }
}

#[test]
fn it_connects_from_the_new_namespace_and_live_connections_go_on() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets, others);
        let other_server = others.listen("127.0.0.1:0");
        let address = other_server.local_addr().unwrap();
        let mut named = Named::new(clients, targets);
        named.server = named.targets.listen(address);
        let forwarder = named.launch("reopen", handoff).start();
        let mut lasting = Lasting::new(forwarder.address(), &named.clients, &named.server);
        lasting.assert_works();
        named.names.link("targets", &others);
        wait_for_line(&forwarder, "new connections are in the new namespace now");
        // Every worker is there: whichever accepts.
        for _ in 0..20 {
            assert_reaches(&forwarder, &named.clients, &other_server);
        }
        lasting.assert_works();
        drop(lasting);
        assert_left(forwarder.connector(), &named.targets);
        let exit = forwarder.stop();
        assert_eq!(exit.code(), Some(0), "{exit:?}");
        assert_eq!(exit.summary()["connections"], 21);
        assert_eq!(exit.stderr.lines().count(), 1, "{exit:?}");
    }
}

/// As `ip netns` does it: unmounted and deleted, then a file, then a namespace mounted on it.
#[test]
fn names_that_are_mounts_are_followed_too() {
    namespaces!(clients, targets, others);
    let named = Named::new(clients, targets);
    let mount = |netns: &Netns| {
        named.names.delete("clients");
        named.names.empty_file("clients");
        named.names.mount("clients", netns)
    };
    if let Err(error) = mount(&named.clients) {
        skip!("nothing can be mounted: {error}");
    }
    let forwarder = named.launch("reopen", "socket").start();
    assert_reaches(&forwarder, &named.clients, &named.server);
    mount(&others).unwrap();
    let port = forwarder.address().port();
    eventually("it listens there", || others.listens(port).then_some(()));
    assert_reaches(&forwarder, &others, &named.server);
    assert_eq!(forwarder.stop().code(), Some(0));
}

#[test]
fn what_keeps_it_from_the_new_namespace_is_said_once_and_tried_again() {
    namespaces!(clients, targets, others);
    let named = Named::new(clients, targets);
    let forwarder = named.launch("reopen", "socket").start();
    let address = forwarder.address();
    let in_the_way = others.listen(address);
    named.names.link("clients", &others);
    let text = format!("-l {address}: cannot listen: EADDRINUSE");
    wait_for_line(&forwarder, &text);
    wait_until_looked_again(&forwarder);
    assert_eq!(forwarder.stderr().matches(&text).count(), 1, "{}", forwarder.stderr());
    assert_reaches(&forwarder, &named.clients, &named.server);
    drop(in_the_way);
    wait_for_line(&forwarder, "new connections are in the new namespace now");
    assert_reaches(&forwarder, &others, &named.server);
    assert_eq!(forwarder.stop().code(), Some(0));
}

/// Room for the socket that comes from the listener, and for no worker's copy of it.
#[test]
fn a_new_namespaces_socket_waits_for_descriptors() {
    const CLIENTS: usize = 5;
    namespaces!(clients, targets, others);
    let named = Named::new(clients, targets);
    let forwarder = named.launch("reopen", "socket").start();
    let (address, connector) = (forwarder.address(), forwarder.connector());
    let sockets = || connector.count_fds("socket");
    let before = sockets();
    assert_reaches(&forwarder, &named.clients, &named.server);
    eventually("that connection is closed", || (sockets() == before).then_some(()));
    let limit = connector.limit_descriptors(connector.limit_for_more(1));
    named.names.link("clients", &others);
    eventually("it listens there", || others.listens(address.port()).then_some(()));
    eventually("the connector has the socket", || (sockets() > before).then_some(()));
    let waiting: Vec<_> = others.enter(|| (0..CLIENTS).map(|_| connect(address)).collect());
    assert!(!is_next(&named.server, 300), "it accepts there");
    connector.limit_descriptors(limit);
    for client in waiting {
        drop((accept(&named.server), client));
    }
    assert_reaches(&forwarder, &others, &named.server);
    let exit = forwarder.stop();
    assert_eq!(exit.code(), Some(0), "{exit:?}");
}

#[test]
fn with_time_to_drain_in_it_exits_after_the_last_connection() {
    for handoff in HANDOFFS {
        for name in ["clients", "targets"] {
            namespaces!(clients, targets);
            let named = Named::new(clients, targets);
            let launch = named.launch("exit", handoff).option("--drain-timeout", "600");
            let forwarder = launch.start();
            let mut lasting = Lasting::new(forwarder.address(), &named.clients, &named.server);
            named.names.delete(name);
            let port = forwarder.address().port();
            let is_closed = || (!named.clients.listens(port)).then_some(());
            eventually("it no longer listens", is_closed);
            lasting.assert_works();
            drop(lasting);
            let exit = forwarder.finish();
            assert_eq!(exit.code(), Some(3), "{exit:?}");
            assert_eq!(exit.summary()["completed"], 1, "{exit:?}");
        }
    }
}

#[test]
fn clients_who_wait_where_it_no_longer_listens_are_served() {
    const CLIENTS: usize = 50;
    for handoff in HANDOFFS {
        namespaces!(clients, targets, others);
        let named = Named::new(clients, targets);
        let forwarder = named.launch("reopen", handoff).start();
        let address = forwarder.address();
        let processes = forwarder.processes();
        processes.iter().for_each(Process::stop);
        let waiting: Vec<_> =
            named.clients.enter(|| (0..CLIENTS).map(|_| connect(address)).collect());
        named.names.link("clients", &others);
        processes.iter().for_each(|process| process.signal(Signal::SIGCONT));
        for client in waiting {
            let server = accept(&named.server);
            drop((client, server));
        }
        eventually("it listens there", || others.listens(address.port()).then_some(()));
        assert_reaches(&forwarder, &others, &named.server);
        let exit = forwarder.stop();
        assert_eq!(exit.summary()["completed"], CLIENTS + 1, "{exit:?}");
    }
}
