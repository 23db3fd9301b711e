//! Plays rows, compares what was seen, and tells it as a page.

use std::fmt::Write;

use super::end::STALLED;
use super::rows::{Row, Seen, Wanted};
use super::stage::Stage;

/// Other programs run on the machine, and may hold up a script once. What is held up twice in three
/// times is so for another reason.
const FURTHER_ATTEMPTS: usize = 2;

/// Plays all rows without a forwarder.
pub fn play_direct(rows: &[Row], stage: &Stage) -> Vec<Seen> {
    rows.iter().map(|row| play(row, stage, |seen| !is_stalled(seen))).collect()
}

/// Plays all rows through a forwarder.
pub fn play_through(rows: &[Row], stage: &Stage, direct: &[Seen]) -> Vec<Seen> {
    let wanted = rows.iter().zip(direct).map(|(row, direct)| wanted(row, direct));
    let settled = |seen: &Seen, wanted: &Seen| seen == wanted || !is_stalled(seen);
    let play = |(row, wanted)| play(row, stage, |seen| settled(seen, &wanted));
    rows.iter().zip(wanted).map(play).collect()
}

fn play(row: &Row, stage: &Stage, settled: impl Fn(&Seen) -> bool) -> Seen {
    let mut seen = row.run(stage);
    if !settled(&seen) {
        for _ in 0..FURTHER_ATTEMPTS {
            seen = row.run(stage);
            if !settled(&seen) {
                break;
            }
        }
    }
    seen
}

fn is_stalled(seen: &Seen) -> bool {
    seen.client.iter().chain(&seen.server).any(|note| note.ends_with(STALLED))
}

/// What the row of a forwarder is to be.
fn wanted(row: &Row, direct: &Seen) -> Seen {
    let own = |notes: &[&str]| notes.iter().map(|&note| note.to_owned()).collect();
    match row.wanted {
        Wanted::AsDirect => direct.clone(),
        Wanted::ByNature(_, client, server) => Seen { client: own(client), server: own(server) },
    }
}

/// Where one end's notes begin to be different from what is wanted.
struct Difference {
    end: &'static str,
    /// `None`: nothing more was noted.
    seen: Option<String>,
    wanted: Option<String>,
}

fn differences(row: &Row, seen: &Seen, direct: &Seen) -> Vec<Difference> {
    let wanted = wanted(row, direct);
    let pairs = [("client", &seen.client, wanted.client), ("server", &seen.server, wanted.server)];
    let differing = pairs.into_iter().filter_map(|(end, seen, wanted)| {
        let at = (0..seen.len().max(wanted.len())).find(|&at| seen.get(at) != wanted.get(at))?;
        Some(Difference { end, seen: seen.get(at).cloned(), wanted: wanted.get(at).cloned() })
    });
    differing.collect()
}

/// What is different from what is wanted, if anything is.
pub fn difference(row: &Row, seen: &Seen, direct: &Seen) -> Option<String> {
    let word = |note: &Option<String>| note.as_deref().unwrap_or("nothing more").to_owned();
    let tell =
        |one: &Difference| format!("{}: {}, not {}", one.end, word(&one.seen), word(&one.wanted));
    let told: Vec<_> = differences(row, seen, direct).iter().map(tell).collect();
    (!told.is_empty()).then(|| told.join("; "))
}

/// The same in fewer words, for beside what is wanted. A script ends when something does not
/// happen, so what the other end does not see then is of no interest.
fn short_difference(row: &Row, seen: &Seen, direct: &Seen) -> Option<String> {
    let all = differences(row, seen, direct);
    let tell = |one: &Difference| Some(format!("{}: {}", one.end, one.seen.as_ref()?));
    let told: Vec<_> = all.iter().filter_map(tell).collect();
    match (all.is_empty(), told.is_empty()) {
        (true, _) => None,
        (false, true) => Some("nothing more".to_owned()),
        (false, false) => Some(told.join("; ")),
    }
}

/// A forwarder's column: its names, and for each row what was seen in each of its variants.
pub struct Column {
    pub name: String,
    pub variants: Vec<(String, Vec<Seen>)>,
}

impl Column {
    /// Rows in which all variants are as wanted.
    fn good(&self, rows: &[Row], direct: &[Seen]) -> usize {
        (0..rows.len())
            .filter(|&at| self.cell(&rows[at], at, &direct[at]) == good(&rows[at]))
            .count()
    }

    fn cell(&self, row: &Row, at: usize, direct: &Seen) -> String {
        let mut told: Vec<(String, Vec<&str>)> = Vec::new();
        for (variant, seen) in &self.variants {
            let short = short_difference(row, &seen[at], direct);
            let text = short.unwrap_or_else(|| good(row).to_owned());
            match told.iter_mut().find(|(known, _)| *known == text) {
                Some((_, variants)) => variants.push(variant),
                None => told.push((text, vec![variant])),
            }
        }
        if let [(text, _)] = &told[..] {
            return text.clone();
        }
        let tell =
            |(text, variants): &(String, Vec<&str>)| format!("{}: {text}", variants.join(", "));
        told.iter().map(tell).collect::<Vec<_>>().join("<br>")
    }
}

