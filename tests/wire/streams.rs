//! Amounts of bytes, and the times they are sent at. `a` sends, `b` receives.

use std::time::Duration;

use super::end::{End, both};

const MIB: u64 = 1 << 20;

/// One message and its answer.
fn ask(a: &mut End, b: &mut End, bytes: u64) {
    both(|| a.send(bytes), || b.read_message(bytes));
    b.send(1);
    a.read(1);
}

/// Three messages of a size, each answered.
pub fn messages<const BYTES: u64>(a: &mut End, b: &mut End) {
    for _ in 0..3 {
        ask(a, b, BYTES);
    }
}

pub fn dribble(a: &mut End, b: &mut End) {
    for _ in 0..200 {
        a.send(1);
        b.read(1);
    }
}

pub fn many_small_writes(a: &mut End, b: &mut End) {
    both(|| a.send_in_pieces(200_000, 37), || b.read(200_000));
    ask(a, b, 1);
}

pub fn small_and_bulk_in_turn(a: &mut End, b: &mut End) {
    for bytes in [1, 3 * MIB, 1, 1, MIB, 10, 100_000, 2 * MIB, 3, 40_000, 5] {
        ask(a, b, bytes);
    }
}

pub fn small_directly_after_bulk(a: &mut End, b: &mut End) {
    both(
        || {
            for bytes in [1, 3 * MIB, 1, MIB, 10, 2 * MIB, 1] {
                a.send(bytes);
            }
        },
        || b.read(6 * MIB + 13),
    );
    ask(a, b, 1);
}

pub fn ping_pong_after_bulk(a: &mut End, b: &mut End) {
    ask(a, b, 3 * MIB);
    ping_pong(a, b, &[1]);
}

/// A message in two writes is what stalls where Nagle's algorithm is on.
pub fn ping_pong_in_two_writes(a: &mut End, b: &mut End) {
    ping_pong(a, b, &[1, 2]);
}

fn ping_pong(a: &mut End, b: &mut End, writes: &[u64]) {
    const ROUNDS: u32 = 100;
    let bytes = writes.iter().sum();
    for _ in 0..ROUNDS {
        for &write in writes {
            a.send(write);
        }
        b.read(bytes);
        for &write in writes {
            b.send(write);
        }
        a.read(bytes);
    }
}

/// A pipe's slots each hold a piece of a packet. A message that fills 16 of them, and then a wait
/// for the answer, is what stalls where a splice announces that more will come (tests/kernel/splicing.rs).
pub fn sixteen_slots(a: &mut End, b: &mut End) {
    for bytes in [4096, 32768] {
        for pieces in [15, 16, 17, 32] {
            both(
                || a.send_in_pieces(pieces * bytes, bytes as usize),
                || b.read_message(pieces * bytes),
            );
            b.send(1);
            a.read(1);
        }
    }
}

/// Also where the pieces arrive together, because nothing is read while they come.
pub fn every_number_of_slots(a: &mut End, b: &mut End) {
    for pages in 1..=40 {
        a.send_in_pieces(pages * 4096, 4096);
        b.read_message(pages * 4096);
        b.send(1);
        a.read(1);
    }
}

/// For tiny receive buffers.
pub fn slow_reader(a: &mut End, b: &mut End) {
    a.unhurried();
    b.unhurried();
    both(
        || {
            a.send(2 * MIB);
            a.shut();
        },
        || {
            b.read_in_pieces(256 << 10, 1 << 10);
            b.read_to_end();
        },
    );
}

pub fn reader_that_rests(a: &mut End, b: &mut End) {
    a.unhurried();
    b.unhurried();
    both(
        || {
            a.send(32 * MIB);
            a.shut();
        },
        || {
            b.read(MIB);
            std::thread::sleep(Duration::from_secs(1));
            b.read_to_end();
        },
    );
}

pub fn both_directions_one_ends_first(a: &mut End, b: &mut End) {
    both(|| a.exchange(2 * MIB), || b.exchange(12 * MIB));
}

/// Both ends send more than is on the way before either reads.
pub fn both_directions_unread(a: &mut End, b: &mut End) {
    a.unhurried();
    b.unhurried();
    let (from_a, from_b) = (a.offer(u64::from(u32::MAX)), b.offer(u64::from(u32::MAX)));
    a.shut();
    b.shut();
    both(|| a.read_all(from_b), || b.read_all(from_a));
}
