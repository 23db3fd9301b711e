//! A ring that reads an epoll set: when it reports what, and in which order.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::types::Fd;
use io_uring::{cqueue, opcode, squeue};
use nix::poll::PollFlags;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, send};

use super::forged::urgent_behind_a_gap;
use super::ring::{Done, Ring, recv};
use super::workers::Workers;
use super::{connection, reset_by_peer, wait_for, wait_for_bytes};
use crate::support::engine::reads_sets;
use crate::support::{namespaces, skip};

const READ: u64 = 1;
const RECEIVE: u64 = 2;
const EVENTS: EpollFlags =
    EpollFlags::EPOLLIN.union(EpollFlags::EPOLLPRI).union(EpollFlags::EPOLLET);

/// A ring, and a set that it reads.
struct Reader {
    // Dropped in this order: the ring before what it writes to.
    ring: Ring,
    set: Epoll,
    events: Box<[EpollEvent; 4]>,
}

impl Reader {
    /// `None` before Linux 6.15.
    fn new() -> Option<Self> {
        let ring = Ring::with_buffers(4);
        let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let events = Box::new([EpollEvent::empty(); 4]);
        reads_sets().then_some(Self { ring, set, events })
    }

    fn add(&self, socket: &TcpStream) {
        let name = socket.as_raw_fd() as u64;
        self.set.add(socket, EpollEvent::new(EVENTS, name)).unwrap();
    }

    /// A connection in the set whose near end has `abc` to read.
    fn with_bytes(&self) -> (TcpStream, TcpStream) {
        let (near, mut far) = connection();
        self.add(&near);
        far.write_all(b"abc").unwrap();
        wait_for_bytes(&near, 3);
        (near, far)
    }

    fn read(&mut self) -> squeue::Entry {
        let events = self.events.as_mut_ptr().cast();
        opcode::EpollWait::new(Fd(self.set.0.as_raw_fd()), events, 4).build()
    }

    fn start(&mut self) {
        let read = self.read();
        self.ring.start(READ, read);
    }

    /// What a reading that has completed reports.
    fn reports(&self, done: &Done) -> Vec<(i32, EpollFlags)> {
        assert_eq!(done.token, READ, "{done:?}");
        let count = done.result.unwrap() as usize;
        self.events[..count].iter().map(|event| (event.data() as i32, event.events())).collect()
    }

    /// Takes all that `near` has with one receive.
    fn take(&mut self, near: &TcpStream) -> Done {
        self.ring.start(RECEIVE, recv(near, libc::MSG_DONTWAIT));
        let done = self.ring.next_of(RECEIVE);
        self.ring.provide(done.buffer().unwrap());
        done
    }
}

macro_rules! reader {
    ($name:ident) => {
        let Some(mut $name) = Reader::new() else { skip!("the ring reads no sets") };
    };
}

