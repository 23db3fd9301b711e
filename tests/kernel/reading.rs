//! An epoll set of sockets that are received from without waiting: when it reports what; and what
//! ends a wait for it when a ring has something to tell.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::opcode;
use io_uring::types::Fd;
use nix::poll::PollFlags;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{MsgFlags, send};

use super::forged::urgent_behind_a_gap;
use super::ring::{Ring, recv};
use super::{connection, reset_by_peer, wait_for, wait_for_bytes};
use crate::support::streams::wait_for_end;
use crate::support::{PATIENCE, namespaces};

const IN: EpollFlags = EpollFlags::EPOLLIN;
const EVENTS: EpollFlags =
    IN.union(EpollFlags::EPOLLPRI).union(EpollFlags::EPOLLRDHUP).union(EpollFlags::EPOLLET);

/// Long enough for what comes, and short enough to wait for what does not.
const A_WHILE: Duration = Duration::from_millis(20);

struct Set(Epoll);

impl Set {
    fn new() -> Self {
        Self(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap())
    }

    fn add(&self, socket: impl AsFd, events: EpollFlags) {
        let name = socket.as_fd().as_raw_fd() as u64;
        self.0.add(socket, EpollEvent::new(events, name)).unwrap();
    }

    /// A connection in the set whose near end has `abc` to read.
    fn with_bytes(&self) -> (TcpStream, TcpStream) {
        let (near, mut far) = connection();
        self.add(&near, EVENTS);
        far.write_all(b"abc").unwrap();
        wait_for_bytes(&near, 3);
        (near, far)
    }

    /// What is reported within the time.
    fn reports(&self, time: Duration) -> Vec<(i32, EpollFlags)> {
        let mut events = [EpollEvent::empty(); 4];
        let timeout = u16::try_from(time.as_millis()).unwrap();
        let count = self.0.wait(&mut events, timeout).unwrap();
        events[..count].iter().map(|event| (event.data() as i32, event.events())).collect()
    }

    /// What is reported of the only socket that something is reported of.
    #[track_caller]
    fn report(&self, socket: &TcpStream) -> EpollFlags {
        let reports = self.reports(PATIENCE);
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert_eq!(reports[0].0, socket.as_raw_fd());
        reports[0].1
    }
}

