//! How TCP connections end, and what a program that reads or polls learns of it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, getsockopt, recv, sockopt};

use super::{connection, events, fill_up, not_acknowledged, not_yet_sent, pipe, reset};
use super::{reset_by_peer, splice, wait_for, wait_for_bytes};
use crate::support::calls::set_option;
use crate::support::eventually;

const HUP: PollFlags = PollFlags::POLLHUP;
const ERR: PollFlags = PollFlags::POLLERR;

fn read(mut socket: &TcpStream) -> Result<usize, ErrorKind> {
    socket.read(&mut [0; 4096]).map_err(|error| error.kind())
}

#[test]
fn a_reset_is_told_once() {
    let (near, far) = connection();
    reset_by_peer(far);
    let first = wait_for(&near, HUP);
    assert!(first.contains(ERR), "{first:?}: a reset looks like an end");
    assert_eq!(read(&near), Err(ErrorKind::ConnectionReset), "a reset looks like an end");
    assert_eq!(
        (read(&near), events(&near).contains(ERR)),
        (Ok(0), false),
        "a reset is told again: Flow::failed need not keep it for the other half; nothing breaks"
    );
}

#[test]
fn splice_tells_a_reset_too() {
    let (near, far) = connection();
    let (_read, write) = pipe();
    reset_by_peer(far);
    wait_for(&near, HUP);
    assert_eq!(splice(&near, &write, 4096), Err(Errno::ECONNRESET), "a reset looks like an end");
}

#[test]
fn a_send_may_be_the_one_that_is_told() {
    let (near, far) = connection();
    reset_by_peer(far);
    wait_for(&near, HUP);
    let told = (&near).write(b"x").map_err(|error| error.kind());
    assert_eq!(told, Err(ErrorKind::ConnectionReset));
    assert_eq!(
        read(&near),
        Ok(0),
        "the reading half learns of the reset by itself: the flag for both halves is not needed; \
         nothing breaks"
    );
}

#[test]
fn what_came_before_a_reset_can_be_read() {
    let (near, mut far) = connection();
    far.write_all(b"last words").unwrap();
    wait_for_bytes(&near, 10);
    reset_by_peer(far);
    wait_for(&near, HUP);
    assert_eq!(read(&near), Ok(10), "bytes that had arrived are lost with the reset");
    assert_eq!(read(&near), Err(ErrorKind::ConnectionReset), "a reset looks like an end");
}

#[test]
fn both_ends_closed_cleanly_is_hup_without_err() {
    let (near, far) = connection();
    near.shutdown(Shutdown::Write).unwrap();
    far.shutdown(Shutdown::Write).unwrap();
    let clean = wait_for(&near, HUP);
    assert!(!clean.contains(ERR), "{clean:?}: a clean end is taken for a reset");
    assert_eq!(read(&near), Ok(0));
}

#[test]
fn a_reset_after_an_end_is_err_too() {
    let (near, far) = connection();
    far.shutdown(Shutdown::Write).unwrap();
    wait_for(&near, PollFlags::POLLIN);
    assert_eq!(read(&near), Ok(0));
    reset_by_peer(far);
    let failure = wait_for(&near, HUP);
    assert!(failure.contains(ERR), "{failure:?}: the reset of a half-closed socket goes unnoticed");
    assert_eq!(getsockopt(&near, sockopt::SocketError), Ok(Errno::EPIPE as i32));
}

#[test]
fn a_reset_by_connect_is_immediate_whoever_else_has_the_socket() {
    let (near, far) = connection();
    let copy = near.try_clone().unwrap();
    assert_eq!(reset(&near), Ok(()), "connect(AF_UNSPEC) is refused: no reset is passed on");
    wait_for(&far, HUP);
    assert_eq!(
        read(&far),
        Err(ErrorKind::ConnectionReset),
        "it ends the connection another way: a failure is passed on as a clean end"
    );
    drop(copy);
}

/// `near`: what it does before it resets, and whether there is anybody left to tell.
#[test]
fn a_reset_by_connect_is_told_until_both_streams_have_ended() {
    let shut = |socket: &TcpStream| socket.shutdown(Shutdown::Write).unwrap();
    for (near_shuts, far_shuts) in [(false, true), (true, false), (true, true)] {
        let (near, far) = connection();
        if far_shuts {
            shut(&far);
            wait_for(&near, PollFlags::POLLIN);
        }
        if near_shuts {
            shut(&near);
            wait_for(&far, PollFlags::POLLIN);
        }
        let _ = reset(&near);
        let is_told = eventually("the far end is told, or not", || {
            let now = events(&far);
            (now.contains(HUP) || far_shuts && near_shuts).then(|| now.contains(ERR))
        });
        assert_eq!(
            is_told,
            !(near_shuts && far_shuts),
            "after ends ({near_shuts}, {far_shuts}): a failure that comes then is passed on \
             otherwise than without nsplice"
        );
    }
}

