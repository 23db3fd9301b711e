//! A worker: one engine and the flows it serves.
//!
//! Each turn hands the requests of the last one to the kernel, collects what has completed,
//! tells the flows, and carries out what they want. A worker shares nothing with its siblings.
//!
//! It must not know which engine it has, or what a flow's state is.

use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::SockaddrStorage;

use crate::config::Transfer;
use crate::engine::{Buffer, Completion, Engine, Outcome, Sleep, Token};
use crate::flow::{Action, End, Event, Flow, Op, Side};
use crate::log::Log;
use crate::stats::Stats;

/// How long accepting pauses after the system ran out of something (kernel-fact 17).
const ACCEPT_PAUSE_MS: u32 = 100;

/// What a worker is to do with connections.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How halves move their bytes.
    pub transfer: Transfer,
    /// The target's name in logs.
    pub target: String,
    /// Accept one connection only.
    pub single: bool,
}

/// What a turn brought besides flows' business.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Woken {
    /// [`Token::Command`] completed.
    pub command: bool,
    /// [`Token::Handoff`] completed.
    pub handoff: bool,
}

/// A flow's place and all that belongs to it.
struct Slot<E: Engine> {
    generation: u32,
    /// `None`: the slot is free.
    flow: Option<Flow>,
    sockets: [Option<E::Socket>; 2],
    buffers: [Option<Buffer>; 2],
    pipes: [Option<E::Pipe>; 2],
    record: Option<Box<Record>>,
}

/// What the log says of a flow at its end; kept only when it will.
struct Record {
    client: Option<SockaddrStorage>,
    started: Instant,
}

/// An engine and its flows.
pub struct Worker<E: Engine> {
    engine: E,
    settings: Settings,
    log: Log,
    stats: Stats,
    slots: Vec<Slot<E>>,
    free: Vec<u32>,
    /// Flows that gave way to others.
    yielded: Vec<(u32, u32)>,
    /// Flows that wait for a buffer.
    starved: Vec<(u32, u32)>,
    listener: Option<E::Socket>,
    accept_armed: bool,
    accept_pause: Option<Instant>,
    /// The socket given by `-C`, until the connection it is for is there.
    target: Option<E::Socket>,
    stopping: bool,
    /// How the last flow ended.
    last_end: Option<End>,
}

impl<E: Engine> Worker<E> {
    /// A worker without connections. `target`: the connected socket to forward the only
    /// connection to, instead of connecting.
    pub fn new(engine: E, settings: Settings, log: Log, target: Option<E::Socket>) -> Self {
        Self {
            engine,
            settings,
            log,
            stats: Stats::default(),
            slots: Vec::new(),
            free: Vec::new(),
            yielded: Vec::new(),
            starved: Vec::new(),
            listener: None,
            accept_armed: false,
            accept_pause: None,
            target,
            stopping: false,
            last_end: None,
        }
    }

    /// Accepts connections from `listener` from the next turn on.
    pub fn listen(&mut self, listener: E::Socket) {
        self.listener = Some(listener);
        self.arm_accept();
    }

