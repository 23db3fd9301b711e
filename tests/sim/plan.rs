//! What a schedule is made of: everything that is decided before it starts, from its seed.

use nix::errno::Errno;
use nsplice::config::Transfer;
use nsplice::flow::half::BUFFER_BYTES;
use nsplice::flow::{Limits, TURN_BYTES};

use crate::rng::Rng;

const MIB: u64 = 1 << 20;

/// A schedule.
#[derive(Clone, Debug)]
pub struct Plan {
    pub transfer: Transfer,
    /// Time the worker has to deliver what a failed socket had sent.
    pub grace_ms: u32,
    pub entry: Entry,
    /// The worker serves one connection only.
    pub single: bool,
    /// The worker logs each connection.
    pub verbose: bool,
    /// The target's socket is given, as by `-C`.
    pub target_given: bool,
    pub connections: Vec<Connection>,
    pub buffers: u16,
    /// Connections above which the worker accepts none.
    pub max_connections: u32,
    /// The longest times of a flow, in ticks.
    pub limits: Limits,
    /// Chance in percent that a tick passes in a turn.
    pub tick: u32,
    /// Pipes that can exist at a time.
    pub pipes: usize,
    /// Capacities of pipes in bytes.
    pub capacities: Vec<u32>,
    pub weather: Weather,
    /// The turn before which the worker is told to stop.
    pub stop_at: Option<u32>,
    /// Connections are given to the worker even then.
    pub gives_after_stop: bool,
    /// What the first accepts fail with, and how many of them.
    pub accept_error: Errno,
    pub accept_errors: u32,
    /// Connections that copy are to be with another worker.
    pub moves: bool,
    /// A pause of the worker is really waited for, instead of ended by the order to stop.
    pub waits_for_pause: bool,
}

/// How connections come to the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It accepts them.
    Accepted,
    /// They are given to it.
    Given,
}

/// A client, its target, and the way between.
#[derive(Clone, Debug)]
pub struct Connection {
    /// What connecting comes to; `None`: it takes for ever. ECONNRESET: the target was reached, sent
    /// what it had and reset at once.
    pub connect: Option<Result<(), Errno>>,
    /// It comes when those before it are gone.
    pub is_late: bool,
    /// What making the target's socket fails with.
    pub no_socket: Option<Errno>,
    /// By side.
    pub peers: [Peer; 2],
}

/// What the other end of a socket does.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Bytes it sends.
    pub len: u64,
    /// What it does then.
    pub ending: Ending,
    /// Where in its stream bytes are that it sends as urgent, in order. One at the stream's end
    /// is announced, but never comes.
    pub marks: Vec<u64>,
    /// Bytes it is ready to take at the start.
    pub first_room: u64,
    /// Bytes by which it makes more room.
    pub step: u64,
    /// Bytes it takes at all.
    pub appetite: u64,
    /// How long it takes to acknowledge what it was sent; `None`: for ever.
    pub ack_delay_ms: Option<u32>,
    /// It does not end with a reset, it is not heard of any more.
    pub falls_silent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Fin,
    Rst,
    FinThenRst,
    /// A FIN, when it has seen one.
    FinAfterFin,
    Never,
}

/// In which order completions become visible to the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As things happened: so does an io_uring ring.
    Kernel,
    /// As things happened to each socket.
    Socket,
}

/// How adverse the world is.
#[derive(Clone, Debug)]
pub struct Weather {
    /// Chance in percent that a socket's peer does something during a wait.
    pub advance: u32,
    /// Chance in percent that a request is executed during a wait.
    pub execute: u32,
    /// Chance in percent that a completion is delivered by a wait.
    pub deliver: u32,
    /// Chance in percent that less is moved than could be.
    pub short: u32,
    /// Chance in 1024 of EINTR, EAGAIN and other nuisances.
    pub mishap: u32,
    /// Chance in percent that such a nuisance is a refusal for good.
    pub refusal: u32,
    /// Chance in percent that there is no pipe.
    pub no_pipe: u32,
    /// The longest time in milliseconds that passes during a wait in which things happen; 0: time
    /// passes only when nothing happens.
    pub tempo_ms: u32,
    pub order: Order,
}

