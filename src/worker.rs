//! A worker: one engine and the flows it serves.
//!
//! Each turn hands the requests of the last one to the kernel, collects what has completed, tells
//! the flows, and carries out what they want. Siblings share where connections are to be.
//!
//! It must not know which engine it has, or what a flow's state is.

use std::collections::VecDeque;
use std::time::Instant;

use nix::errno::Errno;

use crate::config::Transfer;
use crate::engine::{Engine, Outcome, Sleep, Token};
use crate::flow::{Action, End, Event, Flow, Op, Side, TURN_BYTES};
use crate::log::Log;
use crate::spread::Place;
use crate::stats::Stats;
use crate::sys::is_shortage;

mod accepting;
mod clock;
mod moving;
mod slot;

use accepting::ACCEPT_PAUSE;
pub use clock::Clock;
pub use moving::Moved;
use slot::{ROOM, Record, Slot, Tenant, describe, display};

/// What a worker is to do with connections.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How halves move their bytes.
    pub transfer: Transfer,
    /// Time to deliver what a socket had sent before it failed, in milliseconds.
    pub grace_ms: u32,
    /// The longest times of a flow.
    pub clock: Clock,
    /// The target's name in logs.
    pub target: String,
    /// Accept one connection only.
    pub single: bool,
    /// Clients come from a listening socket that another program made.
    pub adopts: bool,
    /// Capacity wanted for pipes, in bytes.
    pub pipe_size_bytes: u32,
    /// Connections above which none is accepted.
    pub max_connections: u32,
    /// Among those it shares connections with; `None`: with nobody.
    pub place: Option<Place>,
}

/// What a fill of a pipe counts for in a turn at least: it is a call, however little it moves.
const FILL_BYTES_MIN: u32 = 4096;

/// What a turn brought besides flows' business.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Woken {
    /// [`Token::Command`] completed.
    pub command: bool,
    /// [`Token::Handoff`] completed.
    pub handoff: bool,
}

