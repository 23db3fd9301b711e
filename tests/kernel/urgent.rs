//! Urgent bytes: where they stop a read, and what tells that one is next.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};

use super::forged::urgent_behind_a_gap;
use super::{connection, connection_to, events, fill_up, int_ioctl, is_at_mark, listener, pipe};
use super::{reset_by_peer, splice, wait_for, wait_for_bytes};
use crate::support::namespaces;

fn send_urgent(socket: &TcpStream, byte: u8) -> Result<usize, Errno> {
    send(socket.as_raw_fd(), &[byte], MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT)
}

/// A connection whose near end has `abc`, the urgent `!`, and `def` to read.
fn with_urgent_byte() -> (TcpStream, TcpStream) {
    let (near, mut far) = connection();
    far.write_all(b"abc").unwrap();
    assert_eq!(send_urgent(&far, b'!'), Ok(1));
    far.write_all(b"def").unwrap();
    wait_for_bytes(&near, 7);
    (near, far)
}

#[test]
fn splice_stops_at_an_urgent_mark_and_siocatmark_tells() {
    let (mut near, _far) = with_urgent_byte();
    let (_read, write) = pipe();
    let broken = "the order of urgent bytes and the others is lost when splicing";
    assert_eq!(splice(&near, &write, 100), Ok(3), "splice does not stop at the mark: {broken}");
    assert!(is_at_mark(&near), "SIOCATMARK does not tell: {broken}");
    let at_mark = splice(&near, &write, 100);
    assert!(
        matches!(at_mark, Ok(0) | Err(Errno::EAGAIN)),
        "splice answers {at_mark:?} at the mark, not 0 or EAGAIN: {broken}"
    );
    assert!(events(&near).contains(PollFlags::POLLIN), "a flow would wait at the mark for ever");
    let mut byte = [0];
    assert_eq!((near.read(&mut byte).unwrap(), byte), (1, *b"!"), "the urgent byte is lost");
    assert!(!is_at_mark(&near), "the mark stays after its byte: the next is taken for urgent");
    assert_eq!(splice(&near, &write, 100), Ok(3), "splice does not go on behind the mark");
}

#[test]
fn at_an_urgent_mark_splice_tells_a_failure_before_the_bytes_behind_it() {
    let (mut near, far) = with_urgent_byte();
    let (_read, write) = pipe();
    reset_by_peer(far);
    wait_for(&near, PollFlags::POLLHUP);
    assert_eq!(splice(&near, &write, 100), Ok(3));
    let told = splice(&near, &write, 100);
    assert_eq!(
        told,
        Err(Errno::ECONNRESET),
        "splice tells {told:?} at the mark: Half::on_filled need not read on after a failure; \
         nothing breaks"
    );
    let mut rest = Vec::new();
    near.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"!def", "the urgent byte and what is behind it are lost with the reset");
}

/// By it the epoll engine tells, after a receive that stopped there, whether there is more.
#[test]
fn fionread_counts_what_is_behind_an_urgent_mark() {
    let (mut near, _far) = with_urgent_byte();
    near.read_exact(&mut [0; 3]).unwrap();
    assert_eq!(
        int_ioctl(&near, libc::FIONREAD),
        Ok(4),
        "at a mark nothing seems to be there: on epoll the half goes on copying; nothing breaks"
    );
}

#[test]
fn a_receive_stops_before_an_urgent_byte_that_is_not_the_next() {
    let (mut near, _far) = with_urgent_byte();
    let mut buffer = [0; 100];
    let length = near.read(&mut buffer).unwrap();
    assert_eq!(
        &buffer[..length],
        b"abc",
        "a receive goes past the mark: an urgent byte that arrives between the wait and the \
         receive becomes an ordinary one"
    );
}

#[test]
fn a_poll_without_pri_means_that_the_next_byte_is_not_urgent() {
    let (mut near, mut far) = connection();
    send_urgent(&far, b'!').unwrap();
    let first = wait_for(&near, PollFlags::POLLIN | PollFlags::POLLPRI);
    assert!(
        first.contains(PollFlags::POLLPRI),
        "an urgent byte that is next is polled as {first:?}, without PRI: the flow takes it for \
         an ordinary one"
    );
    assert!(is_at_mark(&near));
    near.read_exact(&mut [0]).unwrap();
    assert!(!events(&near).contains(PollFlags::POLLPRI), "PRI stays: a wait for more spins");

    far.write_all(b"abc").unwrap();
    let then = wait_for(&near, PollFlags::POLLIN | PollFlags::POLLPRI);
    assert_eq!(then, PollFlags::POLLIN, "PRI comes without an urgent byte: a question too many");
    assert!(!is_at_mark(&near));
}

#[test]
fn pri_says_that_an_urgent_byte_has_arrived_not_that_it_is_next() {
    let (near, _far) = with_urgent_byte();
    assert!(events(&near).contains(PollFlags::POLLPRI));
    assert!(
        !is_at_mark(&near),
        "SIOCATMARK is true before the mark: the byte before it is sent on as urgent"
    );
}

#[test]
fn an_urgent_byte_that_is_ahead_of_what_is_missing_is_pri_without_in() {
    namespaces!(netns);
    let (near, far) = netns.enter(|| connection_to(&listener()));
    urgent_behind_a_gap(&netns, &far, 5);
    let events = wait_for(&near, PollFlags::POLLIN | PollFlags::POLLPRI);
    assert_eq!(
        events,
        PollFlags::POLLPRI,
        "epoll's waits need not leave PRI out once it came alone; nothing breaks"
    );
}

#[test]
fn without_so_oobinline_the_urgent_byte_is_dropped() {
    let (mut near, mut far) = connection();
    setsockopt(&near, sockopt::OobInline, &false).unwrap();
    send_urgent(&far, b'!').unwrap();
    far.write_all(b"def").unwrap();
    wait_for(&near, PollFlags::POLLIN);
    let mut buffer = [0; 100];
    let length = near.read(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"def", "SO_OOBINLINE is not needed; nothing breaks");
}

#[test]
fn an_urgent_byte_does_not_wait_for_room() {
    let (near, _far) = connection();
    fill_up(&near);
    // What an ordinary send finds full has no place for an urgent byte either.
    assert_eq!(
        send_urgent(&near, b'!'),
        Err(Errno::EAGAIN),
        "the flow watches for room and sends it then: another answer ends or delays the connection"
    );
}

#[test]
fn a_byte_sent_with_msg_oob_is_the_urgent_one() {
    let (mut near, far) = connection();
    (&far).write_all(b"abc").unwrap();
    send_urgent(&far, b'!').unwrap();
    wait_for_bytes(&near, 4);
    near.read_exact(&mut [0; 3]).unwrap();
    assert!(is_at_mark(&near), "the urgent mark is not before the byte that was sent as urgent");
}
