//! Any life of a flow: the bytes choose how its requests and questions are answered, and when.
//!
//! A shadow keeps what a worker would have: requests in flight, buffers, pipes, bytes. It answers
//! as a kernel may, with any outcome in any order, but only what was asked.

use nix::errno::Errno;
use nsplice::config::Transfer;
use nsplice::flow::half::BUFFER_BYTES;
use nsplice::flow::{Action, End, Event, Flow, Limits, Op, Question, Side};

/// Actions between two events, when no answer moves anything any more.
const RESTLESS_ACTIONS: u32 = 1000;

pub fn run(data: &[u8]) {
    let mut input = Input { bytes: data.iter() };
    let transfer =
        input.pick([Transfer::Auto, Transfer::Copy, Transfer::Splice]).unwrap_or_default();
    let grace_ms = input.pick([0, 1, 100, 5000]).unwrap_or_default();
    let connecting = input.bit();
    let flow = match connecting {
        true => Flow::connecting(transfer, grace_ms),
        false => Flow::connected(transfer, grace_ms),
    };
    let mut shadow = Shadow::new(flow, connecting, grace_ms);
    shadow.pump(&mut input);
    while let Some(choice) = input.byte()
        && !shadow.closed
    {
        shadow.happen(choice, &mut input);
        shadow.pump(&mut input);
    }
    shadow.finish();
}

/// The choices that are left. When there are none, nothing moves any more.
struct Input<'a> {
    bytes: std::slice::Iter<'a, u8>,
}

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        self.bytes.next().copied()
    }

    fn bit(&mut self) -> bool {
        self.byte().is_some_and(|byte| byte & 1 == 1)
    }

    fn pick<T: Copy, const N: usize>(&mut self, of: [T; N]) -> Option<T> {
        self.byte().map(|byte| of[usize::from(byte) % N])
    }

    /// A result of up to `max` bytes; 0 bytes count as such. Without input: nothing there.
    fn moved(&mut self, max: u32) -> Result<u32, Errno> {
        match self.byte() {
            None => Err(Errno::EAGAIN),
            Some(0..32) => Err(self.errno()),
            Some(32..40) => Ok(0),
            Some(40..140) => Ok(max),
            Some(byte) => Ok(1 + (u32::from(byte - 140) * 257) % max),
        }
    }

    fn errno(&mut self) -> Errno {
        const ERRNOS: [Errno; 9] = [
            Errno::EAGAIN,
            Errno::EINTR,
            Errno::ECANCELED,
            Errno::ENOBUFS,
            Errno::ECONNRESET,
            Errno::EPIPE,
            Errno::ETIMEDOUT,
            Errno::EBADF,
            Errno::ENOMEM,
        ];
        self.pick(ERRNOS).unwrap_or(Errno::EAGAIN)
    }
}

/// What a half has of its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    Nothing,
    Buffer { pending: u32 },
    Pipe { capacity: u32, pending: u32 },
    Urgent(u8),
}

/// What is known of the next byte to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Unknown,
    Ordinary,
    Urgent,
}

#[derive(Clone, Copy, Debug)]
struct Half {
    holds: Holds,
    next: Next,
    delivered_bytes: u64,
    /// The sink failed when it was written to.
    sink_failed: bool,
    /// A read told the end of the stream.
    at_end: bool,
    shut: bool,
}

struct Shadow {
    flow: Flow,
    halves: [Half; 2],
    in_flight: Vec<Op>,
    cancelled: Vec<Op>,
    grace_left_ms: u32,
    connected: bool,
    /// By side: the socket was told to have failed.
    failed: [bool; 2],
    waits_for_turn: bool,
    /// Bytes were thrown away: all that may come is the end.
    has_given_up: bool,
    stopped: bool,
    closed: bool,
}

impl Shadow {
    fn new(flow: Flow, connecting: bool, grace_left_ms: u32) -> Self {
        let half = Half {
            holds: Holds::Nothing,
            next: Next::Unknown,
            delivered_bytes: 0,
            sink_failed: false,
            at_end: false,
            shut: false,
        };
        Self {
            flow,
            halves: [half; 2],
            in_flight: Vec::new(),
            cancelled: Vec::new(),
            grace_left_ms,
            connected: !connecting,
            failed: [false; 2],
            waits_for_turn: false,
            has_given_up: false,
            stopped: false,
            closed: false,
        }
    }

    fn half(&mut self, side: Side) -> &mut Half {
        &mut self.halves[side.index()]
    }

