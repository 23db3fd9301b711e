//! What the kernel is asked to do for a message and for a gigabyte: counts, which the machine's
//! noise does not change, unlike times.
//!
//! The load is `nsplice-load`, built with the program.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;
use support::streams::{accept, connect};
use support::{
    Forwarder, Launch, Netns, Process, TempDir, eventually, find_program, namespaces, skip,
};

const LOAD: &str = env!("CARGO_BIN_EXE_nsplice-load");

/// Seconds of load: some ten thousand messages on a slow machine.
const SECONDS: &str = "1";

/// The server of a load, which ends with its standard input.
struct Server {
    child: Child,
    address: std::net::SocketAddr,
}

impl Server {
    fn start(netns: &Netns, mode: &str, size: &str) -> Self {
        let mut child = netns
            .command(LOAD)
            .args(["server", "--listen", "127.0.0.1:0", "--mode", mode, "--size", size])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let told: Value = serde_json::from_str(&line).unwrap();
        Self { child, address: told["listening"].as_str().unwrap().parse().unwrap() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn forwarder(launch: Launch, clients: &Netns, targets: &Netns, server: &Server) -> Forwarder {
    launch
        .listen_netns(clients)
        .connect_netns(targets)
        .listen(([127, 0, 0, 1], 0))
        .connect(server.address)
        .start()
}

/// The client of a load, already told where to connect.
fn client(netns: &Netns, forwarder: &Forwarder, options: &[&str]) -> Command {
    client_for(SECONDS, netns, forwarder, options)
}

fn client_for(seconds: &str, netns: &Netns, forwarder: &Forwarder, options: &[&str]) -> Command {
    let mut command = netns.command(LOAD);
    command.args(["client", "--connect", &forwarder.address().to_string()]);
    command.args(options).args(["--warmup", "0", "--seconds", seconds]);
    command
}

fn report(mut client: Command) -> Value {
    let output = client.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["errors"], 0, "{report}");
    report
}

/// Counts the system calls of the only worker. Nothing else of the program does anything while
/// connections are forwarded.
struct Trace {
    strace: Child,
    directory: TempDir,
}

impl Trace {
    fn start(strace: PathBuf, forwarder: &Forwarder) -> Self {
        let directory = TempDir::new();
        let worker = forwarder.connector().thread("worker-0").expect("there is a worker");
        let strace = Command::new(strace)
            .args(["-c", "-U", "name,calls", "-p", &worker.pid.to_string(), "-o"])
            .arg(directory.path().join("counts"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("strace has the worker", || worker.is_traced().then_some(()));
        Self { strace, directory }
    }

    /// Calls by name.
    fn finish(mut self) -> BTreeMap<String, u64> {
        Process::of(self.strace.id() as i32).unwrap().signal(Signal::SIGINT);
        self.strace.wait().unwrap();
        let table = std::fs::read_to_string(self.directory.path().join("counts")).unwrap();
        let row = |line: &str| {
            let mut words = line.split_whitespace();
            Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
        };
        table.lines().filter_map(row).filter(|(name, _)| name != "total").collect()
    }
}

const SHORT_MESSAGES: &[&str] = &["--work", "rr", "--size", "64", "--connections", "64"];

/// Runs `body`, and what it starts, on one CPU.
fn on_one_cpu(body: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let this_thread = Pid::from_raw(0);
            let allowed = sched_getaffinity(this_thread).unwrap();
            let is_allowed = |&cpu: &usize| allowed.is_set(cpu).unwrap();
            let mut one = CpuSet::new();
            one.set((0..CpuSet::count()).find(is_allowed).unwrap()).unwrap();
            sched_setaffinity(this_thread, &one).unwrap();
            body();
        });
    });
}

/// On one CPU, where the worker finds what client and server have done since. One with a CPU of
/// its own is not behind them, and enters the kernel for a few messages at a time.
#[test]
fn many_busy_connections_share_each_entry_into_the_kernel() {
    on_one_cpu(|| ["auto", "copy"].into_iter().for_each(share_each_entry));
}

