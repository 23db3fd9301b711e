//! One schedule: a worker in a world, from its start until it is done.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use nsplice::log::Log;
use nsplice::spread::{Place, Spread};
use nsplice::worker::{Clock, Moved, Settings, Worker};

use crate::engine::{FakeEngine, FakeSocket, Shared};
use crate::plan::{Entry, Plan};
use crate::rng::Rng;
use crate::world::World;

/// Turns above which a schedule is taken to go on for ever.
const TURNS_MAX: u32 = 100_000;

/// What a schedule amounted to; equal for equal seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub turns: u32,
    pub calls: u64,
    pub shared_fills: u64,
    /// Connections that left, to come back.
    pub moves: u64,
    /// The next random number.
    pub random: u64,
}

/// Where workers log: quietly, and each connection.
pub struct Logs {
    quiet: Log,
    verbose: Log,
}

impl Logs {
    pub fn start() -> std::io::Result<Self> {
        Ok(Self { quiet: Log::start(false)?.0, verbose: Log::start(true)?.0 })
    }
}

/// Runs the schedule of `seed`. Panics when a property does not hold.
pub fn run(seed: u64, logs: &Logs, is_traced: bool) -> Summary {
    let mut rng = Rng::new(seed);
    let plan = Plan::new(&mut rng);
    if is_traced {
        println!("{plan:#?}");
    }
    let world = Rc::new(RefCell::new(World::new(plan, rng, is_traced)));
    let turns = Schedule::new(&world, logs).run();
    let mut world = world.borrow_mut();
    world.check_all_returned();
    Summary {
        turns,
        calls: world.calls,
        shared_fills: world.shared_fills,
        moves: world.leaves / 2,
        random: world.rng.next(),
    }
}

struct Schedule {
    world: Shared,
    worker: Worker<FakeEngine>,
    entry: Entry,
    single: bool,
    stop_at: Option<u32>,
    /// Connections given to the worker.
    given: usize,
    /// Connections that are between two workers, by number.
    moved: Vec<(usize, Moved<FakeSocket>)>,
    turns: u32,
}

impl Schedule {
    fn new(world: &Shared, logs: &Logs) -> Self {
        let plan = world.borrow().plan.clone();
        let settings = Settings {
            transfer: plan.transfer,
            grace_ms: plan.grace_ms,
            // The schedule itself says when a tick has passed.
            clock: Clock { tick_ms: 0, limits: plan.limits },
            target: "192.0.2.1:80".to_owned(),
            single: plan.single,
            adopts: false,
            pipe_size_bytes: 0,
            max_connections: plan.max_connections,
            // The second of two: those that copy are to be with the first.
            place: plan
                .moves
                .then(|| Place { index: 1, spread: Arc::new(Spread::new(2, [0, 1].into())) }),
        };
        let target = plan.target_given.then(|| {
            world.borrow_mut().connect(0);
            world.borrow_mut().connections[0].is_open = true;
            FakeSocket::new(world, world.borrow_mut().open(1))
        });
        let log = if plan.verbose { &logs.verbose } else { &logs.quiet };
        let mut worker = Worker::new(FakeEngine::new(world), settings, log.clone(), target);
        if plan.entry == Entry::Accepted {
            let listener = world.borrow_mut().open_listener();
            worker.listen(FakeSocket::new(world, listener));
        }
        Self {
            world: Rc::clone(world),
            worker,
            entry: plan.entry,
            single: plan.single,
            stop_at: plan.stop_at,
            given: 0,
            moved: Vec::new(),
            turns: 0,
        }
    }

    fn run(mut self) -> u32 {
        while !self.worker.is_done() || !self.moved.is_empty() {
            if self.stop_at == Some(self.turns) {
                self.stop();
            }
            self.give_some();
            self.tick_some();
            self.come_back_some();
            self.worker.turn().expect("a fake wait does not fail");
            self.part();
            if self.world.borrow().is_quiescent {
                self.settle();
            }
            self.turns += 1;
            assert!(self.turns < TURNS_MAX, "schedule does not end within {TURNS_MAX} turns");
        }
        assert!(self.worker.live() == 0, "done with {} flows", self.worker.live());
        let mut world = self.world.borrow_mut();
        world.submit();
        world.check_stats(self.worker.stats());
        self.turns
    }

    /// Nothing can happen: a connection that is left comes, or it is time to stop.
    fn settle(&mut self) {
        // The order to stop may overtake connections on their way, too.
        if !self.moved.is_empty() && self.world.borrow_mut().rng.percent(5) {
            return self.stop();
        }
        if self.come_back() || self.worker.is_done() || self.give() {
            return;
        }
        let world = self.world.borrow();
        world.check_quiescence();
        assert!(!world.is_stopping, "schedule does not end: the worker does not stop");
        drop(world);
        self.stop();
    }

    /// Takes most of the connections that leave. They come back, sooner or later, to a worker that is
    /// like another.
    fn part(&mut self) {
        while let Some((to, moved)) = self.worker.leaver() {
            assert!(to == 0, "a connection goes to worker {to}");
            let mut world = self.world.borrow_mut();
            let connection = world.left.pop_front().expect("it has left the engine");
            let is_kept = world.rng.percent(30);
            drop(world);
            if is_kept {
                self.go_on(connection, moved, Worker::keep);
            } else {
                self.moved.push((connection, moved));
                self.worker.accept_next();
            }
        }
    }

    fn come_back_some(&mut self) {
        while !self.moved.is_empty() && !self.world.borrow_mut().rng.percent(70) {
            self.come_back();
        }
    }

    /// False if there is none to come back.
    fn come_back(&mut self) -> bool {
        if self.moved.is_empty() {
            return false;
        }
        let which = self.world.borrow_mut().rng.index(self.moved.len());
        let (connection, moved) = self.moved.swap_remove(which);
        self.go_on(connection, moved, Worker::join);
        true
    }

    /// Has the worker go on with a connection that left.
    fn go_on(
        &mut self,
        connection: usize,
        moved: Moved<FakeSocket>,
        by: fn(&mut Worker<FakeEngine>, Moved<FakeSocket>),
    ) {
        self.world.borrow_mut().returning = Some(connection);
        by(&mut self.worker, moved);
        self.world.borrow_mut().returning = None;
    }

    fn stop(&mut self) {
        if !self.world.borrow().is_stopping {
            self.world.borrow_mut().stop();
            self.worker.stop();
        }
    }

    fn tick_some(&mut self) {
        let mut world = self.world.borrow_mut();
        let chance = world.plan.tick;
        // None of the random numbers of schedules without a clock.
        if chance > 0 && world.rng.percent(chance) {
            world.tick();
            drop(world);
            self.worker.tick();
        }
    }

    fn give_some(&mut self) {
        let mut world = self.world.borrow_mut();
        let advance = world.weather.advance;
        if world.rng.percent(advance) {
            drop(world);
            self.give();
        }
    }

    /// Gives the worker a connection; false if there is none for it.
    fn give(&mut self) -> bool {
        let world = self.world.borrow();
        let count = if self.single { 1 } else { world.connections.len() };
        // The order to stop may overtake connections on their way to the worker.
        let is_late = world.is_stopping && !world.plan.gives_after_stop;
        let may_come = self.given < count && !is_late && world.may_arrive(self.given);
        drop(world);
        if self.entry != Entry::Given || !may_come {
            return false;
        }
        let client = self.world.borrow_mut().arrive(self.given);
        self.given += 1;
        self.worker.add(FakeSocket::new(&self.world, client));
        true
    }
}
