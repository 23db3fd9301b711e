//! Connections that go from one worker to another, and when.

use super::Worker;
use super::slot::{Record, Slot, Tenant};
use crate::engine::{Engine, Token};
use crate::flow::{Event, Flow};
use crate::spread::Place;

/// Reads of one kind in a row after which a connection goes where those of that kind are: one with
/// a few exchanges is over before that is worth anything. By how often it has moved, from 0 on: one
/// that is to be elsewhere again and again does not pay for it each time.
const READS_TO_MOVE: [i8; 4] = [16, 32, 64, i8::MAX];

/// A connection between two workers: nothing of it is in flight, and it holds nothing.
pub struct Moved<S> {
    flow: Flow,
    sockets: [S; 2],
    record: Option<Box<Record>>,
    name: Name,
}

/// The worker that a connection came to, as which of those, and how often it has moved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name {
    home: u16,
    number: u16,
    moves: u8,
}

/// What the last reads of a connection were: so many copied; less than zero: spliced.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reads(i8);

impl Reads {
    pub(super) fn copied(&mut self) {
        self.0 = self.0.max(0).saturating_add(1);
    }

    pub(super) fn spliced(&mut self) {
        self.0 = self.0.min(0).saturating_sub(1);
    }

    /// Whether the last ones, as many as count, were all copied, or all spliced.
    fn are_copied(self, name: Name) -> Option<bool> {
        let count = READS_TO_MOVE[usize::from(name.moves).min(READS_TO_MOVE.len() - 1)];
        (self.0.saturating_abs() >= count).then_some(self.0 > 0)
    }
}

impl Name {
    fn worker(self, place: &Place, is_copied: bool) -> usize {
        let Name { home, number, .. } = self;
        place.spread.worker_for(home.into(), number.into(), place.index, is_copied)
    }
}

impl<E: Engine> Worker<E> {
    /// The name of the next connection that comes to this worker.
    pub(super) fn next_name(&self) -> Name {
        let home = self.settings.place.as_ref().map_or(0, |place| place.index as u16);
        Name { home, number: self.stats.connections as u16, moves: 0 }
    }

    /// Has the connection leave if it is to be elsewhere.
    pub(super) fn consider(&mut self, index: u32) {
        let Some(place) = &self.settings.place else { return };
        let Some(tenant) = &mut self.slots[index as usize].tenant else { return };
        let Some(are_copied) = tenant.reads.are_copied(tenant.name) else { return };
        if tenant.name.worker(place, are_copied) == place.index {
            // To be looked at again after so many more.
            tenant.reads = Reads::default();
        } else {
            tenant.flow.on(Event::Leave);
        }
    }

    /// Gives a connection a slot, and lets it go on.
    pub(super) fn seat(&mut self, tenant: Tenant<E>) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, tenant: None });
            self.slots.len() as u32 - 1
        });
        self.slots[index as usize].tenant = Some(tenant);
        self.run_clock();
        self.pump(index);
    }

    /// Takes what is in a slot out of it.
    pub(super) fn vacate(&mut self, index: u32) -> Option<Tenant<E>> {
        let slot = &mut self.slots[index as usize];
        let tenant = slot.tenant.take()?;
        slot.generation = (slot.generation + 1) & Token::GENERATION_MASK;
        self.free.push(index);
        Some(tenant)
    }

    /// The connection is ready to go.
    pub(super) fn part_with(&mut self, index: u32) {
        let Some(place) = &self.settings.place else { return };
        let Some(tenant) = &self.slots[index as usize].tenant else { return };
        // It may be that it has gone on differently since, or that it is to be here now.
        let Some(are_copied) = tenant.reads.are_copied(tenant.name) else { return };
        let to = tenant.name.worker(place, are_copied);
        if to == place.index {
            return;
        }
        let Some(tenant) = self.vacate(index) else { return };
        let Tenant { flow, sockets, record, name, .. } = tenant;
        for socket in &sockets {
            self.engine.let_go(socket);
        }
        self.leavers.push_back((to, Moved { flow, sockets, record, name }));
    }

    /// A connection that is to go on with another worker, and with which. It must be given to that
    /// one, and there [is room](Self::accept_next) for another one here then, or be
    /// [kept](Self::keep).
    pub fn leaver(&mut self) -> Option<(usize, Moved<E::Socket>)> {
        self.leavers.pop_front()
    }

    /// Goes on with a connection of another worker's.
    pub fn join(&mut self, mut moved: Moved<E::Socket>) {
        self.stats.moves += 1;
        moved.name.moves = moved.name.moves.saturating_add(1);
        self.keep(moved);
    }

    /// Goes on with a connection that nobody else took.
    pub fn keep(&mut self, moved: Moved<E::Socket>) {
        let Moved { mut flow, sockets, record, name } = moved;
        if self.stopping {
            flow.on(Event::Stop);
        }
        self.seat(Tenant::new(flow, sockets, record, name));
    }
}
