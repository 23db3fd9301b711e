//! How large pipes are, and how many a user can have.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::namespaces::become_nobody;
use super::{alone, pipe};
use crate::support::skip;

fn capacity(pipe: &OwnedFd) -> i32 {
    fcntl(pipe, FcntlArg::F_GETPIPE_SZ).unwrap()
}

fn limit(name: &str) -> Option<i32> {
    std::fs::read_to_string(format!("/proc/sys/fs/{name}")).ok()?.trim().parse().ok()
}

#[test]
fn a_pipe_grows_to_a_power_of_two_pages_and_says_so() {
    let (_read, write) = pipe();
    for (wanted, got) in [(1, 4096), (4096, 4096), (65_537, 131_072), (300_000, 524_288)] {
        fcntl(&write, FcntlArg::F_SETPIPE_SZ(wanted)).unwrap();
        assert_eq!(
            capacity(&write),
            got,
            "a pipe that was asked for {wanted} bytes: a fill is asked for as much as the pipe \
             says it holds"
        );
    }
}

#[test]
fn an_ordinary_user_gets_no_pipe_above_pipe_max_size() {
    alone(|| {
        if become_nobody(64_002).is_err() {
            skip!("there is no other user in this user namespace");
        }
        let max = limit("pipe-max-size").unwrap();
        let (_read, write) = pipe();
        assert_eq!(
            fcntl(&write, FcntlArg::F_SETPIPE_SZ(max + 1)),
            Err(Errno::EPERM),
            "--pipe-size has no limit; nothing breaks"
        );
        assert!(
            fcntl(&write, FcntlArg::F_SETPIPE_SZ(max / 4)).is_ok(),
            "Pipe::new asks for less when it was refused: it gets nothing"
        );
    });
}

#[test]
fn past_pipe_user_pages_soft_new_pipes_are_too_small_to_be_of_use() {
    alone(|| {
        let soft_pages = limit("pipe-user-pages-soft").unwrap();
        if soft_pages == 0 || become_nobody(64_003).is_err() {
            skip!("there is no other user in this user namespace, or no limit");
        }
        let max = limit("pipe-max-size").unwrap().min(soft_pages * 4096);
        let mut kept = Vec::new();
        for _ in 0..=soft_pages * 4096 / max {
            let (read, write) = pipe();
            let grown = fcntl(&write, FcntlArg::F_SETPIPE_SZ(max));
            kept.push((read, write));
            if grown.is_err() {
                break;
            }
        }
        // What is left below the limit, in steps of a new pipe.
        let smallest = (0..soft_pages).find_map(|_| {
            let (read, write) = pipe();
            let size = capacity(&write);
            kept.push((read, write));
            (size < 65_536).then_some(size)
        });
        let (_, write) = kept.last().unwrap();
        assert_eq!(
            smallest,
            Some(8192),
            "a user past the limit gets other pipes than Pipe's MIN_CAPACITY_BYTES reckons with"
        );
        assert_eq!(fcntl(write, FcntlArg::F_SETPIPE_SZ(65_536)), Err(Errno::EPERM));
    });
}