fn share_each_entry(transfer: &str) {
    namespaces!(clients, targets);
    let server = Server::start(&targets, "rr", "64");
    let launch = Launch::nsplice().option("--transfer", transfer).option("--workers", "1");
    let forwarder = forwarder(launch, &clients, &targets, &server);
    let report = report(client(&clients, &forwarder, SHORT_MESSAGES));
    forwarder.assert_no_kernel_workers();
    let exit = forwarder.stop();
    exit.assert_clean();
    let summary = exit.summary();
    // A request and a response: each is received once and sent once, and not spliced.
    let messages = 2 * report["total_operations"].as_u64().unwrap();
    let turns = summary["turns"].as_u64().unwrap();
    assert!(messages > 1000, "{report}");
    assert!(turns * 4 < messages, "{turns} turns for {messages} messages");
    assert_eq!(summary["splice_operations"], 0, "{summary}");
}

#[test]
fn nothing_is_left_to_workers_of_the_kernel() {
    let opened = &["--work", "crr", "--size", "64", "--connections", "16"];
    for (transfer, load) in [("auto", &opened[..]), ("splice", opened), ("splice", SHORT_MESSAGES)]
    {
        namespaces!(clients, targets);
        let server = Server::start(&targets, "rr", "64");
        let launch = Launch::nsplice().option("--transfer", transfer);
        let forwarder = forwarder(launch, &clients, &targets, &server);
        report(client(&clients, &forwarder, load));
        forwarder.assert_no_kernel_workers();
        let exit = forwarder.stop();
        exit.assert_clean();
        let summary = exit.summary();
        assert!(summary["connections"].as_u64().unwrap() >= 16, "{summary}");
        assert_eq!(summary["splice_operations"] == 0, transfer == "auto", "{summary}");
    }
}

/// Calls for a connection that is being made, and for a socket that joins a set.
const SETTING_UP: [&str; 5] = ["accept4", "connect", "getsockopt", "setsockopt", "socket"];

/// What the only worker calls while it copies short messages of `connections` connections.
fn calls_of_a_busy_worker(
    strace: PathBuf,
    (engine, connections): (&str, usize),
    clients: &Netns,
    targets: &Netns,
    (call, enough): (&str, u64),
) -> BTreeMap<String, u64> {
    let server = Server::start(targets, "rr", "64");
    let launch = Launch::nsplice().engine(engine).option("--transfer", "copy");
    let forwarder = forwarder(launch.option("--workers", "1"), clients, targets, &server);
    let number = connections.to_string();
    let load = ["--work", "rr", "--size", "64", "--connections", &number];
    let mut busy = client_for("60", clients, &forwarder, &load);
    let mut busy = busy.stdout(Stdio::piped()).spawn();
    let busy = busy.as_mut().unwrap();
    // A socket for the target is made by a call of its own: all of them are there by then.
    eventually("all connections are open", || {
        (forwarder.connector().count_fds("socket") >= 2 * connections).then_some(())
    });
    let mut calls = BTreeMap::new();
    // Mostly the first is long enough for thousands of messages; not on a busy machine.
    for tenths in [3, 10, 30, 100] {
        let trace = Trace::start(strace.clone(), &forwarder);
        std::thread::sleep(std::time::Duration::from_millis(100 * tenths));
        calls = trace.finish();
        let are_settled = SETTING_UP.iter().all(|call| !calls.contains_key(*call));
        if are_settled && calls.get(call).is_some_and(|&count| count >= enough) {
            break;
        }
    }
    let busy_still = busy.try_wait().unwrap().is_none();
    busy.kill().unwrap();
    busy.wait().unwrap();
    assert!(busy_still, "the load ended before it was counted");
    calls
}

