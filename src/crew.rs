//! The worker threads: starting them, telling them what to do, hearing what they did.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};

use self::shared::Shared;
use self::thread::Thread;
use crate::engine::{Setup, Start};
use crate::error::{Error, Kind, Result};
use crate::flow::End;
use crate::handoff::Channel;
use crate::log::Log;
use crate::netns::OpenNetns;
use crate::pace::Home;
use crate::queue::Queues;
use crate::spread::{Place, Spread};
use crate::stats::Stats;
use crate::sys::SharedCounters;
use crate::worker::Settings;

mod shared;
mod thread;

const LOW_LIMIT: &str = "RLIMIT_NOFILE is too low";

/// What a worker thread starts with.
pub struct Seed {
    /// Where it is to run, unless anywhere.
    pub home: Option<Home>,
    /// What its engine is to do. No target: see `connected`.
    pub setup: Setup,
    /// What to do with connections.
    pub settings: Settings,
    /// Where to log.
    pub log: Log,
    /// The socket to forward the only connection to.
    pub connected: Option<OwnedFd>,
    /// Where accepted connections come from, with `--handoff connections`.
    pub handoff: Option<Channel>,
    /// Where to count the connections that have ended.
    pub ended: SharedCounters,
}

/// What a worker is told.
enum Command {
    /// Accept from this listening socket, and say so.
    Listen(OwnedFd),
    /// Forward this connection.
    Forward(OwnedFd),
    /// Make new connections from this namespace, and say so.
    Enter(Arc<OpenNetns>, Sender<Result<()>>),
    /// Accept no more by itself.
    StopAccepting,
    /// Take no more, and end the thread after the last connection.
    Drain,
    /// End all connections, then the thread.
    Stop,
}

/// What a worker tells.
enum Report {
    /// It has its engine.
    Started,
    /// It accepts connections.
    Accepting,
    /// It has ended.
    Ended(Ended),
}

/// What a worker leaves behind.
struct Ended {
    index: usize,
    stats: Stats,
    last_end: Option<End>,
    result: Result<()>,
}

/// A worker thread, seen from outside.
struct Handle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl Handle {
    fn give(&self, client: OwnedFd) {
        self.shared.count(1);
        self.tell(Command::Forward(client));
    }

    fn tell(&self, command: Command) {
        // A worker that has ended hears nothing; its report is on its way.
        let _ = self.commands.send(command);
        self.shared.wake();
    }
}

/// The workers and what they have reported.
pub struct Crew {
    workers: Vec<Handle>,
    reports: Receiver<Report>,
    attention: Arc<EventFd>,
    accepting: usize,
    ended: Vec<Ended>,
    /// There is one connection only.
    single: bool,
    /// What the workers accept from.
    listener: Option<OwnedFd>,
    /// What they are to accept from instead, once there are descriptors for it.
    next_listener: Option<OwnedFd>,
    /// Those who waited at others when they were to be closed.
    queues: Queues,
    /// The workers are to be told when there are none.
    is_draining: bool,
    /// Nobody else serves them, as was known when they were to be taken.
    are_ours: Option<bool>,
}

/// What the workers leave behind.
pub struct Outcome {
    /// The counters of each.
    pub stats: Vec<Stats>,
    /// How the connection that ended last did.
    pub last_end: Option<End>,
    /// Clients who waited for room until the end.
    pub unserved: u64,
}

