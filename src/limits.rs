//! How many connections there is room for: descriptors, and who gets how many.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::error::{Error, Kind, Result};

/// Descriptors of a connection: its two sockets.
const PER_CONNECTION: u64 = 2;
/// Of a worker: the three of its engine, its two ends of a pipe, its listening socket, its channel.
const PER_WORKER: u64 = 7;
/// Of a process, besides what is open before the fork: channels, and what opens for a moment.
const SPARE: u64 = 8;
/// The share of all descriptors that is left to pipes, if the number of connections is not given.
/// A connection has one or two only while it moves bulk, and copies when there is none.
const PIPE_SHARE: u64 = 16;
/// Ends of a pipe.
const PER_PIPE: u64 = 2;

/// What each worker may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time, by worker.
    pub connections: Vec<u32>,
    /// Pipes at a time, each worker.
    pub pipes: usize,
}

/// Raises the soft limit of descriptors to the hard one: it is often 1024 for the sake of
/// select(2), which is not used here. Returns the limit.
fn raise_descriptor_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    // Refused: the soft limit stays, and with it fewer connections.
    let is_raised = soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    if is_raised { hard } else { soft }
}

/// Descriptors that are open now.
fn open_descriptors() -> u64 {
    // Without /proc: the standard streams and a few sockets.
    std::fs::read_dir("/proc/self/fd").map_or(16, Iterator::count) as u64
}

impl Limits {
    /// How many workers there are descriptors for, of `wanted`: not more than half of them go to
    /// workers.
    #[must_use]
    pub fn workers(wanted: usize) -> usize {
        Self::workers_of(raise_descriptor_limit(), open_descriptors(), wanted)
    }

    fn workers_of(descriptors: u64, open: u64, wanted: usize) -> usize {
        let most = descriptors.saturating_sub(open + SPARE) / 2 / PER_WORKER;
        wanted.min(usize::try_from(most).unwrap_or(usize::MAX)).max(1)
    }

    /// Shares out what `workers` workers can have of this process's descriptors, or of a child's
    /// of it: `wanted` connections, or as many as there can be.
    ///
    /// # Errors
    /// [`Kind::Kernel`]: there are not as many.
    pub fn of_process(workers: usize, wanted: Option<u32>) -> Result<Self> {
        Self::new(raise_descriptor_limit(), open_descriptors(), workers, wanted)
    }

    /// As [`Limits::of_process`], with so many descriptors of which so many are `open`.
    fn new(descriptors: u64, open: u64, workers: usize, wanted: Option<u32>) -> Result<Self> {
        let needed = open + SPARE + PER_WORKER * workers as u64;
        let free = descriptors.saturating_sub(needed);
        let connections = match wanted {
            Some(wanted) if PER_CONNECTION * u64::from(wanted) > free => {
                return Err(too_few(
                    &format!("--max-connections {wanted}"),
                    needed + PER_CONNECTION * u64::from(wanted),
                    descriptors,
                ));
            }
            Some(wanted) => wanted,
            None if free < PER_CONNECTION => {
                let what = format!("{workers} workers and a connection");
                return Err(too_few(&what, needed + PER_CONNECTION, descriptors));
            }
            None => {
                let for_pipes = descriptors / PIPE_SHARE;
                let connections = free.saturating_sub(for_pipes) / PER_CONNECTION;
                u32::try_from(connections.max(1)).unwrap_or(u32::MAX)
            }
        };
        let pipes = (free - PER_CONNECTION * u64::from(connections)) / PER_PIPE;
        let count = workers as u32;
        let share = |index| connections / count + u32::from(index < connections % count);
        Ok(Self { connections: (0..count).map(share).collect(), pipes: pipes as usize / workers })
    }
}

fn too_few(what: &str, needed: u64, descriptors: u64) -> Error {
    let text = format!(
        "{what}: {needed} descriptors are needed, and RLIMIT_NOFILE is {descriptors}; raise it \
         (ulimit -n, LimitNOFILE=)"
    );
    Error::new(Kind::Kernel, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_had_is_shared_out() {
        // 64 - 10 - 8 - 14 = 32, of which 4 for pipes.
        let limits = Limits::new(64, 10, 2, None).expect("enough");
        assert_eq!(limits, Limits { connections: vec![7, 7], pipes: 1 });
        let many = Limits::new(1 << 20, 10, 2, None).expect("enough");
        assert_eq!(many.connections.iter().sum::<u32>(), 491_504);
        // What is common for a service: it is to carry 9,000 connections, with pipes left.
        let common = Limits::new(20_000, 10, 2, None).expect("enough");
        assert_eq!((common.connections, common.pipes), (vec![4680, 4679], 312));
    }

    #[test]
    fn workers_leave_descriptors_for_connections() {
        assert_eq!(Limits::workers_of(64, 10, 2), 2);
        assert_eq!(Limits::workers_of(64, 10, 128), 3);
        assert_eq!(Limits::workers_of(12, 10, 2), 1);
        assert_eq!(Limits::workers_of(1 << 20, 10, 128), 128);
    }

    #[test]
    fn what_is_asked_for_is_given_or_refused() {
        let limits = Limits::new(1024, 10, 3, Some(100)).expect("enough");
        assert_eq!(limits.connections, [34, 33, 33]);
        assert_eq!(limits.pipes, (1024 - 10 - 8 - 21 - 200) / 2 / 3);
        let few = Limits::new(1024, 10, 4, Some(2)).expect("enough");
        assert_eq!(few.connections, [1, 1, 0, 0]);
        let error = Limits::new(1024, 10, 3, Some(500)).expect_err("too many");
        assert_eq!(error.kind(), Kind::Kernel);
        assert!(
            error.to_string().starts_with("--max-connections 500: 1039 descriptors"),
            "{error}"
        );
        assert!(Limits::new(20, 10, 1, None).is_err());
    }
}
