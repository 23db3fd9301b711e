//! The world of a schedule: peers, sockets, requests and completions.

use std::collections::VecDeque;

use nix::errno::Errno;
use nsplice::engine::Token;
use nsplice::flow::{Limits, Side};

use crate::memory::{Buffers, Pipe};
use crate::plan::{Plan, Weather};
use crate::requests::{Posted, Request};
use crate::rng::Rng;
use crate::socket::{Socket, Status};

/// Calls of the engine in one turn above which the worker is taken to spin.
const TURN_CALLS_MAX: u32 = 200_000;

/// Waits after the last move of a peer during which things go wrong. Without an end to it, nobody
/// could see that nothing goes on any more.
const WAITS_WITH_MISHAPS: u32 = 50;

/// Prints a line when a schedule is replayed.
macro_rules! trace {
    ($world:expr, $($text:tt)*) => {
        if $world.is_traced {
            println!($($text)*);
        }
    };
}
pub(crate) use trace;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The client has not called yet.
    Away,
    /// It can be accepted.
    Waiting,
    /// Its socket is on its way to the worker, or there.
    AtDoor,
    /// It has a flow.
    Served,
    /// There was no socket for its target.
    Refused,
}

#[derive(Debug)]
pub struct Connection {
    pub connect: Option<Result<(), Errno>>,
    pub no_socket: Option<Errno>,
    pub stage: Stage,
    /// Connecting was asked for.
    pub is_connecting: bool,
    /// What connecting came to.
    pub connected: Option<Result<(), Errno>>,
    /// The worker was told that it is connected, before the client failed.
    pub is_open: bool,
    /// The worker was told that connecting failed.
    pub told_unreachable: Option<Errno>,
    /// Slot and generation by which the worker calls it.
    pub name: Option<(u32, u32)>,
    /// Bytes spliced since the last wait.
    pub filled: u64,
    /// Something of it completed since then.
    pub is_woken: bool,
    /// Length of the flow's pauses that are over.
    pub paused_ms: u64,
    /// Bytes that the worker knows to be delivered, both ways.
    pub delivered: u64,
    /// Whole ticks without one, and their number then; `None`: since the last tick the connection
    /// came to be, or was made.
    pub quiet_ticks: u32,
    pub delivered_at_tick: Option<u64>,
    /// At some tick it had been quiet for as long as it may.
    pub has_expired: bool,
}

/// A request to the kernel that is not submitted yet.
#[derive(Debug)]
pub enum Entered {
    Begin(Request),
    Cancel(Token),
    Close(usize),
}

impl Entered {
    pub fn begins(&self, token: Token) -> bool {
        matches!(self, Entered::Begin(request) if request.token == token)
    }
}

#[derive(Debug)]
pub struct World {
    pub rng: Rng,
    pub plan: Plan,
    pub weather: Weather,
    pub connections: Vec<Connection>,
    /// Connection `i` has sockets `2 * i` (its client's) and `2 * i + 1`; the last one listens.
    pub sockets: Vec<Socket>,
    pub buffers: Buffers,
    pub pipes: Vec<Pipe>,
    pub entered: Vec<Entered>,
    /// Submitted and not finished.
    pub requests: Vec<Request>,
    /// Happened and not delivered.
    pub posted: VecDeque<Posted>,
    /// Late reports of watches that are over, and their flows too.
    pub ghosts: Vec<Posted>,
    /// Delivered and not read.
    pub inbox: VecDeque<Posted>,
    /// The connection whose client the worker got last.
    pub newest: Option<usize>,
    /// Closing the listener was announced by a cancellation.
    pub accept_cancelled: bool,
    pub is_stopping: bool,
    /// Connections that had failed before.
    pub failed_before: u64,
    /// Nothing can happen any more unless the worker is told something.
    pub is_quiescent: bool,
    /// Waits since a peer did something.
    pub waits_alone: u32,
    pub turn_calls: u32,
    pub calls: u64,
    /// Fills of a flow in a turn in which another one that only waited for it had filled.
    pub shared_fills: u64,
    /// Sockets that left an engine.
    pub leaves: u64,
    /// Connections that have left since the worker was asked for them.
    pub left: VecDeque<usize>,
    /// The one that comes back now.
    pub returning: Option<usize>,
    /// The time.
    pub now_ms: u64,
    /// Bytes that went through pipes.
    pub drained: u64,
    pub accept_errors: Vec<Errno>,
    /// The worker's pause after one of them is over.
    pub has_paused: bool,
    /// One of them was told since the last wait.
    pub is_exhausted: bool,
    pub is_traced: bool,
}

