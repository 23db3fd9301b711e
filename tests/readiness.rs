//! Sockets with short messages are waited for in a set (`engine::uring`'s `Readiness`): whatever
//! comes on them, and whenever, is told as by a wait of its own.
//!
//! The first tests drive an engine step by step; the last ones run the program.

#![allow(clippy::unwrap_used)]

#[path = "standing/forged.rs"]
mod forged;
mod support;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};
use nsplice::config::SocketOptions;
use nsplice::engine::uring::Uring;
use nsplice::engine::{Buffer, Engine, Outcome, Setup, Sleep, Start, Token};
use nsplice::flow::half::BUFFER_BYTES;
use nsplice::flow::{Op, Side};
use support::calls::{SIOCATMARK, int_ioctl};
use support::streams::{Random, accept, connect, send_at_once, wait_for_end};
use support::{Forwarder, Launch, Netns, PATIENCE, Process, eventually, namespaces};

/// Connections of a worker.
const BUSY: usize = 4;
/// Messages after which a socket surely is in the set.
const ROUNDS: usize = 10;

const MESSAGE: [u8; 64] = [7; 64];

/// An engine with its own ends of connections, each in a slot of its own.
struct Worker {
    engine: Uring,
    near: Vec<OwnedFd>,
    /// By slot.
    generations: Vec<u32>,
    /// What is received is so by the ring, as where a turn has many messages.
    by_ring: bool,
    /// The least number of its sockets. No other test's have such: the least that is free is the
    /// one that was closed last.
    numbers: i32,
}

/// Workers made so far.
static WORKERS: AtomicI32 = AtomicI32::new(0);

impl Worker {
    fn new() -> Self {
        let engine = Uring::start(&Setup {
            target: None,
            sockets: SocketOptions::default(),
            pipe_size_bytes: 1 << 20,
            pipes: 4,
            busy_poll_us: 0,
        });
        let numbers = 256 + 8 * WORKERS.fetch_add(1, Ordering::Relaxed);
        let (near, generations) = (Vec::new(), vec![0; 2 * BUSY]);
        Self { engine: engine.unwrap(), near, generations, by_ring: false, numbers }
    }

    fn token(&self, slot: usize, op: fn(Side) -> Op) -> Token {
        let generation = self.generations[slot];
        Token::Flow { index: slot as u32, generation, op: op(Side::Listen) }
    }

