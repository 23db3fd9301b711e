//! Logs that do not flood: of each kind of failure a few lines in a while, and the number of the
//! others.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Lines of one kind that are written within [`WHILE`].
const LINES: u64 = 3;
/// After this time lines of a kind are written again, and those counted that were not.
const WHILE: Duration = Duration::from_secs(10);

/// What was written of each kind.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    kinds: BTreeMap<&'static str, Window>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    lines: u64,
}

impl Limiter {
    /// Whether a line of this kind is to be written.
    pub(super) fn admits(&mut self, kind: &'static str, now: Instant) -> bool {
        let window = self.kinds.entry(kind).or_insert(Window { since: now, lines: 0 });
        window.lines += 1;
        window.lines <= LINES
    }

    /// Whether there were no lines of late.
    pub(super) fn is_idle(&self) -> bool {
        self.kinds.is_empty()
    }

    /// The kinds of which lines were left out in a time that is over, and how many.
    pub(super) fn left_out(&mut self, now: Instant) -> Vec<(&'static str, u64)> {
        let mut left_out = Vec::new();
        self.kinds.retain(|kind, window| {
            let is_over = now.duration_since(window.since) >= WHILE;
            if is_over && window.lines > LINES {
                left_out.push((*kind, window.lines - LINES));
            }
            !is_over
        });
        left_out
    }

    /// The same, of times that are not over too.
    pub(super) fn all_left_out(&mut self) -> Vec<(&'static str, u64)> {
        let kinds = std::mem::take(&mut self.kinds).into_iter();
        let left_out = kinds.filter(|(_, window)| window.lines > LINES);
        left_out.map(|(kind, window)| (kind, window.lines - LINES)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_lines_of_each_kind_are_written_and_the_rest_is_counted() {
        let mut limiter = Limiter::default();
        let start = Instant::now();
        let admitted = (0..100).filter(|_| limiter.admits("one", start)).count() as u64;
        assert_eq!(admitted, LINES);
        assert!(limiter.admits("another", start));
        assert_eq!(limiter.left_out(start + WHILE / 2), []);
        assert_eq!(limiter.left_out(start + WHILE), [("one", 100 - LINES)]);
        assert!(limiter.admits("one", start + WHILE));
        assert_eq!(limiter.all_left_out(), []);
    }
}
