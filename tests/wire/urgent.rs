//! Urgent data. `a` sends it.
//!
//! A socket knows one urgent byte at a time: the next one takes its place unless it was read
//! before. So scripts wait for either.

use super::end::{End, both};
use super::endings::BULK_BYTES;

/// More than all buffers on the way hold together.
const OVERFLOW_BYTES: u64 = 24 << 20;

fn answer(a: &mut End, b: &mut End) {
    b.send(1);
    a.read(1);
}

pub fn alone(a: &mut End, b: &mut End) {
    a.send_urgent(1);
    b.read(1);
    answer(a, b);
}

pub fn at_start(a: &mut End, b: &mut End) {
    a.send_urgent(1);
    a.send(1000);
    b.read(1001);
    answer(a, b);
}

pub fn last_of_several(a: &mut End, b: &mut End) {
    a.send(500);
    a.send_urgent(100);
    a.send(500);
    b.read(1100);
    answer(a, b);
}

/// Around the sizes of buffers and pipes.
pub fn last_of_many(a: &mut End, b: &mut End) {
    for bytes in [8192, 8193, 16_385, 65_536, 65_537, 1_048_576, 1_048_577] {
        both(
            || {
                a.send(bytes - 1);
                a.send_urgent(1);
            },
            || b.read(bytes),
        );
        answer(a, b);
    }
}

pub fn in_bulk(a: &mut End, b: &mut End) {
    both(
        || {
            a.send(BULK_BYTES);
            a.send_urgent(1);
            a.send(BULK_BYTES);
        },
        || b.read(2 * BULK_BYTES + 1),
    );
    answer(a, b);
}

/// The stream is bulk, so it is spliced where there is a choice, and rests when the byte comes.
pub fn between_bulks(a: &mut End, b: &mut End) {
    for _ in 0..3 {
        both(|| a.send(BULK_BYTES), || b.read(BULK_BYTES));
        a.send_urgent(1);
        b.read(1);
    }
    both(|| a.send(BULK_BYTES), || b.read(BULK_BYTES));
    answer(a, b);
}

/// The first is read before the second is sent.
pub fn twice(a: &mut End, b: &mut End) {
    for _ in 0..2 {
        a.send_urgent(1);
        b.read(1);
    }
    answer(a, b);
}

/// Neither is read before both are there: the first one's mark is lost.
pub fn twice_unread(a: &mut End, b: &mut End) {
    a.send(10);
    a.send_urgent(1);
    b.wait_until_arrived(11);
    a.send_urgent(1);
    b.wait_until_arrived(12);
    b.read(12);
    answer(a, b);
}

/// As above, and neither is waited for.
pub fn twice_at_once(a: &mut End, b: &mut End) {
    a.send(10);
    a.send_urgent(1);
    a.send_urgent(1);
    b.wait_until_arrived(12);
    b.read(12);
    answer(a, b);
}

pub fn many_in_turn(a: &mut End, b: &mut End) {
    for _ in 0..50 {
        a.send(700);
        a.send_urgent(1);
        b.read(701);
    }
    answer(a, b);
}

pub fn before_fin(a: &mut End, b: &mut End) {
    a.send(1000);
    a.send_urgent(1);
    a.shut();
    b.read_to_end();
    answer(a, b);
}

pub fn alone_before_fin(a: &mut End, b: &mut End) {
    a.send_urgent(1);
    a.shut();
    b.read_to_end();
    answer(a, b);
}

pub fn before_reset_at_once(a: &mut End, b: &mut End) {
    a.send(1000);
    a.send_urgent(1);
    a.reset();
    b.read_to_end();
}

/// Around the size at which splice begins: there the failure may be told at the mark.
pub fn amid_bytes_before_reset_at_once<const BYTES: u64>(a: &mut End, b: &mut End) {
    a.send(BYTES);
    a.send_urgent(1);
    a.send(100);
    a.reset();
    b.read_to_end();
}

pub fn before_reset(a: &mut End, b: &mut End) {
    a.send(1000);
    a.send_urgent(1);
    a.wait_until_acknowledged();
    a.reset();
    b.read_to_end();
}

pub fn after_half_close_of_the_other(a: &mut End, b: &mut End) {
    b.shut();
    a.read_to_end();
    a.send(1000);
    a.send_urgent(1);
    a.send(1000);
    a.shut();
    b.read_to_end();
}

pub fn both_directions(a: &mut End, b: &mut End) {
    for end in [&mut *a, &mut *b] {
        end.send(2000);
        end.send_urgent(1);
        end.send(1000);
    }
    a.read(3001);
    b.read(3001);
}

pub fn under_back_pressure(a: &mut End, b: &mut End) {
    a.unhurried();
    b.unhurried();
    both(
        || {
            a.send(OVERFLOW_BYTES);
            a.send_urgent(1);
            a.send(OVERFLOW_BYTES);
        },
        || {
            // Long enough for all on the way to be full.
            std::thread::sleep(std::time::Duration::from_millis(300));
            b.read(2 * OVERFLOW_BYTES + 1);
        },
    );
    answer(a, b);
}

/// For small receive buffers. Nothing follows the byte that would push it on.
pub fn at_the_end_of_back_pressure(a: &mut End, b: &mut End) {
    b.unhurried();
    both(
        || {
            a.send(300_000);
            a.send_urgent(1);
        },
        || {
            std::thread::sleep(std::time::Duration::from_millis(300));
            b.read(300_001);
        },
    );
    answer(a, b);
}

pub fn out_of_band(a: &mut End, b: &mut End) {
    b.take_urgent_out_of_band();
    a.send(1000);
    a.send_aside();
    a.send(1000);
    b.read_aside();
    b.read(2000);
    answer(a, b);
}
