//! Streams whose every byte is known in advance from a seed and a position.
//!
//! A receiver compares what arrives with what it must be, byte for byte, so a fault is found where
//! it happens: lost, doubled, swapped or foreign bytes.

use std::hash::Hasher;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::LazyLock;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::{PATIENCE, Process};

/// A small deterministic generator (SplitMix64): the same numbers from the same seed, everywhere.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number from `low` to `high`, small ones as likely as large ones: uniform in the logarithm.
    pub fn log_uniform(&mut self, low: u64, high: u64) -> u64 {
        let share = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        let (low_ln, high_ln) = ((low as f64).ln(), (high as f64).ln());
        ((low_ln + share * (high_ln - low_ln)).exp().round() as u64).clamp(low, high)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Random bytes that blocks are cut from: copying and comparing are fast even unoptimised.
static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random(1);
    (0..TABLE_BYTES / 8).flat_map(|_| random.next().to_le_bytes()).collect()
});
const TABLE_BYTES: usize = 1 << 20;

/// A block begins with 8 bytes of its own and goes on with a cut of the table at a place of its
/// own, so no block is like another one, of this or of another stream.
const BLOCK_BYTES: usize = 4096;

/// A stream of `len` known bytes, and how far it has been sent or received.
#[derive(Clone, Debug)]
pub struct Pattern {
    seed: u64,
    pub at: u64,
    pub len: u64,
}

impl Pattern {
    pub fn new(seed: u64, len: u64) -> Self {
        Self { seed, at: 0, len }
    }

    pub fn is_done(&self) -> bool {
        self.at == self.len
    }

    /// Writes the next bytes into `buffer` without going on; returns how many there are.
    pub fn peek(&self, buffer: &mut [u8]) -> usize {
        let count = buffer.len().min(usize::try_from(self.len - self.at).unwrap());
        let mut filled = 0;
        while filled < count {
            let piece = self.piece(self.at + filled as u64);
            let n = piece.bytes().len().min(count - filled);
            buffer[filled..filled + n].copy_from_slice(&piece.bytes()[..n]);
            filled += n;
        }
        count
    }

    /// Compares the next bytes with `got` and goes on.
    pub fn check(&mut self, got: &[u8]) -> Result<(), String> {
        if self.len - self.at < got.len() as u64 {
            return Err(format!("{} bytes and more where {} end it", self.at, self.len));
        }
        let mut rest = got;
        while !rest.is_empty() {
            let piece = self.piece(self.at);
            let n = piece.bytes().len().min(rest.len());
            if piece.bytes()[..n] != rest[..n] {
                return Err(format!("wrong bytes after {} of {}", self.at, self.len));
            }
            self.at += n as u64;
            rest = &rest[n..];
        }
        Ok(())
    }

    /// The bytes from `at` to the end of their half of a block.
    fn piece(&self, at: u64) -> Piece {
        let (block, offset) = (at / BLOCK_BYTES as u64, (at % BLOCK_BYTES as u64) as usize);
        let own = mix(self.seed ^ mix(block + 1));
        if offset < 8 {
            return Piece::Own(own.to_le_bytes(), offset);
        }
        let cut = (own % (TABLE_BYTES - BLOCK_BYTES) as u64) as usize;
        Piece::Table(&TABLE[cut + offset..cut + BLOCK_BYTES])
    }
}

enum Piece {
    Own([u8; 8], usize),
    Table(&'static [u8]),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Own(bytes, offset) => &bytes[*offset..],
            Self::Table(bytes) => bytes,
        }
    }
}

/// Connects in the calling thread's namespace. All reads and writes have a limit.
pub fn connect(address: SocketAddr) -> TcpStream {
    bounded(TcpStream::connect_timeout(&address, PATIENCE).unwrap())
}

/// Whether a client waits at `server`, or comes within `ms` milliseconds.
pub fn is_next(server: &TcpListener, ms: u16) -> bool {
    let mut fds = [PollFd::new(server.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, ms).unwrap() > 0
}

/// Takes the next connection, in a limited time.
pub fn accept(listener: &TcpListener) -> TcpStream {
    let ms = PATIENCE.as_millis().try_into().unwrap();
    assert!(is_next(listener, ms), "no connection arrives within {PATIENCE:?}");
    bounded(listener.accept().unwrap().0)
}

/// Limits each read and write, so that a test fails instead of waiting for ever.
pub fn bounded(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Sends a whole stream.
pub fn send(stream: &mut impl Write, seed: u64, len: u64) {
    let mut pattern = Pattern::new(seed, len);
    let mut buffer = vec![0; 64 << 10];
    while !pattern.is_done() {
        let n = pattern.peek(&mut buffer);
        stream.write_all(&buffer[..n]).unwrap();
        pattern.at += n as u64;
    }
}

/// Receives a whole stream; panics where it is not what it must be.
pub fn receive(stream: &mut impl Read, seed: u64, len: u64) {
    let mut pattern = Pattern::new(seed, len);
    let mut buffer = vec![0; 64 << 10];
    while !pattern.is_done() {
        let want = buffer.len().min(usize::try_from(len - pattern.at).unwrap());
        let n = stream.read(&mut buffer[..want]).unwrap();
        assert!(n > 0, "the stream ends after {} of {len} bytes", pattern.at);
        pattern.check(&buffer[..n]).unwrap();
    }
}

/// Sends one stream while receiving another.
pub fn exchange(stream: &TcpStream, send_seed: u64, receive_seed: u64, len: u64) {
    std::thread::scope(|scope| {
        scope.spawn(|| send(&mut &*stream, send_seed, len));
        receive(&mut &*stream, receive_seed, len);
    });
}

/// Waits until the peer's end, or its reset, is there.
pub fn wait_for_end(near: &impl AsFd) {
    let end = PollFlags::from_bits_retain(libc::POLLRDHUP);
    let mut fds = [PollFd::new(near.as_fd(), end)];
    assert_eq!(poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()), Ok(1));
}

/// Sends a short message on each connection, so that a forwarder finds all of them together: it is
/// stopped meanwhile. Returns when they have arrived.
pub fn send_at_once<'a>(
    forwarder: &Process,
    pairs: impl Iterator<Item = (&'a TcpStream, &'a TcpStream)> + Clone,
) {
    let mut message = [7; 64];
    forwarder.stop();
    pairs.clone().for_each(|(mut from, _)| from.write_all(&message).unwrap());
    forwarder.signal(Signal::SIGCONT);
    pairs.for_each(|(_, mut to)| to.read_exact(&mut message).unwrap());
}

/// How a stream ended, as a program that reads it sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    pub bytes: u64,
    /// A hash of the bytes.
    pub hash: u64,
    /// `eof`, or the kind of the error.
    pub how: String,
}

/// Reads to the end, whatever it is.
pub fn read_to_end(stream: &mut impl Read) -> Ended {
    // Without random keys: the same hash in every run, however the bytes fall into reads.
    let mut hasher = std::hash::DefaultHasher::new();
    let mut buffer = vec![0; 64 << 10];
    let mut bytes = 0;
    let how = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break "eof".to_owned(),
            Ok(n) => {
                bytes += n as u64;
                hasher.write(&buffer[..n]);
            }
            Err(error) => break format!("{:?}", error.kind()),
        }
    };
    Ended { bytes, hash: hasher.finish(), how }
}