impl Plan {
    pub fn new(rng: &mut Rng) -> Self {
        let kind = rng.below(1024);
        // Enough to use up a turn's budget, in any size of pipe; and enough flows to reuse slots.
        let (is_bulk, is_crowd) = (kind < 3, (3..6).contains(&kind));
        let capacities = capacities(rng, is_bulk);
        let count = match rng.below(10) {
            _ if is_bulk => rng.range(1, 3),
            _ if is_crowd => rng.range(15, 40),
            0..5 => 1,
            5..8 => 2,
            _ => 3,
        };
        let quiet = rng.percent(60);
        let connections = (0..count)
            .map(|_| match is_bulk {
                true => Connection::bulk(rng),
                false => Connection::new(rng, &capacities, quiet),
            })
            .collect();
        let single = rng.percent(20);
        let is_limited = rng.percent(12);
        let entry = rng.pick(&[Entry::Accepted, Entry::Given]);
        let max_connections = if rng.percent(10) { rng.range(1, 3) as u32 } else { u32::MAX };
        let waits_for_pause = rng.of_1024(1) && rng.percent(15);
        let accept_errors = [Errno::ECONNABORTED, Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM];
        Self {
            transfer: rng.pick(&[
                Transfer::Auto,
                Transfer::Auto,
                Transfer::Auto,
                Transfer::Splice,
                Transfer::Copy,
            ]),
            grace_ms: rng.pick(&[0, 1, 100, 300, 1000, 10_000]),
            entry,
            single,
            verbose: rng.percent(5),
            target_given: single && rng.percent(40),
            connections,
            buffers: if rng.percent(30) { rng.range(1, 4) as u16 } else { 64 },
            max_connections,
            limits: limits(rng, is_limited),
            tick: if is_limited { rng.range(1, 60) as u32 } else { 0 },
            pipes: if rng.percent(20) { rng.range(0, 2) as usize } else { 64 },
            capacities,
            weather: Weather::new(rng, is_bulk),
            stop_at: rng.percent(15).then(|| {
                let limit = 1 << rng.range(0, 8);
                rng.below(limit) as u32
            }),
            gives_after_stop: rng.percent(30),
            accept_error: rng.pick(&accept_errors),
            accept_errors: match waits_for_pause || rng.percent(4) {
                true => rng.pick(&[1, 1, 2, 4]),
                false => 0,
            },
            waits_for_pause,
            // A worker does not count those that another has.
            moves: max_connections == u32::MAX && rng.percent(25),
        }
    }
}

fn limits(rng: &mut Rng, is_limited: bool) -> Limits {
    let mut limit = || if is_limited { rng.pick(&[0, 1, 2, 5, 20]) } else { 0 };
    Limits { connect: limit(), idle: limit(), half_close: limit() }
}

impl Connection {
    fn new(rng: &mut Rng, capacities: &[u32], quiet: bool) -> Self {
        let failures = [Errno::ECONNREFUSED, Errno::ETIMEDOUT, Errno::EHOSTUNREACH];
        let connect = match rng.below(40) {
            0 | 1 => None,
            2 | 3 => Some(Err(rng.pick(&failures))),
            4 => Some(Err(Errno::ECONNRESET)),
            _ => Some(Ok(())),
        };
        let mut peers = [Peer::new(rng, capacities, quiet), Peer::new(rng, capacities, quiet)];
        if rng.of_1024(15) {
            peers[rng.index(2)].meet_splice_at_mark(rng);
        }
        Self {
            connect,
            is_late: rng.percent(30),
            no_socket: rng.of_1024(10).then_some(Errno::EAFNOSUPPORT),
            peers,
        }
    }

    /// A long stream to a target that takes all.
    fn bulk(rng: &mut Rng) -> Self {
        let mut peer = |len| Peer {
            len,
            ending: Ending::Fin,
            marks: Vec::new(),
            ack_delay_ms: Some(0),
            falls_silent: false,
            first_room: rng.pick(&[100 * MIB, 100 * MIB, 300 << 10]),
            step: 100 * MIB,
            appetite: u64::MAX,
        };
        let peers = [peer(16 * u64::from(TURN_BYTES)), peer(1000)];
        Self { connect: Some(Ok(())), is_late: false, no_socket: None, peers }
    }
}