impl Crew {
    /// Starts a worker with an engine of this kind for each seed and waits until all have it; or
    /// fails as the first of them did. `shared_cpus`: what all may have, if they are to share
    /// connections by what these are used for.
    pub fn start<E: Start>(seeds: Vec<Seed>, shared_cpus: Option<Arc<[usize]>>) -> Result<Crew> {
        let (report, reports) = channel();
        let attention = Arc::new(event_fd()?);
        let mut crew = Crew {
            workers: Vec::new(),
            reports,
            attention,
            accepting: 0,
            ended: Vec::new(),
            single: seeds.iter().any(|seed| seed.settings.single),
            listener: None,
            next_listener: None,
            queues: Queues::default(),
            is_draining: false,
            are_ours: None,
        };
        let spread = shared_cpus.map(|cpus| Arc::new(Spread::new(seeds.len(), cpus)));
        let (mut siblings, mut woken) = (Vec::new(), Vec::new());
        for seed in &seeds {
            let (shared, pipe) = Shared::new(seed.settings.max_connections).map_err(|errno| {
                Error::system(Kind::Kernel, "cannot make a pipe", errno, LOW_LIMIT)
            })?;
            siblings.push(Arc::new(shared));
            woken.push(pipe);
        }
        let siblings: Arc<[_]> = siblings.into();
        for (index, (mut seed, woken)) in seeds.into_iter().zip(woken).enumerate() {
            let place = |spread: &Arc<_>| Place { index, spread: Arc::clone(spread) };
            seed.settings.place = spread.as_ref().map(place);
            let reporter = Reporter { reports: report.clone(), attention: crew.attention() };
            crew.workers.push(spawn::<E>(index, seed, woken, Arc::clone(&siblings), reporter)?);
        }
        for _ in 0..crew.workers.len() {
            // The channel cannot close: `report` is here.
            if let Ok(Report::Ended(ended)) = crew.reports.recv() {
                crew.ended.push(ended);
                return Err(crew.stop().err().unwrap_or_else(unexpected_end));
            }
        }
        Ok(crew)
    }

    /// Readable when there is something to [`Crew::collect`].
    pub fn attention(&self) -> Arc<EventFd> {
        Arc::clone(&self.attention)
    }

    /// Takes note of what the workers have reported.
    pub fn collect(&mut self) {
        let _ = self.attention.read();
        while let Ok(report) = self.reports.try_recv() {
            match report {
                Report::Started => {}
                Report::Accepting => self.accepting += 1,
                Report::Ended(ended) => self.ended.push(ended),
            }
        }
    }

    /// Has every worker accept from `listener`, and no longer from what it had before.
    pub fn listen(&mut self, listener: OwnedFd) -> Result<()> {
        let copies = self.workers.iter().map(|_| listener.try_clone());
        let copies = match copies.collect::<std::io::Result<Vec<_>>>() {
            Ok(copies) => copies,
            // There are too few descriptors now: tried again with the waiting clients.
            Err(_) if self.listener.is_some() => {
                let before = self.next_listener.replace(listener);
                before.into_iter().for_each(|listener| self.queues.add(listener));
                return Ok(());
            }
            Err(error) => {
                let text = format!("cannot copy the listening socket: {error}");
                return Err(Error::new(Kind::Kernel, text));
            }
        };
        self.accepting = 0;
        for (worker, copy) in self.workers.iter().zip(copies) {
            worker.tell(Command::Listen(copy));
        }
        // A single connection's socket is closed with the first client: no copy may keep it open.
        let before = self.listener.take();
        self.listener = (!self.single).then_some(listener);
        before.into_iter().for_each(|listener| self.queues.add(listener));
        self.serve_queue();
        Ok(())
    }

    /// Has every worker make its connections from `netns`, and waits until all do.
    pub fn enter(&self, netns: &Arc<OpenNetns>) -> Result<()> {
        let (reply, replies) = channel();
        for worker in &self.workers {
            worker.tell(Command::Enter(Arc::clone(netns), reply.clone()));
        }
        // Those of workers that have ended go with their orders.
        drop(reply);
        replies.iter().collect()
    }

    /// Has a worker forward `client`, the only connection.
    pub fn forward(&mut self, client: OwnedFd) {
        self.workers[0].give(client);
        self.accepting = self.workers.len();
    }

    /// Takes note that the listener will accept.
    pub fn accept_handoff(&mut self) {
        self.accepting = self.workers.len();
    }

    /// Whether all workers accept connections.
    pub fn is_accepting(&self) -> bool {
        self.accepting == self.workers.len()
    }

