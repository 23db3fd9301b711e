//! Waiting with epoll: states level-triggered, changes edge-triggered, clients exclusively.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc::{Sender, channel};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, connect, getsockopt, recv, send,
    setsockopt, socket, sockopt,
};

use super::{
    connection, fill_up, half_closed_and_full, listener, reset_by_peer, wait_for, wait_for_bytes,
};
use crate::support::{PATIENCE, eventually};

const STATE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLPRI);
const CHANGE: EpollFlags = EpollFlags::EPOLLOUT.union(EpollFlags::EPOLLET);
const CLIENT: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLEXCLUSIVE);

fn set() -> Epoll {
    Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap()
}

fn add(set: &Epoll, fd: &impl AsFd, events: EpollFlags) {
    set.add(fd, EpollEvent::new(events, 0)).unwrap();
}

/// What is reported of the only descriptor in the set, within `timeout`.
fn reported_within(set: &Epoll, timeout: EpollTimeout) -> Option<EpollFlags> {
    let mut events = [EpollEvent::empty(); 2];
    (set.wait(&mut events, timeout).unwrap() > 0).then(|| events[0].events())
}

fn reported_now(set: &Epoll) -> Option<EpollFlags> {
    reported_within(set, EpollTimeout::ZERO)
}

#[track_caller]
fn reported(set: &Epoll) -> EpollFlags {
    reported_within(set, EpollTimeout::try_from(PATIENCE).unwrap()).expect("nothing is reported")
}

#[test]
fn a_state_that_was_waited_for_names_urgent_data_only_where_there_is_some() {
    let (mut near, mut far) = connection();
    let set = set();
    add(&set, &near, STATE);
    assert_eq!(reported_now(&set), None);
    far.write_all(b"abc").unwrap();
    for _ in 0..2 {
        let state = reported(&set);
        assert_eq!(state, EpollFlags::EPOLLIN, "a flow asks for a mark where there is none");
    }
    near.read_exact(&mut [0; 3]).unwrap();
    assert_eq!(reported_now(&set), None, "nothing is there any more: a flow spins");
    send(far.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
    for _ in 0..2 {
        let state = reported(&set);
        assert!(state.contains(STATE), "{state:?}: an urgent byte is not noticed");
    }
    near.read_exact(&mut [0]).unwrap();
    assert_eq!(reported_now(&set), None);
}

#[test]
fn a_state_that_stays_is_reported_until_the_descriptor_leaves() {
    let (near, mut far) = connection();
    let set = set();
    add(&set, &near, STATE);
    far.write_all(b"abc").unwrap();
    reported(&set);
    set.delete(&near).unwrap();
    assert_eq!(reported_now(&set), None);
    add(&set, &near, STATE);
    assert!(
        reported_now(&set).is_some(),
        "what was there before is not reported: a flow that asks again waits for ever"
    );
}

#[test]
fn a_change_is_reported_once_also_on_a_half_closed_socket() {
    let (near, mut far) = half_closed_and_full();
    far.set_nonblocking(true).unwrap();
    let set = set();
    add(&set, &near, CHANGE);
    let first = reported_now(&set);
    assert!(!first.is_some_and(|first| first.contains(EpollFlags::EPOLLOUT)), "{first:?}");
    assert_eq!(reported_now(&set), None, "it is reported again and again: the worker spins");
    eventually("the report that there is room; without it the flow stalls", || {
        let _ = far.read(&mut [0; 64 << 10]);
        reported_now(&set).filter(|change| change.contains(EpollFlags::EPOLLOUT)).map(drop)
    });
    assert_eq!(reported_now(&set), None, "room that stays keeps the worker busy");
}

#[test]
fn room_is_reported_after_each_time_that_a_send_found_none() {
    let (near, mut far) = connection();
    let set = set();
    add(&set, &near, CHANGE);
    assert!(reported(&set).contains(EpollFlags::EPOLLOUT));
    for _ in 0..2 {
        let sent = fill_up(&near);
        while reported_now(&set).is_some() {}
        far.read_exact(&mut vec![0; sent]).unwrap();
        let room = reported(&set);
        assert!(room.contains(EpollFlags::EPOLLOUT), "{room:?} instead of room: the flow stalls");
    }
}

#[test]
fn a_change_tells_a_reset_as_err_whether_it_came_before_or_after() {
    for is_before in [true, false] {
        let (near, far) = connection();
        fill_up(&near);
        let set = set();
        if is_before {
            reset_by_peer(far);
            wait_for(&near, PollFlags::POLLHUP);
            add(&set, &near, CHANGE);
        } else {
            add(&set, &near, CHANGE);
            assert_eq!(reported_now(&set), None);
            reset_by_peer(far);
        }
        let failure = reported(&set);
        assert!(
            failure.contains(EpollFlags::EPOLLERR),
            "{failure:?}: a back-pressured flow does not learn that its sink was reset"
        );
    }
}

#[test]
fn a_set_of_changes_is_a_state_in_another_set() {
    let (near, _far) = connection();
    let (outer, inner) = (set(), set());
    add(&outer, &inner.0, EpollFlags::EPOLLIN);
    assert_eq!(reported_now(&outer), None);
    add(&inner, &near, CHANGE);
    let sentence = "the inner set is not told of: changes are never taken";
    assert_eq!(reported_now(&outer), Some(EpollFlags::EPOLLIN), "{sentence}");
    assert_eq!(reported_now(&outer), Some(EpollFlags::EPOLLIN), "{sentence}");
    reported(&inner);
    assert_eq!(reported_now(&outer), None, "it is told of for ever: the worker spins");
}

/// Waits for clients in a set of its own, leaves it and joins again with each, and tells its name
/// for each, until one says that this is the end.
fn serve(name: usize, listener: &TcpListener, waits: &Sender<()>, tell: &Sender<usize>) {
    let set = set();
    add(&set, listener, CLIENT);
    loop {
        waits.send(()).unwrap();
        reported(&set);
        let Ok((mut client, _)) = listener.accept() else { continue };
        set.delete(listener).unwrap();
        add(&set, listener, CLIENT);
        let mut word = [0];
        client.read_exact(&mut word).unwrap();
        if word == *b"e" {
            return;
        }
        tell.send(name).unwrap();
    }
}

#[test]
fn exclusive_waits_that_leave_and_join_again_take_turns() {
    let listener = &listener();
    listener.set_nonblocking(true).unwrap();
    let (waits, waiting) = channel();
    let (tell, told) = channel();
    let client = |word: &[u8]| super::connect(listener).write_all(word).unwrap();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for name in [0, 1] {
            let (waits, tell) = (waits.clone(), tell.clone());
            threads.push(scope.spawn(move || serve(name, listener, &waits, &tell)));
            waiting.recv_timeout(PATIENCE).unwrap();
        }
        let mut turns = Vec::new();
        for _ in 0..16 {
            client(b"x");
            turns.push(told.recv_timeout(PATIENCE).unwrap());
            waiting.recv_timeout(PATIENCE).unwrap();
        }
        eventually("both threads end", || {
            client(b"e");
            threads.iter().all(|thread| thread.is_finished()).then_some(())
        });
        // Not one after the other: who says that he waits may not be asleep yet, and is passed
        // over.
        let first = turns.iter().filter(|name| **name == 0).count();
        assert!((4..=12).contains(&first), "{turns:?}: one worker gets most connections");
    });
}

