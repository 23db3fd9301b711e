//! After a worker has warmed up it asks the allocator for nothing: not for a message, not for a
//! connection, not for a gigabyte. And what an idle connection keeps is small.
//!
//! The worker runs in a thread of this process, on real sockets; its thread's allocations count.

#![allow(clippy::unwrap_used)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nsplice::config::{SocketOptions, Transfer};
use nsplice::engine::epoll::Epoll;
use nsplice::engine::uring::Uring;
use nsplice::engine::{Setup, Start};
use nsplice::log::Log;
use nsplice::worker::{Clock, Settings, Worker};
use support::streams::{accept, connect, exchange};

/// Counts what each thread asks for, and how much of it there is.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
    /// Bytes asked for and not given back; what another thread gives back counts there.
    static HELD_BYTES: Cell<i64> = const { Cell::new(0) };
}

fn held(more: usize, less: usize) {
    HELD_BYTES.set(HELD_BYTES.get() + more as i64 - less as i64);
}

// SAFETY: every call is the system allocator's; the counters are plain data of the thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.set(ASKED.get() + 1);
        held(layout.size(), 0);
        // SAFETY: the caller keeps what `alloc` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        held(0, layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ASKED.set(ASKED.get() + 1);
        held(bytes, layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(start, layout, bytes) }
    }
}

