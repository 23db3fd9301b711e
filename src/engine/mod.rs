//! The kernel behind one boundary: what a worker may ask for, and what it is told.
//!
//! An [`Engine`] owns the descriptors' system calls and the memory of the buffers. Requests
//! (`accept`, `connect`, `recv`, `send`, ...) finish later with a [`Completion`] that carries the
//! request's [`Token`]; the other calls are done when they return. An engine knows no flow: all
//! that it keeps about a connection is where its requests wait.

mod calls;
pub mod epoll;
mod set;
pub mod uring;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::socket::SockaddrStorage;

use crate::config::SocketOptions;
use crate::error::Error;
use crate::flow::Op;
use crate::flow::half::BUFFER_BYTES;

/// Names a request, and through it what the completion is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Token {
    /// A request of the flow in slot `index`, valid while the slot's generation is `generation`.
    Flow {
        /// Slot.
        index: u32,
        /// Generation, 24 bits.
        generation: u32,
        /// Request.
        op: Op,
    },
    /// A new connection, or the failure to get one.
    Accept,
    /// The worker's channel from the listener has something to read.
    Handoff,
    /// The worker's command channel has something to read.
    Command,
    /// A tick of the worker's clock has passed.
    Tick,
    /// Nobody waits for it: closing and cancelling.
    Ignored,
}

impl Token {
    const ACCEPT: u64 = 0x20;
    const HANDOFF: u64 = 0x21;
    const COMMAND: u64 = 0x22;
    const IGNORED: u64 = 0x23;
    const TICK: u64 = 0x24;

    /// Bits of a generation.
    pub const GENERATION_MASK: u32 = (1 << 24) - 1;

    /// The token as the kernel carries it: slot, generation, request, from low to high bits.
    pub fn encode(self) -> u64 {
        match self {
            Token::Flow { index, generation, op } => {
                let generation = u64::from(generation & Self::GENERATION_MASK);
                u64::from(index) | generation << 32 | (op.index() as u64) << 56
            }
            Token::Accept => Self::ACCEPT << 56,
            Token::Handoff => Self::HANDOFF << 56,
            Token::Command => Self::COMMAND << 56,
            Token::Tick => Self::TICK << 56,
            Token::Ignored => Self::IGNORED << 56,
        }
    }

    /// The inverse of [`Token::encode`].
    pub fn decode(bits: u64) -> Token {
        match bits >> 56 {
            Self::ACCEPT => Token::Accept,
            Self::HANDOFF => Token::Handoff,
            Self::COMMAND => Token::Command,
            Self::TICK => Token::Tick,
            op => match Op::ALL.get(op as usize) {
                Some(&op) => Token::Flow {
                    index: bits as u32,
                    generation: (bits >> 32) as u32 & Self::GENERATION_MASK,
                    op,
                },
                None => Token::Ignored,
            },
        }
    }
}

/// A buffer with received bytes that are not yet sent: an offset and an end in the buffer `id`.
///
/// It is neither `Copy` nor `Clone`: whoever holds it is the only one to send from it, and giving
/// it back consumes it. So one flow's bytes cannot reach another.
#[derive(Debug, PartialEq, Eq)]
pub struct Buffer {
    // Small, for each connection has room for two.
    id: u16,
    start: u16,
    end: u16,
}

const _: () = assert!(BUFFER_BYTES <= u16::MAX as u32);

impl Buffer {
    /// Buffer `id` with `len` received bytes, at most [`BUFFER_BYTES`]. For engines: each buffer
    /// exists once.
    pub fn received(id: u16, len: u32) -> Self {
        Self { id, start: 0, end: len as u16 }
    }

    /// The engine's number of the buffer.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Where the bytes not yet sent begin and end.
    pub fn range(&self) -> std::ops::Range<u32> {
        self.start.into()..self.end.into()
    }

    /// Bytes not yet sent.
    pub fn len(&self) -> u32 {
        u32::from(self.end - self.start)
    }

    /// Whether all was sent.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes note that the first `len` bytes were sent.
    pub fn consume(&mut self, len: u32) {
        self.start += len.min(self.len()) as u16;
    }
}

/// What a finished request brings.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome<S> {
    /// A new connection.
    Accepted(Result<S, Errno>),
    /// Connecting, pausing: done or not.
    Done(Result<(), Errno>),
    /// There is something to read; true: an urgent byte has arrived.
    Readable(Result<bool, Errno>),
    /// Received bytes.
    Received {
        /// The bytes; `None`: end of stream.
        result: Result<Option<Buffer>, Errno>,
        /// The socket had more. Where the buffer is not full, that may not have been asked.
        more: bool,
    },
    /// Number of bytes sent.
    Sent(Result<u32, Errno>),
    /// A watched socket changed.
    Watched {
        /// It takes bytes.
        writable: bool,
        /// It failed.
        failed: bool,
        /// The request goes on.
        armed: bool,
    },
}

/// A finished request, or one report of a lasting one.
#[derive(Debug, PartialEq, Eq)]
pub struct Completion<S> {
    /// The request.
    pub token: Token,
    /// What came of it.
    pub outcome: Outcome<S>,
}

/// How long to wait for a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleep {
    /// Not at all: there is other work.
    No,
    /// At most this many milliseconds.
    ForMs(u32),
    /// Until there is one.
    Forever,
}

/// What a worker needs of the kernel. Requests take effect at the next [`Engine::wait`] at the
/// latest.
pub trait Engine {
    /// A socket; dropping it closes it.
    type Socket;
    /// A pipe, possibly with bytes in it; dropping it closes it.
    type Pipe;

