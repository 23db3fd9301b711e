//! Whether a relay forwards at all: every byte in both directions, and each end when it is due.

use std::io::Read;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::thread;

use crate::support::exchanges::{Exchange, run_clients, serve};
use crate::support::streams::{accept, connect, receive, send};

/// Bytes up and down of a connection. What is larger than all buffers on the way meets sinks that
/// are full.
const SIZES: &[(u64, u64)] = &[
    (0, 0),
    (1, 0),
    (0, 1),
    (64, 64),
    (20_000, 300_000),
    (300_000, 20_000),
    (12_000_000, 0),
    (0, 12_000_000),
    (12_000_000, 64),
    (12_000_000, 12_000_000),
];

/// Panics when the relay at `address` loses, swaps or cuts anything on its way to `target`.
pub fn check(address: SocketAddr, target: &TcpListener) {
    passes_an_end_on_alone(address, target);
    let exchanges: Vec<Exchange> =
        SIZES.iter().zip(1..).map(|(&(up, down), seed)| Exchange { seed, up, down }).collect();
    thread::scope(|scope| {
        scope.spawn(|| serve(target, exchanges.len()));
        run_clients(address, &exchanges, exchanges.len());
    });
}

/// One side sends and ends; the other answers only when it has seen that end.
fn passes_an_end_on_alone(address: SocketAddr, target: &TcpListener) {
    const BYTES: u64 = 100_000;
    for client_is_first in [true, false] {
        let (client, server) = (connect(address), accept(target));
        let (first, second) = if client_is_first { (client, server) } else { (server, client) };
        send(&mut &first, 1, BYTES);
        first.shutdown(Shutdown::Write).expect("the connection is there");
        receive(&mut &second, 1, BYTES);
        assert_eq!((&second).read(&mut [0]).expect("an end, not a failure"), 0);
        send(&mut &second, 2, BYTES);
        drop(second);
        receive(&mut &first, 2, BYTES);
        assert_eq!((&first).read(&mut [0]).expect("an end, not a failure"), 0);
    }
}
