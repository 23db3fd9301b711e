//! The words between a flow and its worker: requests, actions, events, ends.

use std::ops::Not;

use nix::errno::Errno;

/// One of the two sockets of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The client's socket.
    Listen,
    /// The target's socket.
    Connect,
}

impl Side {
    /// Both sides, listen side first.
    pub const BOTH: [Side; 2] = [Side::Listen, Side::Connect];

    /// Index into two-element arrays.
    pub fn index(self) -> usize {
        self as usize
    }
}

impl Not for Side {
    type Output = Side;
    fn not(self) -> Side {
        match self {
            Side::Listen => Side::Connect,
            Side::Connect => Side::Listen,
        }
    }
}

/// A request that finishes later, by one event (`Watch`: by several).
///
/// Those of a half carry the half's source side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Connect the connect side's socket to the target.
    Connect,
    /// Receive into a buffer what is there, without waiting.
    Recv(Side),
    /// Say when the half's source has something to read, and whether that may be urgent.
    Readable(Side),
    /// Send what is left of the half's buffer, without waiting.
    Send(Side),
    /// Say whenever this side's socket becomes writable or fails.
    Watch(Side),
    /// Let [`Flow::pause_ms`](crate::flow::Flow::pause_ms) pass.
    Pause,
}

impl Op {
    /// All requests a flow can have in flight.
    pub const ALL: [Op; 10] = [
        Op::Connect,
        Op::Recv(Side::Listen),
        Op::Recv(Side::Connect),
        Op::Readable(Side::Listen),
        Op::Readable(Side::Connect),
        Op::Send(Side::Listen),
        Op::Send(Side::Connect),
        Op::Watch(Side::Listen),
        Op::Watch(Side::Connect),
        Op::Pause,
    ];

    /// Position in [`Op::ALL`].
    pub fn index(self) -> usize {
        match self {
            Op::Connect => 0,
            Op::Recv(side) => 1 + side.index(),
            Op::Readable(side) => 3 + side.index(),
            Op::Send(side) => 5 + side.index(),
            Op::Watch(side) => 7 + side.index(),
            Op::Pause => 9,
        }
    }

    /// The side whose socket it is about; `None`: neither's.
    pub fn side(self) -> Option<Side> {
        match self {
            Op::Connect => Some(Side::Connect),
            Op::Recv(half) | Op::Readable(half) => Some(half),
            Op::Send(half) => Some(!half),
            Op::Watch(side) => Some(side),
            Op::Pause => None,
        }
    }
}

/// What the flow wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin a request.
    Start(Op),
    /// Ask for a request in flight to end early; its event still comes.
    Cancel(Op),
    /// Do something that is done at once, and report what came of it.
    Ask(Question),
    /// Give back the half's buffer or pipe.
    Release(Side),
    /// Pass the end of a stream on: shut down the writing direction of this side's socket.
    Shutdown(Side),
    /// Let other flows have a turn, then report [`Event::Turn`].
    Yield,
    /// Nothing can be received for want of a buffer: report [`Event::Turn`] when one is free.
    Starve,
    /// Nothing is in flight and nothing held: the flow can go on with another engine.
    Leave,
    /// The flow is over and nothing is in flight: reset some sockets, close both.
    Close {
        /// By side: its peer must see a reset.
        reset: [bool; 2],
    },
}