fn send_urgent(socket: &TcpStream) {
    send(socket.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
}

/// Has an urgent byte, or the end, follow the three bytes that are there.
fn follow(near: &TcpStream, far: TcpStream, urgent: bool) -> Option<TcpStream> {
    if urgent {
        send_urgent(&far);
        wait_for_bytes(near, 4);
        return Some(far);
    }
    drop(far);
    wait_for_end(near);
    None
}

/// Receives once, with room for more than there is.
#[track_caller]
fn take(mut near: &TcpStream, wanted: usize) {
    assert_eq!(near.read(&mut [0; 64]).unwrap(), wanted);
}

#[test]
fn a_report_is_of_the_state_with_urgent_data_only_where_there_is_some() {
    let set = Set::new();
    for urgent in [false, true] {
        let (near, mut far) = connection();
        set.add(&near, EVENTS);
        assert_eq!(set.reports(Duration::ZERO), [], "the worker spins");
        match urgent {
            false => far.write_all(b"a").unwrap(),
            true => send_urgent(&far),
        }
        let wanted = if urgent { IN | EpollFlags::EPOLLPRI } else { IN };
        assert_eq!(
            set.report(&near),
            wanted,
            "urgent bytes are passed on as others, or each wait asks for a mark"
        );
    }
}

#[test]
fn what_a_receive_has_taken_is_not_reported_and_what_comes_after_it_is() {
    let set = Set::new();
    let (near, mut far) = set.with_bytes();
    take(&near, 3);
    assert_eq!(set.reports(A_WHILE), [], "each message is reported twice: a flow reads nothing");
    far.write_all(b"d").unwrap();
    assert_eq!(set.report(&near), IN, "a flow waits for ever");
}

#[test]
fn what_has_come_since_a_receive_is_reported_also_when_it_is_asked_for_later() {
    let set = Set::new();
    for end in [false, true] {
        let (near, mut far) = set.with_bytes();
        take(&near, 3);
        if end {
            reset_by_peer(far);
        } else {
            far.write_all(b"d").unwrap();
            wait_for_bytes(&near, 1);
        }
        assert!(set.report(&near).contains(IN), "a flow waits for ever");
    }
}

#[test]
fn what_comes_between_a_report_and_a_receive_that_takes_other_bytes_is_reported() {
    for urgent in [false, true] {
        let set = Set::new();
        let (near, far) = set.with_bytes();
        assert_eq!(set.report(&near), IN);
        let _far = follow(&near, far, urgent);
        take(&near, 3);
        let wanted = if urgent { EpollFlags::EPOLLPRI } else { EpollFlags::EPOLLRDHUP };
        assert_eq!(set.report(&near), IN | wanted, "a flow waits for ever");
    }
}

#[test]
fn what_a_receive_leaves_is_not_reported_again_but_its_report_told_of_more_than_bytes() {
    for urgent in [false, true] {
        let set = Set::new();
        let (near, far) = set.with_bytes();
        let _far = follow(&near, far, urgent);
        assert_ne!(set.report(&near), IN, "a flow waits for ever for what is there");
        take(&near, 3);
        assert_eq!(
            set.reports(A_WHILE),
            [],
            "an edge-triggered set reports states: Readiness need not part the two; nothing breaks"
        );
    }
}

#[test]
fn a_reset_that_was_reported_is_not_told_by_a_receive_of_the_bytes_before_it_nor_again() {
    let set = Set::new();
    let (near, mut far) = connection();
    set.add(&near, EVENTS);
    far.write_all(b"abc").unwrap();
    reset_by_peer(far);
    wait_for(&near, PollFlags::POLLHUP);
    let failed = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
    assert!(set.report(&near).contains(failed), "a flow waits for ever");
    take(&near, 3);
    assert_eq!(set.reports(A_WHILE), [], "Readiness need not part with it; nothing breaks");
}

#[test]
fn what_is_there_when_a_socket_joins_is_reported() {
    let set = Set::new();
    let (near, mut far) = connection();
    far.write_all(b"abc").unwrap();
    wait_for_bytes(&near, 3);
    set.add(&near, EVENTS);
    assert_eq!(set.report(&near), IN, "a flow waits for ever");
}

#[test]
fn an_urgent_byte_that_is_announced_before_those_that_come_first_is_reported_without_them() {
    namespaces!(netns);
    let listener = netns.listen("127.0.0.1:0");
    let far = netns.enter(|| TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    let (near, _) = listener.accept().unwrap();
    let set = Set::new();
    set.add(&near, EVENTS);
    urgent_behind_a_gap(&netns, &far, 5);
    assert_eq!(
        set.report(&near),
        EpollFlags::EPOLLPRI,
        "Readiness need not tell it apart; nothing breaks"
    );
}

/// A ring that waits for `awaited`, and a set that has the ring itself and what the ring rings.
fn ring_and_set(awaited: impl AsFd) -> (Ring, EventFd, Set) {
    let (mut ring, bell, set) = (Ring::new(), EventFd::new().unwrap(), Set::new());
    ring.io_uring().submitter().register_eventfd(bell.as_raw_fd()).unwrap();
    let fd = Fd(awaited.as_fd().as_raw_fd());
    ring.start(1, opcode::PollAdd::new(fd, libc::POLLIN as u32).build());
    assert_eq!(ring.done(), []);
    (ring, bell, set)
}

#[test]
fn a_ring_with_something_to_do_rings_its_eventfd_and_is_not_readable_itself() {
    let (near, mut far) = connection();
    let (mut ring, bell, set) = ring_and_set(&near);
    set.add(&bell, IN | EpollFlags::EPOLLET);
    let itself = Set::new();
    // SAFETY: the ring lives as long as the set has it.
    itself.add(unsafe { BorrowedFd::borrow_raw(ring.io_uring().as_raw_fd()) }, IN);
    // What makes it tell anything is a task of the ring's own, too.
    assert_eq!(itself.reports(Duration::ZERO), []);
    assert_eq!(ring.done(), []);
    far.write_all(b"a").unwrap();
    assert_eq!(set.reports(PATIENCE), [(bell.as_raw_fd(), IN)], "a worker sleeps for ever");
    assert_eq!(
        itself.reports(A_WHILE),
        [],
        "it is: the ring could be in the set itself, without an eventfd; nothing breaks"
    );
    assert_eq!(ring.next().token, 1);
}

#[test]
fn a_ring_that_waits_for_an_eventfd_rings_its_own_only_after_a_while() {
    for _ in 0..50 {
        let awaited = EventFd::new().unwrap();
        let (mut ring, bell, set) = ring_and_set(&awaited);
        set.add(&bell, IN);
        awaited.write(1).unwrap();
        let is_rung = !set.reports(Duration::ZERO).is_empty();
        assert_eq!(set.reports(PATIENCE), [(bell.as_raw_fd(), IN)], "a worker sleeps for ever");
        assert_eq!(ring.next().token, 1);
        if !is_rung {
            return;
        }
    }
    panic!("at once: crew::Shared could wake a worker by an eventfd; nothing breaks");
}

#[test]
fn an_eventfd_need_not_be_read_to_be_reported_each_time_it_is_rung() {
    let (set, bell) = (Set::new(), EventFd::new().unwrap());
    set.add(&bell, IN | EpollFlags::EPOLLET);
    for _ in 0..3 {
        bell.write(1).unwrap();
        assert_eq!(set.reports(PATIENCE), [(bell.as_raw_fd(), IN)], "a worker sleeps for ever");
        assert_eq!(set.reports(A_WHILE), [], "the worker spins");
    }
}

#[test]
fn a_ring_whose_eventfd_is_disabled_does_not_ring_it() {
    let (near, mut far) = connection();
    let (mut ring, bell, set) = ring_and_set(&near);
    set.add(&bell, IN | EpollFlags::EPOLLET);
    ring.io_uring().completion().disable_eventfd();
    far.write_all(b"a").unwrap();
    assert_eq!(set.reports(A_WHILE), [], "each completion wakes the worker once more");
    assert_eq!(ring.next().token, 1);
}

#[test]
fn a_receive_into_a_provided_buffer_tells_whether_it_left_something() {
    for urgent in [false, true] {
        let mut ring = Ring::with_buffers(4);
        let (near, mut far) = connection();
        far.write_all(b"abc").unwrap();
        let _far = follow(&near, far, urgent);
        // Without the end.
        wait_for_bytes(&near, if urgent { 4 } else { 3 });
        ring.start(1, recv(&near, libc::MSG_DONTWAIT));
        let done = ring.next();
        assert_eq!(done.result, Ok(3));
        assert!(
            io_uring::cqueue::sock_nonempty(done.flags),
            "a flow waits for ever for what is there"
        );
    }
}
