//! Every way a connection can end. `a` is the end that acts, `b` the one that is acted upon.

use super::end::{End, both};

/// More than fits a pipe of the default size, and buffers around it.
pub const BULK_BYTES: u64 = 3 << 20;

/// Both ends are really connected to each other.
fn greet(a: &mut End, b: &mut End) {
    a.send(10);
    b.read(10);
    b.send(10);
    a.read(10);
}

fn answer_and_end(a: &mut End, b: &mut End) {
    b.send(1000);
    b.shut();
    a.read_to_end();
}

pub fn fin_after_last_byte(a: &mut End, b: &mut End) {
    a.send(1000);
    a.shut();
    b.read_to_end();
    answer_and_end(a, b);
}

pub fn fin_after_bulk(a: &mut End, b: &mut End) {
    both(
        || {
            a.send(BULK_BYTES);
            a.shut();
        },
        || b.read_to_end(),
    );
    answer_and_end(a, b);
}

pub fn bulk_back_after_half_close(a: &mut End, b: &mut End) {
    a.shut();
    b.read_to_end();
    both(
        || {
            b.send(BULK_BYTES);
            b.shut();
        },
        || a.read_to_end(),
    );
}

/// After one end has ended its stream the other one still talks, in several rounds.
pub fn dribble_back_after_half_close(a: &mut End, b: &mut End) {
    a.send(100);
    a.shut();
    b.read_to_end();
    for _ in 0..20 {
        b.send(1);
        a.read(1);
    }
    b.shut();
    a.read_to_end();
}

pub fn empty_close(a: &mut End, b: &mut End) {
    a.close();
    b.read_to_end();
}

pub fn empty_shutdowns(a: &mut End, b: &mut End) {
    a.shut();
    b.read_to_end();
    b.shut();
    a.read_to_end();
}

pub fn simultaneous_close(a: &mut End, b: &mut End) {
    greet(a, b);
    a.shut();
    b.shut();
    a.read_to_end();
    b.read_to_end();
}

pub fn simultaneous_close_with_bytes(a: &mut End, b: &mut End) {
    for end in [&mut *a, b] {
        end.send(5000);
        end.shut();
    }
    a.read_to_end();
    b.read_to_end();
}

/// The first write is answered by a reset, as nobody is there; a later one fails.
pub fn write_to_closed(a: &mut End, b: &mut End) {
    greet(a, b);
    a.close();
    b.read_to_end();
    b.write_until_it_fails();
}

pub fn reset_when_idle(a: &mut End, b: &mut End) {
    greet(a, b);
    a.reset();
    b.read_to_end();
    b.write_until_it_fails();
}

/// As soon as the server has the connection.
pub fn reset_at_once(a: &mut End, b: &mut End) {
    a.reset();
    b.read_to_end();
}

/// A program that writes before it reads learns it from the write.
pub fn reset_met_by_write(a: &mut End, b: &mut End) {
    greet(a, b);
    a.reset();
    b.wait_until_failed();
    b.write_until_it_fails();
    b.read_to_end();
}

pub fn reset_after_fin_sent(a: &mut End, b: &mut End) {
    greet(a, b);
    a.shut();
    b.read_to_end();
    a.reset();
    b.wait_until_failed();
    b.write_until_it_fails();
    b.read_to_end();
}

pub fn reset_after_fin_received(a: &mut End, b: &mut End) {
    greet(a, b);
    b.shut();
    a.read_to_end();
    a.reset();
    b.read_to_end();
}

pub fn reset_after_fin_received_with_bytes(a: &mut End, b: &mut End) {
    greet(a, b);
    b.shut();
    a.read_to_end();
    a.send(1000);
    a.wait_until_acknowledged();
    a.reset();
    b.read_to_end();
}

pub fn reset_after_unread_bytes_and_fin(a: &mut End, b: &mut End) {
    a.send(1000);
    a.shut();
    a.wait_until_acknowledged();
    a.reset();
    b.read(1000);
    b.read_to_end();
    b.wait_until_failed();
    b.write_until_it_fails();
}

pub fn reset_after_unread_bytes(a: &mut End, b: &mut End) {
    a.send(1000);
    a.wait_until_acknowledged();
    a.reset();
    b.read_to_end();
}

/// The bytes and the reset arrive together.
pub fn reset_after_bytes_at_once(a: &mut End, b: &mut End) {
    greet(a, b);
    a.send(20_000);
    a.reset();
    b.read_to_end();
}

pub fn reset_after_bytes_and_fin_at_once(a: &mut End, b: &mut End) {
    greet(a, b);
    a.send(1000);
    a.shut();
    a.reset();
    b.read(1000);
    b.read_to_end();
    b.wait_until_failed();
    b.write_until_it_fails();
}