    fn connection(&mut self) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        setsockopt(&listener, sockopt::OobInline, &true).unwrap();
        let far = connect(listener.local_addr().unwrap());
        let near = accept(&listener);
        near.set_nonblocking(true).unwrap();
        let number = fcntl(&near, FcntlArg::F_DUPFD_CLOEXEC(self.numbers)).unwrap();
        // SAFETY: the kernel has just made this descriptor for this call alone.
        self.near.push(unsafe { OwnedFd::from_raw_fd(number) });
        far
    }

    fn wait_for(&mut self, slot: usize) {
        self.engine.readable(self.token(slot, Op::Readable), &self.near[slot]);
    }

    /// The next completion, in a limited time.
    #[track_caller]
    fn next(&mut self) -> (usize, Outcome<OwnedFd>) {
        let completion = eventually("a request completes", || {
            self.engine.completion().or_else(|| {
                self.engine.wait(Sleep::ForMs(50)).unwrap();
                self.engine.completion()
            })
        });
        let Token::Flow { index, .. } = completion.token else { panic!("{completion:?}") };
        (index as usize, completion.outcome)
    }

    /// Nothing is told for a while.
    #[track_caller]
    fn assert_silent(&mut self) {
        for _ in 0..3 {
            self.engine.wait(Sleep::ForMs(5)).unwrap();
            let told = self.engine.completion();
            assert!(told.is_none(), "{told:?}");
        }
    }

    /// Whether an urgent byte has arrived, once the slot's wait is over.
    #[track_caller]
    fn told(&mut self, slot: usize) -> Result<bool, Errno> {
        let (index, outcome) = self.next();
        let Outcome::Readable(told) = outcome else { panic!("{outcome:?}") };
        assert_eq!(index, slot);
        told
    }

    #[track_caller]
    fn begin_to_receive(&mut self, slot: usize) {
        if self.by_ring {
            // The turn is over then.
            assert!(self.engine.completion().is_none());
        }
        self.engine.recv(self.token(slot, Op::Recv), &self.near[slot]);
    }

    #[track_caller]
    fn receive(&mut self, slot: usize) -> (Result<Option<u32>, Errno>, bool) {
        self.begin_to_receive(slot);
        let (index, outcome) = self.next();
        let Outcome::Received { result, more } = outcome else { panic!("{outcome:?}") };
        assert_eq!(index, slot);
        let length = result.map(|buffer| {
            let length = buffer.as_ref().map(Buffer::len);
            buffer.into_iter().for_each(|buffer| self.engine.give_back(buffer));
            length
        });
        (length, more)
    }

    /// Receives `length` bytes, which leaves nothing.
    #[track_caller]
    fn take(&mut self, slot: usize, length: u32) {
        assert_eq!(self.receive(slot), (Ok(Some(length)), false));
    }

    #[track_caller]
    fn take_urgent(&mut self, slot: usize) {
        assert!(self.engine.is_at_mark(&self.near[slot]));
        assert_eq!(self.engine.recv_urgent(&self.near[slot]), Ok(Some(b'!')));
    }

    /// How many of its sockets are in the set.
    fn members(&self) -> usize {
        let members = Process::of(std::process::id() as i32).unwrap().in_sets();
        let is_member = |socket: &&OwnedFd| members.contains(&socket.as_raw_fd());
        self.near.iter().filter(is_member).count()
    }
}

/// Sends short messages, one on each connection in a turn.
fn send_messages(worker: &mut Worker, far: &mut [TcpStream], rounds: usize) {
    for _ in 0..rounds {
        for (slot, far) in far.iter_mut().enumerate() {
            worker.wait_for(slot);
            far.write_all(&MESSAGE).unwrap();
        }
        let mut readable: Vec<_> = far.iter().map(|_| worker.next()).collect();
        readable.sort_by_key(|(slot, _)| *slot);
        for (slot, (index, outcome)) in readable.into_iter().enumerate() {
            assert!(matches!(outcome, Outcome::Readable(Ok(false))), "{outcome:?}");
            assert_eq!(index, slot);
            worker.begin_to_receive(slot);
        }
        for _ in &*far {
            let (_, outcome) = worker.next();
            let Outcome::Received { result: Ok(Some(buffer)), more: false } = outcome else {
                panic!("{outcome:?}")
            };
            assert_eq!(buffer.len() as usize, MESSAGE.len());
            worker.engine.give_back(buffer);
        }
    }
}

/// Runs the body with a worker whose connections have had short messages for a while, twice: with
/// what comes received at once, and by the ring as if it was much.
fn busy(body: impl Fn(&mut Worker, &mut Vec<TcpStream>)) {
    for by_ring in [false, true] {
        let mut worker = Worker::new();
        worker.by_ring = by_ring;
        let mut far: Vec<_> = (0..BUSY).map(|_| worker.connection()).collect();
        send_messages(&mut worker, &mut far, ROUNDS);
        assert_eq!(worker.members(), BUSY);
        body(&mut worker, &mut far);
    }
}

