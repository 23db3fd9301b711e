//! A standard error that nobody reads: a pipe that is full. Who writes there waits for ever.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::support::streams::{accept, connect};
use crate::support::{Launch, namespaces};
use crate::{HANDOFFS, answer, assert_answered, clients_of, launch, server};

/// Each process waits for its last lines, and then for its last one.
const ENDS_WITHIN: Duration = Duration::from_secs(6);

/// Both ends; while the first is there, writing to the other does not fail.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    while nix::unistd::write(&write, &[b'x'; 4096]).is_ok() {}
    fcntl(&write, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (read, write)
}

/// Two that stay, one that could not be connected, and many that are over.
#[test]
fn connections_go_on_and_are_cut_when_the_time_to_drain_in_is_over() {
    // More than lines that may wait.
    const SHORT: usize = 1_100;
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let server = server(&targets);
        let (_read, stderr) = full_pipe();
        let launch = launch(&clients, &targets, &server, handoff).stderr(stderr).flag("-v");
        let launch = launch.option("--drain-timeout", "0.3");
        let forwarder = launch.start();
        let address = forwarder.address();
        let mut lasting = clients_of(&clients, address, 2);
        let held = [answer(&server), answer(&server)];
        lasting.iter_mut().for_each(assert_answered);
        for _ in 0..SHORT / 100 {
            let mut short = clients_of(&clients, address, 100);
            (0..100).for_each(|_| drop(answer(&server)));
            short.iter_mut().for_each(assert_answered);
        }
        let told = Instant::now();
        let exit = forwarder.stop();
        assert!(told.elapsed() < ENDS_WITHIN, "{:?}", told.elapsed());
        assert_eq!(exit.code(), Some(8), "{exit:?}");
        assert_eq!(exit.summary()["stopped"], 2, "{exit:?}");
        drop((lasting, held));
    }
}

#[test]
fn told_to_end_at_once_it_does() {
    for handoff in HANDOFFS {
        namespaces!(clients, targets);
        let server = server(&targets);
        let (_read, stderr) = full_pipe();
        let launch = launch(&clients, &targets, &server, handoff).stderr(stderr).flag("-v");
        let forwarder = launch.start();
        let mut client = clients.enter(|| connect(forwarder.address()));
        let mut held = accept(&server);
        let told = Instant::now();
        forwarder.listener.signal(nix::sys::signal::Signal::SIGTERM);
        // What is written last is not waited for before the connections are ended.
        assert!(client.read(&mut [0]).is_err() || held.read(&mut [0]).is_err());
        println!("--handoff {handoff}: reset after {:?}", told.elapsed());
        assert!(told.elapsed() < Duration::from_millis(900), "{:?}", told.elapsed());
        let exit = forwarder.finish();
        assert!(told.elapsed() < ENDS_WITHIN, "{:?}", told.elapsed());
        assert_eq!(exit.code(), Some(0), "{exit:?}");
    }
}

#[test]
fn a_start_that_cannot_work_ends_with_its_status() {
    namespaces!(both);
    let nobodys = ([192, 0, 2, 1], 80);
    let named = |launch: Launch| launch.listen_netns(&both).connect_netns(&both);
    // The other one has a line to say before, too.
    let unnamed = |launch: Launch| launch.inside(&both);
    let ways: [&dyn Fn(Launch) -> Launch; 2] = [&named, &unnamed];
    for way in ways {
        let (_read, stderr) = full_pipe();
        let started = Instant::now();
        let launch = way(Launch::nsplice()).listen(nobodys).connect(([127, 0, 0, 1], 1));
        let exit = launch.stderr(stderr).run();
        assert!(started.elapsed() < ENDS_WITHIN, "{:?}", started.elapsed());
        assert_eq!(exit.code(), Some(4), "{exit:?}");
    }
}