    /// Does all that the flow wants.
    fn pump(&mut self, input: &mut Input) {
        let mut restless = 0;
        while let Some(action) = self.flow.next() {
            restless = if input.bytes.len() == 0 { restless + 1 } else { 0 };
            assert!(restless < RESTLESS_ACTIONS, "{action:?} again and again");
            self.act(action, input);
        }
        assert_eq!(self.flow.end().is_some(), self.closed);
        assert!(
            self.closed || self.waits_for_turn || !self.in_flight.is_empty(),
            "a flow that waits for nothing: {:?}",
            self.flow
        );
        for side in Side::BOTH {
            assert_eq!(self.flow.delivered_bytes(side), self.half(side).delivered_bytes);
        }
    }

    fn act(&mut self, action: Action, input: &mut Input) {
        assert!(!self.closed, "{action:?} after Close");
        let is_last = matches!(action, Action::Release(_) | Action::Close { .. });
        assert!(is_last || !self.has_given_up, "{action:?} after bytes were thrown away");
        match action {
            Action::Start(op) => self.start(op),
            Action::Cancel(op) => {
                assert!(self.in_flight.contains(&op), "{op:?} is cancelled, and not in flight");
                assert!(!self.cancelled.contains(&op), "{op:?} is cancelled twice");
                self.cancelled.push(op);
            }
            Action::Ask(question) => {
                let event = self.answer(question, input);
                self.flow.on(event);
            }
            Action::Release(half) => self.release(half),
            Action::Shutdown(side) => {
                let half = self.half(!side);
                assert!(!half.shut, "the end is passed on twice");
                assert!(half.at_end, "an end is passed on that did not come");
                assert!(matches!(half.holds, Holds::Nothing), "the end overtakes {:?}", half.holds);
                half.shut = true;
            }
            Action::Yield | Action::Starve => {
                assert!(!self.waits_for_turn, "the flow waits for its turn twice");
                self.waits_for_turn = true;
            }
            Action::Leave => self.leave(),
            Action::Close { reset } => self.close(reset),
        }
    }

    fn start(&mut self, op: Op) {
        assert!(!self.in_flight.contains(&op), "{op:?} is started twice");
        self.in_flight.push(op);
        assert!(self.connected || matches!(op, Op::Connect | Op::Watch(Side::Listen)), "{op:?}");
        match op {
            Op::Recv(half) => {
                let half = self.half(half);
                // The buffer would take the place of one that is in use.
                assert_eq!(half.holds, Holds::Nothing, "{op:?}");
                assert_eq!(half.next, Next::Ordinary, "an urgent byte may become an ordinary one");
            }
            Op::Send(half) => {
                let half = self.half(half);
                let holds = half.holds;
                assert!(matches!(holds, Holds::Buffer { pending: 1.. }), "sends from {holds:?}");
                assert!(!half.sink_failed, "sends to a sink that failed");
            }
            Op::Pause => {
                let ms = self.flow.pause_ms();
                assert!(0 < ms && ms <= self.grace_left_ms, "{ms} of {} ms", self.grace_left_ms);
                self.grace_left_ms -= ms;
            }
            Op::Connect | Op::Readable(_) | Op::Watch(_) => {}
        }
    }

    fn release(&mut self, half: Side) {
        let holds = std::mem::replace(&mut self.half(half).holds, Holds::Nothing);
        match holds {
            Holds::Buffer { pending } | Holds::Pipe { pending, .. } => {
                self.has_given_up |= pending > 0;
                let ending = self.stopped || self.failed != [false; 2];
                assert!(pending == 0 || ending, "{pending} bytes are thrown away");
                let is_idle = self.in_flight.is_empty();
                assert!(pending == 0 || is_idle, "{pending} bytes are thrown away, and others not");
            }
            Holds::Nothing | Holds::Urgent(_) => panic!("{holds:?} is given back"),
        }
        let sending = self.in_flight.contains(&Op::Send(half));
        assert!(!sending, "a buffer is given back while it is sent from");
    }

    /// It goes on with another engine, which knows nothing of it.
    fn leave(&self) {
        assert!(self.in_flight.is_empty(), "leaves with {:?} in flight", self.in_flight);
        assert!(!self.waits_for_turn, "leaves a place in the queue");
        for half in self.halves {
            assert_eq!(half.holds, Holds::Nothing, "leaves");
        }
    }

    fn close(&mut self, reset: [bool; 2]) {
        self.closed = true;
        assert!(self.in_flight.is_empty(), "closed with {:?} in flight", self.in_flight);
        for half in self.halves {
            let held = matches!(half.holds, Holds::Buffer { .. } | Holds::Pipe { .. });
            assert!(!held, "closed with {:?}", half.holds);
        }
        let is_whole = Side::BOTH.map(|side| self.halves[(!side).index()].shut);
        match self.flow.end() {
            Some(End::Complete) => {
                assert_eq!(is_whole, [true; 2], "complete, with ends kept back");
                assert_eq!(reset, [false; 2], "complete");
            }
            Some(End::Failed(side, _)) => {
                assert!(self.failed[side.index()], "{side:?} has not failed");
                assert!(reset[(!side).index()], "{side:?} has failed, and nobody hears of it");
                assert!(
                    reset[side.index()] || is_whole[side.index()],
                    "{side:?}, which has failed"
                );
            }
            // All that is not passed on whole is cut, and looks like it.
            Some(_) => assert!(reset.iter().zip(is_whole).all(|(reset, whole)| reset | whole)),
            None => panic!("closed, and not ended"),
        }
    }

