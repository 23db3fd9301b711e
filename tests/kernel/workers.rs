//! Which requests the kernel gives to worker threads of its own (io-wq).
//!
//! Such a thread carries its ring's name until it has idled for seconds. One of these tests runs
//! at a time, and looks for threads that were not there before.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use io_uring::opcode;
use nix::errno::Errno;

use super::ring::{self, Ring};
use super::{connection, fill_up, half_closed_and_full, pipe};
use crate::support::eventually;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The kernel's worker threads when it began.
pub(super) struct Workers {
    before: BTreeSet<String>,
    _guard: MutexGuard<'static, ()>,
}

impl Workers {
    pub(super) fn new() -> Self {
        let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        Self { before: Self::all(), _guard: guard }
    }

    fn all() -> BTreeSet<String> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let named = tasks.filter_map(|task| {
            let path = task.ok()?.path();
            let name = std::fs::read_to_string(path.join("comm")).ok()?;
            name.starts_with("iou-wrk").then(|| path.display().to_string())
        });
        named.collect()
    }

    pub(super) fn is_new(&self) -> bool {
        !Self::all().is_subset(&self.before)
    }
}

fn send(socket: &TcpStream, bytes: &'static [u8], flags: i32) -> io_uring::squeue::Entry {
    let flags = flags | libc::MSG_NOSIGNAL;
    opcode::Send::new(ring::fd(socket), bytes.as_ptr(), bytes.len() as u32).flags(flags).build()
}

#[test]
fn a_send_with_dontwait_needs_no_worker_thread() {
    let workers = Workers::new();
    let (full, _far) = connection();
    fill_up(&full);
    let (half_closed, _far) = half_closed_and_full();
    let mut ring = Ring::new();
    for socket in [&full, &half_closed] {
        eventually("a send finds no room", || {
            fill_up(socket);
            ring.start(1, send(socket, b"x", libc::MSG_DONTWAIT));
            (ring.next_of(1).result == Err(Errno::EAGAIN)).then_some(())
        });
    }
    assert!(!workers.is_new(), "a send that finds no room is given to a kernel worker thread");
}

#[test]
fn what_nsplice_submits_needs_no_worker_thread() {
    let workers = Workers::new();
    let (near, far) = connection();
    let (gone, _peer) = connection();
    let mut ring = Ring::with_buffers(1);
    ring.start(1, ring::poll_once(&near, libc::POLLIN | libc::POLLPRI));
    ring.start(2, ring::poll_on(&near, libc::POLLOUT));
    std::io::Write::write_all(&mut &far, b"x").unwrap();
    eventually("both polls report", || {
        (ring.done().iter().any(|done| done.token == 1)).then_some(())
    });
    ring.start(3, ring::recv(&near, libc::MSG_DONTWAIT));
    assert_eq!(ring.next_of(3).result, Ok(1));
    ring.start(4, send(&near, b"x", libc::MSG_DONTWAIT));
    assert_eq!(ring.next_of(4).result, Ok(1));
    let number = std::os::fd::IntoRawFd::into_raw_fd(gone);
    ring.start(5, opcode::Close::new(io_uring::types::Fd(number)).build());
    assert_eq!(ring.next_of(5).result, Ok(0));
    assert!(!workers.is_new(), "a kernel worker thread does what the ring's thread should do");
}

#[test]
fn a_send_that_waits_on_a_half_closed_socket_is_given_to_a_worker_thread() {
    let workers = Workers::new();
    let (half_closed, far) = half_closed_and_full();
    let mut ring = Ring::new();
    // Each of a limited number of tries in the ring finds the socket ready and has no room.
    let sentence = "a kernel worker thread takes a send that waits; if none does, nothing breaks";
    eventually(sentence, || {
        fill_up(&half_closed);
        ring.start(1, send(&half_closed, b"x", 0));
        while ring.done().is_empty() {
            if workers.is_new() {
                return Some(());
            }
        }
        None
    });
    drop(far);
    ring.next_of(1);
}

#[test]
fn a_shutdown_in_the_ring_is_given_to_a_worker_thread() {
    let workers = Workers::new();
    let (near, _far) = connection();
    let mut ring = Ring::new();
    ring.start(1, opcode::Shutdown::new(ring::fd(&near), libc::SHUT_WR).build());
    assert_eq!(ring.next_of(1).result, Ok(0));
    assert!(
        workers.is_new(),
        "IORING_OP_SHUTDOWN is done by the ring's own thread: it could replace the system call; \
         nothing breaks"
    );
}

#[test]
fn a_splice_in_the_ring_is_given_to_a_worker_thread() {
    let workers = Workers::new();
    let (near, mut far) = connection();
    let (_read, write) = pipe();
    std::io::Write::write_all(&mut far, b"x").unwrap();
    super::wait_for_bytes(&near, 1);
    let mut ring = Ring::new();
    let splice = opcode::Splice::new(ring::fd(&near), -1, ring::fd(&write), -1, 4096);
    ring.start(1, splice.flags(libc::SPLICE_F_NONBLOCK).build());
    assert_eq!(ring.next_of(1).result, Ok(1));
    assert!(
        workers.is_new(),
        "IORING_OP_SPLICE is done by the ring's own thread: it could be measured anew; nothing \
         breaks"
    );
}