fn send_urgent(far: &TcpStream) {
    send(far.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
}

/// Until it is there on the other end.
fn wait_for_bytes(near: &OwnedFd, bytes: i32) {
    eventually("what was sent arrives", || {
        (int_ioctl(near, libc::FIONREAD) == Ok(bytes)).then_some(())
    });
}

#[test]
fn a_message_before_or_after_the_wait_is_told() {
    busy(|worker, far| {
        for _ in 0..20 {
            worker.wait_for(0);
            worker.assert_silent();
            far[0].write_all(b"abc").unwrap();
            assert_eq!(worker.told(0), Ok(false));
            worker.take(0, 3);

            far[0].write_all(b"abc").unwrap();
            wait_for_bytes(&worker.near[0], 3);
            worker.wait_for(0);
            assert_eq!(worker.told(0), Ok(false));
            worker.take(0, 3);
        }
    });
}

#[test]
fn a_message_that_is_reported_before_it_is_asked_for_is_told() {
    busy(|worker, far| {
        for urgent in [false, true] {
            // Another one waits, so that the set is read.
            worker.wait_for(1);
            worker.assert_silent();
            match urgent {
                false => far[0].write_all(b"a").unwrap(),
                true => send_urgent(&far[0]),
            }
            wait_for_bytes(&worker.near[0], 1);
            worker.assert_silent();
            worker.wait_for(0);
            assert_eq!(worker.told(0), Ok(urgent));
            if urgent {
                worker.take_urgent(0);
            } else {
                worker.take(0, 1);
            }
            far[1].write_all(b"b").unwrap();
            assert_eq!(worker.told(1), Ok(false));
            worker.take(1, 1);
        }
    });
}

#[test]
fn an_urgent_byte_is_told_wherever_it_is() {
    busy(|worker, far| {
        // Alone, and first of all.
        worker.wait_for(0);
        worker.assert_silent();
        send_urgent(&far[0]);
        far[0].write_all(b"tail").unwrap();
        assert_eq!(worker.told(0), Ok(true));
        wait_for_bytes(&worker.near[0], 5);
        worker.take_urgent(0);
        worker.wait_for(0);
        assert_eq!(worker.told(0), Ok(false));
        worker.take(0, 4);

        // Behind bytes that were told before it came.
        worker.wait_for(0);
        worker.assert_silent();
        far[0].write_all(b"abc").unwrap();
        assert_eq!(worker.told(0), Ok(false));
        send_urgent(&far[0]);
        far[0].write_all(b"def").unwrap();
        wait_for_bytes(&worker.near[0], 7);
        // A plain recv(2) does not tell that there is more.
        assert_eq!(worker.receive(0), (Ok(Some(3)), worker.by_ring));
        worker.wait_for(0);
        assert_eq!(worker.told(0), Ok(true));
        worker.take_urgent(0);
        worker.wait_for(0);
        assert_eq!(worker.told(0), Ok(false));
        worker.take(0, 3);

        // After a receive and before the wait.
        send_urgent(&far[0]);
        wait_for_bytes(&worker.near[0], 1);
        worker.wait_for(0);
        assert_eq!(worker.told(0), Ok(true));
        worker.take_urgent(0);
    });
}

#[test]
fn an_urgent_byte_that_is_ahead_of_others_is_told_with_them() {
    namespaces!(netns);
    netns.enter(|| {
        busy(|worker, far| {
            worker.wait_for(0);
            worker.assert_silent();
            forged::urgent_behind_a_gap(&netns, &far[0], 3);
            worker.assert_silent();
            far[0].write_all(b"abc").unwrap();
            assert_eq!(worker.told(0), Ok(true));
            assert!(!worker.engine.is_at_mark(&worker.near[0]));
        });
    });
}

#[test]
fn what_a_receive_leaves_is_told_at_once() {
    busy(|worker, far| {
        for length in [BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES] {
            worker.wait_for(0);
            worker.assert_silent();
            far[0].write_all(&vec![1; length as usize]).unwrap();
            wait_for_bytes(&worker.near[0], length as i32);
            let mut left = length;
            while left > 0 {
                assert_eq!(worker.told(0), Ok(false));
                let now = left.min(BUFFER_BYTES);
                left -= now;
                assert_eq!(worker.receive(0), (Ok(Some(now)), left > 0));
                worker.wait_for(0);
            }
            worker.assert_silent();
            far[0].write_all(b"a").unwrap();
            assert_eq!(worker.told(0), Ok(false));
            worker.take(0, 1);
        }
    });
}

/// Ends the connection, with a reset or a FIN.
fn end(far: TcpStream, reset: bool) {
    let linger = libc::linger { l_onoff: reset.into(), l_linger: 0 };
    setsockopt(&far, sockopt::Linger, &linger).unwrap();
}

#[test]
fn an_end_and_a_reset_are_told() {
    for (reset, before) in [(false, false), (false, true), (true, false), (true, true)] {
        busy(|worker, far| {
            if before {
                end(far.remove(0), reset);
                wait_for_end(&worker.near[0]);
                worker.wait_for(0);
            } else {
                worker.wait_for(0);
                worker.assert_silent();
                end(far.remove(0), reset);
            }
            assert_eq!(worker.told(0), Ok(false));
            let ended = if reset { Err(Errno::ECONNRESET) } else { Ok(None) };
            assert_eq!(worker.receive(0).0, ended);
        });
    }
}

/// What a receive of the bytes before it does not tell.
#[test]
fn an_end_and_a_reset_behind_bytes_are_told() {
    for (reset, told_before) in [(false, false), (false, true), (true, false), (true, true)] {
        busy(|worker, far| {
            // Another one waits, so that the set is read.
            worker.wait_for(1);
            worker.wait_for(0);
            worker.assert_silent();
            far[0].write_all(b"abc").unwrap();
            if told_before {
                assert_eq!(worker.told(0), Ok(false));
            }
            end(far.remove(0), reset);
            wait_for_end(&worker.near[0]);
            if told_before {
                // Reported while nobody waits for it.
                worker.assert_silent();
            } else {
                assert_eq!(worker.told(0), Ok(false));
            }
            assert_eq!(worker.receive(0).0, Ok(Some(3)));
            worker.wait_for(0);
            assert_eq!(worker.told(0), Ok(false));
            let ended = if reset { Err(Errno::ECONNRESET) } else { Ok(None) };
            assert_eq!(worker.receive(0).0, ended);
        });
    }
}

/// Also by the set that the socket joins with that message.
#[test]
fn what_is_behind_an_early_message_is_told() {
    for before in 0..4 {
        busy(|worker, far| {
            for behind in ["urgent", "end", "reset"] {
                let mut fresh = worker.connection();
                for _ in 0..before {
                    worker.wait_for(BUSY);
                    fresh.write_all(&MESSAGE).unwrap();
                    assert_eq!(worker.told(BUSY), Ok(false));
                    worker.take(BUSY, MESSAGE.len() as u32);
                }
                worker.wait_for(BUSY);
                fresh.write_all(b"abc").unwrap();
                assert_eq!(worker.told(BUSY), Ok(false));
                let _open = match behind {
                    "urgent" => {
                        send_urgent(&fresh);
                        wait_for_bytes(&worker.near[BUSY], 4);
                        Some(fresh)
                    }
                    _ => {
                        end(fresh, behind == "reset");
                        wait_for_end(&worker.near[BUSY]);
                        None
                    }
                };
                assert_eq!(worker.receive(BUSY).0, Ok(Some(3)));
                worker.wait_for(BUSY);
                assert_eq!(worker.told(BUSY), Ok(behind == "urgent"), "{behind}, {before} before");
                match behind {
                    "urgent" => worker.take_urgent(BUSY),
                    "end" => assert_eq!(worker.receive(BUSY).0, Ok(None)),
                    _ => assert_eq!(worker.receive(BUSY).0, Err(Errno::ECONNRESET)),
                }
                let closed = worker.near.pop().unwrap();
                worker.engine.close(closed);
                worker.generations[BUSY] += 1;
            }
            send_messages(worker, far, 2);
        });
    }
}

#[test]
fn the_ring_receives_when_no_buffer_for_calls_is_left() {
    busy(|worker, far| {
        let mut held = Vec::new();
        for message in 0..1000_u32 {
            worker.wait_for(0);
            far[0].write_all(&message.to_le_bytes()).unwrap();
            assert_eq!(worker.told(0), Ok(false));
            let buffer = loop {
                worker.begin_to_receive(0);
                match worker.next().1 {
                    Outcome::Received { result: Ok(Some(buffer)), .. } => break buffer,
                    // The ring had none, and has more now.
                    Outcome::Received { result: Err(Errno::EINTR), .. } => {}
                    outcome => panic!("message {message}: {outcome:?}"),
                }
            };
            assert_eq!(buffer.len(), 4);
            held.push(buffer);
        }
        let ids: BTreeSet<_> = held.iter().map(Buffer::id).collect();
        assert_eq!(ids.len(), held.len(), "a buffer was given twice");
        held.into_iter().for_each(|buffer| worker.engine.give_back(buffer));
        send_messages(worker, far, 2);
    });
}

#[test]
fn what_the_ring_tells_ends_a_sleep_for_the_set() {
    busy(|worker, _far| {
        worker.wait_for(1);
        let mut fresh = worker.connection();
        worker.wait_for(BUSY);
        worker.assert_silent();
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            fresh.write_all(b"abc").unwrap();
            fresh
        });
        let started = Instant::now();
        let patience_ms = u32::try_from(PATIENCE.as_millis()).unwrap();
        worker.engine.wait(Sleep::ForMs(patience_ms)).unwrap();
        assert!(started.elapsed() < PATIENCE, "it sleeps for as long as it may");
        assert_eq!(worker.told(BUSY), Ok(false));
        writer.join().unwrap();
    });
}