    /// A socket told an error; whether that was a failure, and not one of `nuisances`.
    fn told(&mut self, side: Side, errno: Errno, nuisances: &[Errno]) -> bool {
        let has_failed = !nuisances.contains(&errno);
        self.failed[side.index()] |= has_failed;
        has_failed
    }

    fn answer(&mut self, question: Question, input: &mut Input) -> Event {
        assert!(self.connected, "{question:?} before there is a connection");
        match question {
            Question::Pipe(half) => {
                assert_eq!(self.half(half).holds, Holds::Nothing, "a second pipe");
                let capacity = input.pick([None, Some(4096), Some(64 << 10), Some(1 << 20)]);
                let capacity = capacity.flatten();
                if let Some(capacity) = capacity {
                    self.half(half).holds = Holds::Pipe { capacity, pending: 0 };
                }
                Event::Pipe { half, capacity }
            }
            Question::Fill { half, len } => {
                let Holds::Pipe { capacity, pending: 0 } = self.half(half).holds else {
                    panic!("fills {:?}", self.half(half).holds);
                };
                assert!(0 < len && len <= capacity, "fills {len} of {capacity}");
                let result = input.moved(len);
                self.half(half).next = Next::Unknown;
                match result {
                    Ok(moved) => self.half(half).holds = Holds::Pipe { capacity, pending: moved },
                    Err(errno) => {
                        self.told(half, errno, &[Errno::EAGAIN, Errno::EINTR, Errno::ENOMEM]);
                    }
                }
                Event::Fill { half, result }
            }
            Question::Drain { half, len } => {
                let Holds::Pipe { pending, .. } = self.half(half).holds else {
                    panic!("drains {:?}", self.half(half).holds);
                };
                assert!(0 < len && len == pending, "drains {len} of {pending}");
                assert!(!self.half(half).sink_failed, "drains into a sink that failed");
                let result = input.moved(len);
                self.delivered(half, result);
                Event::Drain { half, result }
            }
            Question::Mark(half) => {
                let next_is_urgent = input.bit();
                self.half(half).next = if next_is_urgent { Next::Urgent } else { Next::Ordinary };
                Event::Mark { half, next_is_urgent }
            }
            Question::TakeUrgent(half) => {
                assert_eq!(self.half(half).next, Next::Urgent, "an ordinary byte becomes urgent");
                assert_eq!(self.half(half).holds, Holds::Nothing, "an urgent byte overtakes");
                let byte = match input.byte() {
                    None | Some(0..32) => Err(input.errno()),
                    Some(32..40) => Ok(None),
                    Some(byte) => Ok(Some(byte)),
                };
                self.half(half).next = Next::Unknown;
                match byte {
                    Ok(Some(byte)) => self.half(half).holds = Holds::Urgent(byte),
                    // The stream has ended at the mark.
                    Ok(None) => self.half(half).next = Next::Ordinary,
                    Err(errno) => {
                        self.told(half, errno, &[Errno::EAGAIN, Errno::EINTR]);
                    }
                }
                Event::TakeUrgent { half, byte }
            }
            Question::SendUrgent { half, byte } => {
                assert_eq!(self.half(half).holds, Holds::Urgent(byte));
                assert!(!self.half(half).sink_failed, "sends to a sink that failed");
                let sent = input.bit();
                let result = if sent { Ok(()) } else { Err(input.errno()) };
                self.delivered(half, result.map(|()| 1));
                Event::SendUrgent { half, result }
            }
            Question::Failure(side) => {
                assert!(self.failed[side.index()], "{side:?} has not failed");
                Event::Failure { side, errno: input.bit().then(|| input.errno()) }
            }
            Question::Unsent(_) => Event::Unsent { bytes: input.byte().map_or(0, u32::from) },
        }
    }

    fn delivered(&mut self, half: Side, result: Result<u32, Errno>) {
        let nuisances = [Errno::EAGAIN, Errno::EINTR, Errno::ECANCELED];
        let has_failed = result.is_err_and(|errno| self.told(!half, errno, &nuisances));
        let half = self.half(half);
        half.sink_failed |= has_failed;
        let Ok(moved) = result else { return };
        half.delivered_bytes += u64::from(moved);
        match &mut half.holds {
            Holds::Buffer { pending } | Holds::Pipe { pending, .. } => *pending -= moved,
            Holds::Urgent(_) => half.holds = Holds::Nothing,
            Holds::Nothing => {}
        }
    }

