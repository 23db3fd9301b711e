//! One direction of a flow: where its bytes are, and how it wants to read more.
//!
//! A half is in one of two ways of reading. *Copy* receives into a buffer; *splice* waits for
//! readiness and fills a pipe. Under [`Transfer::Auto`] it changes from one to the other by the
//! size of its reads. Between reads it holds neither a buffer nor a pipe.

use nix::errno::Errno;

use crate::config::Transfer;
use crate::flow::{Op, Question, Side};

/// Size of a buffer in bytes: the largest read in copy. Copy and splice cross between 8 and 64 KiB
/// a read, by the machine (ARCHITECTURE.md). Has room for a message of 16 KiB with its header.
pub const BUFFER_BYTES: u32 = 20 << 10;

/// Bytes between two waits below which a burst counts as small.
const SMALL_BURST_BYTES: u64 = BUFFER_BYTES as u64;

/// Small bursts in a row that bring a half back from splice to copy. More than one, so that the
/// short end of each large message does not.
const SMALL_BURSTS_TO_COPY: u8 = 4;

/// What a half holds of its worker's resources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nothing: idle.
    Nothing,
    /// A buffer.
    Buffer {
        /// Bytes in it that are not yet delivered.
        pending: u32,
        /// What follows them is there: bytes that are spliced in the flow's turn, an urgent byte,
        /// or the end of the stream.
        more: bool,
    },
    /// A pipe.
    Pipe {
        /// Bytes it can hold.
        capacity: u32,
        /// Bytes in it that are not yet delivered.
        pending: u32,
    },
    /// An urgent byte, in the half itself.
    Urgent(u8),
}

/// What is known of the half's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// May or may not have something to read: wait.
    Unknown,
    /// Has something to read, and it is not an urgent byte.
    Ready,
    /// Has something to read that may be an urgent byte: ask.
    Doubtful,
    /// The next byte is urgent.
    AtMark,
    /// Will never have anything more: end of stream, or failed.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Copy,
    Splice,
}

/// One direction of a flow.
#[derive(Clone, Debug)]
pub struct Half {
    transfer: Transfer,
    way: Way,
    source: Source,
    held: Held,
    delivered_bytes: u64,
    /// Value of `delivered_bytes` at the last wait.
    delivered_at_wait: u64,
    small_bursts: u8,
    /// The next read is a receive, whatever the way: it tells the end of the stream, which splice
    /// does not, and works where no pipe is to be had.
    must_recv: bool,
    shut: bool,
}

impl Half {
    pub(crate) fn new(transfer: Transfer) -> Self {
        Self {
            transfer,
            way: if transfer == Transfer::Splice { Way::Splice } else { Way::Copy },
            source: Source::Unknown,
            held: Held::Nothing,
            delivered_bytes: 0,
            delivered_at_wait: 0,
            small_bursts: 0,
            must_recv: false,
            shut: false,
        }
    }

    pub(crate) fn held(&self) -> Held {
        self.held
    }

    /// Bytes held and not yet delivered.
    pub(crate) fn pending(&self) -> u32 {
        match self.held {
            Held::Nothing => 0,
            Held::Buffer { pending, .. } | Held::Pipe { pending, .. } => pending,
            Held::Urgent(_) => 1,
        }
    }

    pub(crate) fn delivered_bytes(&self) -> u64 {
        self.delivered_bytes
    }

    /// Whether the half does not know if there is something to read.
    pub(crate) fn must_wait(&self) -> bool {
        self.source == Source::Unknown
    }

    /// Nothing more will be read.
    pub(crate) fn is_at_end(&self) -> bool {
        self.source == Source::Ended
    }

    /// Nothing more will be read, and all that was read is delivered.
    pub(crate) fn is_drained(&self) -> bool {
        self.is_at_end() && self.pending() == 0
    }

    /// The end of the stream was passed on.
    pub(crate) fn is_shut(&self) -> bool {
        self.shut
    }

    /// Passes the end of the stream on; false if that was done before.
    pub(crate) fn shut(&mut self) -> bool {
        !std::mem::replace(&mut self.shut, true)
    }

    /// Whether what is held is of no use now. A pipe is kept while there is something to fill.
    pub(crate) fn wants_release(&self) -> bool {
        match self.held {
            Held::Nothing | Held::Urgent(_) => false,
            Held::Buffer { .. } => true,
            Held::Pipe { .. } => self.source != Source::Ready || self.must_recv,
        }
    }

    pub(crate) fn on_released(&mut self) {
        self.held = Held::Nothing;
    }

    /// How to read on; [`Op::Readable`] where that is not known.
    ///
    /// A receive that waits by itself would be one request less, but it cannot tell that the byte
    /// it waits for is urgent. Readiness can, and what was not urgent then is not urgent later.
    pub(crate) fn next_read(&mut self, side: Side) -> Result<Question, Op> {
        match (self.source, self.held) {
            (Source::Doubtful, _) => Ok(Question::Mark(side)),
            (Source::AtMark, _) => Ok(Question::TakeUrgent(side)),
            (Source::Ready, _) if self.way == Way::Copy || self.must_recv => Err(Op::Recv(side)),
            (Source::Ready, Held::Pipe { capacity, .. }) => {
                Ok(Question::Fill { half: side, len: capacity })
            }
            (Source::Ready, _) => Ok(Question::Pipe(side)),
            (Source::Unknown | Source::Ended, _) => {
                self.end_burst();
                Err(Op::Readable(side))
            }
        }
    }