#[test]
fn copying_many_messages_takes_nothing_for_each_but_requests_in_the_ring() {
    let Some(strace) = find_program("strace") else {
        skip!("no strace in PATH: scripts/install-test-peers installs it");
    };
    namespaces!(clients, targets);
    let mut calls = BTreeMap::new();
    // Where it finds many messages in a turn: more than it would receive by calls.
    let connections = 256;
    on_one_cpu(|| {
        let worker = ("uring", connections);
        let enough = ("io_uring_enter", 100);
        calls = calls_of_a_busy_worker(strace, worker, &clients, &targets, enough);
    });
    let count = |name: &str| calls.get(name).copied().unwrap_or(0);
    let (entered, waited) = (count("io_uring_enter"), count("epoll_wait"));
    assert!(entered > 10, "{calls:?}");
    // Once for a turn, and there are two entries at least to receive and to send.
    assert!(waited <= 2 * entered, "{calls:?}");
    let paced = count("sched_setscheduler");
    assert!(paced * 64 < entered, "{calls:?}");
    // Once for a socket: that it is plain TCP's, and that it joins the set.
    let joining = ["getsockopt", "epoll_ctl"].map(count);
    let connections = connections as u64;
    assert!(joining[0] <= 4 * connections && joining[1] <= 2 * connections, "{calls:?}");
    // Turns that happen to have few messages; an entry has hundreds mostly.
    let few = ["recvfrom", "sendto"].map(count);
    assert!(few.iter().all(|&count| count < 5 * entered), "{calls:?}");
    let counted = [&joining[..], &few, &[entered, waited, paced]].concat();
    assert_eq!(calls.values().sum::<u64>(), counted.iter().sum::<u64>(), "{calls:?}");
}

#[test]
fn some_messages_take_a_receive_each_and_share_the_entry_that_sends_them() {
    let Some(strace) = find_program("strace") else {
        skip!("no strace in PATH: scripts/install-test-peers installs it");
    };
    namespaces!(clients, targets);
    let mut calls = BTreeMap::new();
    on_one_cpu(|| {
        let enough = ("recvfrom", 2000);
        calls = calls_of_a_busy_worker(strace, ("uring", 16), &clients, &targets, enough);
    });
    let count = |name: &str| calls.get(name).copied().unwrap_or(0);
    let received = count("recvfrom");
    assert!(received > 100, "{calls:?}");
    for shared in ["io_uring_enter", "epoll_wait", "sendto"] {
        assert!(count(shared) * 4 < received, "{shared}: {calls:?}");
    }
}

