//! Accepting: how connections get to a worker, and what happens to those it cannot serve.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Worker;
use super::slot::display;
use crate::engine::{Engine, Token};
use crate::flow::End;

/// How long accepting pauses after the system ran out of something (tests/kernel/accepting.rs).
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl<E: Engine> Worker<E> {
    /// Accepts connections from `listener` from the next turn on, and no longer from the one
    /// before it, if there was one.
    pub fn listen(&mut self, listener: E::Socket) {
        let before = self.listener.replace(listener);
        self.leave(before);
        self.accept_next();
    }

    /// Goes on accepting when the pause is over.
    pub(super) fn end_accept_pause(&mut self) {
        if self.accept_pause.is_none_or(|until| until > Instant::now()) {
            return;
        }
        self.accept_pause = None;
        for client in std::mem::take(&mut self.waiting) {
            self.add(client);
        }
        self.accept_next();
    }

    /// Whether the system has run out of something, for a moment.
    pub fn is_paused(&self) -> bool {
        self.accept_pause.is_some()
    }

    /// Takes no more connections for a moment: the system has run out of something.
    pub fn pause(&mut self) {
        self.accept_pause = Some(Instant::now() + ACCEPT_PAUSE);
    }

    /// Accepts a connection, if there is room for one and nothing else against it.
    pub fn accept_next(&mut self) {
        // Those that leave may be kept.
        let load = self.load() + self.leavers.len() as u32;
        let has_room = load < self.settings.max_connections;
        if self.is_paused() || !has_room {
            return;
        }
        let Some(listener) = &self.listener else { return };
        if !self.is_accepting {
            self.is_accepting = true;
            self.engine.accept(Token::Accept, listener);
        }
    }

    /// Accepts no more. A connection that is accepted in this moment still comes.
    pub fn stop_accepting(&mut self) {
        let before = self.listener.take();
        self.leave(before);
    }

    /// Has nobody wait at `before` any more. It is closed when that is so.
    fn leave(&mut self, before: Option<E::Socket>) {
        let Some(before) = before else { return };
        // At one that comes after one that is being left, nobody waits yet.
        if self.is_accepting && self.leaving.is_none() {
            self.engine.cancel(Token::Accept);
            self.leaving = Some(before);
        } else {
            self.engine.close(before);
        }
    }

    /// A listening socket that was left. Whoever gets it has to look whether a client is there,
    /// once, without waiting, and to close it.
    ///
    /// A client wakes one of those who wait at the socket, in whatever process. If that one was
    /// woken and is told in the same moment to wait no more, it leaves without the client, and
    /// nobody else is woken: that one would wait until the next comes.
    pub fn left(&mut self) -> Option<E::Socket> {
        self.left.take()
    }

    pub(super) fn accepted(&mut self, result: Result<E::Socket, Errno>) {
        self.is_accepting = false;
        if let Some(before) = self.leaving.take() {
            // One that has got its client was woken for no other; and at the end nobody is served.
            if result.is_ok() || self.stopping {
                self.engine.close(before);
            } else {
                self.left = Some(before);
            }
        }
        match result {
            Ok(client) => {
                if self.settings.single {
                    self.stop_accepting();
                }
                self.add(client);
            }
            Err(Errno::ECANCELED | Errno::ECONNABORTED | Errno::EINTR) => {}
            Err(errno) => {
                self.stats.count_error(&format!("accept {errno:?}"));
                let text = || format!("cannot accept: {errno:?}: {}", errno.desc());
                self.log.failure("cannot accept", text);
                self.pause();
            }
        }
        self.accept_next();
    }

    /// Ends a connection that was not served: the program ends.
    pub(super) fn cut(&mut self, client: E::Socket) {
        self.stats.connections += 1;
        self.stats.stopped += 1;
        self.turn_away(client);
    }

    fn turn_away(&mut self, client: E::Socket) {
        self.engine.reset(&client);
        self.engine.close(client);
    }

    /// No socket for the target can be had: the client learns it by a reset.
    pub(super) fn refuse(&mut self, client: E::Socket, errno: Errno) {
        let name = display(self.engine.peer(&client));
        self.turn_away(client);
        self.stats.connections += 1;
        self.ended(End::ConnectFailed(errno), [0, 0], &name, None);
    }
}
