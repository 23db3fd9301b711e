//! A worker's thread from inside: it lets the worker take its turns, and obeys and reports between
//! them.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use nix::errno::Errno;

use super::{Command, Ended, Report, Reporter, Seed, Shared};
use crate::engine::{Sleep, Start, Token};
use crate::error::{Error, Kind, Result};
use crate::handoff::{Channel, Message};
use crate::log::Log;
use crate::netns;
use crate::pace::{Home, Pace};
use crate::queue;
use crate::spread::Place;
use crate::sys::{SharedCounters, is_shortage, set_nonblocking};
use crate::worker::Worker;

/// Turns between two looks at the clock.
const TURNS_TO_TELL: u32 = 16;

/// A worker thread, seen from inside: the worker and its channels.
pub(super) struct Thread<E: Start> {
    index: usize,
    worker: Worker<E>,
    orders: Receiver<Command>,
    woken: OwnedFd,
    handoff: Option<Channel>,
    /// There was no room for connections that are in the channel.
    must_look_again: bool,
    /// A listening socket that is to be left, once there is room to look at it.
    leaving: Option<OwnedFd>,
    ended: SharedCounters,
    /// Connections counted in `ended` so far.
    ended_count: u64,
    /// What all workers share, this one too.
    siblings: Arc<[Arc<Shared>]>,
    /// What is counted there of the connections it has.
    load_count: u32,
    place: Option<Place>,
    /// It has no room for connections of siblings, as far as they know.
    is_full: bool,
    /// Turns so far, as far as they can be told apart.
    turns: u32,
    pace: Pace,
    log: Log,
}

impl<E: Start> Thread<E> {
    pub(super) fn new(
        index: usize,
        seed: Seed,
        woken: OwnedFd,
        orders: Receiver<Command>,
        siblings: Arc<[Arc<Shared>]>,
    ) -> Result<Self> {
        if let Some(home) = &seed.home {
            pin(home)?;
        }
        let engine = E::start(&seed.setup)?;
        let place = seed.settings.place.clone();
        if let Some(Place { index, spread }) = &place {
            spread.begin(*index);
        }
        let mut worker = Worker::new(engine, seed.settings, seed.log.clone(), seed.connected);
        worker.engine().readable(Token::Command, &woken);
        if let Some(channel) = &seed.handoff {
            worker.engine().readable(Token::Handoff, channel.as_ref());
        }
        let mut thread = Self {
            index,
            worker,
            orders,
            woken,
            handoff: seed.handoff,
            must_look_again: false,
            leaving: None,
            ended: seed.ended,
            ended_count: 0,
            siblings,
            load_count: 0,
            place,
            is_full: false,
            turns: 0,
            pace: Pace::new(seed.home),
            log: seed.log,
        };
        thread.tell_room();
        Ok(thread)
    }

    pub(super) fn serve(&mut self, reporter: &Reporter) -> Result<()> {
        while !(self.worker.is_done() && self.siblings[self.index].close()) {
            let woken = self.worker.turn().map_err(|errno| {
                let what = format!("{}: cannot wait for completions", E::NAME);
                Error::system(Kind::Kernel, what, errno, "")
            })?;
            let late = self.leaving.take_if(|_| !self.worker.is_paused());
            for listener in late.into_iter().chain(self.worker.left()) {
                self.leave(listener);
            }
            if woken.command {
                self.obey(reporter);
            }
            if woken.handoff || (self.must_look_again && !self.worker.is_paused()) {
                self.take_over();
            }
            self.part();
            self.publish();
            self.pace.turned(self.worker.stats());
            self.tell_siblings();
        }
        Ok(())
    }

    /// Serves the client, if there is one, who may have woken this worker when it was told to wait
    /// no more; others still wait, and nobody else is woken for that one.
    fn leave(&mut self, listener: OwnedFd) {
        // Whoever has the socket too finds it changed, as with a worker on epoll.
        let client = set_nonblocking(&listener).and_then(|()| queue::accept(&listener));
        match client {
            Ok(client) => self.worker.add(client),
            Err(errno) if is_shortage(errno) => {
                self.worker.pause();
                self.leaving = Some(listener);
                return;
            }
            Err(_) => {}
        }
        self.worker.engine().close(listener);
    }