    /// Has every worker end with its last connection, when those who wait have been taken. One that
    /// is handed connections over first takes all that come until its channel ends. `is_shared`:
    /// another program has the listening socket, too.
    pub fn drain(&mut self, is_shared: bool) {
        self.is_draining = true;
        self.are_ours.get_or_insert(!is_shared);
        // What they took of those who come later, those who wait would have to wait for.
        for worker in &self.workers {
            worker.tell(Command::StopAccepting);
        }
        let listeners = [self.listener.take(), self.next_listener.take()];
        listeners.into_iter().flatten().for_each(|listener| self.queues.add(listener));
        self.serve_queue();
    }

    /// To be called again while there are [waiting clients](Self::has_waiting_clients).
    pub fn serve_queue(&mut self) {
        if let Some(listener) = self.next_listener.take()
            && self.listen(listener).is_err()
        {
            return;
        }
        while !self.queues.is_empty() {
            let have_room = self.workers.iter().filter(|worker| worker.shared.has_room());
            let Some(worker) = have_room.min_by_key(|worker| worker.shared.load()) else { return };
            let Ok(client) = self.queues.take() else { return };
            client.into_iter().for_each(|client| worker.give(client));
        }
        if std::mem::take(&mut self.is_draining) {
            for worker in &self.workers {
                worker.tell(Command::Drain);
            }
        }
    }

    /// Whether there are clients for whom there is no room now.
    pub fn has_waiting_clients(&self) -> bool {
        !self.queues.is_empty() || self.next_listener.is_some()
    }

    /// Whether a worker has failed, or all have ended: with their last or the only connection.
    pub fn is_over(&self) -> bool {
        let has_failed = self.ended.iter().any(|ended| ended.result.is_err());
        has_failed || self.ended.len() == self.workers.len()
    }

    /// Ends all workers. Fails with the first failure.
    pub fn stop(mut self) -> Result<Outcome> {
        let unserved = if self.are_ours == Some(true) { self.queues.waiting() } else { 0 };
        for worker in &self.workers {
            worker.tell(Command::Stop);
        }
        for worker in std::mem::take(&mut self.workers) {
            worker.thread.join().map_err(|_| unexpected_end())?;
        }
        self.collect();
        self.ended.sort_by_key(|ended| ended.index);
        let mut stats = Vec::new();
        let mut last_end = None;
        for ended in self.ended {
            ended.result?;
            stats.push(ended.stats);
            last_end = ended.last_end.or(last_end);
        }
        Ok(Outcome { stats, last_end, unserved })
    }
}

/// A worker's way to report.
struct Reporter {
    reports: Sender<Report>,
    attention: Arc<EventFd>,
}

impl Reporter {
    fn send(&self, report: Report) {
        let _ = self.reports.send(report);
        let _ = self.attention.write(1);
    }
}

fn spawn<E: Start>(
    index: usize,
    seed: Seed,
    woken: OwnedFd,
    siblings: Arc<[Arc<Shared>]>,
    reporter: Reporter,
) -> Result<Handle> {
    let (commands, orders) = channel();
    let shared = Arc::clone(&siblings[index]);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || {
            let ended = match Thread::<E>::new(index, seed, woken, orders, siblings) {
                Ok(mut thread) => {
                    reporter.send(Report::Started);
                    let result = thread.serve(&reporter);
                    thread.ended(result)
                }
                Err(error) => {
                    Ended { index, stats: Stats::default(), last_end: None, result: Err(error) }
                }
            };
            reporter.send(Report::Ended(ended));
        })
        .map_err(|error| Error::new(Kind::Kernel, format!("cannot start a worker: {error}")))?;
    Ok(Handle { commands, shared, thread })
}

fn event_fd() -> Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|errno| Error::system(Kind::Kernel, "cannot make an eventfd", errno, LOW_LIMIT))
}

fn unexpected_end() -> Error {
    Error::new(Kind::Process, "a worker thread ended unexpectedly")
}