/// What `b` ends was cut before; the reset came first.
pub fn reset_after_fin_met_by_fin(a: &mut End, b: &mut End) {
    greet(a, b);
    a.shut();
    a.reset();
    b.wait_until_failed();
    b.shut();
    b.read_to_end();
    b.write_until_it_fails();
}

/// All was said before: to `b` there is nothing to reset.
pub fn reset_after_both_fins(a: &mut End, b: &mut End) {
    greet(a, b);
    a.shut();
    b.read_to_end();
    b.shut();
    a.read_to_end();
    a.reset();
    b.read_to_end();
    b.write_until_it_fails();
}

pub fn reset_after_both_fins_with_bytes(a: &mut End, b: &mut End) {
    greet(a, b);
    a.send(1000);
    b.shut();
    a.read_to_end();
    a.shut();
    a.wait_until_acknowledged();
    a.reset();
    b.read_to_end();
    b.write_until_it_fails();
}

/// As above, on a way that was full before, so that it is watched for room, and for failures.
pub fn reset_after_bytes_and_fin_at_once_after_back_pressure(a: &mut End, b: &mut End) {
    a.unhurried();
    let offered = b.offer(u64::from(u32::MAX));
    a.read_message(offered);
    b.send(10);
    a.read(10);
    a.send(1000);
    a.shut();
    a.reset();
    b.read(1000);
    b.read_to_end();
    b.wait_until_failed();
    b.write_until_it_fails();
}

/// What `b` has sent is not wanted, nor is the end that waits behind it.
pub fn reset_against_bytes_and_fin(a: &mut End, b: &mut End) {
    b.offer(u64::from(u32::MAX));
    b.shut();
    a.reset();
    b.wait_until_failed();
    b.read_to_end();
}

/// Bytes wait in both directions; those of the end that resets are still read.
pub fn reset_with_bytes_each_way(a: &mut End, b: &mut End) {
    a.send(1000);
    b.offer(u64::from(u32::MAX));
    a.reset();
    b.wait_until_failed();
    b.read(1000);
    b.read_to_end();
    b.write_until_it_fails();
}

/// For receive buffers that take it all.
pub fn reset_after_unread_bulk(a: &mut End, b: &mut End) {
    a.send(BULK_BYTES);
    a.wait_until_acknowledged();
    a.reset();
    b.read_to_end();
}

/// By nature: without a forwarder, what the receiver has no room for is lost with the sender.
pub fn reset_while_receiver_is_full(a: &mut End, b: &mut End) {
    b.unhurried();
    if a.offer(100_000) == 100_000 {
        a.wait_until_acknowledged();
    }
    a.reset();
    // Whoever has the bytes now has them for a while.
    std::thread::sleep(std::time::Duration::from_millis(300));
    b.read_to_end();
}

pub fn reset_after_both_carried_data(a: &mut End, b: &mut End) {
    both(|| a.send(BULK_BYTES), || b.read(BULK_BYTES));
    both(|| b.send(BULK_BYTES), || a.read(BULK_BYTES));
    a.reset();
    b.read_to_end();
    b.write_until_it_fails();
}

/// The sender is blocked, so it does not read, write or wait for an end.
pub fn reset_by_stopped_reader(a: &mut End, b: &mut End) {
    b.offer(u64::from(u32::MAX));
    a.reset();
    b.wait_until_failed();
    b.write_until_it_fails();
    b.read_to_end();
}

/// As above, and the reader had nothing more to say either.
pub fn reset_by_half_closed_stopped_reader(a: &mut End, b: &mut End) {
    a.shut();
    b.read_to_end();
    b.offer(u64::from(u32::MAX));
    a.reset();
    b.wait_until_failed();
    b.write_until_it_fails();
}

/// The kernel makes a reset of a close that throws bytes away.
pub fn close_with_unread_bytes(a: &mut End, b: &mut End) {
    b.send(1000);
    a.wait_until_arrived(1000);
    a.close();
    b.read_to_end();
}

pub fn answer_then_close_with_unread_bytes(a: &mut End, b: &mut End) {
    b.send(1000);
    a.wait_until_arrived(1000);
    a.send(500);
    a.wait_until_acknowledged();
    a.close();
    b.read_to_end();
}

pub fn close_in_the_middle_of_bulk(a: &mut End, b: &mut End) {
    both(
        || {
            a.read(100_000);
            a.close();
        },
        || {
            b.offer(u64::from(u32::MAX));
            b.read_to_end();
        },
    );
}
