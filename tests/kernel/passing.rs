//! Sockets that cross from one process to the other.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};

use super::{alone, connect, listener, pipe, wait_for};
use crate::support::skip;

/// What the kernel allows in a message.
const MAX: usize = 253;

fn channel() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn send(channel: &OwnedFd, fds: &[RawFd]) -> Result<(), Errno> {
    let rights = [ControlMessage::ScmRights(fds)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(b"m")], &rights, flags, None).map(drop)
}

/// What arrived: bytes, descriptors, flags.
fn receive(channel: &OwnedFd) -> Result<(usize, Vec<OwnedFd>, MsgFlags), Errno> {
    receive_with(channel, MsgFlags::empty())
}

fn receive_with(
    channel: &OwnedFd,
    flags: MsgFlags,
) -> Result<(usize, Vec<OwnedFd>, MsgFlags), Errno> {
    let mut byte = [0];
    let mut control = nix::cmsg_space!([RawFd; MAX]);
    let mut iov = [IoSliceMut::new(&mut byte)];
    let flags = flags | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(channel.as_raw_fd(), &mut iov, Some(&mut control), flags)?;
    let (bytes, flags) = (received.bytes, received.flags);
    Ok((bytes, descriptors(&control), flags))
}

/// The descriptors of a message's only control part. By hand, because nix gives none of those
/// that arrived when others did not.
fn descriptors(control: &[u8]) -> Vec<OwnedFd> {
    let header = size_of::<libc::cmsghdr>();
    let length = usize::from_ne_bytes(control[..size_of::<usize>()].try_into().unwrap());
    let numbers = control.get(header..length).unwrap_or_default().chunks_exact(size_of::<RawFd>());
    let numbers = numbers.map(|bytes| RawFd::from_ne_bytes(bytes.try_into().unwrap()));
    // SAFETY: the kernel has just made these descriptors for this message alone.
    numbers.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect()
}

#[test]
fn a_message_takes_253_descriptors() {
    let (here, there) = channel();
    let (read, _write) = pipe();
    assert_eq!(
        send(&here, &[read.as_raw_fd(); MAX]),
        Ok(()),
        "it takes fewer: Outbox::flush tries the same batch again and again"
    );
    let (bytes, fds, flags) = receive(&there).unwrap();
    assert_eq!((bytes, fds.len()), (1, MAX), "a message does not arrive with all its sockets");
    assert!(!flags.contains(MsgFlags::MSG_CTRUNC));
    assert_eq!(
        send(&here, &[read.as_raw_fd(); MAX + 1]),
        Err(Errno::EINVAL),
        "it takes more: MAX_SOCKETS could grow; nothing breaks"
    );
}

#[test]
fn passed_descriptors_are_closed_on_exec() {
    let (here, there) = channel();
    send(&here, &[here.as_raw_fd()]).unwrap();
    let (_, fds, _) = receive(&there).unwrap();
    let flags = FdFlag::from_bits_retain(fcntl(&fds[0], FcntlArg::F_GETFD).unwrap());
    assert!(flags.contains(FdFlag::FD_CLOEXEC), "connections leak into other programs");
}

#[test]
fn messages_keep_their_borders() {
    let (here, there) = channel();
    let (read, write) = pipe();
    send(&here, &[read.as_raw_fd(), write.as_raw_fd()]).unwrap();
    send(&here, &[read.as_raw_fd()]).unwrap();
    let counts = [(); 2].map(|()| receive(&there).unwrap()).map(|(_, fds, _)| fds.len());
    assert_eq!(counts, [2, 1], "messages run together: sockets go to the wrong place");
}

#[test]
fn the_death_of_the_other_end_is_seen_after_its_messages() {
    let (here, there) = channel();
    send(&here, &[]).unwrap();
    drop(here);
    let seen = wait_for(&there, PollFlags::POLLIN);
    assert!(seen.contains(PollFlags::POLLHUP), "{seen:?}: a process outlives the other");
    assert_eq!(receive(&there).unwrap().0, 1, "messages are lost");
    assert_eq!(receive(&there).unwrap().0, 0, "the end of the other process is not told");
    assert_eq!(send(&there, &[]), Err(Errno::EPIPE), "Outbox::flush waits for the dead");
}