    /// A burst has ended: goes back to copy after enough small ones.
    fn end_burst(&mut self) {
        let burst = self.delivered_bytes - self.delivered_at_wait;
        self.delivered_at_wait = self.delivered_bytes;
        if self.way == Way::Copy {
            return;
        }
        self.small_bursts =
            if burst < SMALL_BURST_BYTES { self.small_bursts.saturating_add(1) } else { 0 };
        if self.small_bursts >= SMALL_BURSTS_TO_COPY && self.transfer == Transfer::Auto {
            self.small_bursts = 0;
            self.way = Way::Copy;
        }
    }

    pub(crate) fn on_received(
        &mut self,
        result: Result<u32, Errno>,
        more: bool,
    ) -> Result<(), Errno> {
        match result {
            Ok(0) => self.source = Source::Ended,
            Ok(len) => {
                self.must_recv = false;
                let more = self.transfer == Transfer::Auto && more && len == BUFFER_BYTES;
                self.held = Held::Buffer { pending: len, more };
                self.source = Source::Unknown;
                if more {
                    self.way = Way::Splice;
                    // Splice stops at an urgent mark, so there is no need to wait before it.
                    self.source = Source::Ready;
                }
            }
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECANCELED | Errno::ENOBUFS) => {
                self.source = Source::Unknown;
            }
            Err(errno) => {
                self.source = Source::Ended;
                return Err(errno);
            }
        }
        Ok(())
    }

    /// `urgent`: an urgent byte has arrived, and may be the next one.
    pub(crate) fn on_readable(&mut self, urgent: Result<bool, Errno>) {
        match urgent {
            Ok(true) => self.source = Source::Doubtful,
            Ok(false) => self.source = Source::Ready,
            Err(Errno::EINTR | Errno::ECANCELED) => {}
            // The wait could not be made: a receive tells the error, if it is the socket's.
            Err(_) => self.doubt(),
        }
    }

    pub(crate) fn on_mark(&mut self, next_is_urgent: bool) {
        self.source = if next_is_urgent { Source::AtMark } else { Source::Ready };
    }

    /// `byte`: the urgent one; `None`: it was announced, but is not there.
    pub(crate) fn on_urgent(&mut self, byte: Result<Option<u8>, Errno>) -> Result<(), Errno> {
        match byte {
            Ok(Some(byte)) => {
                self.held = Held::Urgent(byte);
                self.must_recv = false;
                self.source = Source::Unknown;
            }
            Ok(None) => {
                self.must_recv = true;
                self.source = Source::Ready;
            }
            Err(Errno::EAGAIN | Errno::EINTR) => self.source = Source::Unknown,
            Err(errno) => {
                self.source = Source::Ended;
                return Err(errno);
            }
        }
        Ok(())
    }

    pub(crate) fn on_pipe(&mut self, capacity: Option<u32>) {
        match capacity {
            Some(capacity) => self.held = Held::Pipe { capacity, pending: 0 },
            None => self.doubt(),
        }
    }

    pub(crate) fn on_filled(&mut self, result: Result<u32, Errno>) -> Result<(), Errno> {
        match result {
            Ok(0) => self.doubt(),
            Ok(len) => {
                let Held::Pipe { capacity, pending } = &mut self.held else { return Ok(()) };
                *pending = len;
                // A short fill took all there was, or ended at the pipe's last slot or at an
                // urgent mark: the next wait tells.
                self.source = if len < *capacity { Source::Unknown } else { Source::Ready };
            }
            Err(Errno::EINTR) => {}
            Err(Errno::ENOMEM) => self.doubt(),
            // Readiness was reported, and there is nothing to splice.
            Err(Errno::EAGAIN) if self.delivered_bytes == self.delivered_at_wait => self.doubt(),
            Err(Errno::EAGAIN) => self.source = Source::Unknown,
            // At an urgent mark a failure is told before the bytes behind it, which can still be
            // received.
            Err(errno) => {
                self.doubt();
                return Err(errno);
            }
        }
        Ok(())
    }

    /// The next read is a receive, once it is known that it does not meet an urgent byte: splice
    /// moved nothing although there is something (tests/kernel/urgent.rs), or cannot be used.
    fn doubt(&mut self) {
        self.source = Source::Doubtful;
        self.must_recv = true;
    }

    /// Returns the bytes still pending.
    pub(crate) fn on_delivered(&mut self, len: u32) -> u32 {
        match &mut self.held {
            Held::Buffer { pending, .. } | Held::Pipe { pending, .. } => {
                debug_assert!(len <= *pending, "a sink takes no more than it is given");
                *pending -= len;
            }
            Held::Urgent(_) => self.held = Held::Nothing,
            Held::Nothing => {}
        }
        self.delivered_bytes += u64::from(len);
        self.pending()
    }
}
