//! What a send keeps back that says more is to come.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};

use super::{connection, not_yet_sent, pipe, splice};

const LENGTH: usize = 8 << 10;

/// A connection whose near end keeps bytes back for more that was promised.
fn keeps_back() -> (TcpStream, TcpStream) {
    let (near, far) = connection();
    setsockopt(&near, sockopt::TcpNoDelay, &true).unwrap();
    let more = MsgFlags::from_bits_retain(libc::MSG_MORE);
    assert_eq!(send(near.as_raw_fd(), &[b'm'; LENGTH], more), Ok(LENGTH));
    (near, far)
}

#[test]
fn what_is_sent_with_msg_more_is_kept_back() {
    let (near, _far) = keeps_back();
    assert_eq!(
        not_yet_sent(&near),
        LENGTH as i32,
        "MSG_MORE has no effect: what was copied is a segment of its own; nothing breaks"
    );
}

#[test]
fn what_is_spliced_behind_it_sends_it() {
    let (near, _far) = keeps_back();
    let (read, write) = pipe();
    nix::unistd::write(&write, b"x").unwrap();
    assert_eq!(splice(&read, &near, 1), Ok(1));
    assert_eq!(not_yet_sent(&near), 0, "the beginning of a large message arrives 200 ms late");
}

#[test]
fn the_end_of_the_stream_sends_it() {
    let (near, _far) = keeps_back();
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(not_yet_sent(&near), 0, "the last bytes of a stream arrive 200 ms late");
}

#[test]
fn an_urgent_byte_sends_it() {
    let (near, _far) = keeps_back();
    assert_eq!(send(near.as_raw_fd(), b"u", MsgFlags::MSG_OOB), Ok(1));
    assert_eq!(not_yet_sent(&near), 0, "what comes before an urgent byte arrives 200 ms late");
}

#[test]
fn setting_tcp_nodelay_again_sends_it() {
    let (near, _far) = keeps_back();
    setsockopt(&near, sockopt::TcpNoDelay, &true).unwrap();
    assert_eq!(not_yet_sent(&near), 0, "before a reset bytes arrive 200 ms late, or not at all");
}

#[test]
fn a_send_without_it_sends_all() {
    let (mut near, _far) = keeps_back();
    near.write_all(b"x").unwrap();
    assert_eq!(not_yet_sent(&near), 0, "where no pipe is to be had, bytes arrive 200 ms late");
}
