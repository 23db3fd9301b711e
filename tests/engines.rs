//! Which engine the program comes to, and what it says about that, where the kernel answers
//! io_uring's system calls as containers, old kernels and a machine without memory do.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};

use nix::errno::Errno;
use support::streams::{accept, connect};
use support::{Exit, Launch, Netns, namespaces, skip};

const SETUP: libc::c_long = libc::SYS_io_uring_setup;

fn launch(clients: &Netns, targets: &Netns) -> Launch {
    let launch = Launch::nsplice().listen_netns(clients).connect_netns(targets);
    launch.listen(([127, 0, 0, 1], 0))
}

/// Forwards a message there and back, then ends the program. Returns the engines' descriptors
/// while it ran, too.
fn serve(launch: impl FnOnce(Launch) -> Launch) -> Option<(Exit, Vec<String>)> {
    let (clients, targets) = (Netns::new().ok()?, Netns::new().ok()?);
    let listener = targets.listen("127.0.0.1:0");
    let launch = launch(self::launch(&clients, &targets).connect(listener.local_addr().unwrap()));
    let forwarder = launch.option("--workers", "2").start();
    let mut client = clients.enter(|| connect(forwarder.address()));
    let mut server = accept(&listener);
    let mut message = *b"ping";
    client.write_all(&message).unwrap();
    server.read_exact(&mut message).unwrap();
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut message).unwrap();
    assert_eq!(&message, b"pong");
    let mut engines = forwarder.connector().fds();
    engines.retain(|fd| fd.ends_with("[io_uring]") || fd.ends_with("[eventpoll]"));
    Some((forwarder.stop(), engines))
}

/// Both sets of each of two workers.
const TWO_ON_EPOLL: [&str; 4] = ["anon_inode:[eventpoll]"; 4];

#[test]
fn auto_takes_epoll_where_io_uring_is_not_there_or_not_allowed() {
    for (number, errno, cause) in [
        (SETUP, Errno::EPERM, "a seccomp filter forbids it"),
        (SETUP, Errno::EACCES, "a seccomp filter forbids it"),
        (SETUP, Errno::ENOSYS, "a seccomp filter hides it"),
        (SETUP, Errno::EINVAL, "older than 6.1"),
        (libc::SYS_io_uring_register, Errno::EPERM, "a seccomp filter forbids it"),
        (libc::SYS_io_uring_enter, Errno::EPERM, "a seccomp filter forbids it"),
        (libc::SYS_io_uring_enter, Errno::ENOSYS, "a seccomp filter hides it"),
    ] {
        let case = format!("{errno:?} to system call {number}");
        let Some((exit, engines)) = serve(|launch| launch.answering(number, errno)) else {
            skip!("no network namespace to be had");
        };
        assert_eq!(exit.code(), Some(0), "{case}: {exit:?}");
        let line = exit.stderr.strip_prefix("io_uring: cannot ").unwrap_or_default();
        assert_eq!(exit.stderr.lines().count(), 1, "{case}: {exit:?}");
        assert!(line.contains(&format!("{errno:?}")), "{case}: {exit:?}");
        assert!(line.contains(cause) && line.ends_with("; using epoll\n"), "{case}: {exit:?}");
        assert_eq!(exit.summary()["engine"], "epoll", "{case}");
        assert_eq!(engines, TWO_ON_EPOLL, "{case}");
    }
}

#[test]
fn auto_does_not_hide_that_there_is_no_memory_or_no_descriptor() {
    namespaces!(clients, targets);
    for errno in [Errno::ENOMEM, Errno::EMFILE, Errno::ENFILE] {
        let launch = launch(&clients, &targets).connect(([127, 0, 0, 1], 1));
        assert_refused(&launch.answering(SETUP, errno).run(), &[&format!("{errno:?}")]);
    }
}

#[test]
fn uring_where_it_is_refused_ends_with_status_5_and_the_cause() {
    namespaces!(clients, targets);
    for (errno, cause) in [
        (Errno::EPERM, "seccomp filter"),
        (Errno::ENOSYS, "seccomp filter"),
        (Errno::EINVAL, "older than 6.1"),
    ] {
        let launch = launch(&clients, &targets).connect(([127, 0, 0, 1], 1));
        let exit = launch.engine("uring").answering(SETUP, errno).run();
        assert_refused(&exit, &[&format!("{errno:?}"), cause]);
    }
}

#[track_caller]
fn assert_refused(exit: &Exit, names: &[&str]) {
    assert_eq!(exit.code(), Some(5), "{exit:?}");
    assert!(exit.stderr.starts_with("Error: io_uring: cannot set up a ring: "), "{exit:?}");
    assert_eq!(exit.stderr.lines().count(), 1, "{exit:?}");
    for name in names {
        assert!(exit.stderr.contains(name), "{name}: {exit:?}");
    }
    assert!(!exit.stderr.contains("epoll"), "{exit:?}");
}

#[test]
fn epoll_asks_nothing_of_io_uring() {
    let epoll = |launch: Launch| launch.engine("epoll").answering(SETUP, Errno::ENOMEM);
    let Some((exit, engines)) = serve(epoll) else { skip!("no network namespace to be had") };
    exit.assert_clean();
    assert_eq!(exit.summary()["engine"], "epoll");
    assert_eq!(engines, TWO_ON_EPOLL);
}

#[test]
fn auto_takes_io_uring_where_it_can_be_had() {
    if let Err(refusal) = nsplice::engine::uring::probe() {
        skip!("{refusal}");
    }
    // Told to choose: a test that tells nothing does as NSPLICE_TEST_ENGINE says.
    let auto = |launch: Launch| launch.engine("auto");
    let Some((exit, engines)) = serve(auto) else { skip!("no network namespace to be had") };
    exit.assert_clean();
    assert_eq!(exit.summary()["engine"], "uring");
    let count = |kind| engines.iter().filter(|fd| **fd == format!("anon_inode:[{kind}]")).count();
    assert_eq!(count("io_uring"), 2, "{engines:?}");
    // Each worker has a set for sockets with short messages.
    assert_eq!(count("eventpoll"), 2, "{engines:?}");
    assert_eq!(engines.len(), 4, "{engines:?}");
}