    pub(super) fn ended(mut self, result: Result<()>) -> Ended {
        self.siblings[self.index].give_up();
        if let Some(Place { index, spread }) = &self.place {
            spread.note_full(*index, true);
        }
        // What is still to be closed is: the other workers may go on for long. So there is room for
        // those who were handed over and not taken, which are cut.
        let _ = self.worker.engine().wait(Sleep::No);
        if result.is_ok() && self.handoff.is_some() {
            self.take_over();
            let _ = self.worker.engine().wait(Sleep::No);
        }
        let stats = self.worker.stats().clone();
        Ended { index: self.index, stats, last_end: self.worker.last_end(), result }
    }

    fn obey(&mut self, reporter: &Reporter) {
        // More of them have it woken again, for nothing.
        let _ = nix::unistd::read(&self.woken, &mut [0; 64]);
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Command::Listen(listener) => {
                    self.worker.listen(listener);
                    reporter.send(Report::Accepting);
                }
                Command::Forward(client) => {
                    // It was counted when it was given.
                    self.load_count += 1;
                    self.worker.add(client);
                }
                Command::Enter(netns, reply) => {
                    // Nobody waits for it any more: the program is ending.
                    let _ = reply.send(netns::enter(&netns));
                }
                Command::StopAccepting => self.worker.stop_accepting(),
                Command::Drain if self.handoff.is_none() => self.worker.drain(),
                Command::Drain => {}
                Command::Stop => self.worker.stop(),
            }
        }
        for moved in self.siblings[self.index].take() {
            // It was counted when it was given.
            self.load_count += 1;
            self.worker.join(moved);
        }
        self.worker.engine().readable(Token::Command, &self.woken);
    }

    /// Lets the siblings know whether there is room for connections of theirs.
    fn tell_room(&mut self) {
        let is_full = self.siblings[self.index].is_half_full();
        if let Some(Place { index, spread }) = &self.place
            && std::mem::replace(&mut self.is_full, is_full) != is_full
        {
            spread.note_full(*index, is_full);
        }
    }

    /// Lets the siblings know, now and then, what they are to know of this worker.
    fn tell_siblings(&mut self) {
        let Some(Place { index, spread }) = &self.place else { return };
        self.turns = self.turns.wrapping_add(1);
        if self.turns.is_multiple_of(TURNS_TO_TELL) {
            spread.note(*index, self.pace.is_bulk(), Instant::now());
        }
    }

    /// Gives connections to the siblings whose they are to be. What these do not take goes on here.
    fn part(&mut self) {
        while let Some((to, moved)) = self.worker.leaver() {
            match self.siblings[to].put(moved) {
                Some(moved) => self.worker.keep(moved),
                None => self.worker.accept_next(),
            }
        }
    }

    /// Takes over the connections the listener has accepted for this worker.
    fn take_over(&mut self) {
        let Some(channel) = &self.handoff else { return };
        self.must_look_again = false;
        loop {
            match channel.receive() {
                Ok(Some(received)) => {
                    for client in received.sockets {
                        self.worker.add(client);
                    }
                    if self.worker.is_paused() {
                        self.must_look_again = true;
                        return;
                    }
                }
                Err(Errno::EAGAIN) => break,
                // They stay where they are until there is room.
                Err(Errno::EMFILE) => {
                    let text = || "cannot take connections: EMFILE: Too many open files".to_owned();
                    self.log.failure("cannot take connections", text);
                    self.must_look_again = true;
                    return self.worker.pause();
                }
                // The listener has no more; or it is gone, which ends the worker by another way.
                Ok(None) | Err(_) => {
                    self.handoff = None;
                    return self.worker.drain();
                }
            }
        }
        self.worker.engine().readable(Token::Handoff, channel.as_ref());
    }

    /// Lets the crew know how many connections there are here, and the listener how many have
    /// ended.
    fn publish(&mut self) {
        let load = self.worker.load();
        if load != self.load_count {
            self.siblings[self.index].count(load.wrapping_sub(self.load_count));
            self.load_count = load;
        }
        self.tell_room();
        let stats = self.worker.stats();
        let count = stats.completed + stats.failed + stats.stopped;
        if count > self.ended_count {
            let is_waited_for = self.ended.add(self.index, (count - self.ended_count) as u32);
            self.ended_count = count;
            if let Some(channel) = self.handoff.as_ref().filter(|_| is_waited_for) {
                // A channel that takes nothing is full of them already.
                let _ = channel.send(Message::Room, &[]);
            }
        }
    }
}

fn pin(home: &Home) -> Result<()> {
    home.confine(false).map_err(|errno| {
        let what = format!("--cpus: cannot pin a worker to CPU {}", home.cpu);
        Error::system(Kind::Kernel, what, errno, "no such CPU, or not one for this process")
    })
}
