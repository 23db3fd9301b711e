//! What single requests answer: connecting, sending, receiving, pausing.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::OwnedFd;

use io_uring::types::Timespec;
use io_uring::{cqueue, opcode};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage, socket};

use super::ring::{self, BUFFER_BYTES, Done, Ring};
use super::{connection, listener, reset_by_peer, wait_for, wait_for_bytes};

/// Connects a socket such as nsplice's; the address is gone when this returns.
fn connect(ring: &mut Ring, target: SocketAddr) -> (OwnedFd, Done) {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    let address = SockaddrStorage::from(target);
    let connect = opcode::Connect::new(ring::fd(&socket), address.as_ptr(), address.len());
    ring.start(1, connect.build());
    (socket, ring.next_of(1))
}

#[test]
fn a_connect_completes_when_connected_also_on_an_o_nonblock_socket() {
    let listener = listener();
    let mut ring = Ring::new();
    let (_socket, done) = connect(&mut ring, listener.local_addr().unwrap());
    assert_eq!(done.result, Ok(0), "no connection to any target is ever made");
}

#[test]
fn a_refused_connect_says_so() {
    let listener = listener();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (_socket, done) = connect(&mut Ring::new(), address);
    assert_eq!(done.result, Err(Errno::ECONNREFUSED), "the log names another cause");
}

#[test]
fn a_receive_that_finds_nothing_takes_no_buffer() {
    let (near, mut far) = connection();
    let mut ring = Ring::with_buffers(1);
    ring.start(1, ring::recv(&near, libc::MSG_DONTWAIT));
    let done = ring.next_of(1);
    assert_eq!(
        (done.result, done.buffer()),
        (Err(Errno::EAGAIN), None),
        "a receive that found nothing waits, or keeps a buffer: buffers run out"
    );
    far.write_all(b"x").unwrap();
    wait_for_bytes(&near, 1);
    ring.start(2, ring::recv(&near, libc::MSG_DONTWAIT));
    let done = ring.next_of(2);
    assert_eq!((done.result, done.buffer()), (Ok(1), Some(0)), "the buffer is lost");
}

#[test]
fn a_receive_that_waits_takes_no_buffer() {
    let (idle, _other) = connection();
    let (near, mut far) = connection();
    let mut ring = Ring::with_buffers(1);
    ring.start(1, ring::recv(&idle, 0));
    assert_eq!(ring.done(), []);
    far.write_all(b"x").unwrap();
    wait_for_bytes(&near, 1);
    ring.start(2, ring::recv(&near, 0));
    assert_eq!(ring.next_of(2).buffer(), Some(0), "idle connections hold buffers");
}

#[test]
fn a_receive_without_a_buffer_is_refused_and_loses_nothing() {
    let (near, mut far) = connection();
    let mut ring = Ring::with_buffers(0);
    ring.start(1, ring::recv(&near, libc::MSG_DONTWAIT));
    let nothing_there = ring.next_of(1).result;
    assert_eq!(nothing_there, Err(Errno::ENOBUFS), "it is EAGAIN first; nothing breaks");
    far.write_all(b"kept").unwrap();
    wait_for_bytes(&near, 4);
    ring.start(1, ring::recv(&near, libc::MSG_DONTWAIT));
    assert_eq!(ring.next_of(1).result, Err(Errno::ENOBUFS), "no buffers are added when needed");
    ring.provide(3);
    ring.start(2, ring::recv(&near, libc::MSG_DONTWAIT));
    let done = ring.next_of(2);
    assert_eq!((done.result, done.buffer()), (Ok(4), Some(3)), "a new buffer is not used");
}

/// What the flag of a buffer says is what counts: Uring::decode_received gives back exactly that.
#[test]
fn an_end_and_an_error_keep_no_buffer_without_naming_it() {
    let mut ring = Ring::with_buffers(1);
    let (ended, far) = connection();
    far.shutdown(Shutdown::Write).unwrap();
    wait_for(&ended, PollFlags::POLLIN);
    let (failed, far) = connection();
    reset_by_peer(far);
    wait_for(&failed, PollFlags::POLLHUP);
    for (socket, wanted) in [(&ended, Ok(0)), (&failed, Err(Errno::ECONNRESET))] {
        ring.start(1, ring::recv(socket, libc::MSG_DONTWAIT));
        let done = ring.next_of(1);
        assert_eq!(done.result, wanted);
        if let Some(id) = done.buffer() {
            ring.provide(id);
        }
    }
    let (near, mut far) = connection();
    far.write_all(b"x").unwrap();
    wait_for_bytes(&near, 1);
    ring.start(2, ring::recv(&near, libc::MSG_DONTWAIT));
    assert_eq!(ring.next_of(2).result, Ok(1), "each connection that ends costs a buffer");
    ring.start(3, ring::recv(&near, libc::MSG_DONTWAIT));
    let refused = ring.next_of(3).result;
    assert_eq!(refused, Err(Errno::ENOBUFS), "a buffer was provided twice: streams are mixed up");
}

#[test]
fn a_receive_says_whether_the_socket_has_more() {
    let (near, mut far) = connection();
    let mut ring = Ring::with_buffers(2);
    far.write_all(&[1; BUFFER_BYTES as usize + 1]).unwrap();
    wait_for_bytes(&near, BUFFER_BYTES as i32 + 1);
    let more = [BUFFER_BYTES, 1].map(|length| {
        ring.start(1, ring::recv(&near, libc::MSG_DONTWAIT));
        let done = ring.next_of(1);
        assert_eq!(done.result, Ok(length));
        cqueue::sock_nonempty(done.flags)
    });
    assert_eq!(
        more,
        [true, false],
        "IORING_CQE_F_SOCK_NONEMPTY is wrong: --transfer auto never changes to splice, or does so \
         for no reason"
    );
}

#[test]
fn a_send_takes_what_there_is_room_for() {
    let (near, mut far) = connection();
    let mut ring = Ring::new();
    let block = vec![5; 64 << 20];
    let send = opcode::Send::new(ring::fd(&near), block.as_ptr(), block.len() as u32)
        .flags(libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL);
    ring.start(1, send.build());
    let sent = ring.next_of(1).result.unwrap() as usize;
    assert!(
        0 < sent && sent < block.len(),
        "{sent} bytes of {} are taken at once: a send waits, or is all or nothing",
        block.len()
    );
    far.read_exact(&mut vec![0; sent]).unwrap();
}

#[test]
fn a_pause_ends_with_etime_and_its_length_is_read_at_once() {
    let mut ring = Ring::new();
    let mut time = Box::new(Timespec::new().nsec(1_000_000));
    ring.start(1, opcode::Timeout::new(&*time).build());
    *time = Timespec::new().sec(86_400);
    assert_eq!(ring.next_of(1).result, Err(Errno::ETIME));
}