/// An engine and its flows.
pub struct Worker<E: Engine> {
    engine: E,
    settings: Settings,
    log: Log,
    stats: Stats,
    slots: Vec<Slot<E>>,
    free: Vec<u32>,
    /// Accepted connections for whose targets the system has no socket now.
    waiting: VecDeque<E::Socket>,
    /// Flows that gave way to others, in the order in which they go on.
    yielded: VecDeque<(u32, u32)>,
    /// Connections that go to other workers.
    leavers: VecDeque<(usize, Moved<E::Socket>)>,
    /// Bytes that flows have taken into pipes, from the start; see [`FILL_BYTES_MIN`].
    filled_bytes: u64,
    /// Flows that wait for a buffer.
    starved: VecDeque<(u32, u32)>,
    /// A buffer was given back since starved flows were last told.
    has_spare_buffer: bool,
    listener: Option<E::Socket>,
    /// [`Token::Accept`] is in flight: one at a time, so that siblings take turns.
    is_accepting: bool,
    /// The listening socket of before, while that is in flight for it.
    leaving: Option<E::Socket>,
    /// See [`Worker::left`].
    left: Option<E::Socket>,
    accept_pause: Option<Instant>,
    /// The socket given by `-C`, until the connection it is for is there.
    target: Option<E::Socket>,
    /// Nothing more comes; the flows there are end by themselves.
    draining: bool,
    stopping: bool,
    /// [`Token::Tick`] is in flight. The clock runs only while there are flows.
    is_ticking: bool,
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
            slots: Vec::with_capacity(ROOM),
            free: Vec::new(),
            waiting: VecDeque::new(),
            yielded: VecDeque::new(),
            leavers: VecDeque::new(),
            filled_bytes: 0,
            starved: VecDeque::new(),
            has_spare_buffer: false,
            listener: None,
            is_accepting: false,
            leaving: None,
            left: None,
            accept_pause: None,
            target,
            draining: false,
            stopping: false,
            is_ticking: false,
            last_end: None,
        }
    }

    /// Forwards `client`, an accepted connection.
    pub fn add(&mut self, client: E::Socket) {
        if self.stopping {
            return self.cut(client);
        }
        let Settings { transfer, grace_ms, adopts, .. } = self.settings;
        if adopts {
            self.engine.adopt(&client);
        }
        let (flow, target) = match self.target.take() {
            Some(target) => (Flow::connected(transfer, grace_ms), target),
            None => match self.engine.target_socket() {
                Ok(socket) => (Flow::connecting(transfer, grace_ms), socket),
                Err(errno) if is_shortage(errno) => {
                    let text = || format!("clients wait: {errno:?}: {}", errno.desc());
                    self.log.failure("clients wait", text);
                    self.waiting.push_back(client);
                    self.pause();
                    return;
                }
                Err(errno) => return self.refuse(client, errno),
            },
        };
        self.stats.connections += 1;
        let record = self.log.is_verbose().then(|| {
            Box::new(Record { client: self.engine.peer(&client), started: Instant::now() })
        });
        self.seat(Tenant::new(flow, [client, target], record, self.next_name()));
    }

    /// Accepts no more; [`Worker::is_done`] tells when all flows have ended by themselves.
    pub fn drain(&mut self) {
        self.draining = true;
        self.stop_accepting();
    }

    /// Tells the flows that a tick has passed. The clock does so by itself.
    pub fn tick(&mut self) {
        self.is_ticking = false;
        for index in 0..self.slots.len() as u32 {
            self.tell(index, Event::Tick(self.settings.clock.limits));
        }
        self.run_clock();
    }

    fn run_clock(&mut self) {
        let tick_ms = self.settings.clock.tick_ms;
        if tick_ms > 0 && !self.is_ticking && self.live() > 0 {
            self.is_ticking = true;
            self.engine.pause(Token::Tick, tick_ms);
        }
    }

    /// Ends all flows; [`Worker::is_done`] tells when they have ended.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.stop_accepting();
        self.accept_pause = None;
        for client in std::mem::take(&mut self.waiting) {
            self.cut(client);
        }
        for index in 0..self.slots.len() as u32 {
            self.tell(index, Event::Stop);
        }
    }

    /// Whether there is nothing left to do and nothing will come.
    pub fn is_done(&self) -> bool {
        let is_single = self.settings.single && self.stats.connections > 0;
        let is_over = self.stopping || self.draining || is_single;
        is_over && !self.is_accepting && self.waiting.is_empty() && self.live() == 0
    }

    /// Number of live flows.
    pub fn live(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Number of connections: live flows, and clients who wait for a socket to the target.
    pub fn load(&self) -> u32 {
        (self.live() + self.waiting.len()) as u32
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
        self.stats.turns += 1;
        // Those that yield in this turn go on in the next: after the others' requests.
        let due = self.yielded.len();
        let mut woken = Woken::default();
        while let Some(completion) = self.engine.completion() {
            match completion.token {
                Token::Flow { index, generation, op } => {
                    self.complete(index, generation, op, completion.outcome);
                }
                Token::Accept => {
                    if let Outcome::Accepted(result) = completion.outcome {
                        self.accepted(result);
                    }
                }
                Token::Command => woken.command = true,
                Token::Handoff => woken.handoff = true,
                Token::Tick => self.tick(),
                Token::Ignored => {}
            }
        }
        self.resume(due);
        if self.can_feed() {
            // All of them: whoever were chosen might not need it any more.
            self.has_spare_buffer = false;
            for _ in 0..self.starved.len() {
                let Some((index, generation)) = self.starved.pop_front() else { break };
                self.take_turn(index, generation);
            }
        }
        self.end_accept_pause();
        Ok(woken)
    }

    /// Lets the first `due` flows that gave way go on, until they have spliced as much as one of
    /// them may: what the others have to do meanwhile is shorter.
    fn resume(&mut self, due: usize) {
        let before = self.filled_bytes;
        for _ in 0..due {
            let Some((index, generation)) = self.yielded.pop_front() else { return };
            self.take_turn(index, generation);
            if self.filled_bytes - before >= u64::from(TURN_BYTES) {
                return;
            }
        }
    }

    fn take_turn(&mut self, index: u32, generation: u32) {
        if self.slots[index as usize].generation == generation {
            self.tell(index, Event::Turn);
        }
    }

    fn can_feed(&self) -> bool {
        self.has_spare_buffer && !self.starved.is_empty()
    }

    fn sleep(&self) -> Sleep {
        if self.can_feed() || !self.yielded.is_empty() {
            Sleep::No
        } else if self.accept_pause.is_some() {
            Sleep::ForMs(ACCEPT_PAUSE.as_millis() as u32)
        } else {
            Sleep::Forever
        }
    }

    /// A flow's request has completed. A flow ends only when nothing is in flight, so a late
    /// completion can be the report of a watch alone, and carries nothing to give back.
    fn complete(&mut self, index: u32, generation: u32, op: Op, outcome: Outcome<E::Socket>) {
        let slot = self.slots.get_mut(index as usize);
        let current = slot.filter(|slot| slot.generation == generation);
        if let Some(tenant) = current.and_then(|slot| slot.tenant.as_mut()) {
            tenant.completed(&mut self.engine, op, outcome, &mut self.stats);
            self.consider(index);
            self.pump(index);
        }
    }

    fn tell(&mut self, index: u32, event: Event) {
        if let Some(tenant) = &mut self.slots[index as usize].tenant {
            tenant.flow.on(event);
            self.pump(index);
        }
    }

    /// Carries out all the flow wants now.
    fn pump(&mut self, index: u32) {
        while let Some(Slot { generation, tenant }) = self.slots.get_mut(index as usize)
            && let Some(tenant) = tenant
            && let Some(action) = tenant.flow.next()
        {
            let token = |op| Token::Flow { index, generation: *generation, op };
            // A socket that was given may be kernel TLS, which would keep a stream's last bytes.
            let promises = !self.settings.single;
            match action {
                Action::Start(op) => tenant.start(&mut self.engine, token(op), op, promises),
                Action::Cancel(op) => self.engine.cancel(token(op)),
                Action::Ask(question) => {
                    let wanted = self.settings.pipe_size_bytes;
                    let filled = tenant.answer(&mut self.engine, question, wanted, &mut self.stats);
                    if filled > 0 {
                        self.filled_bytes += u64::from(filled.max(FILL_BYTES_MIN));
                    }
                }
                Action::Release(half) => self.release(index, half),
                Action::Shutdown(side) => self.engine.shutdown(&tenant.sockets[side.index()]),
                Action::Yield => self.yielded.push_back((index, *generation)),
                Action::Starve => self.starved.push_back((index, *generation)),
                Action::Leave => self.part_with(index),
                Action::Close { reset } => self.close(index, reset),
            }
        }
    }

    fn release(&mut self, index: u32, half: Side) {
        let Some(tenant) = &mut self.slots[index as usize].tenant else { return };
        if let Some(pipe) = tenant.pipes[half.index()].take() {
            self.engine.release_pipe(pipe);
        }
        if let Some(buffer) = tenant.buffers[half.index()].take() {
            self.engine.give_back(buffer);
            self.has_spare_buffer = true;
        }
    }

    fn close(&mut self, index: u32, reset: [bool; 2]) {
        let Some(Tenant { flow, sockets, record, .. }) = self.vacate(index) else { return };
        let end = flow.end().unwrap_or(End::Stopped);
        let client = match (&record, end) {
            (Some(record), _) => display(record.client),
            (None, End::ConnectFailed(_)) => {
                display(self.engine.peer(&sockets[Side::Listen.index()]))
            }
            _ => String::new(),
        };
        for (socket, reset) in sockets.into_iter().zip(reset) {
            if reset {
                self.engine.reset(&socket);
            }
            self.engine.close(socket);
        }
        let bytes = Side::BOTH.map(|half| flow.delivered_bytes(half));
        self.ended(end, bytes, &client, record.map(|record| record.started));
        self.accept_next();
    }

    /// Counts and logs a flow's end.
    fn ended(&mut self, end: End, bytes: [u64; 2], client: &str, started: Option<Instant>) {
        self.last_end = Some(end);
        self.stats.count_end(end, bytes);
        let target = &self.settings.target;
        if let Some(started) = started {
            let [to_target, to_client] = bytes;
            let seconds = started.elapsed().as_secs_f64();
            let how = describe(end);
            self.log.line(&format!(
                "{client} -> {target}: {to_target} bytes to target, {to_client} bytes to client, \
                 {seconds:.3} s: {how}"
            ));
        } else if matches!(end, End::ConnectFailed(_)) {
            let text = || format!("{client} -> {target}: {}", describe(end));
            self.log.failure("cannot connect", text);
        }
    }
}