/// A socket that began to connect and was accepted, given data and reset before anybody looked.
fn accepted_and_reset() -> (OwnedFd, SockaddrStorage) {
    let listener = listener();
    let address = SockaddrStorage::from(listener.local_addr().unwrap());
    let near =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
    let begun = connect(near.as_raw_fd(), &address);
    assert!(matches!(begun, Ok(()) | Err(Errno::EINPROGRESS)), "{begun:?}");
    let (mut far, _) = listener.accept().unwrap();
    far.write_all(b"data").unwrap();
    wait_for_bytes(&near, 4);
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&far, sockopt::Linger, &linger).unwrap();
    drop(far);
    wait_for(&near, PollFlags::POLLERR);
    (near, address)
}

#[test]
fn the_failure_of_a_socket_that_was_connected_is_econnreset_and_its_data_stay() {
    let (near, _) = accepted_and_reset();
    let failure = getsockopt(&near, sockopt::SocketError).unwrap();
    assert_eq!(failure, Errno::ECONNRESET as i32, "it cannot be told from a refusal");
    let mut data = [0; 8];
    assert_eq!(recv(near.as_raw_fd(), &mut data, MsgFlags::empty()), Ok(4));
    assert_eq!(recv(near.as_raw_fd(), &mut data, MsgFlags::empty()), Ok(0));
}

#[test]
fn a_second_connect_drops_what_a_target_sent_before_it_reset() {
    let (near, address) = accepted_and_reset();
    assert_eq!(connect(near.as_raw_fd(), &address), Err(Errno::ECONNRESET));
    let data = recv(near.as_raw_fd(), &mut [0; 8], MsgFlags::empty());
    assert!(
        !matches!(data, Ok(1..)),
        "{data:?}: the data stay: connect(2) could tell what came of the first; nothing breaks"
    );
}
