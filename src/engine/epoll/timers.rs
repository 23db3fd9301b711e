//! Requests that complete when a time is over.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::engine::Token;

/// Tokens by the time they are due, and the other way round; both encoded.
#[derive(Default)]
pub(super) struct Timers {
    due: BTreeMap<(Instant, u64), Errno>,
    times: HashMap<u64, Instant>,
}

impl Timers {
    /// `errno` is handed back when the time is over.
    pub(super) fn add(&mut self, token: Token, after: Duration, errno: Errno) {
        self.remove(token);
        let due = Instant::now() + after;
        self.due.insert((due, token.encode()), errno);
        self.times.insert(token.encode(), due);
    }

    /// False if there is none for this token.
    pub(super) fn remove(&mut self, token: Token) -> bool {
        let token = token.encode();
        let due = self.times.remove(&token);
        due.is_some_and(|due| self.due.remove(&(due, token)).is_some())
    }

    /// How long it takes until the next is over.
    pub(super) fn left(&self) -> Option<Duration> {
        let ((due, _), _) = self.due.first_key_value()?;
        Some(due.saturating_duration_since(Instant::now()))
    }

    /// One that is over.
    pub(super) fn expired(&mut self) -> Option<(Token, Errno)> {
        let first = self.due.first_entry().filter(|first| first.key().0 <= Instant::now())?;
        let ((_, token), errno) = first.remove_entry();
        self.times.remove(&token);
        Some((Token::decode(token), errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_first_expires_first_and_what_is_removed_does_not() {
        let mut timers = Timers::default();
        assert_eq!((timers.left(), timers.expired()), (None, None));
        let hour = Duration::from_secs(3600);
        timers.add(Token::Command, hour, Errno::ETIME);
        timers.add(Token::Accept, Duration::from_nanos(2), Errno::ENOMEM);
        timers.add(Token::Handoff, Duration::ZERO, Errno::ENOSPC);
        assert_eq!(timers.left(), Some(Duration::ZERO));
        assert!(timers.remove(Token::Accept));
        assert!(!timers.remove(Token::Accept));
        assert_eq!(timers.expired(), Some((Token::Handoff, Errno::ENOSPC)));
        assert_eq!(timers.expired(), None);
        assert!(timers.left().is_some_and(|left| left > hour / 2));
        assert!(timers.remove(Token::Command));
        assert_eq!(timers.left(), None);
    }
}
