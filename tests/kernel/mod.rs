//! Sockets, rings and processes for the tests of single facts.

mod accepting;
mod cancelling;
mod endings;
mod epoll;
#[path = "../standing/forged.rs"]
mod forged;
mod namespaces;
mod passing;
mod pipes;
mod polling;
mod reading;
mod requests;
mod ring;
mod rings;
mod sending;
mod splicing;
mod urgent;
mod workers;

use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use crate::support::PATIENCE;
use crate::support::calls::{SIOCATMARK, int_ioctl};

/// Two ends of a TCP connection: the near one as nsplice has its sockets, not blocking, and the
/// one of its peer.
fn connection() -> (TcpStream, TcpStream) {
    connection_to(&listener())
}

fn listener() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    setsockopt(&listener, sockopt::TcpNoDelay, &true).unwrap();
    setsockopt(&listener, sockopt::OobInline, &true).unwrap();
    listener
}

fn connection_to(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let far = connect(listener);
    let (near, peer) = listener.accept().unwrap();
    assert_eq!(peer, far.local_addr().unwrap());
    near.set_nonblocking(true).unwrap();
    (near, far)
}

fn connect(listener: &TcpListener) -> TcpStream {
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    far.set_nodelay(true).unwrap();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    far.set_write_timeout(Some(PATIENCE)).unwrap();
    far
}

/// Waits for at least one of the events; poll adds ERR and HUP.
#[track_caller]
fn wait_for(fd: &impl AsFd, events: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(fd.as_fd(), events)];
    let ready = poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
    assert!(ready > 0, "{events:?} does not come within {PATIENCE:?}");
    fds[0].revents().unwrap()
}

/// The events that there are.
fn events(fd: &impl AsFd) -> PollFlags {
    let events = PollFlags::POLLIN | PollFlags::POLLPRI | PollFlags::POLLOUT;
    let mut fds = [PollFd::new(fd.as_fd(), events)];
    poll(&mut fds, PollTimeout::ZERO).unwrap();
    fds[0].revents().unwrap()
}

/// Waits until exactly `bytes` can be received.
#[track_caller]
fn wait_for_bytes(socket: &impl AsFd, bytes: i32) {
    crate::support::eventually("what was sent arrives", || {
        (int_ioctl(socket, libc::FIONREAD) == Ok(bytes)).then_some(())
    });
}

/// Sends until the socket takes not one byte more: its queue is full and its peer's too. Returns
/// how many it took. A probe of the peer's window may make room for a few after a while.
fn fill_up(mut socket: &TcpStream) -> usize {
    let block = [b'f'; 64 << 10];
    let mut sent = 0;
    // A queue that has no room for a block may have it for a few bytes.
    for length in [64 << 10, 4096, 256, 16, 1] {
        loop {
            match socket.write(&block[..length]) {
                Ok(length) => sent += length,
                Err(_) if is_settled(socket) => break,
                Err(_) => {}
            }
        }
    }
    sent
}

/// A connection whose near end takes nothing more and has got its peer's FIN.
fn half_closed_and_full() -> (TcpStream, TcpStream) {
    let (near, far) = connection();
    fill_up(&near);
    far.shutdown(Shutdown::Write).unwrap();
    wait_for(&near, PollFlags::POLLIN);
    (near, far)
}

/// Whether the peer has acknowledged all that its window let it have, and there is more.
fn is_settled(socket: &TcpStream) -> bool {
    std::thread::yield_now();
    let unsent = not_yet_sent(socket);
    unsent > 0 && unsent == not_acknowledged(socket)
}

/// Ends the connection with a reset, as a peer does that has died.
fn reset_by_peer(far: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&far, sockopt::Linger, &linger).unwrap();
}

/// Ends it as nsplice does.
fn reset(socket: &impl AsFd) -> Result<(), Errno> {
    let unspecified =
        libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the address lives until the call returns, and its length is its own.
    let result = unsafe { libc::connect(socket.as_fd().as_raw_fd(), &unspecified, length) };
    Errno::result(result).map(drop)
}

const SIOCOUTQ: libc::Ioctl = libc::TIOCOUTQ;
const SIOCOUTQNSD: libc::Ioctl = 0x894b;

fn is_at_mark(socket: &impl AsFd) -> bool {
    int_ioctl(socket, SIOCATMARK).unwrap() != 0
}

fn not_acknowledged(socket: &impl AsFd) -> i32 {
    int_ioctl(socket, SIOCOUTQ).unwrap()
}

fn not_yet_sent(socket: &impl AsFd) -> i32 {
    int_ioctl(socket, SIOCOUTQNSD).unwrap()
}

/// A pipe as nsplice has it: read end, write end.
fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap()
}

/// splice(2) with the flags nsplice gives.
fn splice(from: &impl AsFd, to: &impl AsFd, length: usize) -> Result<usize, Errno> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    nix::fcntl::splice(from, None, to, None, length, flags)
}

/// Runs the body of a test in a process of its own, for what all threads of a process share.
/// The test must do nothing else.
fn alone<F: FnOnce()>(body: F) {
    const MARK: &str = "NSPLICE_TEST_ALONE";
    // Such as `kernel::facts::pipes::the_test::{{closure}}`, the first being the crate.
    let path = std::any::type_name::<F>().trim_end_matches("::{{closure}}");
    let name = path.split_once("::").unwrap().1;
    if std::env::var_os(MARK).is_some() {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(MARK, "1");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("running 1 test"), "{name} is not the name of a test");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    eprint!("{errors}");
}