    /// Forwards `client`, an accepted connection.
    pub fn add(&mut self, client: E::Socket) {
        self.stats.connections += 1;
        let transfer = self.settings.transfer;
        let (flow, target) = match self.target.take() {
            Some(target) => (Flow::connected(transfer), target),
            None => match self.engine.target_socket() {
                Ok(socket) => (Flow::connecting(transfer), socket),
                Err(errno) => return self.refuse(client, errno),
            },
        };
        let record = self.log.is_verbose().then(|| {
            Box::new(Record { client: self.engine.peer(&client), started: Instant::now() })
        });
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                flow: None,
                sockets: [None, None],
                buffers: [None, None],
                pipes: [None, None],
                record: None,
            });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        slot.flow = Some(flow);
        slot.sockets = [Some(client), Some(target)];
        slot.record = record;
        self.pump(index);
    }

    /// Ends all flows; [`Worker::is_done`] tells when they have ended.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.stop_accepting();
        for index in 0..self.slots.len() as u32 {
            self.tell(index, Event::Stop);
        }
    }

    /// Whether there is nothing left to do and nothing will come.
    pub fn is_done(&self) -> bool {
        let over = self.stopping || (self.settings.single && self.stats.connections > 0);
        over && !self.accept_armed && self.live() == 0
    }

    /// Number of live flows.
    pub fn live(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// How the flow that ended last did.
    pub fn last_end(&self) -> Option<End> {
        self.last_end
    }

    /// The counters so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The engine, to wait for the channels with [`Token::Command`] and [`Token::Handoff`].
    pub fn engine(&mut self) -> &mut E {
        &mut self.engine
    }

    /// One turn: submit, wait if there is nothing else to do, and serve what has completed.
    pub fn turn(&mut self) -> Result<Woken, Errno> {
        self.engine.wait(self.sleep())?;
        let mut woken = Woken::default();
        while let Some(completion) = self.engine.completion() {
            match completion.token {
                Token::Flow { index, generation, op } => {
                    self.complete(index, generation, op, completion.outcome);
                }
                Token::Accept => self.accepted(completion),
                Token::Command => woken.command = true,
                Token::Handoff => woken.handoff = true,
                Token::Ignored => {}
            }
        }
        for (index, generation) in std::mem::take(&mut self.yielded) {
            if self.is_current(index, generation) {
                self.tell(index, Event::Turn);
            }
        }
        if self.accept_pause.is_some_and(|until| until <= Instant::now()) {
            self.accept_pause = None;
            self.arm_accept();
        }
        Ok(woken)
    }

    fn sleep(&self) -> Sleep {
        if !self.yielded.is_empty() {
            Sleep::No
        } else if self.accept_pause.is_some() {
            Sleep::ForMs(ACCEPT_PAUSE_MS)
        } else {
            Sleep::Forever
        }
    }

    fn arm_accept(&mut self) {
        if let Some(listener) = &self.listener
            && !self.accept_armed
        {
            self.engine.accept(Token::Accept, listener);
            self.accept_armed = true;
        }
    }

    fn stop_accepting(&mut self) {
        if self.accept_armed {
            self.engine.cancel(Token::Accept);
        }
        self.accept_pause = None;
        if let Some(listener) = self.listener.take() {
            self.engine.close(listener);
        }
    }

    fn accepted(&mut self, completion: Completion<E::Socket>) {
        let Outcome::Accepted { result, armed } = completion.outcome else { return };
        self.accept_armed = armed;
        match result {
            // It came together with the order to stop, or behind the only one to be served: as
            // if it had still been in the queue of the listening socket that is closed now.
            Ok(client) if self.listener.is_none() => {
                self.engine.reset(&client);
                self.engine.close(client);
            }
            Ok(client) => {
                if self.settings.single {
                    self.stop_accepting();
                }
                self.add(client);
            }
            Err(Errno::ECANCELED | Errno::ECONNABORTED | Errno::EINTR) => {}
            Err(errno) => {
                self.stats.count_error(&format!("accept {errno:?}"));
                self.log.line(&format!("cannot accept: {errno:?}: {}", errno.desc()));
                if !armed {
                    let pause = std::time::Duration::from_millis(ACCEPT_PAUSE_MS.into());
                    self.accept_pause = Some(Instant::now() + pause);
                }
            }
        }
        if self.accept_pause.is_none() {
            self.arm_accept();
        }
    }

    /// No socket for the target can be had: the client learns it by a reset.
    fn refuse(&mut self, client: E::Socket, errno: Errno) {
        let name = display(self.engine.peer(&client));
        self.engine.reset(&client);
        self.engine.close(client);
        self.ended(End::ConnectFailed(errno), [0, 0], &name, None);
    }

    fn is_current(&self, index: u32, generation: u32) -> bool {
        let slot = self.slots.get(index as usize);
        slot.is_some_and(|slot| slot.flow.is_some() && slot.generation == generation)
    }

    /// A flow's request has completed.
    fn complete(&mut self, index: u32, generation: u32, op: Op, outcome: Outcome<E::Socket>) {
        if !self.is_current(index, generation) {
            // A flow ends only when nothing is in flight, so this can be a late report of a
            // watch alone; it carries nothing to give back.
            return;
        }
        let event = match (op, outcome) {
            (Op::Connect, Outcome::Done(result)) => Event::Connected(result),
            (Op::Readable(half), Outcome::Done(result)) => Event::Readable { half, result },
            (Op::Recv(half), Outcome::Received { result, more }) => {
                self.received(index, half, result, more)
            }
            (Op::Send(half), Outcome::Sent(result)) => {
                self.stats.copy_operations += u64::from(result.is_ok());
                if let (Ok(len), Some(buffer)) =
                    (result, &mut self.slots[index as usize].buffers[half.index()])
                {
                    buffer.consume(len);
                }
                Event::Sent { half, result }
            }
            (Op::Watch(side), Outcome::Watched { writable, failed, armed }) => {
                Event::Watched { side, writable, failed, armed }
            }
            _ => return,
        };
        self.tell(index, event);
    }

    /// Keeps the buffer for the half and says how much it holds.
    fn received(
        &mut self,
        index: u32,
        half: Side,
        result: Result<Option<Buffer>, Errno>,
        more: bool,
    ) -> Event {
        let result = result.map(|buffer| {
            let len = buffer.as_ref().map_or(0, Buffer::len);
            self.stats.copy_operations += u64::from(len > 0);
            self.slots[index as usize].buffers[half.index()] = buffer;
            len
        });
        Event::Received { half, result, more }
    }

    fn tell(&mut self, index: u32, event: Event) {
        if let Some(flow) = &mut self.slots[index as usize].flow {
            flow.on(event);
            self.pump(index);
        }
    }

    /// Carries out all the flow wants now.
    fn pump(&mut self, index: u32) {
        while let Some(slot) = self.slots.get_mut(index as usize)
            && let Some(flow) = &mut slot.flow
            && let Some(action) = flow.next()
        {
            let token = |op| Token::Flow { index, generation: slot.generation, op };
            match action {
                Action::Start(op) => start(&mut self.engine, slot, token(op), op),
                Action::Cancel(op) => self.engine.cancel(token(op)),
                Action::TakePipe(half) => {
                    let taken = self.engine.take_pipe();
                    let capacity = taken.as_ref().map(|&(_, capacity)| capacity);
                    slot.pipes[half.index()] = taken.map(|(pipe, _)| pipe);
                    flow.on(Event::TakePipe { half, capacity });
                }
                Action::Fill { half, len } => {
                    let result = fill(&mut self.engine, slot, half, len);
                    self.stats.splice_operations += u64::from(result.is_ok_and(|len| len > 0));
                    self.tell_only(index, Event::Fill { half, result });
                }
                Action::Drain { half, len } => {
                    let result = drain(&mut self.engine, slot, half, len);
                    self.stats.splice_operations += u64::from(result.is_ok_and(|len| len > 0));
                    self.stats.spliced_bytes += u64::from(result.unwrap_or(0));
                    self.tell_only(index, Event::Drain { half, result });
                }
                Action::Release(half) => self.release(index, half),
                Action::Shutdown(side) => {
                    if let Some(socket) = &slot.sockets[side.index()] {
                        self.engine.shutdown(socket);
                    }
                }
                Action::Yield => self.yielded.push((index, slot.generation)),
                Action::Starve => self.starved.push((index, slot.generation)),
                Action::Close { reset } => self.close(index, reset),
            }
        }
    }

    fn tell_only(&mut self, index: u32, event: Event) {
        if let Some(flow) = &mut self.slots[index as usize].flow {
            flow.on(event);
        }
    }

    fn release(&mut self, index: u32, half: Side) {
        let slot = &mut self.slots[index as usize];
        if let Some(pipe) = slot.pipes[half.index()].take() {
            self.engine.release_pipe(pipe);
        }
        if let Some(buffer) = slot.buffers[half.index()].take() {
            self.engine.give_back(buffer);
            // One of those that waited may have it; it yields, so it is told at the turn's end.
            self.yielded.extend(self.starved.pop());
        }
    }

    fn close(&mut self, index: u32, reset: Option<Side>) {
        let slot = &mut self.slots[index as usize];
        let Some(flow) = slot.flow.take() else { return };
        let record = slot.record.take();
        let sockets = std::mem::take(&mut slot.sockets);
        slot.generation = (slot.generation + 1) & Token::GENERATION_MASK;
        self.free.push(index);
        let end = flow.end().unwrap_or(End::Stopped);
        let client = match (&record, &sockets[Side::Listen.index()]) {
            (Some(record), _) => display(record.client),
            (None, Some(socket)) if matches!(end, End::ConnectFailed(_)) => {
                display(self.engine.peer(socket))
            }
            _ => String::new(),
        };
        for (side, socket) in Side::BOTH.into_iter().zip(sockets) {
            let Some(socket) = socket else { continue };
            if reset == Some(side) {
                self.engine.reset(&socket);
            }
            self.engine.close(socket);
        }
        let bytes = Side::BOTH.map(|half| flow.delivered_bytes(half));
        self.ended(end, bytes, &client, record.map(|record| record.started));
    }

    /// Counts and logs a flow's end.
    fn ended(&mut self, end: End, bytes: [u64; 2], client: &str, started: Option<Instant>) {
        self.last_end = Some(end);
        self.stats.count_end(end, bytes);
        let target = &self.settings.target;
        let how = match end {
            End::Complete => "complete".to_owned(),
            End::Stopped => "cut: the program was told to stop".to_owned(),
            End::ConnectFailed(errno) => {
                format!("cannot connect: {errno:?}: {}", errno.desc())
            }
            End::Failed(side, errno) => {
                let who = if side == Side::Listen { "client" } else { "target" };
                format!("{who} failed: {errno:?}: {}", errno.desc())
            }
        };
        if let Some(started) = started {
            let [to_target, to_client] = bytes;
            let seconds = started.elapsed().as_secs_f64();
            self.log.line(&format!(
                "{client} -> {target}: {to_target} bytes to target, {to_client} bytes to client, \
                 {seconds:.3} s: {how}"
            ));
        } else if matches!(end, End::ConnectFailed(_)) {
            self.log.line(&format!("{client} -> {target}: {how}"));
        }
    }
}