/// The most sockets that were in the workers' sets while a load ran. Afterwards there is none.
fn in_sets_during(load: &[&str]) -> Option<usize> {
    let (clients, targets) = (Netns::new().ok()?, Netns::new().ok()?);
    let server = Server::start(&targets, "rr", "64");
    let launch = Launch::nsplice().engine("uring").option("--workers", "1");
    let forwarder = forwarder(launch, &clients, &targets, &server);
    let connector = forwarder.connector();
    // The worker's command channel is not there: that is waited for by itself.
    assert_eq!(connector.in_sets().len(), 0);
    let mut client = client(&clients, &forwarder, load).stdout(Stdio::null()).spawn().unwrap();
    let mut most = 0;
    while client.try_wait().unwrap().is_none() {
        most = most.max(connector.in_sets().len());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    eventually("all connections are closed, and in no set", || {
        let are_closed = connector.count_fds("socket") < 8;
        (are_closed && connector.in_sets().is_empty()).then_some(())
    });
    forwarder.stop().assert_clean();
    Some(most)
}

#[test]
fn sockets_join_the_set_only_for_several_short_messages() {
    let busy = SHORT_MESSAGES;
    let single = ["--work", "rr", "--size", "64", "--connections", "1"];
    let short = ["--work", "crr", "--size", "64", "--connections", "64"];
    for (load, least, most) in [(busy, 64, 2 * 64), (&single[..], 2, 2), (&short[..], 0, 0)] {
        let Some(in_sets) = in_sets_during(load) else {
            skip!("no network namespace to be had");
        };
        assert!((least..=most).contains(&in_sets), "{load:?}: {in_sets} in the set");
    }
}

#[test]
fn copying_with_epoll_is_a_receive_and_a_send_for_each_message_and_few_waits() {
    let Some(strace) = find_program("strace") else {
        skip!("no strace in PATH: scripts/install-test-peers installs it");
    };
    namespaces!(clients, targets);
    // What one turn can receive, so that the counts may begin or end between that and sending it.
    let turn = 2 * 64;
    let enough = ("recvfrom", 10 * turn);
    let calls = calls_of_a_busy_worker(strace, ("epoll", 64), &clients, &targets, enough);
    let count = |name: &str| calls.get(name).copied().unwrap_or(0);
    let messages = count("recvfrom");
    assert!(messages > 2 * turn, "{calls:?}");
    assert!(count("sendto").abs_diff(messages) <= turn, "{calls:?}");
    assert!(count("epoll_wait") * 4 < messages, "{calls:?}");
    // Sockets stay in their set; one whose connection has just been made joins it.
    assert!(count("epoll_ctl") <= turn, "{calls:?}");
    let counted = ["recvfrom", "sendto", "epoll_wait", "epoll_ctl", "sched_setscheduler"];
    assert_eq!(calls.values().sum::<u64>(), counted.map(count).iter().sum::<u64>(), "{calls:?}");
}

#[test]
fn a_turn_is_one_entry_into_the_kernel() {
    let Some(strace) = find_program("strace") else {
        skip!("no strace in PATH: scripts/install-test-peers installs it");
    };
    namespaces!(clients, targets);
    let server = Server::start(&targets, "rr", "64");
    let launch = Launch::nsplice().engine("uring").option("--workers", "1");
    let forwarder = forwarder(launch, &clients, &targets, &server);
    let trace = Trace::start(strace, &forwarder);
    let report = report(client(&clients, &forwarder, SHORT_MESSAGES));
    let calls = trace.finish();
    let exit = forwarder.stop();
    let summary = exit.summary();
    let messages = 2 * report["total_operations"].as_u64().unwrap();
    let (entered, turns) = (calls["io_uring_enter"], summary["turns"].as_u64().unwrap());
    assert!(messages > 1000, "{report}");
    assert!(
        entered <= turns && entered * 4 < messages,
        "{calls:?}, {messages} messages: {summary}"
    );
}

/// What the only worker calls for each message of one client, by name.
fn calls_per_message(
    strace: PathBuf,
    clients: &Netns,
    targets: &Netns,
    work: &str,
    options: &[(&str, &str)],
) -> BTreeMap<String, f64> {
    let server = Server::start(targets, "rr", "64");
    let with = |launch: Launch, &(name, value): &(&str, &str)| launch.option(name, value);
    let launch = options.iter().fold(Launch::nsplice().option("--workers", "1"), with);
    let forwarder = forwarder(launch, clients, targets, &server);
    let trace = Trace::start(strace, &forwarder);
    let load = ["--work", work, "--size", "64", "--connections", "1"];
    let report = report(client(clients, &forwarder, &load));
    let calls = trace.finish();
    forwarder.stop().assert_clean();
    let messages = 2.0 * report["total_operations"].as_f64().unwrap();
    assert!(messages > 200.0, "{report}");
    calls.into_iter().map(|(name, count)| (name, count as f64 / messages)).collect()
}

#[test]
fn a_message_that_is_alone_takes_three_calls() {
    let Some(strace) = find_program("strace") else {
        skip!("no strace in PATH: scripts/install-test-peers installs it");
    };
    namespaces!(clients, targets);
    let engine = [("--engine", "uring")];
    let calls = calls_per_message(strace, &clients, &targets, "rr", &engine);
    let count = |name: &str| calls.get(name).copied().unwrap_or(0.0);
    // The first messages on each side, the connection itself, and a wait for the ring's sake.
    for name in ["recvfrom", "sendto", "epoll_wait"] {
        assert!((0.9..1.1).contains(&count(name)), "{calls:?}");
    }
    let others = calls.values().sum::<f64>() - 3.0;
    assert!(others < 0.3, "{calls:?}");
}

#[test]
fn a_connection_with_one_exchange_receives_and_sends_by_calls() {
    let Some(strace) = find_program("strace") else {
        skip!("no strace in PATH: scripts/install-test-peers installs it");
    };
    namespaces!(clients, targets);
    let engine = [("--engine", "uring")];
    let calls = calls_per_message(strace, &clients, &targets, "crr", &engine);
    let count = |name: &str| calls.get(name).copied().unwrap_or(0.0);
    // Each side's end is received, too.
    assert!((1.8..2.2).contains(&count("recvfrom")), "{calls:?}");
    assert!((0.9..1.1).contains(&count("sendto")), "{calls:?}");
    assert!(count("epoll_ctl") < 0.1, "it joins no set: {calls:?}");
}

#[test]
fn limits_of_time_cost_nothing_for_a_message() {
    /// For a connection, and for a tick of the clock, which is a second here: not for a message.
    const FEW: f64 = 0.05;
    let Some(strace) = find_program("strace") else {
        skip!("no strace in PATH: scripts/install-test-peers installs it");
    };
    namespaces!(clients, targets);
    let limits = [("--idle-timeout", "8"), ("--user-timeout", "8"), ("--half-close-timeout", "8")];
    let calls =
        |options: &[_]| calls_per_message(strace.clone(), &clients, &targets, "rr", options);
    let (without, with) = (calls(&[]), calls(&limits));
    println!("{without:.3?}\n{with:.3?}");
    for name in without.keys().chain(with.keys()) {
        let count = |calls: &BTreeMap<_, _>| calls.get(name).copied().unwrap_or(0.0);
        let more = count(&with) - count(&without);
        assert!(more < FEW, "{name}: {more:.3} more for a message\n{without:.3?}\n{with:.3?}");
    }
}

/// 50 kB a call, each byte being moved twice. A call takes what has arrived, at most a pipe of
/// 1 MiB: 130 to 800 kB where this was written.
const SPLICES_PER_GB_MAX: f64 = 40_000.0;

#[test]
fn a_gigabyte_takes_a_bounded_number_of_splices() {
    for connections in ["1", "8"] {
        namespaces!(clients, targets);
        let server = Server::start(&targets, "discard", "64");
        let forwarder = forwarder(Launch::nsplice(), &clients, &targets, &server);
        let load = ["--work", "bulk", "--connections", connections];
        report(client(&clients, &forwarder, &load));
        forwarder.assert_no_kernel_workers();
        let exit = forwarder.stop();
        let summary = exit.summary();
        let gigabytes = summary["bytes_to_target"].as_f64().unwrap() / 1e9;
        let per_gb = summary["splice_operations"].as_f64().unwrap() / gigabytes;
        assert!(gigabytes > 0.1, "{summary}");
        assert!(per_gb < SPLICES_PER_GB_MAX, "{per_gb} a GB: {summary}");
        // Splices are done at once; what waits in the ring is readiness.
        let copied = summary["copy_operations"].as_u64().unwrap();
        assert!(copied < 1000, "{summary}");
    }
}

#[test]
fn a_worker_with_many_messages_a_turn_does_not_interrupt_others() {
    namespaces!(clients, targets);
    let server = Server::start(&targets, "rr", "64");
    let forwarder =
        forwarder(Launch::nsplice().option("--workers", "1"), &clients, &targets, &server);
    let worker = forwarder.connector().thread("worker-0").expect("there is a worker");
    let load = ["--work", "rr", "--size", "64", "--connections", "1"];
    report(client(&clients, &forwarder, &load));
    assert_eq!(worker.scheduling_policy(), nix::libc::SCHED_OTHER);
    let mut busy = client(&clients, &forwarder, SHORT_MESSAGES).stdout(Stdio::null()).spawn();
    let busy = busy.as_mut().unwrap();
    eventually("the worker is patient", || {
        (worker.scheduling_policy() == nix::libc::SCHED_BATCH).then_some(())
    });
    busy.kill().unwrap();
    busy.wait().unwrap();
}

#[test]
fn a_worker_leaves_its_cpu_only_while_it_moves_bulk() {
    let all = Process::of(std::process::id() as i32).unwrap().cpus();
    let [first, second, ..] = all[..] else { skip!("one CPU") };
    namespaces!(clients, targets);
    let server = Server::start(&targets, "echo", "64");
    let cpus = format!("{first},{second}");
    for (options, bulk, messages) in [
        (vec!["--cpus", &cpus[..]], vec![first, second], vec![first]),
        (vec!["--cpus", &cpus[..], "--workers", "1"], vec![first, second], vec![first]),
        (vec!["--cpus", &second.to_string()[..]], vec![second], vec![second]),
        (vec!["--cpus", &cpus[..], "--transfer", "copy"], vec![first], vec![first]),
        (vec!["--no-pin"], all.clone(), all.clone()),
    ] {
        let launch = options.into_iter().fold(Launch::nsplice(), Launch::flag);
        let forwarder = forwarder(launch, &clients, &targets, &server);
        let worker = forwarder.connector().thread("worker-0").expect("there is a worker");
        // Each long enough for the worker to have made up its mind: then it is patient, too.
        for (size, cpus) in [("1048576", bulk), ("64", messages)] {
            let load = ["--work", "rr", "--size", size, "--connections", "32"];
            // Several: while other tests keep its CPU busy its sibling may get all the clients.
            eventually("it is where it should be", || {
                let mut busy = client_for("3", &clients, &forwarder, &load);
                let mut busy = busy.stdout(Stdio::null()).spawn().unwrap();
                let mut is_there = false;
                while !is_there && busy.try_wait().unwrap().is_none() {
                    let is_patient = worker.scheduling_policy() == nix::libc::SCHED_BATCH;
                    is_there = is_patient && worker.cpus() == cpus;
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                let _ = busy.kill();
                busy.wait().unwrap();
                is_there.then_some(())
            });
        }
        forwarder.stop().assert_clean();
    }
}

#[test]
fn an_idle_connection_takes_two_descriptors() {
    const CONNECTIONS: usize = 50;
    for handoff in ["socket", "connections"] {
        namespaces!(clients, targets);
        let target = targets.listen("127.0.0.1:0");
        let forwarder = Launch::nsplice()
            .option("--handoff", handoff)
            .listen_netns(&clients)
            .connect_netns(&targets)
            .listen(([127, 0, 0, 1], 0))
            .connect(target.local_addr().unwrap())
            .start();
        let fds = || {
            let fds = forwarder.processes().iter().flat_map(Process::fds).collect::<Vec<_>>();
            let sockets = fds.iter().filter(|fd| fd.starts_with("socket:")).count();
            (sockets, fds.len() - sockets)
        };
        let (sockets, others) = fds();
        let pair = || {
            let client = clients.enter(|| connect(forwarder.address()));
            let server = accept(&target);
            exchange(&client, &server);
            (client, server)
        };
        let connections: Vec<_> = (0..CONNECTIONS).map(|_| pair()).collect();
        // The listener closes its copy of a connection some time after it has handed that over,
        // and what it tells its address by after it has told it.
        eventually("two sockets for each connection, and no more of anything else", || {
            let (now, others_now) = fds();
            (now == sockets + 2 * CONNECTIONS && others_now <= others).then_some(())
        });
        drop(connections);
    }
}

fn exchange(mut client: &TcpStream, mut server: &TcpStream) {
    client.write_all(b"ping").unwrap();
    server.read_exact(&mut [0; 4]).unwrap();
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut [0; 4]).unwrap();
}

/// Times the only worker has gone to sleep.
fn sleeps(forwarder: &Forwarder) -> u64 {
    forwarder.connector().thread("worker-0").expect("there is a worker").voluntary_switches()
}

/// Times the only worker goes to sleep for each message on one connection.
fn sleeps_per_message(clients: &Netns, targets: &Netns, busy_poll_us: &str) -> f64 {
    let server = Server::start(targets, "rr", "64");
    let launch = Launch::nsplice().option("--busy-poll", busy_poll_us).option("--workers", "1");
    let forwarder = forwarder(launch, clients, targets, &server);
    let before = sleeps(&forwarder);
    let load = ["--work", "rr", "--size", "64", "--connections", "1"];
    let report = report(client(clients, &forwarder, &load));
    let slept = sleeps(&forwarder) - before;
    forwarder.stop().assert_clean();
    slept as f64 / (2.0 * report["total_operations"].as_f64().unwrap())
}

/// On a busy machine a worker often finds the next message before it sleeps, also without polling.
#[test]
fn a_worker_that_polls_does_not_sleep_between_messages() {
    namespaces!(clients, targets);
    let [sleeping, polling] = ["0", "20000"].map(|us| sleeps_per_message(&clients, &targets, us));
    assert!(
        polling * 10.0 < sleeping,
        "{polling} sleeps for a message, {sleeping} without polling"
    );
}
