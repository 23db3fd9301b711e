//! Accepting in rings: who gets a connection, and what the accepted socket is like.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use io_uring::opcode;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{getsockopt, sockopt};

use super::ring::{self, Done, Ring};
use super::{alone, connect, listener};
use crate::support::PATIENCE;

fn own(done: Done) -> TcpStream {
    // SAFETY: the kernel has just made this descriptor for this completion alone.
    unsafe { OwnedFd::from_raw_fd(done.result.unwrap() as i32) }.into()
}

/// Waits until one of the rings has accepted, and says which.
fn wait_any(rings: &mut [Ring]) -> (usize, Done) {
    let mut fds: Vec<_> =
        rings.iter().map(|ring| PollFd::new(ring.as_fd(), PollFlags::POLLIN)).collect();
    let ready = poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
    assert!(ready > 0, "no ring accepts within {PATIENCE:?}");
    let index = fds.iter().position(|fd| fd.any() == Some(true)).unwrap();
    drop(fds);
    (index, rings[index].next())
}

#[test]
fn options_of_the_listener_are_those_of_accepted_sockets() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(address) else { continue };
        super::setsockopt(&listener, sockopt::TcpNoDelay, &true).unwrap();
        super::setsockopt(&listener, sockopt::OobInline, &true).unwrap();
        let _client = connect(&listener);
        let mut ring = Ring::new();
        ring.start(1, ring::accept(&listener));
        let accepted = own(ring.next());
        let inherited = [
            getsockopt(&accepted, sockopt::TcpNoDelay).unwrap(),
            getsockopt(&accepted, sockopt::OobInline).unwrap(),
        ];
        assert_eq!(
            inherited, [true; 2],
            "TCP_NODELAY or SO_OOBINLINE is not inherited: short messages are late, or urgent \
             bytes are lost"
        );
    }
}

#[test]
fn who_waits_in_the_queue_has_the_options_of_its_handshake() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = connect(&listener);
    super::setsockopt(&listener, sockopt::TcpNoDelay, &true).unwrap();
    super::setsockopt(&listener, sockopt::OobInline, &true).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let options = [
        getsockopt(&accepted, sockopt::TcpNoDelay).unwrap(),
        getsockopt(&accepted, sockopt::OobInline).unwrap(),
    ];
    assert_eq!(
        options, [false; 2],
        "a client who waited has what was set later: Engine::adopt is for other sockets than TCP's \
         only; nothing breaks"
    );
}

#[test]
fn an_accepted_socket_has_the_flags_asked_for() {
    let listener = listener();
    let _client = connect(&listener);
    let mut ring = Ring::new();
    ring.start(1, ring::accept(&listener));
    let accepted = own(ring.next());
    let status = OFlag::from_bits_retain(fcntl(&accepted, FcntlArg::F_GETFL).unwrap());
    let descriptor = FdFlag::from_bits_retain(fcntl(&accepted, FcntlArg::F_GETFD).unwrap());
    assert!(
        status.contains(OFlag::O_NONBLOCK) && descriptor.contains(FdFlag::FD_CLOEXEC),
        "the socket is {status:?} {descriptor:?}: splice would wait for it and hold up its worker"
    );
}

#[test]
fn one_shot_accepts_in_several_rings_take_turns() {
    let listener = listener();
    let mut rings = [Ring::new(), Ring::new()];
    for ring in &mut rings {
        ring.start(1, ring::accept(&listener));
    }
    let mut turns = Vec::new();
    for _ in 0..8 {
        let _client = connect(&listener);
        let (index, done) = wait_any(&mut rings);
        own(done);
        rings[index].start(1, ring::accept(&listener));
        turns.push(index);
    }
    assert_eq!(
        turns,
        [0, 1, 0, 1, 0, 1, 0, 1],
        "rings that accept from one listener do not take turns: one worker gets more connections \
         than the others"
    );
}

#[test]
fn multishot_accepts_do_not_take_turns() {
    let listener = listener();
    let mut rings = [Ring::new(), Ring::new()];
    for ring in &mut rings {
        let accept = opcode::AcceptMulti::new(ring::fd(&listener)).flags(libc::SOCK_CLOEXEC);
        ring.start(1, accept.build());
    }
    let mut turns = Vec::new();
    for _ in 0..4 {
        let _client = connect(&listener);
        let (index, done) = wait_any(&mut rings);
        assert!(done.is_armed());
        own(done);
        turns.push(index);
    }
    assert_eq!(
        turns, [0; 4],
        "multishot accepts share the connections: they could replace one-shot ones; nothing breaks"
    );
}

#[test]
fn an_accept_waits_also_on_a_listener_that_is_o_nonblock() {
    let listener = listener();
    listener.set_nonblocking(true).unwrap();
    let mut ring = Ring::new();
    ring.start(1, ring::accept(&listener));
    assert_eq!(
        ring.done(),
        [],
        "it does not wait: with -L and such a socket a worker looks for connections only ten \
         times a second, and logs each look"
    );
    let _client = connect(&listener);
    own(ring.next());
}

/// What TCP_INFO tells of a listening socket as that which is not acknowledged.
fn waiting(listener: &TcpListener) -> u32 {
    // SAFETY: it consists of numbers, for which zeroes are valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let (fd, place) = (listener.as_raw_fd(), (&raw mut info).cast());
    // SAFETY: there is room for the length given until the call returns.
    let result =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut length) };
    Errno::result(result).unwrap();
    info.tcpi_unacked
}

#[test]
fn a_listening_socket_tells_how_many_wait_in_its_queue() {
    let listener = listener();
    assert_eq!(waiting(&listener), 0);
    let _clients: Vec<_> = (0..3).map(|_| connect(&listener)).collect();
    let broken = "a drain takes more connections than --max-connections, or leaves some";
    assert_eq!(waiting(&listener), 3, "{broken}");
    let _served = listener.accept().unwrap();
    assert_eq!(waiting(&listener), 2, "{broken}");
}

/// So a worker that has run out of them pauses and asks again, whether anybody connects or not.
#[test]
fn an_accept_without_descriptors_fails_also_when_nobody_connects() {
    alone(|| {
        let listener = listener();
        let mut ring = Ring::new();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
        ring.start(1, ring::accept(&listener));
        let done = ring.done();
        assert!(
            done.len() == 1 && done[0].result == Err(Errno::EMFILE),
            "{done:?}: it waits for a connection first: a worker that has run out of descriptors \
             is no longer woken by its pause; nothing breaks"
        );
    });
}

#[test]
fn an_accept_without_descriptors_fails_and_leaves_the_connection() {
    alone(|| {
        let listener = listener();
        let _client = connect(&listener);
        let mut ring = Ring::new();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        // Limits new descriptors only.
        setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
        ring.start(1, ring::accept(&listener));
        assert_eq!(
            ring.next().result,
            Err(Errno::EMFILE),
            "Worker::accepted pauses after an error; without one it does not"
        );
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
        ring.start(1, ring::accept(&listener));
        let accepted = ring.next().result;
        assert!(accepted.is_ok(), "{accepted:?}: the connection is lost, not accepted later");
    });
}