fn send_urgent(socket: &TcpStream) {
    send(socket.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
}

#[test]
fn a_reading_waits_and_tells_the_state_with_urgent_data_only_where_there_is_some() {
    reader!(reader);
    for urgent in [false, true] {
        let (near, mut far) = connection();
        reader.add(&near);
        reader.start();
        assert_eq!(reader.ring.done(), [], "a reading does not wait: the worker spins");
        match urgent {
            false => far.write_all(b"a").unwrap(),
            true => send_urgent(&far),
        }
        let done = reader.ring.next();
        let wanted =
            if urgent { EpollFlags::EPOLLIN | EpollFlags::EPOLLPRI } else { EpollFlags::EPOLLIN };
        assert_eq!(
            reader.reports(&done),
            [(near.as_raw_fd(), wanted)],
            "urgent bytes are passed on as others, or each wait asks for a mark"
        );
    }
}

#[test]
fn what_a_receive_before_it_has_taken_is_not_reported() {
    reader!(reader);
    let (near, mut far) = reader.with_bytes();
    let read = reader.read();
    reader.ring.push(RECEIVE, recv(&near, libc::MSG_DONTWAIT));
    reader.ring.push(READ, read);
    reader.ring.enter(1, None).unwrap();
    let done = reader.ring.next_of(RECEIVE);
    assert!(!cqueue::sock_nonempty(done.flags), "a receive does not tell that nothing is left");
    assert_eq!(reader.ring.done(), [], "each message is reported twice: a flow reads nothing");
    far.write_all(b"d").unwrap();
    let done = reader.ring.next();
    assert_eq!(reader.reports(&done).len(), 1, "what comes after it is not reported");
}

#[test]
fn completions_are_in_the_order_of_receiving_and_reading() {
    reader!(reader);
    let (near, _far) = reader.with_bytes();
    let read = reader.read();
    reader.ring.push(READ, read);
    reader.ring.push(RECEIVE, recv(&near, libc::MSG_DONTWAIT));
    reader.ring.enter(2, None).unwrap();
    let order = [reader.ring.next().token, reader.ring.next().token];
    assert_eq!(
        order,
        [READ, RECEIVE],
        "a report of bytes that were taken seems to be of new ones: an urgent byte that comes \
         meanwhile is passed on as another"
    );
}

#[test]
fn what_has_come_since_a_receive_that_left_nothing_is_reported_also_to_a_later_reading() {
    reader!(reader);
    for end in [false, true] {
        let (near, mut far) = reader.with_bytes();
        reader.take(&near);
        if end {
            reset_by_peer(far);
        } else {
            far.write_all(b"d").unwrap();
            wait_for_bytes(&near, 1);
        }
        reader.start();
        let done = reader.ring.next();
        assert_eq!(reader.reports(&done)[0].0, near.as_raw_fd(), "a flow waits for ever");
    }
}

#[test]
fn a_reset_that_was_reported_is_told_neither_by_a_receive_of_the_bytes_before_it_nor_again() {
    reader!(reader);
    let (near, mut far) = connection();
    reader.add(&near);
    far.write_all(b"abc").unwrap();
    reset_by_peer(far);
    wait_for(&near, PollFlags::POLLHUP);
    reader.start();
    let done = reader.ring.next();
    let events = reader.reports(&done)[0].1;
    assert!(events.contains(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP), "a flow waits for ever");
    let done = reader.take(&near);
    assert_eq!(done.result, Ok(3));
    assert!(
        !cqueue::sock_nonempty(done.flags),
        "a receive tells of the reset: Readiness need not part with the socket; nothing breaks"
    );
    reader.start();
    assert_eq!(reader.ring.done(), [], "the same; nothing breaks");
}

#[test]
fn a_reading_that_wakes_up_for_nothing_128_times_is_given_to_a_kernel_worker() {
    let workers = Workers::new();
    reader!(reader);
    let (mut near, mut far) = connection();
    reader.add(&near);
    reader.start();
    for wakeup in 1..=1000 {
        far.write_all(b"a").unwrap();
        wait_for_bytes(&near, 1);
        near.read_exact(&mut [0]).unwrap();
        let done = reader.ring.done();
        if workers.is_new() {
            assert!(wakeup > 100, "after {wakeup}: Readiness makes it anew too late");
            return;
        }
        assert_eq!(done, [], "a wake-up for nothing is reported: a flow spins");
    }
    panic!("it never is: Readiness need not make it anew; nothing breaks");
}

#[test]
fn what_is_there_when_a_socket_joins_is_reported() {
    reader!(reader);
    let (near, mut far) = connection();
    far.write_all(b"abc").unwrap();
    wait_for_bytes(&near, 3);
    reader.add(&near);
    reader.start();
    let done = reader.ring.next();
    assert_eq!(reader.reports(&done).len(), 1, "a flow waits for ever");
}

#[test]
fn what_a_receive_leaves_is_not_reported_again() {
    reader!(reader);
    let (near, mut far) = connection();
    reader.add(&near);
    far.write_all(&[7; 20]).unwrap();
    wait_for_bytes(&near, 20);
    reader.start();
    reader.ring.next_of(READ);
    let done = reader.take(&near);
    assert!(cqueue::sock_nonempty(done.flags), "{done:?}: a flow waits for what is there already");
    reader.start();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(
        reader.ring.done(),
        [],
        "an edge-triggered set reports states: Readiness need not part the two; nothing breaks"
    );
}

#[test]
fn an_urgent_byte_that_is_announced_before_those_that_come_first_is_reported_without_them() {
    reader!(reader);
    namespaces!(netns);
    let listener = netns.listen("127.0.0.1:0");
    let far = netns.enter(|| TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    let (near, _) = listener.accept().unwrap();
    reader.add(&near);
    reader.start();
    urgent_behind_a_gap(&netns, &far, 5);
    let done = reader.ring.next();
    assert_eq!(
        reader.reports(&done),
        [(near.as_raw_fd(), EpollFlags::EPOLLPRI)],
        "Readiness need not tell it apart; nothing breaks"
    );
}
