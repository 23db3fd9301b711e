//! Failures that a system short of something causes: in accept, and in handing over.

use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;

use crate::support::{Launch, Process, TempDir, eventually, namespaces, skip};
use crate::{answer, assert_answered, clients_of, cpu_ticks, launch, server};

/// A filter answers each accept, which shows what the program does however long it lasts.
#[test]
fn an_accept_that_fails_for_want_of_something_is_tried_again_at_leisure() {
    const SECONDS: u64 = 2;
    namespaces!(clients, targets);
    let server = server(&targets);
    let errnos = [Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM];
    // Where accept is a call of its own: in a worker on epoll, and in the listener.
    let ways = [("socket", "epoll"), ("connections", "auto")];
    let cases: Vec<_> = errnos.into_iter().flat_map(|e| ways.map(|way| (e, way))).collect();
    let running: Vec<_> = cases
        .iter()
        .map(|&(errno, (handoff, engine))| {
            let launch = launch(&clients, &targets, &server, handoff).engine(engine);
            launch.answering(libc::SYS_accept4, errno).start()
        })
        .collect();
    let waiting: Vec<_> =
        running.iter().map(|forwarder| clients_of(&clients, forwarder.address(), 3)).collect();
    let before: u64 = running.iter().map(cpu_ticks).sum();
    std::thread::sleep(Duration::from_secs(SECONDS));
    let taken = running.iter().map(cpu_ticks).sum::<u64>() - before;
    assert!(taken < 5 * SECONDS * cases.len() as u64, "{taken} ticks in {SECONDS} s");
    for ((errno, way), forwarder) in cases.into_iter().zip(running) {
        // Written by a thread of its own.
        let text = format!("cannot accept: {errno:?}: ");
        eventually("it says so", || forwarder.stderr().contains(&text).then_some(()));
        assert!(forwarder.processes().iter().all(Process::is_alive), "{errno:?}, {way:?}");
        let exit = forwarder.stop();
        assert_eq!(exit.code(), Some(0), "{way:?}: {exit:?}");
        let lines = exit.stderr.matches(&text).count();
        assert_eq!(lines, 3, "{way:?}: {exit:?}");
        let left_out = exit.stderr.lines().last().unwrap_or_default();
        assert!(
            left_out.contains("cannot accept: ") && left_out.ends_with(" more times"),
            "{exit:?}"
        );
    }
    drop(waiting);
}

/// The kernel lets a user have as many sockets under way as one process may have descriptors
/// (ETOOMANYREFS): several programs of one user, with stopped connectors.
#[test]
fn clients_who_cannot_be_sent_to_a_worker_now_are_sent_later() {
    const NOBODY: u32 = 65533;
    const DESCRIPTORS: u64 = 64;
    const PROGRAMS: usize = 8;
    const CLIENTS: usize = 12;
    let uids = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    if uids.split_whitespace().nth(2) == Some("1") {
        skip!("there is no other user in this user namespace");
    }
    namespaces!(both);
    let directory = TempDir::new();
    let file: PathBuf = directory.path().join("nsplice");
    let copied =
        std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_nsplice")).arg(&file).status();
    assert!(copied.unwrap().success());
    let server = server(&both);
    let start = || {
        let launch = Launch::nsplice().run_as(NOBODY, file.clone()).descriptors(DESCRIPTORS);
        launch
            .inside(&both)
            .option("--handoff", "connections")
            .option("--workers", "1")
            .listen(([127, 0, 0, 1], 0))
            .connect(server.local_addr().unwrap())
            .start()
    };
    let running: Vec<_> = (0..PROGRAMS).map(|_| start()).collect();
    let sockets =
        || running.iter().map(|forwarder| forwarder.listener.count_fds("socket")).sum::<usize>();
    let before = sockets();
    running.iter().for_each(|forwarder| forwarder.connector().stop());
    let mut all: Vec<_> = running
        .iter()
        .flat_map(|forwarder| clients_of(&both, forwarder.address(), CLIENTS))
        .collect();
    // What is sent is closed here, at once if it can be sent.
    let left = || sockets() - before;
    let mut looks = 0;
    eventually("some cannot be handed over", || {
        looks = if left() > 0 { looks + 1 } else { 0 };
        (looks >= 100).then_some(())
    });
    println!("{} of {} clients cannot be sent now", left(), all.len());
    running.iter().for_each(|forwarder| forwarder.connector().signal(Signal::SIGCONT));
    let held: Vec<_> = (0..PROGRAMS * CLIENTS).map(|_| answer(&server)).collect();
    all.iter_mut().for_each(assert_answered);
    drop((all, held));
    for forwarder in running {
        assert_eq!(forwarder.stop().code(), Some(0));
    }
}