/// What a program that asks for time stamps gets there.
#[test]
fn what_is_in_the_error_queue_looks_like_a_failure_and_is_none() {
    let (near, mut far) = connection();
    // Of what is sent, by software.
    set_option(&near, libc::SOL_SOCKET, libc::SO_TIMESTAMPING, 1 << 1 | 1 << 4).unwrap();
    (&near).write_all(b"x").unwrap();
    far.read_exact(&mut [0]).unwrap();
    let events = wait_for(&near, PollFlags::empty());
    assert!(events.contains(ERR), "{events:?}: Engine::has_failed need not look; nothing breaks");
    assert_eq!(getsockopt(&near, sockopt::SocketError), Ok(0));
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    while recv(near.as_raw_fd(), &mut [0], flags).is_ok() {}
    assert!(!super::events(&near).contains(ERR), "a worker with such a socket spins");
}

#[test]
fn a_unix_domain_socket_gives_bytes_to_who_asks_for_its_error_queue() {
    let (near, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
    far.write_all(b"x").unwrap();
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    assert_eq!(
        recv(near.as_raw_fd(), &mut [0], flags),
        Ok(1),
        "it does not: empty_error_queue need not ask for the family; nothing breaks"
    );
}

#[test]
fn a_reset_by_linger_waits_for_the_last_copy() {
    let (near, far) = connection();
    let copy = near.try_clone().unwrap();
    reset_by_peer(near);
    far.set_nonblocking(true).unwrap();
    assert_eq!(
        read(&far),
        Err(ErrorKind::WouldBlock),
        "closing one descriptor of several resets: connect(AF_UNSPEC) is not needed; nothing breaks"
    );
    drop(copy);
    wait_for(&far, HUP);
    assert_eq!(read(&far), Err(ErrorKind::ConnectionReset));
}

#[test]
fn a_reset_discards_what_was_not_sent_yet() {
    let (near, far) = connection();
    let sent = fill_up(&near);
    assert!(not_yet_sent(&near) > 0);
    reset(&near).unwrap();
    let mut received = Vec::new();
    let end = (&far).read_to_end(&mut received).map_err(|error| error.kind());
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
    assert!(
        received.len() < sent,
        "all {sent} bytes arrive in spite of the reset: Question::Unsent and --reset-timeout are \
         not needed; nothing breaks"
    );
}

#[test]
fn after_siocoutq_is_0_a_reset_discards_nothing() {
    let (near, far) = connection();
    let sent = fill_up(&near);
    assert!(not_acknowledged(&near) > 0);
    let mut received = vec![0; sent - 1000];
    (&far).read_exact(&mut received).unwrap();
    eventually("all is acknowledged", || (not_acknowledged(&near) == 0).then_some(()));
    reset(&near).unwrap();
    wait_for(&far, HUP);
    let end = (&far).read_to_end(&mut received).map_err(|error| error.kind());
    assert_eq!(
        (received.len(), end),
        (sent, Err(ErrorKind::ConnectionReset)),
        "SIOCOUTQ says 0 too early: bytes are lost that came before a reset"
    );
}

#[test]
fn siocoutq_counts_what_is_sent_and_not_acknowledged() {
    let (near, far) = connection();
    let sent = fill_up(&near) as i32;
    let (waiting, unsent) = (not_acknowledged(&near), not_yet_sent(&near));
    assert!(
        0 < unsent && unsent <= waiting && waiting <= sent,
        "of {sent} bytes {waiting} are not acknowledged, and {unsent} not sent: Question::Unsent \
         is answered wrongly"
    );
    drop(far);
}

/// A peer that acknowledges nothing any more, and what is left to it after all bytes.
#[test]
fn siocoutq_counts_an_end_that_is_not_acknowledged() {
    let (near, far) = connection();
    fill_up(&near);
    let bytes = not_acknowledged(&near);
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(
        not_acknowledged(&near),
        bytes + 1,
        "an end that waits to be sent is not counted: a reset may overtake it"
    );
    drop(far);
}

#[test]
fn closing_with_unread_bytes_resets() {
    let (near, far) = connection();
    (&far).write_all(b"unread").unwrap();
    wait_for_bytes(&near, 6);
    drop(near);
    wait_for(&far, HUP);
    assert_eq!(
        read(&far),
        Err(ErrorKind::ConnectionReset),
        "it looks like a clean end: a client whose connection is cut takes it for complete"
    );
}

#[test]
fn an_end_comes_after_all_that_was_sent() {
    let (near, far) = connection();
    let sent = fill_up(&near);
    near.shutdown(Shutdown::Write).unwrap();
    let mut received = Vec::new();
    (&far).read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), sent, "an end overtakes bytes");
}