#[test]
fn a_wait_that_is_cancelled_completes_once_and_loses_nothing() {
    busy(|worker, far| {
        worker.wait_for(0);
        worker.assert_silent();
        worker.engine.cancel(worker.token(0, Op::Readable));
        assert_eq!(worker.told(0), Err(Errno::ECANCELED));
        worker.assert_silent();
        far[0].write_all(b"abc").unwrap();
        wait_for_bytes(&worker.near[0], 3);
        worker.assert_silent();
        worker.wait_for(0);
        assert_eq!(worker.told(0), Ok(false));
        worker.take(0, 3);
    });
}

#[test]
fn a_socket_that_was_let_go_is_told_of_by_another_worker_only() {
    busy(|worker, far| {
        worker.wait_for(0);
        worker.assert_silent();
        worker.engine.cancel(worker.token(0, Op::Readable));
        assert_eq!(worker.told(0), Err(Errno::ECANCELED));
        worker.engine.let_go(&worker.near[0]);
        assert_eq!(worker.members(), BUSY - 1);
        let mut other = Worker::new();
        other.near.push(worker.near.remove(0));
        for _ in 0..3 {
            other.wait_for(0);
            far[0].write_all(&MESSAGE).unwrap();
            assert_eq!(other.told(0), Ok(false));
            other.take(0, MESSAGE.len() as u32);
            worker.assert_silent();
        }
        // It comes back, as another flow.
        other.engine.let_go(&other.near[0]);
        worker.near.insert(0, other.near.remove(0));
        worker.generations[0] += 1;
        send_messages(worker, far, 20);
        assert_eq!(worker.members(), BUSY);
    });
}

