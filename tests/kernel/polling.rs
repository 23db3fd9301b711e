//! Waiting for readiness in a ring: one-shot to read, multishot to write.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;

use io_uring::types::CancelBuilder;
use io_uring::{opcode, squeue};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, send};

use super::ring::{Done, Ring, poll_on, poll_once};
use super::{
    connection, events, fill_up, half_closed_and_full, is_at_mark, reset_by_peer, wait_for,
};
use crate::support::eventually;

const IN: i16 = libc::POLLIN | libc::POLLPRI;

fn reported(done: Done) -> PollFlags {
    PollFlags::from_bits_retain(done.result.unwrap() as i16)
}

#[test]
fn a_one_shot_poll_asks_for_the_state() {
    let (mut near, mut far) = connection();
    let mut ring = Ring::new();
    far.write_all(b"two").unwrap();
    wait_for(&near, PollFlags::POLLIN);
    for _ in 0..2 {
        near.read_exact(&mut [0]).unwrap();
        ring.start(1, poll_once(&near, IN));
        assert_eq!(
            ring.done().len(),
            1,
            "what is there already is not reported: after a fill that left something the flow \
             waits for ever"
        );
    }
    near.read_exact(&mut [0]).unwrap();
    ring.start(1, poll_once(&near, IN));
    assert_eq!(ring.done(), [], "nothing is there, and the poll completes: a flow spins");
    far.write_all(b"!").unwrap();
    assert!(reported(ring.next_of(1)).contains(PollFlags::POLLIN));
}

#[test]
fn a_poll_that_waited_names_urgent_data_also_without_any() {
    let (near, mut far) = connection();
    let mut ring = Ring::new();
    ring.start(1, poll_once(&near, IN));
    assert_eq!(ring.done(), []);
    far.write_all(b"abc").unwrap();
    assert!(
        reported(ring.next_of(1)).contains(PollFlags::POLLPRI),
        "PRI can be believed after a wait: a second poll for the state is not needed"
    );
    assert!(!is_at_mark(&near) && !events(&near).contains(PollFlags::POLLPRI));
}

/// Starts a wait to read, and behind it the question what there is.
fn start_chain(ring: &mut Ring, token: u64, socket: &TcpStream) {
    let flags = squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS;
    ring.push(token, poll_once(socket, libc::POLLIN).flags(flags));
    ring.start(token, poll_once(socket, IN));
}

