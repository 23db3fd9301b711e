//! The wire as with nothing in between: what clients and servers observe through nsplice is what
//! they observe without it.
//!
//! Each row of the table (`wire/rows.rs`) is a script for a client and a server with real sockets,
//! played without a forwarder and through each way of forwarding. docs/wire.md shows the result,
//! with other forwarders beside it; `scripts/wire-table` writes it.

#![allow(clippy::unwrap_used)]

mod support;

mod wire {
    pub mod connecting;
    pub mod end;
    pub mod endings;
    pub mod orders;
    pub mod others;
    pub mod pressure;
    pub mod rows;
    pub mod stage;
    pub mod streams;
    pub mod table;
    pub mod urgent;
}

use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use support::{Program, namespaces, skip};
use wire::others::Other;
use wire::rows::{Row, Seen, rows};
use wire::stage::{NSPLICE, NSPLICE_ON_EPOLL, NSPLICE_THAT_TALKED, Stage, Way};
use wire::table::{Column, difference, names_on, page, play_direct, play_through};

/// The rows to play: all, or those whose name contains `NSPLICE_WIRE_ROW`.
fn chosen_rows() -> Vec<Row> {
    let wanted = std::env::var("NSPLICE_WIRE_ROW").unwrap_or_default();
    rows().into_iter().filter(|row| row.name.contains(&wanted)).collect()
}

/// Scripts wait more than they work: so many are played at a time, each on a stage of its own.
const STAGES: usize = 3;

/// What is seen without a forwarder; played once.
fn direct() -> &'static [Seen] {
    static DIRECT: OnceLock<Vec<Seen>> = OnceLock::new();
    DIRECT.get_or_init(|| play_in_shares(Way::Direct, |rows, _, stage| play_direct(rows, stage)))
}

fn through(way: Way) -> Vec<Seen> {
    let direct = direct();
    play_in_shares(way, |rows, range, stage| play_through(rows, stage, &direct[range]))
}

/// `play`: some rows, and which of all they are.
fn play_in_shares(
    way: Way,
    play: impl Fn(&[Row], Range<usize>, &Stage) -> Vec<Seen> + Sync,
) -> Vec<Seen> {
    let (rows, play) = (chosen_rows(), &play);
    let share = rows.len().div_ceil(STAGES).max(1);
    std::thread::scope(|scope| {
        let shares = rows.chunks(share).enumerate().map(|(index, rows)| {
            let first = index * share;
            scope.spawn(move || {
                let stage = Stage::new(way).unwrap();
                let seen = play(rows, first..first + rows.len(), &stage);
                stage.finish();
                seen
            })
        });
        let shares: Vec<_> = shares.collect();
        shares.into_iter().flat_map(|share| share.join().unwrap()).collect()
    })
}

/// Both ends see through nsplice what they see without it.
fn assert_same(way: Way) {
    namespaces!(_possible);
    let seen = through(way);
    let rows = chosen_rows();
    let differences = rows.iter().zip(&seen).zip(direct()).filter_map(|((row, seen), direct)| {
        let difference = difference(row, seen, direct)?;
        Some(format!("{}:\n    {difference}\n    {seen:?}", row.name))
    });
    let differences: Vec<_> = differences.collect();
    let count = rows.len();
    let list = differences.join("\n");
    assert!(differences.is_empty(), "{} of {count} rows differ:\n{list}", differences.len());
}

mod is_the_same_through {
    use super::{NSPLICE, NSPLICE_ON_EPOLL, NSPLICE_THAT_TALKED, assert_same};

    #[test]
    fn auto_with_the_socket_handed_over() {
        assert_same(NSPLICE[0]);
    }

    #[test]
    fn auto_with_connections_handed_over() {
        assert_same(NSPLICE[1]);
    }

    #[test]
    fn copy_with_the_socket_handed_over() {
        assert_same(NSPLICE[2]);
    }

    #[test]
    fn copy_with_connections_handed_over() {
        assert_same(NSPLICE[3]);
    }

    #[test]
    fn splice_with_the_socket_handed_over() {
        assert_same(NSPLICE[4]);
    }

    #[test]
    fn splice_with_connections_handed_over() {
        assert_same(NSPLICE[5]);
    }

    #[test]
    fn auto_on_connections_that_have_talked() {
        assert_same(NSPLICE_THAT_TALKED);
    }

    #[test]
    fn auto_on_epoll() {
        assert_same(NSPLICE_ON_EPOLL[0]);
    }

    #[test]
    fn copy_on_epoll() {
        assert_same(NSPLICE_ON_EPOLL[1]);
    }

    #[test]
    fn splice_on_epoll() {
        assert_same(NSPLICE_ON_EPOLL[2]);
    }
}

/// Where the reference differs from a direct connection is for docs/wire.md to tell.
#[test]
fn the_reference_can_be_asked_the_same() {
    if let Err(reason) = Program::Reference.path() {
        skip!("{reason}");
    }
    namespaces!(_possible);
    let seen = through(Way::Reference);
    let rows = chosen_rows();
    for ((row, seen), direct) in rows.iter().zip(&seen).zip(direct()) {
        if let Some(difference) = difference(row, seen, direct) {
            eprintln!("{}: {difference}", row.name);
        }
    }
}

#[test]
fn every_row_has_a_name_of_its_own_and_there_are_at_least_30() {
    let names: std::collections::BTreeSet<_> = rows().into_iter().map(|row| row.name).collect();
    assert_eq!(names.len(), rows().len());
    assert!(names.len() >= 30);
}

fn page_path() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/wire.md")
}

#[test]
fn the_page_lists_the_rows_of_the_table() {
    let page = std::fs::read_to_string(page_path()).unwrap();
    let names: Vec<_> = rows().into_iter().map(|row| row.name).collect();
    assert_eq!(names_on(&page), names, "docs/wire.md is out of date: scripts/wire-table");
}

/// Not a test: what `scripts/wire-table` runs.
#[test]
#[ignore = "writes docs/wire.md"]
fn write_the_page() {
    let variant = |way: Way| {
        let Way::Nsplice { transfer, handoff, .. } = way else { unreachable!("it is its list") };
        (format!("{transfer}/{handoff}"), through(way))
    };
    let own = |name: &str, ways: &[Way]| {
        let variants = ways.iter().copied().map(variant).collect();
        Column { name: name.to_owned(), variants }
    };
    let mut columns = vec![own("nsplice", &NSPLICE), own("nsplice, epoll", &NSPLICE_ON_EPOLL)];
    let one = |name, seen| Column { name, variants: vec![(String::new(), seen)] };
    Program::Reference.path().unwrap();
    columns.push(one("netns_tcp_bridge 0.1.1".to_owned(), through(Way::Reference)));
    for other in [Other::Haproxy, Other::Socat] {
        match other.version() {
            Some(version) => {
                columns
                    .push(one(format!("{} {version}", other.name()), through(Way::Other(other))));
            }
            None => eprintln!("no {} in PATH: no column of it", other.name()),
        }
    }
    let kernel = nix::sys::utsname::uname().unwrap();
    let release = kernel.release().to_string_lossy();
    let version = release.split('-').next().unwrap_or_default();
    let text = page(&chosen_rows(), direct(), &columns, &format!("Linux {version}"));
    std::fs::write(page_path(), text).unwrap();
}
