//! What happened, in numbers: plain counters of one worker, merged at the end.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::flow::{End, Limit, Side};

/// Counters of a worker, or of all together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Connections taken from the listen side, or cut before they could be.
    pub connections: u64,
    /// Connections whose two streams ended and were passed on whole.
    pub completed: u64,
    /// Connections that ended otherwise: see `errors`.
    pub failed: u64,
    /// Connections ended by the end of the program.
    pub stopped: u64,
    /// Bytes passed on to the target.
    pub bytes_to_target: u64,
    /// Bytes passed on to the client.
    pub bytes_to_client: u64,
    /// Times a connection went from one worker to another.
    pub moves: u64,
    /// Times a worker handed its requests to the kernel and took what had completed.
    pub turns: u64,
    /// Receives and sends.
    pub copy_operations: u64,
    /// Fills and drains that moved bytes.
    pub splice_operations: u64,
    /// Bytes that went through a pipe.
    pub spliced_bytes: u64,
    /// Times a half that was to splice got no pipe and copied instead.
    pub no_pipe: u64,
    /// Times it got one smaller than wanted.
    pub small_pipes: u64,
    /// Times a half had to wait for a buffer.
    pub no_buffer: u64,
    /// Failures by what failed and how (`connect ECONNREFUSED`).
    pub errors: BTreeMap<String, u64>,
}

impl Stats {
    /// Counts a flow that has ended after passing on `bytes`, indexed by half.
    pub fn count_end(&mut self, end: End, bytes: [u64; 2]) {
        self.bytes_to_target += bytes[Side::Listen.index()];
        self.bytes_to_client += bytes[Side::Connect.index()];
        match end {
            End::Complete => self.completed += 1,
            End::Stopped => self.stopped += 1,
            End::Expired(limit) => {
                self.failed += 1;
                self.count_error(match limit {
                    Limit::Idle => "idle timeout",
                    Limit::HalfClose => "half-close timeout",
                });
            }
            End::ConnectFailed(errno) => {
                self.failed += 1;
                self.count_error(&format!("connect {errno:?}"));
            }
            End::Failed(side, errno) => {
                self.failed += 1;
                let name = if side == Side::Listen { "client" } else { "target" };
                self.count_error(&format!("{name} {errno:?}"));
            }
        }
    }

    /// Counts a failure by name.
    pub fn count_error(&mut self, name: &str) {
        *self.errors.entry(name.to_owned()).or_default() += 1;
    }

    /// Adds another worker's counters.
    pub fn merge(&mut self, other: &Stats) {
        self.connections += other.connections;
        self.completed += other.completed;
        self.failed += other.failed;
        self.stopped += other.stopped;
        self.bytes_to_target += other.bytes_to_target;
        self.bytes_to_client += other.bytes_to_client;
        self.moves += other.moves;
        self.turns += other.turns;
        self.copy_operations += other.copy_operations;
        self.splice_operations += other.splice_operations;
        self.spliced_bytes += other.spliced_bytes;
        self.no_pipe += other.no_pipe;
        self.small_pipes += other.small_pipes;
        self.no_buffer += other.no_buffer;
        for (name, count) in &other.errors {
            *self.errors.entry(name.clone()).or_default() += count;
        }
    }
}

/// What `--summary json` prints: the sum, and each worker's share of it.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    #[serde(flatten)]
    total: Stats,
    /// The engine the workers used.
    engine: &'static str,
    workers: Vec<Stats>,
}

impl Summary {
    /// Adds up the workers, and the clients who were not served before the end.
    pub fn new(engine: &'static str, workers: Vec<Stats>, unserved: u64) -> Self {
        let mut total = Stats { connections: unserved, stopped: unserved, ..Stats::default() };
        for worker in &workers {
            total.merge(worker);
        }
        Self { total, engine, workers }
    }

    /// One line of JSON, without the newline.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain counters always serialise")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;

    #[test]
    fn the_summary_adds_up_its_workers() {
        let mut one = Stats { connections: 2, ..Stats::default() };
        one.count_end(End::Complete, [10, 20]);
        one.count_end(End::ConnectFailed(Errno::ECONNREFUSED), [0, 0]);
        let mut two = Stats { connections: 1, ..Stats::default() };
        two.count_end(End::ConnectFailed(Errno::ECONNREFUSED), [0, 0]);
        let text = Summary::new("uring", vec![one, two], 5).to_json();
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["connections"], 8);
        assert_eq!(value["stopped"], 5);
        assert_eq!(value["completed"], 1);
        assert_eq!(value["failed"], 2);
        assert_eq!(value["bytes_to_target"], 10);
        assert_eq!(value["bytes_to_client"], 20);
        assert_eq!(value["errors"]["connect ECONNREFUSED"], 2);
        assert_eq!(value["workers"][1]["failed"], 1);
    }
}