#[test]
fn a_poll_linked_behind_a_wait_tells_the_state_and_completes_alone() {
    let (mut near, mut far) = connection();
    let mut ring = Ring::new();
    start_chain(&mut ring, 1, &near);
    assert_eq!(ring.done(), []);
    far.write_all(b"abc").unwrap();
    let state = reported(ring.next_of(1));
    assert_eq!(state, PollFlags::POLLIN, "a flow asks for a mark where there is none");
    near.read_exact(&mut [0; 3]).unwrap();

    start_chain(&mut ring, 2, &near);
    send(far.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
    let state = reported(ring.next_of(2));
    assert!(state.contains(PollFlags::POLLPRI), "{state:?}: an urgent byte is not noticed");

    start_chain(&mut ring, 3, &near);
    let state = reported(ring.next_of(3));
    assert!(state.contains(PollFlags::POLLPRI), "{state:?}: nor one that was there");
    assert_eq!(ring.done(), [], "a wait completes beside its question: the flow counts two");
}

#[test]
fn a_chain_of_polls_that_is_cancelled_completes_once() {
    let (near, _far) = connection();
    let mut ring = Ring::new();
    start_chain(&mut ring, 1, &near);
    assert_eq!(ring.done(), []);
    let which = CancelBuilder::user_data(1).all();
    ring.start(2, opcode::AsyncCancel2::new(which).build().flags(squeue::Flags::SKIP_SUCCESS));
    let result = ring.next_of(1).result;
    assert_eq!(result, Err(Errno::ECANCELED), "a flow that ends waits for ever");
    assert_eq!(ring.done(), [], "the flow's slot is free at the first of two completions");
}

#[test]
fn a_one_shot_poll_reports_an_end_and_a_reset() {
    let (near, far) = connection();
    let mut ring = Ring::new();
    ring.start(1, poll_once(&near, IN));
    far.shutdown(Shutdown::Write).unwrap();
    let end = reported(ring.next_of(1));
    assert!(end.contains(PollFlags::POLLIN), "{end:?}: the end of a stream is not noticed");

    let (near, far) = connection();
    ring.start(2, poll_once(&near, IN));
    reset_by_peer(far);
    let failure = reported(ring.next_of(2));
    assert!(failure.contains(PollFlags::POLLIN), "{failure:?}: a reset is not noticed");
}

#[test]
fn after_a_fin_a_one_shot_poll_for_room_completes_at_once_for_ever() {
    let (near, _far) = half_closed_and_full();
    let mut ring = Ring::new();
    for _ in 0..3 {
        ring.start(1, poll_once(&near, libc::POLLOUT));
        let done = ring.done();
        assert!(
            done.len() == 1 && !reported(done[0]).contains(PollFlags::POLLOUT),
            "{done:?}: a one-shot poll waits for room on a half-closed socket; Watch need not be \
             multishot; nothing breaks"
        );
    }
}

#[test]
fn after_a_fin_a_multishot_poll_reports_once_and_goes_on() {
    let (near, mut far) = half_closed_and_full();
    far.set_nonblocking(true).unwrap();
    let mut ring = Ring::new();
    ring.start(1, poll_on(&near, libc::POLLOUT));
    let first = ring.done();
    assert!(
        first.len() <= 1 && first.iter().all(Done::is_armed),
        "{first:?}: a half-closed flow that waits for room keeps its worker busy, or stalls"
    );
    assert_eq!(ring.done(), [], "it reports again and again: the worker spins");
    eventually("the report that there is room; without it the flow stalls", || {
        let _ = far.read(&mut [0; 64 << 10]);
        let room = |done: Done| reported(done).contains(PollFlags::POLLOUT);
        ring.done().into_iter().any(room).then_some(())
    });
}

#[test]
fn a_multishot_poll_that_was_armed_with_room_reports_the_next_room() {
    let (near, mut far) = connection();
    let mut ring = Ring::new();
    ring.start(1, poll_on(&near, libc::POLLOUT));
    assert!(reported(ring.next_of(1)).contains(PollFlags::POLLOUT));
    // Twice: the request is not armed anew.
    for _ in 0..2 {
        let sent = fill_up(&near);
        ring.done();
        far.read_exact(&mut vec![0; sent]).unwrap();
        let room = reported(ring.next_of(1));
        assert!(
            room.contains(PollFlags::POLLOUT),
            "{room:?} instead of room after the queue was full: the flow stalls"
        );
    }
}

#[test]
fn a_multishot_poll_reports_a_reset_as_err() {
    let (near, far) = connection();
    let mut ring = Ring::new();
    fill_up(&near);
    ring.start(1, poll_on(&near, libc::POLLOUT));
    assert_eq!(ring.done(), []);
    reset_by_peer(far);
    let failure = reported(ring.next_of(1));
    assert!(
        failure.contains(PollFlags::POLLERR),
        "{failure:?}: a back-pressured flow does not learn that its sink was reset"
    );
}

#[test]
fn a_poll_for_room_reports_err_for_a_reset_that_came_before() {
    let (near, far) = connection();
    let mut ring = Ring::new();
    reset_by_peer(far);
    wait_for(&near, PollFlags::POLLHUP);
    ring.start(1, poll_on(&near, libc::POLLOUT));
    let failure = reported(ring.next_of(1));
    assert!(
        failure.contains(PollFlags::POLLERR),
        "{failure:?}: a watch that starts after the reset does not notice it"
    );
}