#[test]
fn a_connection_with_the_slot_and_the_number_of_one_that_was_closed_is_another() {
    busy(|worker, far| {
        for _ in 0..10 {
            // Another one waits, so that the set is read.
            worker.wait_for(1);
            let closed = worker.near[0].as_raw_fd();
            let _ = far[0].write_all(b"for the old one");
            let socket = worker.near.remove(0);
            worker.engine.close(socket);
            // Those that the engine keeps are no more than 16 bits.
            worker.generations[0] += 1 << 16;
            worker.assert_silent();
            let fresh = worker.connection();
            let socket = worker.near.pop().unwrap();
            worker.near.insert(0, socket);
            far[0] = fresh;
            assert_eq!(worker.near[0].as_raw_fd(), closed, "the number is not given again");
            far[0].write_all(b"abc").unwrap();
            wait_for_bytes(&worker.near[0], 3);
            worker.wait_for(0);
            assert_eq!(worker.told(0), Ok(false));
            worker.take(0, 3);
            worker.wait_for(0);
            worker.assert_silent();
            far[0].write_all(b"d").unwrap();
            assert_eq!(worker.told(0), Ok(false));
            worker.take(0, 1);
            far[1].write_all(b"e").unwrap();
            assert_eq!(worker.told(1), Ok(false));
            worker.take(1, 1);
            // It joins as the other one did.
            send_messages(worker, far, 5);
            assert_eq!(worker.members(), BUSY);
        }
    });
}

