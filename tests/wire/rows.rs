//! The table of scripts: each row a way to use a connection, by name, and how it is run.

use std::time::Duration;

use super::end::{End, STALL};
use super::stage::Stage;
use super::{connecting, endings, streams, urgent};

/// What both ends observed, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub client: Vec<String>,
    pub server: Vec<String>,
}

type Between = fn(&mut End, &mut End);

enum Script {
    /// For a client and a server that are connected.
    ClientActs(Between),
    ServerActs(Between),
    /// For anything else.
    Stage(fn(&Stage) -> Seen),
}

/// What a forwarder's row is held against.
pub enum Wanted {
    /// What is seen without a forwarder.
    AsDirect,
    /// This, because there is a forwarder: the reason, the client's notes, the server's.
    ByNature(&'static str, &'static [&'static str], &'static [&'static str]),
}

pub struct Row {
    pub group: &'static str,
    pub name: String,
    pub wanted: Wanted,
    script: Script,
    /// Size of the receive buffers, where it matters.
    receive_bytes: Option<usize>,
    /// A wait as long as this is noted.
    stall: Duration,
}

/// A little less than what Nagle's algorithm and a delayed acknowledgement make of a wait: 40 ms.
const SHORT_STALL: Duration = Duration::from_millis(35);

/// So small that a receiver is soon full.
const SMALL: usize = 16 << 10;
/// So large that a receiver is never full.
const LARGE: usize = 4 << 20;

impl Row {
    /// Plays the script.
    pub fn run(&self, stage: &Stage) -> Seen {
        let (between, client_acts) = match self.script {
            Script::Stage(script) => return script(stage),
            Script::ClientActs(script) => (script, true),
            Script::ServerActs(script) => (script, false),
        };
        let Some((mut client, mut server)) = stage.pair(self.receive_bytes, self.stall) else {
            stage.forget();
            return Seen { client: vec!["no connection".to_owned()], server: Vec::new() };
        };
        if client_acts {
            between(&mut client, &mut server);
        } else {
            between(&mut server, &mut client);
        }
        if client.has_given_up() {
            stage.forget();
        }
        Seen { client: merge(client.into_notes()), server: merge(server.into_notes()) }
    }
}

/// Notes that repeat are told once.
fn merge(notes: Vec<String>) -> Vec<String> {
    let mut merged: Vec<(String, usize)> = Vec::new();
    for note in notes {
        match merged.last_mut() {
            Some((last, count)) if *last == note => *count += 1,
            _ => merged.push((note, 1)),
        }
    }
    let tell = |(note, count)| if count == 1 { note } else { format!("{count} x {note}") };
    merged.into_iter().map(tell).collect()
}

/// Rows under construction.
struct Table {
    group: &'static str,
    stall: Duration,
    rows: Vec<Row>,
}

impl Table {
    fn group(&mut self, group: &'static str, stall: Duration) {
        (self.group, self.stall) = (group, stall);
    }

    fn add(&mut self, name: String, script: Script) -> &mut Row {
        let &mut Self { group, stall, .. } = self;
        let (wanted, receive_bytes) = (Wanted::AsDirect, None);
        self.rows.push(Row { group, name, wanted, script, receive_bytes, stall });
        self.rows.last_mut().expect("one was just added")
    }

    /// Two rows, in which the client and the server are `{a}` of the name; `{b}` is the other one.
    fn both(&mut self, name: &str, script: Between) {
        self.both_with(None, name, script);
    }

    fn both_with(&mut self, receive_bytes: Option<usize>, name: &str, script: Between) {
        let ends = ["client", "server"];
        for (a, script) in
            [Script::ClientActs(script), Script::ServerActs(script)].into_iter().enumerate()
        {
            let name = name.replace("{a}", ends[a]).replace("{b}", ends[1 - a]);
            self.add(name, script).receive_bytes = receive_bytes;
        }
    }

    fn stage(&mut self, name: &str, script: fn(&Stage) -> Seen) -> &mut Row {
        self.add(name.to_owned(), Script::Stage(script))
    }
}

/// All rows.
pub fn rows() -> Vec<Row> {
    let mut table = Table { group: "", stall: STALL, rows: Vec::new() };
    orderly_ends(&mut table);
    resets(&mut table);
    connections(&mut table);
    urgent_bytes(&mut table);
    amounts(&mut table);
    pauses(&mut table);
    table.rows
}

fn orderly_ends(table: &mut Table) {
    table.group("Orderly ends", STALL);
    table.both("{a} ends its stream with its last byte, {b} answers", endings::fin_after_last_byte);
    table.both("{a} ends its stream with the last byte of 3 MiB", endings::fin_after_bulk);
    table.both("{a} only ends its stream, {b} sends 3 MiB", endings::bulk_back_after_half_close);
    table.both(
        "{a} ends its stream, {b} sends byte after byte",
        endings::dribble_back_after_half_close,
    );
    table.both("{a} closes, nothing was sent", endings::empty_close);
    table.both("{a} ends its stream, then {b}, nothing was sent", endings::empty_shutdowns);
    table.both("{a} and {b} end their streams at once", endings::simultaneous_close);
    table.both("{a} and {b} send and end at once", endings::simultaneous_close_with_bytes);
    table.both("{a} closes, {b} goes on writing", endings::write_to_closed);
}

fn resets(table: &mut Table) {
    table.group("Resets", STALL);
    table.both("{a} resets", endings::reset_when_idle);
    table.both("{a} resets as soon as it can", endings::reset_at_once);
    table.both("{a} resets, {b} writes before it reads", endings::reset_met_by_write);
    table.both("{a} ends its stream, then resets", endings::reset_after_fin_sent);
    table.both("{b} ends its stream, then {a} resets", endings::reset_after_fin_received);
    table.both(
        "{b} ends its stream, {a} sends, then resets",
        endings::reset_after_fin_received_with_bytes,
    );
    table.both("{a} sends and resets before {b} reads", endings::reset_after_unread_bytes);
    table.both(
        "{a} sends, ends its stream and resets before {b} reads",
        endings::reset_after_unread_bytes_and_fin,
    );
    table.both("{a} sends and resets at once", endings::reset_after_bytes_at_once);
    table.both(
        "{a} sends, ends its stream and resets at once",
        endings::reset_after_bytes_and_fin_at_once,
    );
    table.both(
        "{b} was blocked before {a} sends, ends its stream and resets at once",
        endings::reset_after_bytes_and_fin_at_once_after_back_pressure,
    );
    table.both_with(
        Some(LARGE),
        "{a} sends 3 MiB and resets before {b} reads",
        endings::reset_after_unread_bulk,
    );
    table.both("{a} resets after 3 MiB each way", endings::reset_after_both_carried_data);
    table.both(
        "{a} ends its stream and resets at once, {b} ends its own before it reads",
        endings::reset_after_fin_met_by_fin,
    );
    table.both("{a}, then {b} ends its stream, then {a} resets", endings::reset_after_both_fins);
    table.both(
        "{a} sends, {b} ends its stream, {a} ends its own and resets before {b} reads",
        endings::reset_after_both_fins_with_bytes,
    );
    table.both(
        "{a} reads nothing, and resets while {b} is blocked",
        endings::reset_by_stopped_reader,
    );
    table.both(
        "{a} ends its stream, reads nothing, and resets while {b} is blocked",
        endings::reset_by_half_closed_stopped_reader,
    );
    table.both(
        "{a} reads nothing, and resets when {b}, blocked, has ended its stream",
        endings::reset_against_bytes_and_fin,
    );
    table.both(
        "{a} sends, reads nothing, and resets while {b} is blocked",
        endings::reset_with_bytes_each_way,
    );
    table.both("{a} closes with bytes unread", endings::close_with_unread_bytes);
    table.both(
        "{a} answers and closes with bytes unread",
        endings::answer_then_close_with_unread_bytes,
    );
    table.both("{a} closes in the middle of what {b} sends", endings::close_in_the_middle_of_bulk);
    let reason = "a forwarder has room for bytes that would have been lost with their sender";
    for (script, client, server) in [
        (
            Script::ClientActs(endings::reset_while_receiver_is_full),
            &[][..],
            &["100000 bytes, ECONNRESET"][..],
        ),
        (
            Script::ServerActs(endings::reset_while_receiver_is_full),
            &["100000 bytes, ECONNRESET"][..],
            &[][..],
        ),
    ] {
        let a = if client.is_empty() { "client" } else { "server" };
        let row =
            table.add(format!("{a} sends more than the other has room for, and resets"), script);
        row.receive_bytes = Some(SMALL);
        row.wanted = Wanted::ByNature(reason, client, server);
    }
}

fn connections(table: &mut Table) {
    table.group("Connecting", STALL);
    let mut failure = |name, script| {
        table.stage(name, script).wanted = Wanted::ByNature(
            "the client is connected before it is known; it must be a reset, never an orderly end",
            &["ECONNRESET"],
            &[],
        );
    };
    failure("nothing listens at the target", connecting::refused);
    failure("there is no route to the target", connecting::no_network);
    failure("the target's host cannot be reached", connecting::no_host);
    failure("the target does not answer in time", connecting::timed_out);
    table.stage(
        "client resets while the target does not answer",
        connecting::reset_while_connecting,
    );
    table.stage(
        "client sends and resets while the target does not answer",
        connecting::reset_after_bytes_while_connecting,
    );
    table.stage(
        "client sends, ends its stream and resets while the target does not answer",
        connecting::reset_after_half_close_while_connecting,
    );
    table.stage(
        "client sends and ends its stream while the target does not answer",
        connecting::half_close_while_connecting,
    );
    table.stage(
        "client only ends its stream while the target does not answer",
        connecting::end_while_connecting,
    );
}

fn urgent_bytes(table: &mut Table) {
    table.group("Urgent data", STALL);
    table.both("{a} sends an urgent byte alone", urgent::alone);
    table.both("{a} sends an urgent byte first", urgent::at_start);
    table.both("{a} sends 100 bytes as urgent, so the last one is", urgent::last_of_several);
    table.both("{a} sends 8 KiB to 1 MiB, the last byte urgent", urgent::last_of_many);
    table.both("{a} sends an urgent byte in the middle of 6 MiB", urgent::in_bulk);
    table
        .both("{a} sends an urgent byte after each 3 MiB, when all is read", urgent::between_bulks);
    table.both("{a} sends a second urgent byte when the first is read", urgent::twice);
    table.both("{a} sends a second urgent byte before the first is read", urgent::twice_unread);
    table.both("{a} sends two urgent bytes at once", urgent::twice_at_once);
    table.both("{a} sends 50 urgent bytes in turn with others", urgent::many_in_turn);
    table.both("{a} sends an urgent byte and ends its stream", urgent::before_fin);
    table.both("{a} sends only an urgent byte and ends its stream", urgent::alone_before_fin);
    table.both("{a} sends an urgent byte and resets before {b} reads", urgent::before_reset);
    table.both("{a} sends an urgent byte and resets at once", urgent::before_reset_at_once);
    table.both(
        "{a} sends 8191 bytes, an urgent one and 100 more, and resets at once",
        urgent::amid_bytes_before_reset_at_once::<8191>,
    );
    table.both(
        "{a} sends 8192 bytes, an urgent one and 100 more, and resets at once",
        urgent::amid_bytes_before_reset_at_once::<8192>,
    );
    table.both(
        "{a} sends 8193 bytes, an urgent one and 100 more, and resets at once",
        urgent::amid_bytes_before_reset_at_once::<8193>,
    );
    table.both(
        "{a} sends 60000 bytes, an urgent one and 100 more, and resets at once",
        urgent::amid_bytes_before_reset_at_once::<60_000>,
    );
    table.both(
        "{a} sends an urgent byte after {b} has ended its stream",
        urgent::after_half_close_of_the_other,
    );
    table.both("{a} and {b} send an urgent byte", urgent::both_directions);
    table.both(
        "{a} sends an urgent byte amid 48 MiB that {b} reads later",
        urgent::under_back_pressure,
    );
    table.both_with(
        Some(SMALL),
        "{a} sends an urgent byte when {b} has no room",
        urgent::at_the_end_of_back_pressure,
    );
    table.both("{a} sends an urgent byte that {b} takes out of band", urgent::out_of_band);
}

fn amounts(table: &mut Table) {
    table.group("Amounts, no wait of 35 ms", SHORT_STALL);
    table.both("{a} sends 8191 bytes, {b} answers, three times", streams::messages::<8191>);
    table.both("{a} sends 8192 bytes, {b} answers, three times", streams::messages::<8192>);
    table.both("{a} sends 8193 bytes, {b} answers, three times", streams::messages::<8193>);
    table.both("{a} sends 1 MiB - 1, {b} answers, three times", streams::messages::<1_048_575>);
    table.both("{a} sends 1 MiB, {b} answers, three times", streams::messages::<1_048_576>);
    table.both("{a} sends 1 MiB + 1, {b} answers, three times", streams::messages::<1_048_577>);
    table.both("{a} sends what fills 15, 16, 17 and 32 slots of a pipe", streams::sixteen_slots);
    table.both("{a} sends 1 to 40 pages before {b} reads", streams::every_number_of_slots);
    table.both("{a} and {b} send 2 and 12 MiB at once", streams::both_directions_one_ends_first);
}

fn pauses(table: &mut Table) {
    table.group("Timing, no wait of 35 ms", SHORT_STALL);
    table.both("{a} sends byte after byte, {b} reads each", streams::dribble);
    table.both("{a} sends 200000 bytes in writes of 37", streams::many_small_writes);
    table.both(
        "{a} sends small and large messages in turn, {b} answers",
        streams::small_and_bulk_in_turn,
    );
    table.both(
        "{a} sends small and large messages without a pause",
        streams::small_directly_after_bulk,
    );
    table
        .both("{a} sends 3 MiB, then 100 rounds of a byte each way", streams::ping_pong_after_bulk);
    table.both("{a} and {b} talk in messages of two writes", streams::ping_pong_in_two_writes);
    table.both_with(Some(SMALL), "{b} reads slowly, with a small buffer", streams::slow_reader);
    table.both("{b} reads nothing for a second amid 32 MiB", streams::reader_that_rests);
    table.both("{a} and {b} send all that goes before they read", streams::both_directions_unread);
}
