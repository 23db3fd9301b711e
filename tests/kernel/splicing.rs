//! splice(2) between sockets and pipes.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl};
use nix::poll::PollFlags;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};

use super::{alone, connection, fill_up, not_yet_sent, pipe, reset_by_peer, splice};
use super::{wait_for, wait_for_bytes};
use crate::support::PATIENCE;

#[test]
fn splice_f_nonblock_does_not_cover_the_socket() {
    let (near, _far) = connection();
    let (_read, write) = pipe();
    near.set_nonblocking(false).unwrap();
    let limit = Duration::from_millis(30);
    near.set_read_timeout(Some(limit)).unwrap();
    let started = Instant::now();
    assert_eq!(splice(&near, &write, 4096), Err(Errno::EAGAIN));
    assert!(
        started.elapsed() >= limit,
        "a blocking socket is not waited for: the check that all sockets are O_NONBLOCK is no \
         longer needed; nothing breaks"
    );
}

#[test]
fn splice_does_not_wait_for_an_o_nonblock_socket() {
    let (near, _far) = connection();
    let (read, write) = pipe();
    near.set_read_timeout(Some(PATIENCE)).unwrap();
    near.set_write_timeout(Some(PATIENCE)).unwrap();
    let started = Instant::now();
    let filled = splice(&near, &write, 4096);
    nix::unistd::write(&write, b"more").unwrap();
    fill_up(&near);
    let drained = splice(&read, &near, 4);
    assert!(
        (filled, drained) == (Err(Errno::EAGAIN), Err(Errno::EAGAIN))
            && started.elapsed() < PATIENCE,
        "splice waited, or answered {filled:?} and {drained:?}: an idle or full connection holds \
         up all others of its worker"
    );
}

#[test]
fn an_empty_socket_and_a_full_pipe_give_the_same_error() {
    let (near, mut far) = connection();
    let (read, write) = pipe();
    let slots = fcntl(&write, FcntlArg::F_SETPIPE_SZ(4096)).unwrap() as usize / 4096;
    let empty = splice(&near, &write, 4096);
    far.write_all(&vec![1; 256 << 10]).unwrap();
    wait_for(&near, PollFlags::POLLIN);
    // A slot may be filled in part only.
    for _ in 0..slots {
        let _ = splice(&near, &write, 1 << 20);
    }
    let full = splice(&near, &write, 1 << 20);
    assert_eq!(
        (empty, full),
        (Err(Errno::EAGAIN), Err(Errno::EAGAIN)),
        "empty and full can be told apart; Half::on_filled takes EAGAIN for an empty socket, \
         which is right only because it fills empty pipes"
    );
    drop(read);
}

/// Fills the slots of a pipe, splices to a socket, and returns what that keeps back.
fn kept_back(slots: usize, overlong: usize, flags: SpliceFFlags) -> i32 {
    let (near, _far) = connection();
    // O_DIRECT: each write takes a slot.
    let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_DIRECT).unwrap();
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(64 * 4096)).unwrap();
    for _ in 0..slots {
        assert_eq!(nix::unistd::write(&write, b"x"), Ok(1));
    }
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | flags;
    let moved = nix::fcntl::splice(&read, None, &near, None, slots + overlong, flags);
    assert_eq!(moved, Ok(slots));
    not_yet_sent(&near)
}

#[test]
fn a_drain_of_exactly_what_the_pipe_holds_is_sent_at_once() {
    for slots in [1, 2, 15, 16, 17, 31, 32, 33, 48, 64] {
        assert_eq!(
            kept_back(slots, 0, SpliceFFlags::empty()),
            0,
            "bytes of a drain of {slots} slots are kept back as if more were to come: messages \
             that are spliced arrive 200 ms late"
        );
    }
}

#[test]
fn an_overlong_drain_of_16_slots_is_kept_back() {
    assert!(
        kept_back(16, 1, SpliceFFlags::empty()) > 0,
        "the kernel no longer takes 16 filled slots for a sign that more is coming: the exact \
         length of a drain is not needed any more; nothing breaks"
    );
    assert_eq!(kept_back(15, 1, SpliceFFlags::empty()), 0);
}

#[test]
fn splice_f_more_keeps_back_what_no_more_comes_after() {
    assert!(
        kept_back(1, 0, SpliceFFlags::SPLICE_F_MORE) > 0,
        "SPLICE_F_MORE has no effect: it could be given with every drain; nothing breaks"
    );
}

#[test]
fn splice_takes_all_that_is_there_up_to_the_pipes_slots() {
    let (near, mut far) = connection();
    let (_read, write) = pipe();
    let capacity = fcntl(&write, FcntlArg::F_SETPIPE_SZ(1 << 16)).unwrap() as usize;
    far.write_all(&[7; 10_000]).unwrap();
    wait_for_bytes(&near, 10_000);
    assert_eq!(
        splice(&near, &write, capacity),
        Ok(10_000),
        "a fill ends early although there is more: Half::on_filled waits after it, which costs a \
         turn for each piece"
    );
}

#[test]
fn splice_to_a_reset_socket_raises_sigpipe_unless_it_is_ignored() {
    alone(|| {
        let (near, far) = connection();
        let (read, write) = pipe();
        nix::unistd::write(&write, b"late").unwrap();
        reset_by_peer(far);
        wait_for(&near, PollFlags::POLLHUP);
        // The first error is the reset, which raises nothing.
        let _ = (&near).read(&mut [0]);

        // Rust's runtime ignores it, so this survives.
        assert_eq!(splice(&read, &near, 4), Err(Errno::EPIPE));
        // Blocked, it waits for whoever wants it, even if it was ignored.
        SigSet::from(Signal::SIGPIPE).thread_block().unwrap();
        // SAFETY: no handler is installed.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.unwrap();
        assert_eq!(splice(&read, &near, 4), Err(Errno::EPIPE));
        assert!(is_pending(), "splice raises no SIGPIPE: it need not be ignored; nothing breaks");
    });
}

fn is_pending() -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:")).unwrap();
    let bits = u64::from_str_radix(pending.trim(), 16).unwrap();
    bits & 1 << (Signal::SIGPIPE as u64 - 1) != 0
}