/// Other sockets than TCP's do not say what a receive leaves.
#[test]
fn a_unix_domain_socket_is_waited_for_by_itself() {
    busy(|worker, far| {
        let (mut there, here) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        worker.near.push(here.into());
        let slot = BUSY;
        for _ in 0..20 {
            there.write_all(b"abc").unwrap();
            there.write_all(b"de").unwrap();
            worker.wait_for(slot);
            assert_eq!(worker.told(slot), Ok(false));
            assert_eq!(worker.receive(slot).0, Ok(Some(5)));
            // Those of the set go on as before.
            for (other, far) in far.iter_mut().enumerate() {
                worker.wait_for(other);
                far.write_all(&MESSAGE).unwrap();
                assert_eq!(worker.told(other), Ok(false));
                worker.take(other, MESSAGE.len() as u32);
            }
        }
        assert_eq!(worker.members(), BUSY);
    });
}

#[test]
fn a_socket_that_no_longer_has_short_messages_leaves_the_set() {
    busy(|worker, far| {
        let block = vec![1; BUFFER_BYTES as usize];
        // Another one waits all the time, so that the set is read.
        worker.wait_for(1);
        eventually("it leaves", || {
            far[0].write_all(&block).unwrap();
            wait_for_bytes(&worker.near[0], block.len() as i32);
            worker.wait_for(0);
            assert_eq!(worker.told(0), Ok(false));
            assert_eq!(worker.receive(0).0, Ok(Some(BUFFER_BYTES)));
            (worker.members() == BUSY - 1).then_some(())
        });
    });
}

/// Bytes of a stream, each with whether it is urgent.
type Marked = Vec<(u8, bool)>;

/// Reads `length` bytes.
fn read_marked(stream: &TcpStream, length: usize) -> Marked {
    let mut marked = Marked::new();
    while marked.len() < length {
        // Only of a byte that is there can be told whether it is urgent.
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        assert!(poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap() > 0);
        let urgent = int_ioctl(stream, SIOCATMARK) == Ok(1);
        let mut buffer = [0; 256];
        let most = if urgent { 1 } else { buffer.len().min(length - marked.len()) };
        let count = (&*stream).read(&mut buffer[..most]).unwrap();
        if count == 0 {
            break;
        }
        marked.extend(buffer[..count].iter().map(|&byte| (byte, urgent)));
    }
    marked
}

/// Sends them, each urgent one and what is between by itself.
fn write_marked(mut stream: &TcpStream, marked: &[(u8, bool)]) {
    for piece in marked.chunk_by(|one, next| !one.1 && !next.1) {
        let bytes: Vec<_> = piece.iter().map(|&(byte, _)| byte).collect();
        if piece[0].1 {
            assert_eq!(send(stream.as_raw_fd(), &bytes, MsgFlags::MSG_OOB), Ok(1));
        } else {
            stream.write_all(&bytes).unwrap();
        }
    }
}

/// Sends back what comes, by a header of one byte: how many follow.
fn echo(stream: TcpStream) {
    setsockopt(&stream, sockopt::OobInline, &true).unwrap();
    while let [(length, _)] = read_marked(&stream, 1)[..] {
        let mut answer = vec![(length, false)];
        answer.extend(read_marked(&stream, length.into()));
        write_marked(&stream, &answer);
    }
}