#[test]
fn the_death_of_an_end_with_unread_messages_is_a_reset() {
    let (here, there) = channel();
    send(&there, &[]).unwrap();
    drop(here);
    wait_for(&there, PollFlags::POLLIN);
    let told = receive(&there).map(|(bytes, ..)| bytes);
    assert!(
        matches!(told, Err(Errno::ECONNRESET) | Ok(0)),
        "{told:?}: both processes take ECONNRESET and 0 for the other's end, nothing else"
    );
}

#[test]
fn a_channel_that_is_full_says_later() {
    let (here, there) = channel();
    let refused = (0..100_000).find_map(|_| send(&here, &[]).err());
    assert_eq!(refused, Some(Errno::EAGAIN), "Outbox::flush waits for room after an error");
    while receive(&there).is_ok() {}
    wait_for(&here, PollFlags::POLLOUT);
    assert_eq!(send(&here, &[]), Ok(()));
}

#[test]
fn what_an_end_has_sent_is_there_after_the_reset_by_its_death() {
    let (here, there) = channel();
    let (read, _write) = pipe();
    send(&there, &[]).unwrap();
    send(&here, &[read.as_raw_fd()]).unwrap();
    drop(here);
    let told = receive(&there).map(|(bytes, ..)| bytes);
    assert_eq!(told, Err(Errno::ECONNRESET), "Channel::receive need not go on after it");
    let (bytes, fds, _) = receive(&there).unwrap();
    assert_eq!((bytes, fds.len()), (1, 1), "connections on their way are lost");
    assert_eq!(receive(&there).unwrap().0, 0, "Channel::receive takes an end for a message");
}

#[test]
fn a_message_that_is_looked_at_gives_its_descriptors_and_is_still_there() {
    let (here, there) = channel();
    let (read, _write) = pipe();
    send(&here, &[read.as_raw_fd(); 3]).unwrap();
    let (bytes, seen, _) = receive_with(&there, MsgFlags::MSG_PEEK).unwrap();
    assert_eq!((bytes, seen.len()), (1, 3), "Channel::receive gets no sockets");
    let (bytes, fds, _) = receive(&there).unwrap();
    assert_eq!((bytes, fds.len()), (1, 3), "Channel::receive loses what it had no room for");
}

/// As many as there is room for arrive, and are the receiver's to close.
#[test]
fn a_receiver_without_descriptors_gets_some_of_them_and_msg_ctrunc() {
    alone(|| {
        let (here, there) = channel();
        let (read, _write) = pipe();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        send(&here, &[read.as_raw_fd(); 5]).unwrap();
        // Room for two: the lowest free numbers are taken first.
        let next = read.try_clone().unwrap().as_raw_fd() as u64;
        setrlimit(Resource::RLIMIT_NOFILE, next + 2, hard).unwrap();
        let (bytes, fds, flags) = receive(&there).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
        assert!(
            bytes == 1 && flags.contains(MsgFlags::MSG_CTRUNC),
            "{bytes} {flags:?}: the loss of sockets is not told"
        );
        assert_eq!(fds.len(), 2, "the sockets that there is room for do not arrive");
    });
}

#[test]
fn a_user_has_as_many_descriptors_under_way_as_its_limit_of_open_ones() {
    alone(|| {
        if crate::facts::namespaces::become_nobody(64_001).is_err() {
            skip!("there is no other user in this user namespace");
        }
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
        let (here, there) = channel();
        let (read, _write) = pipe();
        let fds = [read.as_raw_fd(); 50];
        let refused = (0..10).find_map(|_| send(&here, &fds).err());
        assert_eq!(
            refused,
            Some(Errno::ETOOMANYREFS),
            "descriptors under way have no limit, or another error tells it; Outbox::flush takes \
             any error for \"later\""
        );
        drop(receive(&there).unwrap());
        drop(receive(&there).unwrap());
        assert_eq!(send(&here, &fds), Ok(()), "it is not over when they have arrived");
    });
}

#[test]
fn a_listening_socket_keeps_its_queue_while_anybody_has_it() {
    let listener = listener();
    let shared = listener.try_clone().unwrap();
    let mut client = connect(&listener);
    drop(listener);
    let later = connect(&shared);
    for far in [&mut client, &mut { later }] {
        let (mut near, _) = shared.accept().expect("a client in the queue is lost at a takeover");
        near.write_all(b"x").unwrap();
        let mut byte = [0];
        far.read_exact(&mut byte).expect("a client in the queue is reset at a takeover");
    }
}
