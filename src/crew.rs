//! The worker threads: starting them, telling them what to do, hearing what they did.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;

use crate::engine::{Start, Token};
use crate::error::{Error, Kind, Result};
use crate::flow::End;
use crate::handoff::Channel;
use crate::log::Log;
use crate::netns::{self, OpenNetns};
use crate::pace::Pace;
use crate::stats::Stats;
use crate::sys::SharedCounters;
use crate::worker::{Settings, Worker};

const LOW_LIMIT: &str = "RLIMIT_NOFILE is too low";

/// What a worker thread starts with.
pub struct Seed {
    /// The CPU to stay on.
    pub cpu: Option<usize>,
    /// Where to connect to; `None`: see `connected`.
    pub target: Option<SocketAddr>,
    /// Capacity wanted for pipes.
    pub pipe_size_bytes: u32,
    /// How long to look for work before sleeping, in microseconds.
    pub busy_poll_us: u32,
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
    wake: EventFd,
    thread: JoinHandle<()>,
}

impl Handle {
    fn tell(&self, command: Command) {
        // A worker that has ended hears nothing; its report is on its way.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }
}

/// The workers and what they have reported.
pub struct Crew {
    workers: Vec<Handle>,
    reports: Receiver<Report>,
    attention: Arc<EventFd>,
    accepting: usize,
    ended: Vec<Ended>,
}

impl Crew {
    /// Starts a worker with an engine of this kind for each seed and waits until all have it; or
    /// fails as the first of them did.
    pub fn start<E: Start>(seeds: Vec<Seed>) -> Result<Crew> {
        abort_on_panic();
        let (report, reports) = channel();
        let attention = Arc::new(event_fd()?);
        let mut crew =
            Crew { workers: Vec::new(), reports, attention, accepting: 0, ended: Vec::new() };
        for (index, seed) in seeds.into_iter().enumerate() {
            let reporter = Reporter { reports: report.clone(), attention: crew.attention() };
            crew.workers.push(spawn::<E>(index, seed, reporter)?);
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
    pub fn listen(&mut self, listener: &OwnedFd) -> Result<()> {
        self.accepting = 0;
        for worker in &self.workers {
            let copy = listener.try_clone().map_err(|error| {
                Error::new(Kind::Kernel, format!("cannot copy the listening socket: {error}"))
            })?;
            worker.tell(Command::Listen(copy));
        }
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
        self.workers[0].tell(Command::Forward(client));
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

    /// Whether a worker has ended: it failed, or the only connection is over.
    pub fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// Ends all workers. Returns their counters, and how the connection that ended last did; or
    /// the first failure.
    pub fn stop(mut self) -> Result<(Vec<Stats>, Option<End>)> {
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
        Ok((stats, last_end))
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

/// A worker that panics ends the process, not a share of its service: with a report, and with a
/// signal that the listener sees.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

fn spawn<E: Start>(index: usize, seed: Seed, reporter: Reporter) -> Result<Handle> {
    let (commands, orders) = channel();
    let wake = event_fd()?;
    let woken = wake
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| Error::new(Kind::Kernel, format!("cannot copy an eventfd: {error}")))?;
    let thread = std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || {
            let ended = match Thread::<E>::new(index, seed, woken, orders) {
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
    Ok(Handle { commands, wake, thread })
}

/// A worker thread, seen from inside: the worker and its channels.
struct Thread<E: Start> {
    index: usize,
    worker: Worker<E>,
    orders: Receiver<Command>,
    woken: OwnedFd,
    handoff: Option<Channel>,
    ended: SharedCounters,
    /// Connections counted in `ended` so far.
    ended_count: u64,
    pace: Pace,
    log: Log,
}

impl<E: Start> Thread<E> {
    fn new(index: usize, seed: Seed, woken: OwnedFd, orders: Receiver<Command>) -> Result<Self> {
        if let Some(cpu) = seed.cpu {
            pin(cpu)?;
        }
        let engine = E::start(seed.target, seed.pipe_size_bytes, seed.busy_poll_us)?;
        let mut worker = Worker::new(engine, seed.settings, seed.log.clone(), seed.connected);
        worker.engine().readable(Token::Command, &woken);
        if let Some(channel) = &seed.handoff {
            worker.engine().readable(Token::Handoff, channel.as_ref());
        }
        Ok(Self {
            index,
            worker,
            orders,
            woken,
            handoff: seed.handoff,
            ended: seed.ended,
            ended_count: 0,
            pace: Pace::default(),
            log: seed.log,
        })
    }

    fn serve(&mut self, reporter: &Reporter) -> Result<()> {
        while !self.worker.is_done() {
            let woken = self.worker.turn().map_err(|errno| {
                let what = format!("{}: cannot wait for completions", E::NAME);
                Error::system(Kind::Kernel, what, errno, "")
            })?;
            if woken.command {
                self.obey(reporter);
            }
            if woken.handoff {
                self.take_over();
            }
            self.publish();
            self.pace.turned(self.worker.stats());
        }
        Ok(())
    }

    fn ended(self, result: Result<()>) -> Ended {
        let stats = self.worker.stats().clone();
        Ended { index: self.index, stats, last_end: self.worker.last_end(), result }
    }

    fn obey(&mut self, reporter: &Reporter) {
        let mut count = [0; 8];
        let _ = nix::unistd::read(&self.woken, &mut count);
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Command::Listen(listener) => {
                    self.worker.listen(listener);
                    reporter.send(Report::Accepting);
                }
                Command::Forward(client) => self.worker.add(client),
                Command::Enter(netns, reply) => {
                    // Nobody waits for it any more: the program is ending.
                    let _ = reply.send(netns::enter(&netns));
                }
                Command::Stop => self.worker.stop(),
            }
        }
        self.worker.engine().readable(Token::Command, &self.woken);
    }

    /// Takes over the connections the listener has accepted for this worker.
    fn take_over(&mut self) {
        let Some(channel) = &self.handoff else { return };
        loop {
            match channel.receive() {
                Ok(Some(received)) => {
                    if received.truncated {
                        self.log.line("connections lost: RLIMIT_NOFILE is too low to take them");
                    }
                    for client in received.sockets {
                        self.worker.add(client);
                    }
                }
                Err(Errno::EAGAIN) => break,
                // The listener is gone; the control channel says so too, and ends the worker.
                Ok(None) | Err(_) => return,
            }
        }
        self.worker.engine().readable(Token::Handoff, channel.as_ref());
    }

    /// Lets the listener know how many connections have ended here.
    fn publish(&mut self) {
        let stats = self.worker.stats();
        let count = stats.completed + stats.failed + stats.stopped;
        if count > self.ended_count {
            self.ended.add(self.index, (count - self.ended_count) as u32);
            self.ended_count = count;
        }
    }
}

fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)).map_err(|errno| {
        let what = format!("--cpus: cannot pin a worker to CPU {cpu}");
        Error::system(Kind::Kernel, what, errno, "no such CPU, or not one for this process")
    })
}

fn event_fd() -> Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|errno| Error::system(Kind::Kernel, "cannot make an eventfd", errno, LOW_LIMIT))
}

fn unexpected_end() -> Error {
    Error::new(Kind::Process, "a worker thread ended unexpectedly")
}