/// What is done at once, and answered by the event of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Get a pipe for the half.
    Pipe(Side),
    /// Move up to `len` bytes from the half's source into its pipe.
    Fill {
        /// The half.
        half: Side,
        /// Bytes asked for; never more than the pipe has room for.
        len: u32,
    },
    /// Move `len` bytes from the half's pipe into its sink.
    Drain {
        /// The half.
        half: Side,
        /// Bytes asked for; exactly what the pipe holds.
        len: u32,
    },
    /// Is the next byte of the half's source urgent?
    Mark(Side),
    /// Receive the urgent byte of the half's source.
    TakeUrgent(Side),
    /// Send this byte to the half's sink as urgent.
    SendUrgent {
        /// The half.
        half: Side,
        /// The byte.
        byte: u8,
    },
    /// How much has the peer of this side's socket not acknowledged?
    Unsent(Side),
    /// How has this side's socket failed? To be asked once, and nothing afterwards.
    Failure(Side),
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// [`Op::Connect`] finished.
    Connected(Result<(), Errno>),
    /// [`Op::Recv`] finished.
    Received {
        /// The half.
        half: Side,
        /// Bytes received into a buffer the half now holds (0: end of stream, no buffer).
        result: Result<u32, Errno>,
        /// The socket had still more to read, or its end.
        more: bool,
    },
    /// [`Op::Readable`] finished.
    Readable {
        /// The half.
        half: Side,
        /// Whether an urgent byte has arrived. A failure is the request's, not the socket's.
        urgent: Result<bool, Errno>,
    },
    /// [`Op::Send`] finished.
    Sent {
        /// The half.
        half: Side,
        /// Bytes the sink took.
        result: Result<u32, Errno>,
    },
    /// [`Op::Watch`] reported.
    Watched {
        /// The side.
        side: Side,
        /// The socket can take bytes.
        writable: bool,
        /// The socket failed.
        failed: bool,
        /// The watch goes on.
        armed: bool,
    },
    /// [`Op::Pause`] is over, or was cancelled.
    Paused,
    /// Answers [`Question::Mark`].
    Mark {
        /// The half.
        half: Side,
        /// The next byte is urgent.
        next_is_urgent: bool,
    },
    /// Answers [`Question::TakeUrgent`].
    TakeUrgent {
        /// The half.
        half: Side,
        /// The byte; `None`: there is none.
        byte: Result<Option<u8>, Errno>,
    },
    /// Answers [`Question::SendUrgent`].
    SendUrgent {
        /// The half.
        half: Side,
        /// Whether the sink took it.
        result: Result<(), Errno>,
    },
    /// Answers [`Question::Failure`].
    Failure {
        /// The side.
        side: Side,
        /// The error; `None`: there is none that was not told before.
        errno: Option<Errno>,
    },
    /// Answers [`Question::Unsent`].
    Unsent {
        /// Bytes.
        bytes: u32,
    },
    /// Answers [`Question::Pipe`].
    Pipe {
        /// The half.
        half: Side,
        /// The pipe's capacity in bytes; `None`: there is no pipe.
        capacity: Option<u32>,
    },
    /// Answers [`Question::Fill`].
    Fill {
        /// The half.
        half: Side,
        /// Bytes moved (0: end of stream, or an urgent mark).
        result: Result<u32, Errno>,
    },
    /// Answers [`Question::Drain`].
    Drain {
        /// The half.
        half: Side,
        /// Bytes moved.
        result: Result<u32, Errno>,
    },
    /// The wait asked for by [`Action::Yield`] or [`Action::Starve`] is over.
    Turn,
    /// The flow is to go on elsewhere, as soon as it is between two messages.
    Leave,
    /// A tick of the worker's clock has passed; by it flows are timed.
    Tick(Limits),
    /// The flow is to end now, whatever its state.
    Stop,
}

/// The longest times of a flow, each in ticks; 0: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// To connect.
    pub connect: u32,
    /// Without a byte passed on.
    pub idle: u32,
    /// The same, once one of the two streams has ended.
    pub half_close: u32,
}

/// What a flow exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// [`Limits::idle`].
    Idle,
    /// [`Limits::half_close`].
    HalfClose,
}

/// How a flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Both streams ended and were passed on whole.
    Complete,
    /// The target could not be reached; the client was reset.
    ConnectFailed(Errno),
    /// This side's socket failed; the other one was reset.
    Failed(Side, Errno),
    /// No byte was passed on for the time that a limit allows.
    Expired(Limit),
    /// The program was told to stop.
    Stopped,
}

/// A set of [`Op`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OpSet(u16);

impl OpSet {
    pub(super) fn has(self, op: Op) -> bool {
        self.0 & (1 << op.index()) != 0
    }
    pub(super) fn insert(&mut self, op: Op) {
        self.0 |= 1 << op.index();
    }
    pub(super) fn remove(&mut self, op: Op) {
        self.0 &= !(1 << op.index());
    }
    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }
}