    /// Accepts a connection.
    fn accept(&mut self, token: Token, listener: &Self::Socket);
    /// Connects `socket` to the target.
    fn connect(&mut self, token: Token, socket: &Self::Socket);
    /// Receives what there is into a buffer the engine provides, without waiting.
    fn recv(&mut self, token: Token, socket: &Self::Socket);
    /// Completes when there is something to read (or an end or error to be read).
    fn readable(&mut self, token: Token, socket: &Self::Socket);
    /// Sends as much of `buffer` as the socket takes at once. `more`: the kernel may keep it back,
    /// for some 200 ms, to send it in one segment with what is sent next or the stream's end.
    fn send(&mut self, token: Token, socket: &Self::Socket, buffer: &Buffer, more: bool);
    /// Reports whenever the socket becomes writable or fails, until cancelled.
    fn watch(&mut self, token: Token, socket: &Self::Socket);
    /// Completes after `ms` milliseconds.
    fn pause(&mut self, token: Token, ms: u32);
    /// Ends the requests with this token early. Their completions still come.
    fn cancel(&mut self, token: Token);
    /// Closes a socket that has no request in flight. One that had some must be closed so.
    fn close(&mut self, socket: Self::Socket);
    /// Knows nothing of a socket any more that has no request in flight: another engine is to have
    /// it.
    fn let_go(&mut self, socket: &Self::Socket);

    /// A new socket for the target, ready to be connected.
    fn target_socket(&mut self) -> Result<Self::Socket, Errno>;
    /// Shuts down the writing direction.
    fn shutdown(&mut self, socket: &Self::Socket);
    /// Makes the peer see a reset.
    fn reset(&mut self, socket: &Self::Socket);
    /// Whether the next byte to be received is urgent.
    fn is_at_mark(&self, socket: &Self::Socket) -> bool;
    /// Receives one byte, without waiting; `None`: end of stream.
    fn recv_urgent(&mut self, socket: &Self::Socket) -> Result<Option<u8>, Errno>;
    /// Sends one byte as urgent, without waiting.
    fn send_urgent(&mut self, socket: &Self::Socket, byte: u8) -> Result<(), Errno>;
    /// Bytes sent that the peer has not acknowledged; 0 if that cannot be known. None is kept back
    /// any longer.
    fn unsent(&self, socket: &Self::Socket) -> u32;
    /// Makes a client's socket ready that was accepted from one which another program made.
    fn adopt(&mut self, client: &Self::Socket);
    /// Whether a socket that seems to have failed did. One may have only something in its error
    /// queue; that is thrown away.
    fn has_failed(&mut self, socket: &Self::Socket) -> bool;
    /// The failure that no request has been told of, which none is told of any more.
    fn failure(&self, socket: &Self::Socket) -> Option<Errno>;
    /// Who is at the other end, if the socket still knows.
    fn peer(&self, socket: &Self::Socket) -> Option<SockaddrStorage>;
    /// Gives a buffer back.
    fn give_back(&mut self, buffer: Buffer);
    /// An empty pipe and its capacity in bytes.
    fn take_pipe(&mut self) -> Option<(Self::Pipe, u32)>;
    /// Gives a pipe back; only an empty one is used again.
    fn release_pipe(&mut self, pipe: Self::Pipe);
    /// Moves up to `len` bytes from a socket into a pipe, without waiting.
    fn fill(
        &mut self,
        socket: &Self::Socket,
        pipe: &mut Self::Pipe,
        len: u32,
    ) -> Result<u32, Errno>;
    /// Moves `len` bytes from a pipe into a socket, without waiting.
    fn drain(
        &mut self,
        pipe: &mut Self::Pipe,
        socket: &Self::Socket,
        len: u32,
    ) -> Result<u32, Errno>;

    /// Hands the requests to the kernel and waits for a completion as long as `sleep` allows.
    fn wait(&mut self, sleep: Sleep) -> Result<(), Errno>;
    /// The next completion that is there.
    fn completion(&mut self) -> Option<Completion<Self::Socket>>;
}

/// An engine on the real kernel, for the thread that starts it.
pub trait Start: Engine<Socket = OwnedFd> + Sized {
    /// What it is called, in options and in the summary.
    const NAME: &'static str;

    /// An engine for the calling thread, which must be the only one to use it.
    ///
    /// # Errors
    /// [`Kind::Kernel`](crate::error::Kind::Kernel).
    fn start(setup: &Setup) -> Result<Self, Error>;
}

/// What an engine is to do.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Where to connect to; `None`: nowhere.
    pub target: Option<SocketAddr>,
    /// What is asked of the sockets that connect.
    pub sockets: SocketOptions,
    /// Capacity wanted for pipes.
    pub pipe_size_bytes: u32,
    /// Most pipes at a time.
    pub pipes: usize,
    /// How long to look for work before sleeping, in microseconds.
    pub busy_poll_us: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Side;

    #[test]
    fn a_token_survives_the_kernel() {
        for op in Op::ALL {
            let token = Token::Flow { index: 0xdead_beef, generation: 0x00ab_cdef, op };
            assert_eq!(Token::decode(token.encode()), token);
        }
        let others = [Token::Accept, Token::Handoff, Token::Command, Token::Tick, Token::Ignored];
        for token in others {
            assert_eq!(Token::decode(token.encode()), token);
        }
        let send = Token::Flow { index: 7, generation: 1, op: Op::Send(Side::Listen) };
        assert_eq!(send.encode(), 0x0500_0001_0000_0007);
    }
}