impl World {
    pub fn new(plan: Plan, rng: Rng, is_traced: bool) -> Self {
        let connections = plan.connections.iter().map(|connection| Connection {
            connect: connection.connect,
            no_socket: connection.no_socket,
            stage: Stage::Away,
            is_connecting: false,
            connected: None,
            is_open: false,
            told_unreachable: None,
            name: None,
            filled: 0,
            is_woken: false,
            paused_ms: 0,
            delivered: 0,
            quiet_ticks: 0,
            delivered_at_tick: None,
            has_expired: false,
        });
        let peers = plan.connections.iter().flat_map(|connection| connection.peers.iter());
        let mut sockets: Vec<_> = peers.map(|peer| Socket::new(peer.clone())).collect();
        sockets.push(Socket::new(plan.connections[0].peers[0].clone()));
        Self {
            weather: plan.weather.clone(),
            connections: connections.collect(),
            sockets,
            buffers: Buffers::new(plan.buffers),
            pipes: Vec::new(),
            entered: Vec::new(),
            requests: Vec::new(),
            posted: VecDeque::new(),
            ghosts: Vec::new(),
            inbox: VecDeque::new(),
            newest: None,
            accept_cancelled: false,
            is_stopping: false,
            failed_before: 0,
            is_quiescent: false,
            waits_alone: 0,
            turn_calls: 0,
            calls: 0,
            shared_fills: 0,
            leaves: 0,
            left: VecDeque::new(),
            returning: None,
            now_ms: 0,
            drained: 0,
            accept_errors: Vec::new(),
            has_paused: false,
            is_exhausted: false,
            is_traced,
            rng,
            plan,
        }
    }

    /// The listening socket.
    pub fn listener(&self) -> usize {
        self.sockets.len() - 1
    }

    pub fn open_listener(&mut self) -> usize {
        self.open(self.listener())
    }

    /// Makes a socket of the worker.
    pub fn open(&mut self, socket: usize) -> usize {
        self.sockets[socket].status = Status::Open;
        socket
    }

    /// The client of `connection` is handed to the worker.
    pub fn arrive(&mut self, connection: usize) -> usize {
        self.connections[connection].stage = Stage::AtDoor;
        self.newest = Some(connection);
        let client = self.open(2 * connection);
        self.sockets[client].is_connected = true;
        client
    }

    /// The target of `connection` is reached.
    pub fn connect(&mut self, connection: usize) {
        self.connections[connection].connected = Some(Ok(()));
        self.sockets[2 * connection + 1].is_connected = true;
    }

    /// A tick of the worker's clock passes.
    pub fn tick(&mut self) {
        trace!(self, "tick");
        for index in 0..self.connections.len() {
            let connection = &mut self.connections[index];
            if connection.is_open && connection.name.is_none() {
                // Between two workers: neither's clock is its own.
                continue;
            }
            connection.quiet_ticks += 1;
            if connection.delivered_at_tick != Some(connection.delivered) {
                connection.delivered_at_tick = Some(connection.delivered);
                connection.quiet_ticks = 0;
            }
            self.connections[index].has_expired |= self.is_expired(index);
        }
    }

    /// Whether the connection has been quiet for as long as it may.
    fn is_expired(&self, index: usize) -> bool {
        let Limits { connect, idle, half_close } = self.plan.limits;
        let Connection { is_open, quiet_ticks, .. } = self.connections[index];
        let is_half_closed = self.sockets[2 * index].is_shut || self.sockets[2 * index + 1].is_shut;
        let is_over = |limit| limit > 0 && quiet_ticks >= limit;
        match (is_open, is_half_closed) {
            (false, _) => is_over(connect),
            (true, false) => is_over(idle),
            (true, true) => is_over(idle) || is_over(half_close),
        }
    }

    /// Counts a call of the engine.
    pub fn call(&mut self) {
        self.calls += 1;
        self.turn_calls += 1;
        assert!(self.turn_calls < TURN_CALLS_MAX, "the worker spins within a turn");
    }

    /// Something that goes wrong now and then, but not for ever.
    pub fn mishap(&mut self) -> bool {
        self.waits_alone < WAITS_WITH_MISHAPS && self.rng.of_1024(self.weather.mishap)
    }

    /// What a request of a socket fails with by bad luck: one of `nuisances`, or for good.
    pub fn failed(&mut self, socket: usize, nuisances: &[Errno]) -> Errno {
        if !self.rng.percent(self.weather.refusal) {
            return self.rng.pick(nuisances);
        }
        self.sockets[socket].was_refused = true;
        Errno::ENOMEM
    }

    /// The connection of a flow the worker has named.
    pub fn connection_of(&self, token: Token) -> Option<usize> {
        let Token::Flow { index, generation, .. } = token else { return None };
        self.connections.iter().position(|known| known.name == Some((index, generation)))
    }

    /// A number of bytes that is moved when `most` could be.
    pub fn some_of(&mut self, most: u64) -> u64 {
        if most <= 1 || !self.rng.percent(self.weather.short) {
            return most;
        }
        if self.rng.percent(10) { 1 } else { self.rng.range(most.div_ceil(4), most) }
    }
}

/// The other socket of the same connection.
pub fn other(socket: usize) -> usize {
    socket ^ 1
}

/// Which side of its connection a socket is.
pub fn side(socket: usize) -> Side {
    Side::BOTH[socket % 2]
}