impl Peer {
    fn new(rng: &mut Rng, capacities: &[u32], quiet: bool) -> Self {
        let len = stream_len(rng, capacities);
        let ending = match rng.below(100) {
            0..40 => Ending::Fin,
            40..60 if quiet => Ending::FinAfterFin,
            40..60 => Ending::Rst,
            60..72 if !quiet => Ending::FinThenRst,
            72..76 => Ending::Never,
            _ => Ending::Fin,
        };
        let step = match rng.below(4) {
            0 => rng.range(1 + len / 16, 2 + len / 2),
            1 => rng.range(1000, 100_000),
            _ => 100 * MIB,
        };
        // The other peer's stream is of another length, so this may be more or less than it.
        let appetite = if rng.percent(4) { rng.range(0, 2 * len + 1) } else { u64::MAX };
        let first_room = if rng.percent(70) { 10 * MIB } else { rng.range(0, 100_000) };
        Self {
            len,
            ending,
            marks: if rng.percent(12) { marks(rng, len) } else { Vec::new() },
            ack_delay_ms: match rng.below(10) {
                0 => None,
                1..4 => Some(rng.range(1, 400) as u32),
                _ => Some(0),
            },
            falls_silent: rng.percent(25),
            first_room: first_room.min(appetite),
            step: step.max(2000),
            appetite,
        }
    }
}

impl Peer {
    /// Its urgent byte is where splice begins, and it resets soon after.
    fn meet_splice_at_mark(&mut self, rng: &mut Rng) {
        let mark = u64::from(BUFFER_BYTES) * rng.range(1, 2);
        (self.len, self.marks) = (mark + rng.range(1, 200), vec![mark]);
        (self.ending, self.falls_silent) = (Ending::Rst, false);
    }
}

/// A length in bytes: most streams are short, and many end near a boundary.
fn stream_len(rng: &mut Rng, capacities: &[u32]) -> u64 {
    let buffer = u64::from(BUFFER_BYTES);
    let capacity = u64::from(rng.pick(capacities));
    match rng.below(100) {
        0..12 => 0,
        12..20 => 1,
        20..45 => rng.range(2, 2000),
        45..57 => rng.range(buffer - 1, buffer + 1),
        57..70 => buffer * rng.range(1, 4) + rng.below(100),
        70..78 => buffer + rng.range(capacity - 1, capacity + 1),
        78..86 => buffer + capacity * rng.range(1, 3) + rng.below(1000),
        86..96 => rng.range(buffer, 400_000),
        _ => rng.below(2 * MIB),
    }
}

/// Offsets of urgent bytes in a stream: some alone, some near each other or near a boundary.
fn marks(rng: &mut Rng, len: u64) -> Vec<u64> {
    let buffer = u64::from(BUFFER_BYTES);
    let mut marks = Vec::new();
    for _ in 0..rng.pick(&[1, 1, 2, 3, 6]) {
        let mark = match rng.below(8) {
            0 => 0,
            1 => len.saturating_sub(1),
            2 => len,
            3 | 4 => buffer * rng.range(1, 4) + rng.below(2),
            5 => marks.last().map_or(1, |last| last + 1),
            _ => rng.below(len + 1),
        };
        marks.push(mark.min(len));
    }
    marks.sort_unstable();
    marks.dedup();
    marks
}

/// Capacities of the pipes of a schedule, in bytes.
fn capacities(rng: &mut Rng, is_bulk: bool) -> Vec<u32> {
    let choices: &[u32] = if is_bulk {
        &[64 << 10, 256 << 10, 1 << 20]
    } else {
        &[4 << 10, 8 << 10, 64 << 10, 64 << 10, 256 << 10, 1 << 20]
    };
    (0..rng.range(1, 2)).map(|_| rng.pick(choices)).collect()
}

impl Weather {
    fn new(rng: &mut Rng, is_bulk: bool) -> Self {
        let order = rng.pick(&[Order::Kernel, Order::Kernel, Order::Socket]);
        let fair = Self {
            advance: 100,
            execute: 100,
            deliver: 100,
            short: 0,
            mishap: 0,
            refusal: 0,
            no_pipe: 0,
            tempo_ms: 0,
            order,
        };
        if is_bulk || rng.percent(25) {
            return fair;
        }
        Self {
            advance: rng.range(10, 100) as u32,
            execute: rng.range(5, 100) as u32,
            deliver: rng.range(5, 100) as u32,
            short: rng.pick(&[0, 10, 30, 60]),
            mishap: rng.pick(&[0, 4, 40, 150]),
            refusal: rng.pick(&[0, 0, 0, 2, 20]),
            no_pipe: rng.pick(&[0, 0, 20]),
            tempo_ms: rng.pick(&[0, 0, 0, 1, 20, 300]),
            ..fair
        }
    }
}
