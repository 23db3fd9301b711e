//! Requests that are to end early, and what they hold until then.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, IntoRawFd};

use io_uring::types::{CancelBuilder, Timespec};
use io_uring::{opcode, squeue};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, socket,
};

use super::ring::{self, Ring, poll_on, poll_once};
use super::{connect, connection, fill_up, listener};

const CANCEL: u64 = 99;

fn cancel(token: u64) -> squeue::Entry {
    opcode::AsyncCancel2::new(CancelBuilder::user_data(token).all()).build()
}

#[test]
fn a_socket_with_a_request_in_a_ring_is_not_closed_by_close() {
    let (near, mut far) = connection();
    let mut ring = Ring::new();
    ring.start(1, poll_once(&near, libc::POLLIN));
    drop(near);
    far.set_nonblocking(true).unwrap();
    let seen = far.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(
        seen,
        Err(ErrorKind::WouldBlock),
        "the peer learns of the close at once: it is not needed any more to cancel and to wait \
         before; nothing breaks"
    );
    assert_eq!(ring.done(), []);
    ring.start(CANCEL, cancel(1));
    ring.next();
    ring.next();
    far.set_nonblocking(false).unwrap();
    assert_eq!(
        far.read(&mut [0]).unwrap(),
        0,
        "the end does not come although the request is over: connections stay open"
    );
}

#[test]
fn each_cancelled_request_still_completes() {
    let (near, _far) = connection();
    let (full, _other) = connection();
    fill_up(&full);
    let mut ring = Ring::new();
    let day = Timespec::new().sec(86_400);
    ring.start(1, poll_once(&near, libc::POLLIN));
    ring.start(2, poll_on(&full, libc::POLLOUT));
    ring.start(3, opcode::Timeout::new(&day).build());
    assert_eq!(ring.done(), []);
    for token in 1..=3 {
        ring.start(CANCEL, cancel(token).flags(squeue::Flags::SKIP_SUCCESS));
        let done = ring.next_of(token);
        assert!(
            done.result == Err(Errno::ECANCELED) && !done.is_armed(),
            "{done:?}: a flow that is to be closed waits for its requests' ends"
        );
    }
    assert_eq!(ring.done(), [], "a cancellation that is asked to keep quiet reports");
}

#[test]
fn a_connect_under_way_can_be_cancelled() {
    // A listener whose queue is full answers nobody.
    let listener = listener();
    nix::sys::socket::listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let address = SockaddrStorage::from(listener.local_addr().unwrap());
    let _queued = connect(&listener);
    let mut ring = Ring::new();
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    let connect = opcode::Connect::new(ring::fd(&socket), address.as_ptr(), address.len());
    ring.start(1, connect.build());
    assert_eq!(ring.done(), []);
    ring.start(CANCEL, cancel(1).flags(squeue::Flags::SKIP_SUCCESS));
    assert_eq!(
        ring.next_of(1).result,
        Err(Errno::ECANCELED),
        "a flow whose client is gone stays until the target answers"
    );
}

#[test]
fn one_cancellation_ends_all_requests_with_its_number() {
    let listener = listener();
    let mut ring = Ring::new();
    for _ in 0..4 {
        ring.start(1, ring::accept(&listener));
    }
    ring.start(CANCEL, cancel(1).flags(squeue::Flags::SKIP_SUCCESS));
    let results: Vec<_> = (0..4).map(|_| ring.next_of(1).result).collect();
    assert_eq!(
        results,
        [Err(Errno::ECANCELED); 4],
        "accepts are left: a worker that is to stop waits for them for ever"
    );
}

#[test]
fn a_close_in_the_ring_ends_the_connection_and_keeps_quiet() {
    let (near, mut far) = connection();
    let mut ring = Ring::new();
    let number = io_uring::types::Fd(near.into_raw_fd());
    ring.start(1, opcode::Close::new(number).build().flags(squeue::Flags::SKIP_SUCCESS));
    assert_eq!(ring.done(), [], "it reports its success, which nobody reads");
    assert_eq!(far.read(&mut [0]).unwrap(), 0, "the peer never sees the end");
}

#[test]
fn closing_the_listener_after_its_accepts_refuses_new_connections() {
    let listener = listener();
    let address = listener.local_addr().unwrap();
    let mut ring = Ring::new();
    ring.start(1, ring::accept(&listener));
    // As the worker does it: in one batch, the cancellation first.
    ring.push(CANCEL, cancel(1));
    let number = listener.as_raw_fd();
    std::mem::forget(listener);
    ring.push(2, opcode::Close::new(io_uring::types::Fd(number)).build());
    ring.enter(3, None).unwrap();
    assert_eq!(ring.done().len(), 3);
    let refused = std::net::TcpStream::connect(address).map_err(|error| error.kind());
    assert!(
        matches!(refused, Err(ErrorKind::ConnectionRefused)),
        "{refused:?}: clients wait at a program that has stopped accepting"
    );
}