fn start<E: Engine>(engine: &mut E, slot: &Slot<E>, token: Token, op: Op) {
    let side = match op {
        Op::Connect => Side::Connect,
        Op::Recv(half) | Op::Readable(half) => half,
        Op::Send(half) => !half,
        Op::Watch(side) => side,
    };
    let Some(socket) = &slot.sockets[side.index()] else { return };
    match op {
        Op::Connect => engine.connect(token, socket),
        Op::Recv(half) => {
            let wait_first = slot.flow.as_ref().is_some_and(|flow| flow.expects_wait(half));
            engine.recv(token, socket, wait_first);
        }
        Op::Readable(_) => engine.readable(token, socket),
        Op::Send(half) => {
            if let Some(buffer) = &slot.buffers[half.index()] {
                engine.send(token, socket, buffer);
            }
        }
        Op::Watch(_) => engine.watch(token, socket),
    }
}

fn fill<E: Engine>(engine: &mut E, slot: &mut Slot<E>, half: Side, len: u32) -> Result<u32, Errno> {
    let (Some(socket), Some(pipe)) = (&slot.sockets[half.index()], &mut slot.pipes[half.index()])
    else {
        return Err(Errno::EBADF);
    };
    engine.fill(socket, pipe, len)
}

fn drain<E: Engine>(
    engine: &mut E,
    slot: &mut Slot<E>,
    half: Side,
    len: u32,
) -> Result<u32, Errno> {
    let (Some(socket), Some(pipe)) =
        (&slot.sockets[(!half).index()], &mut slot.pipes[half.index()])
    else {
        return Err(Errno::EBADF);
    };
    engine.drain(pipe, socket, len)
}

/// An address as logs show it.
fn display(address: Option<SockaddrStorage>) -> String {
    address.map_or_else(|| "unknown client".to_owned(), |address| address.to_string())
}