/// A worker in a thread, seen from outside.
struct Observed {
    address: SocketAddr,
    targets: TcpListener,
    asked: Arc<AtomicU64>,
    held_bytes: Arc<AtomicI64>,
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Observed {
    fn start<E: Start>(transfer: Transfer) -> Self {
        let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (clients, targets) = (listen(), listen());
        let (address, target) = (clients.local_addr().unwrap(), targets.local_addr().unwrap());
        let asked = Arc::new(AtomicU64::new(0));
        let held_bytes = Arc::new(AtomicI64::new(0));
        let is_over = Arc::new(AtomicBool::new(false));
        let (count, over) = (Arc::clone(&asked), Arc::clone(&is_over));
        let held = Arc::clone(&held_bytes);
        let thread = std::thread::spawn(move || {
            let engine = E::start(&Setup {
                target: Some(target),
                sockets: SocketOptions::default(),
                pipe_size_bytes: 1 << 20,
                pipes: 64,
                busy_poll_us: 0,
            })
            .unwrap();
            let settings = Settings {
                transfer,
                grace_ms: 1000,
                clock: Clock::default(),
                target: target.to_string(),
                single: false,
                adopts: false,
                pipe_size_bytes: 1 << 20,
                max_connections: u32::MAX,
                place: None,
            };
            let (log, _) = Log::start(false).unwrap();
            let mut worker = Worker::new(engine, settings, log, None);
            worker.listen(OwnedFd::from(clients));
            while !over.load(Ordering::Acquire) {
                worker.turn().unwrap();
                count.store(ASKED.get(), Ordering::Release);
                held.store(HELD_BYTES.get(), Ordering::Release);
            }
            worker.stop();
            while !worker.is_done() {
                worker.turn().unwrap();
            }
        });
        Self { address, targets, asked, held_bytes, is_over, thread }
    }

    fn connection(&self) -> (TcpStream, TcpStream) {
        let client = connect(self.address);
        (client, accept(&self.targets))
    }

    /// Does `work` twice; what the second time asks the allocator for.
    fn asked_for(&self, work: impl Fn()) -> u64 {
        work();
        let before = self.asked.load(Ordering::Acquire);
        work();
        self.asked.load(Ordering::Acquire) - before
    }

    fn stop(self) {
        self.is_over.store(true, Ordering::Release);
        // Something to wake up for.
        drop(TcpStream::connect(self.address));
        self.thread.join().unwrap();
    }
}

const CONNECTIONS: usize = 32;

#[test]
fn messages_and_bulk_ask_for_no_memory() {
    exchange_messages_and_bulk::<Uring>();
    exchange_messages_and_bulk::<Epoll>();
}

fn exchange_messages_and_bulk<E: Start>() {
    for transfer in [Transfer::Auto, Transfer::Copy, Transfer::Splice] {
        let observed = Observed::start::<E>(transfer);
        let pairs: Vec<_> = (0..CONNECTIONS).map(|_| observed.connection()).collect();
        for bytes in [1, 64, 4096, 100_000] {
            let asked = observed.asked_for(|| {
                let message = vec![7; bytes];
                let mut got = vec![0; bytes];
                for (client, server) in &pairs {
                    let (mut client, mut server) = (client, server);
                    client.write_all(&message).unwrap();
                    server.read_exact(&mut got).unwrap();
                    server.write_all(&message).unwrap();
                    client.read_exact(&mut got).unwrap();
                }
            });
            assert_eq!(asked, 0, "{}, {transfer:?}, messages of {bytes} bytes", E::NAME);
        }
        // Many in a turn, for so long that the worker knows that it is busy.
        let asked = observed.asked_for(|| {
            let mut message = [7; 64];
            for _ in 0..20 {
                let all = || pairs.iter().map(|(client, server)| (client, server));
                all().for_each(|(mut client, _)| client.write_all(&message).unwrap());
                all().for_each(|(_, mut server)| server.read_exact(&mut message).unwrap());
                all().for_each(|(_, mut server)| server.write_all(&message).unwrap());
                all().for_each(|(mut client, _)| client.read_exact(&mut message).unwrap());
            }
        });
        assert_eq!(asked, 0, "{}, {transfer:?}, many messages at a time", E::NAME);
        let asked = observed.asked_for(|| {
            let (client, server) = &pairs[0];
            std::thread::scope(|scope| {
                scope.spawn(|| exchange(server, 2, 1, 50_000_000));
                exchange(client, 1, 2, 50_000_000);
            });
        });
        assert_eq!(asked, 0, "{}, {transfer:?}, bulk", E::NAME);
        drop(pairs);
        observed.stop();
    }
}

#[test]
fn connections_ask_for_no_memory() {
    open_and_close_connections::<Uring>();
    open_and_close_connections::<Epoll>();
}

fn open_and_close_connections<E: Start>() {
    let observed = Observed::start::<E>(Transfer::Auto);
    let asked = observed.asked_for(|| {
        for _ in 0..500 {
            let (mut client, mut server) = observed.connection();
            client.write_all(b"ping").unwrap();
            server.read_exact(&mut [0; 4]).unwrap();
            drop(server);
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        }
    });
    assert_eq!(asked, 0, "{}", E::NAME);
    observed.stop();
}

/// What an idle connection may keep of the worker's memory, whatever it has done before, besides its
/// slot: that has its room from the start, and src/worker/slot.rs says how much.
const IDLE_BYTES_MAX: i64 = 256;

#[test]
fn an_idle_connection_keeps_little_memory() {
    keep_idle_connections::<Uring>();
    keep_idle_connections::<Epoll>();
}

fn keep_idle_connections<E: Start>() {
    // With the first, one more than a table has room for that doubles: the most it has for each.
    const MORE_CONNECTIONS: usize = 512;
    for transfer in [Transfer::Auto, Transfer::Copy, Transfer::Splice] {
        let observed = Observed::start::<E>(transfer);
        let message = vec![7; 20_000];
        let connection = || {
            let (client, server) = observed.connection();
            for (mut from, mut to) in [(&client, &server), (&server, &client)] {
                from.write_all(&message).unwrap();
                to.read_exact(&mut vec![0; message.len()]).unwrap();
            }
            (client, server)
        };
        let first = connection();
        let before = observed.held_bytes.load(Ordering::Acquire);
        // The table of slots is a part of it: else the count is wrong.
        assert!(before > 500_000, "{}: {before} bytes", E::NAME);
        let more: Vec<_> = (0..MORE_CONNECTIONS).map(|_| connection()).collect();
        let held_bytes = observed.held_bytes.load(Ordering::Acquire) - before;
        let for_each = held_bytes / MORE_CONNECTIONS as i64;
        let range = 0..IDLE_BYTES_MAX;
        assert!(range.contains(&for_each), "{}, {transfer:?}: {for_each} bytes", E::NAME);
        drop((first, more));
        observed.stop();
    }
}