/// Messages of up to 40 bytes, of which one in three has one urgent byte, somewhere.
fn exchange_marked(stream: &TcpStream, random: &mut Random, messages: usize) {
    setsockopt(stream, sockopt::OobInline, &true).unwrap();
    for _ in 0..messages {
        let length = random.next() as usize % 40 + 1;
        let mut message: Marked = (0..length).map(|_| (random.next() as u8, false)).collect();
        if random.next().is_multiple_of(3) {
            let at = random.next() as usize % length;
            message[at].1 = true;
        }
        let mut sent = vec![(length as u8, false)];
        sent.extend(&message);
        write_marked(stream, &sent);
        assert_eq!(read_marked(stream, length + 1), sent);
    }
}

/// A program with one worker, and both ends of connections through it. Those of clients are in its
/// set: they have had short messages, all at once.
struct Busy {
    forwarder: Forwarder,
    pairs: Vec<(TcpStream, TcpStream)>,
}

impl Busy {
    fn start(clients: &Netns, targets: &Netns, connections: usize) -> Self {
        let listener = targets.listen("127.0.0.1:0");
        let forwarder = Launch::nsplice()
            .listen_netns(clients)
            .connect_netns(targets)
            .listen(([127, 0, 0, 1], 0))
            .connect(listener.local_addr().unwrap())
            .option("--workers", "1")
            .start();
        let connect = |_| (clients.enter(|| connect(forwarder.address())), accept(&listener));
        let pairs: Vec<_> = (0..connections).map(connect).collect();
        let connector = forwarder.connector();
        for _ in 0..ROUNDS {
            send_at_once(&connector, pairs.iter().map(|(client, server)| (client, server)));
        }
        assert!(connector.in_sets().len() >= connections);
        Self { forwarder, pairs }
    }
}

#[test]
fn ends_and_resets_behind_bytes_are_passed_on_by_a_busy_worker() {
    namespaces!(clients, targets);
    for reset in [false, true] {
        // More than it receives by calls.
        let Busy { forwarder, pairs } = Busy::start(&clients, &targets, 96);
        let mut got = MESSAGE;
        let (clients, servers): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let connector = forwarder.connector();
        connector.stop();
        for mut client in clients {
            client.write_all(&MESSAGE).unwrap();
            end(client, reset);
        }
        connector.signal(Signal::SIGCONT);
        for mut server in servers {
            server.read_exact(&mut got).unwrap();
            let ended = server.read(&mut got).map_err(|error| error.raw_os_error());
            assert_eq!(ended, if reset { Err(Some(libc::ECONNRESET)) } else { Ok(0) });
        }
        forwarder.stop().assert_clean();
    }
}

#[test]
fn urgent_bytes_keep_their_places_in_a_turn_with_many() {
    namespaces!(clients, targets);
    let Busy { forwarder, pairs } = Busy::start(&clients, &targets, 96);
    let connector = forwarder.connector();
    let marked = |index: usize| -> Marked {
        (0..8).map(|place| ((index + place) as u8, place == index % 9)).collect()
    };
    for _ in 0..10 {
        connector.stop();
        for (index, (client, _)) in pairs.iter().enumerate() {
            write_marked(client, &marked(index));
        }
        connector.signal(Signal::SIGCONT);
        for (index, (_, server)) in pairs.iter().enumerate() {
            setsockopt(server, sockopt::OobInline, &true).unwrap();
            assert_eq!(read_marked(server, 8), marked(index), "connection {index}");
        }
    }
    forwarder.stop().assert_clean();
}

#[test]
fn urgent_bytes_keep_their_places_on_the_sockets_of_a_busy_worker() {
    namespaces!(clients, targets);
    let Busy { forwarder, pairs } = Busy::start(&clients, &targets, 16);
    std::thread::scope(|scope| {
        for (index, (client, server)) in pairs.into_iter().enumerate() {
            scope.spawn(move || echo(server));
            let mut random = Random(index as u64);
            scope.spawn(move || exchange_marked(&client, &mut random, 400));
        }
    });
    forwarder.stop().assert_clean();
}
