//! Rings as a whole: whose they are, what they keep, how long they wait.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use io_uring::opcode;
use io_uring::types::Timespec;
use nix::errno::Errno;

use super::ring::{GETEVENTS, Ring};

#[test]
fn a_ring_works_on_the_thread_that_made_it_only() {
    let mut ring = Ring::new();
    ring.push(1, opcode::Nop::new().build());
    let inner = ring.io_uring();
    let elsewhere =
        std::thread::scope(|scope| scope.spawn(|| inner.submit_and_wait(1)).join().unwrap());
    assert_eq!(
        elsewhere.map_err(|error| error.raw_os_error()).err(),
        Some(Some(libc::EEXIST)),
        "another thread may use a ring of IORING_SETUP_SINGLE_ISSUER; nothing breaks"
    );
    assert_eq!(ring.next().result, Ok(0), "a ring does not work on the thread that made it");
}

#[test]
fn completions_that_find_no_room_are_kept() {
    let mut ring = Ring::with_entries(4, 4);
    assert!(ring.io_uring().params().is_feature_nodrop(), "completions can be lost");
    const COUNT: u64 = 40;
    for token in 0..COUNT {
        // Handed over without collecting what completes.
        ring.start(token, opcode::Nop::new().build());
    }
    let mut tokens = BTreeSet::new();
    loop {
        let before = tokens.len();
        tokens.extend(ring.done().iter().map(|done| done.token));
        if tokens.len() == before {
            break;
        }
    }
    let missing = COUNT - tokens.len() as u64;
    assert_eq!(missing, 0, "{missing} completions are lost: their flows wait for ever");
}

#[test]
fn a_bounded_wait_ends_with_etime() {
    let mut ring = Ring::new();
    let started = Instant::now();
    let ended = ring.enter(1, Some(Timespec::new().nsec(5_000_000)));
    assert_eq!(ended, Err(Errno::ETIME), "Uring::wait takes it for a failure, and ends the worker");
    assert!(started.elapsed() >= Duration::from_millis(5), "it does not wait: the worker spins");
}

#[test]
fn a_wait_may_be_kept_out_of_iowait_where_the_kernel_says_so() {
    const NO_IOWAIT: u32 = 1 << 7;
    let mut ring = Ring::new();
    if !ring.io_uring().params().is_feature_no_iowait() {
        return;
    }
    ring.push(1, opcode::Nop::new().build());
    let submitter = ring.io_uring().submitter();
    // SAFETY: there is no argument.
    let entered = unsafe { submitter.enter::<libc::sigset_t>(1, 1, GETEVENTS | NO_IOWAIT, None) };
    assert!(entered.is_ok(), "{entered:?}: Uring::wait fails, and ends the worker");
}

#[test]
fn a_request_refused_by_the_kernel_completes_and_holds_up_no_other() {
    let mut ring = Ring::new();
    ring.push(1, opcode::Close::new(io_uring::types::Fd(-1)).build());
    ring.push(2, opcode::Nop::new().build());
    ring.enter(2, None).unwrap();
    let done = ring.done();
    assert_eq!(done.len(), 2, "{done:?}: requests behind a bad one are not begun");
    assert_eq!(done[0].result, Err(Errno::EBADF));
}