    /// One of the events that there can be now.
    fn happen(&mut self, choice: u8, input: &mut Input) {
        if choice == 255 {
            self.stopped = true;
            return self.flow.on(Event::Stop);
        }
        if choice == 254 {
            let mut limit = || input.pick([0, 1, 2, 5]).unwrap_or_default();
            let limits = Limits { connect: limit(), idle: limit(), half_close: limit() };
            // What it may cut short.
            self.stopped |= limits != Limits::default();
            return self.flow.on(Event::Tick(limits));
        }
        if choice == 253 {
            return self.flow.on(Event::Leave);
        }
        let events = self.in_flight.len() + usize::from(self.waits_for_turn);
        let Some(&op) = self.in_flight.get(usize::from(choice) % events.max(1)) else {
            return self.turn();
        };
        let event = self.complete(op, input);
        if !matches!(event, Event::Watched { armed: true, .. }) {
            self.in_flight.retain(|&other| other != op);
            self.cancelled.retain(|&other| other != op);
        }
        self.flow.on(event);
    }

    fn turn(&mut self) {
        if std::mem::take(&mut self.waits_for_turn) {
            self.flow.on(Event::Turn);
        }
    }

    fn complete(&mut self, op: Op, input: &mut Input) -> Event {
        match op {
            Op::Connect => {
                let result = if input.bit() { Err(input.errno()) } else { Ok(()) };
                // A target may have reset the connection that was just made.
                let reset = matches!(result, Err(Errno::ECONNRESET | Errno::EPIPE));
                self.connected |= result.is_ok() || reset;
                self.half(Side::Listen).sink_failed |= reset;
                self.failed[Side::Connect.index()] |= reset;
                Event::Connected(result)
            }
            Op::Recv(half) => {
                let result = input.moved(BUFFER_BYTES);
                self.half(half).next = Next::Unknown;
                match result {
                    Ok(0) => self.half(half).at_end = true,
                    Ok(pending) => self.half(half).holds = Holds::Buffer { pending },
                    Err(errno) => {
                        let nuisances =
                            [Errno::EAGAIN, Errno::EINTR, Errno::ECANCELED, Errno::ENOBUFS];
                        self.told(half, errno, &nuisances);
                    }
                }
                Event::Received { half, result, more: input.bit() }
            }
            Op::Readable(half) => {
                let failed = input.byte().is_some_and(|byte| byte < 16);
                let urgent = if failed { Err(input.errno()) } else { Ok(input.bit()) };
                if urgent == Ok(false) {
                    self.half(half).next = Next::Ordinary;
                }
                Event::Readable { half, urgent }
            }
            Op::Send(half) => {
                let Holds::Buffer { pending } = self.half(half).holds else {
                    panic!("sent from {:?}", self.half(half).holds);
                };
                let result = input.moved(pending);
                self.delivered(half, result);
                Event::Sent { half, result }
            }
            Op::Watch(side) => {
                let bits = input.byte().unwrap_or(0);
                let (writable, failed) = (bits & 1 == 1, bits & 6 == 6);
                let armed = bits & 8 == 0 && !self.cancelled.contains(&op);
                self.failed[side.index()] |= failed;
                Event::Watched { side, writable, failed, armed }
            }
            Op::Pause => Event::Paused,
        }
    }

    /// Whatever its state: told to stop, it closes when its requests have ended.
    fn finish(&mut self) {
        let mut nothing = Input { bytes: [].iter() };
        if self.closed {
            return;
        }
        self.flow.on(Event::Stop);
        self.stopped = true;
        self.pump(&mut nothing);
        while let Some(op) = self.in_flight.pop() {
            assert!(self.cancelled.contains(&op), "{op:?} is waited for, and not cancelled");
            let event = match op {
                Op::Connect => Event::Connected(Err(Errno::ECANCELED)),
                Op::Recv(half) => {
                    Event::Received { half, result: Err(Errno::ECANCELED), more: false }
                }
                Op::Readable(half) => Event::Readable { half, urgent: Err(Errno::ECANCELED) },
                Op::Send(half) => Event::Sent { half, result: Err(Errno::ECANCELED) },
                Op::Watch(side) => {
                    Event::Watched { side, writable: false, failed: false, armed: false }
                }
                Op::Pause => Event::Paused,
            };
            self.flow.on(event);
            self.pump(&mut nothing);
        }
        assert!(self.closed, "it was told to stop, nothing is in flight, and it does not close");
    }
}