fn good(row: &Row) -> &'static str {
    match row.wanted {
        Wanted::AsDirect => "same",
        Wanted::ByNature(..) => "as it should be",
    }
}

/// docs/wire.md.
pub fn page(rows: &[Row], direct: &[Seen], columns: &[Column], machine: &str) -> String {
    let mut page = String::from(HEAD);
    writeln!(page, "Written by `scripts/wire-table` on {machine}.\n").unwrap();
    writeln!(page, "| | rows as they should be, of {} |\n|---|---|", rows.len()).unwrap();
    for column in columns {
        let count = column.good(rows, direct);
        writeln!(page, "| {} | {count} |", column.name).unwrap();
    }
    let names: Vec<_> = columns.iter().map(|column| column.name.as_str()).collect();
    let mut group = "";
    let mut reasons = Vec::new();
    for (at, row) in rows.iter().enumerate() {
        if row.group != group {
            group = row.group;
            let line = "---|".repeat(names.len() + 2);
            let names = names.join(" | ");
            writeln!(page, "\n## {group}\n\n| row | direct | {names} |\n|{line}").unwrap();
        }
        let mut name = row.name.clone();
        if let Wanted::ByNature(reason, ..) = row.wanted {
            let known = reasons.iter().position(|known| *known == reason);
            let number = known.unwrap_or_else(|| {
                reasons.push(reason);
                reasons.len() - 1
            });
            write!(name, " ({})", number + 1).unwrap();
        }
        let cells: Vec<_> =
            columns.iter().map(|column| column.cell(row, at, &direct[at])).collect();
        writeln!(page, "| {name} | {} | {} |", tell(&direct[at]), cells.join(" | ")).unwrap();
    }
    page.push_str("\n## By nature not as without a forwarder\n\n");
    for (index, reason) in reasons.iter().enumerate() {
        writeln!(page, "{}. {reason}", index + 1).unwrap();
    }
    page
}

/// The names of the rows on a page.
pub fn names_on(page: &str) -> Vec<String> {
    let rows = page.lines().skip_while(|line| !line.starts_with("## ")).filter_map(|line| {
        let name = line.strip_prefix("| ")?.split(" | ").next()?;
        let name =
            name.strip_suffix(')').and_then(|name| name.rsplit_once(" (")).map_or(name, |s| s.0);
        (name != "row").then(|| name.to_owned())
    });
    rows.collect()
}

fn tell(seen: &Seen) -> String {
    let ends = [("client", &seen.client), ("server", &seen.server)];
    let told = ends.into_iter().filter(|(_, notes)| !notes.is_empty());
    told.map(|(end, notes)| format!("{end}: {}", notes.join("; "))).collect::<Vec<_>>().join("<br>")
}

const HEAD: &str = "\
# The wire as with nothing in between

What a client and a server observe, each row a script with real sockets: without a forwarder
(*direct*), and through forwarders. *Same* means that both ends observe what they observe without
one: the same bytes, urgent bytes in the same places, the same ends and errors in the same order,
and no wait of 150 ms or more, or of 35 ms where a heading says so, where there is none without it
(a row in which there is one is played twice more, and neither may have one). nsplice is in six
columns, `--transfer` auto, copy and splice with `--handoff` socket and connections, told
as one where they agree, and with `--engine epoll` in three, one for each `--transfer`. `cargo test
--test wire` plays all rows through nsplice, once more on connections that have had short messages,
and fails where it is not the same.

In a cell, `1000 bytes, ECONNRESET` is one reading: 1000 bytes of the right content, then the error;
readings and writes are parted by semicolons. Where a forwarder is not the same, its cell has the
first thing that is seen otherwise.

Time is not the same, by nature, in two places. A reset that follows bytes is passed on when these are
acknowledged, and a peer that has been answering puts that off for 40 ms: the reset comes some 45 ms
later than without a forwarder. And over loopback, whose packets carry 64 KiB, a window that is a
little smaller than a packet can hold up the end of a message of some hundred KiB for the 200 ms of a
window probe; seen in one of some ten to thirty thousand exchanges of 160 to 395 KB in writes of
4 KiB, and not where packets are smaller.

One thing is left to chance, and was never seen: io_uring workers, of connections with short messages,
and epoll ask for a socket's state once. The kernel reads first whether an urgent byte is announced,
then whether there is anything: an urgent byte that reaches an empty socket in the nanoseconds between
would pass as another.

";
