//! Any message on a channel between the processes: each input is a script of what its other end
//! sends, with whatever bytes and descriptors, to a receiver that may be short of descriptors.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use nsplice::handoff::{Channel, MAX_SOCKETS};

/// Messages of an input; a channel has room for more.
const MESSAGES_MAX: usize = 8;
/// How long somebody else may hold a descriptor that is closed here.
const PATIENCE_MS: u16 = 5_000;

pub fn run(data: &[u8]) {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("pipe");
    script(data, &read);
    drop(read);
    // All copies are closed when the pipe has nobody who reads.
    assert!(has_come(&write, PollFlags::POLLERR), "a descriptor is leaked");
}

/// Whether the end of the other side has come, or comes soon: a process that lists the descriptors
/// of others, as lsof does, holds each for a moment. One that is leaked stays.
fn has_come(end: impl AsFd, event: PollFlags) -> bool {
    let mut fds = [PollFd::new(end.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::from(PATIENCE_MS)).expect("poll");
    fds[0].revents().is_some_and(|events| events.contains(event))
}

fn script(data: &[u8], passed: &OwnedFd) {
    let (here, there) = Channel::pair().expect("socketpair");
    let mut bytes = data.iter().copied();
    let mut sent = Vec::new();
    while let Some(kind) = bytes.next()
        && sent.len() < MESSAGES_MAX
    {
        let length = usize::from(bytes.next().unwrap_or(1)) % 5;
        let body: Vec<u8> = bytes.by_ref().take(length).collect();
        let count = bytes.next().unwrap_or(0);
        sent.extend(send(here.as_fd(), kind, &body, count, passed.as_raw_fd()));
        if kind & 0x40 != 0 {
            // As if someone who sends it also asked for credentials of the other end.
            let _ = setsockopt(&there, sockopt::PassCred, &true);
        }
    }
    let room = bytes.next().filter(|&room| room < 16);
    drop(here);
    for sent in sent {
        let result = with_room(room, passed, || there.receive());
        // What there was no room for is still there.
        let result = if matches!(result, Err(Errno::EMFILE)) { there.receive() } else { result };
        check(result, &sent);
    }
    assert!(has_come(&there, PollFlags::POLLHUP), "the other end is closed");
    assert!(matches!(there.receive(), Ok(None)), "a channel whose other end is closed");
}

/// What was sent.
struct Sent {
    body: Vec<u8>,
    descriptors: usize,
}

fn send(to: BorrowedFd, kind: u8, body: &[u8], count: u8, fd: RawFd) -> Option<Sent> {
    // Mostly few, and often the most there can be.
    let count = if count < 200 { usize::from(count % 4) } else { MAX_SOCKETS };
    let fds = vec![fd; count];
    let (first, second) = fds.split_at(if kind & 0x80 == 0 { 0 } else { count / 2 });
    let parts = [ControlMessage::ScmRights(first), ControlMessage::ScmRights(second)];
    let control = match (first.is_empty(), second.is_empty()) {
        (_, true) => &[][..],
        (true, false) => &parts[1..],
        (false, false) => &parts[..],
    };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(body)], control, flags, None);
    sent.ok().map(|_| Sent { body: body.to_vec(), descriptors: count })
}

/// Runs `receive` with room for so many more descriptors.
fn with_room<T>(room: Option<u8>, fd: &OwnedFd, receive: impl FnOnce() -> T) -> T {
    let Some(room) = room else { return receive() };
    let next = fd.try_clone().expect("a descriptor").as_raw_fd();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit");
    let limit = next as u64 + u64::from(room);
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).expect("setrlimit");
    let result = receive();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("setrlimit");
    result
}

fn check(result: Result<Option<nsplice::handoff::Received>, Errno>, sent: &Sent) {
    match result {
        Ok(None) => assert!(sent.body.is_empty(), "a message is taken for the end"),
        Ok(Some(received)) => {
            assert_eq!(sent.body.first(), Some(&(received.message as u8)));
            assert_eq!(received.sockets.len(), sent.descriptors);
            for socket in &received.sockets {
                let flags = fcntl(socket, FcntlArg::F_GETFD).expect("it is open");
                assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
            }
        }
        Err(errno) => {
            assert_eq!(errno, Errno::EBADMSG);
            assert!(!b"RLSAC".contains(&sent.body[0]), "a message of ours is refused");
        }
    }
}
