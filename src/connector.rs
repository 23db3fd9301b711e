//! The connector process: the child. It enters the connect side's namespace, starts the workers,
//! gives them what the listener hands over, and adds up what they did.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;

use crate::config::{Config, Engine, Forward, Handoff, ListenSide, SummaryFormat};
use crate::crew::{Crew, Outcome, Seed};
use crate::engine::epoll::Epoll;
use crate::engine::uring::{self, Uring};
use crate::engine::{Setup, Start};
use crate::error::{Error, Kind, Result};
use crate::flow::End;
use crate::handoff::Channel;
use crate::limits::Limits;
use crate::log::{self, Log};
use crate::netns::{self, Follower};
use crate::pace::Home;
use crate::process::ConnectPart;
use crate::stats::Summary;
use crate::sys::SharedCounters;
use crate::worker::Settings;
use serving::Serving;

mod serving;

/// What the connector is given at the fork.
pub struct Part<'a> {
    /// What was asked for.
    pub config: &'a Config,
    /// Where each worker is to run.
    pub homes: Vec<Option<Home>>,
    /// What each may have.
    pub limits: Limits,
    /// Where connections go to.
    pub connect: ConnectPart,
    /// There is one connection only.
    pub single: bool,
    /// To the listener.
    pub control: Channel,
    /// From the listener to each worker.
    pub handoff: Vec<Channel>,
    /// Connections each worker has ended.
    pub ended: SharedCounters,
    /// Connections the listener has cut.
    pub cut: SharedCounters,
    /// SIGINT and SIGTERM.
    pub signals: SignalFd,
}

/// Where each worker is to run; `None`: wherever the scheduler puts it. Errors if the allowed CPUs
/// cannot be told.
pub fn worker_homes(config: &Config, single: bool) -> Result<Vec<Option<Home>>> {
    let cpus = worker_cpus(config)?;
    // One connection is one worker's.
    let count = match (single, config.workers, &config.cpus) {
        (true, ..) => 1,
        (_, Some(workers), _) => workers,
        (_, None, Some(_)) => cpus.len(),
        (_, None, None) => Limits::workers(cpus.len()),
    };
    // Many programs with a worker each that is active are not to share the first CPU.
    let is_any = config.cpus.is_none() && share_connections(config, count);
    let first = if is_any { RandomState::new().hash_one(()) as usize % cpus.len() } else { 0 };
    // Connections with a process each, as from an inetd, are not to share it either.
    let is_pinned = config.pin && !(single && config.cpus.is_none());
    let home = |&cpu: &usize| is_pinned.then(|| Home { cpu, all: Arc::clone(&cpus) });
    Ok(cpus.iter().cycle().skip(first).take(count).map(home).collect())
}

/// Whether so many workers share connections by what there is to do. A number that was asked for is
/// how many have them, `--handoff connections` says where each is to be, and with `--busy-poll`
/// workers seem busy whatever they do.
fn share_connections(config: &Config, workers: usize) -> bool {
    let is_free = config.workers.is_none() && config.handoff == Handoff::Socket;
    workers > 1 && is_free && config.busy_poll_us == 0
}

/// The CPUs that workers may have.
fn worker_cpus(config: &Config) -> Result<Arc<[usize]>> {
    if let Some(cpus) = &config.cpus {
        return Ok(cpus.as_slice().into());
    }
    let allowed = sched_getaffinity(Pid::from_raw(0)).map_err(|errno| {
        Error::system(Kind::Kernel, "cannot ask for the allowed CPUs", errno, "")
    })?;
    Ok((0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).collect())
}

/// Serves until told to stop, or until the only connection is over. Returns the exit status.
pub fn run(part: Part) -> Result<u8> {
    // Before the log's thread is there, so that it is in that namespace, too.
    if let ConnectPart::Address(_, Some(netns)) = &part.connect {
        netns::enter(netns)?;
    }
    log::with(part.config.verbose, |log| serve(part, log))
}

fn serve(part: Part, log: Log) -> Result<u8> {
    let config = part.config;
    let mut follower = None;
    let (target, connected) = match part.connect {
        ConnectPart::Connected(socket) => (None, Some(socket)),
        ConnectPart::Address(address, netns) => {
            if let Some(netns) = netns {
                follower = Follower::start(netns, config.netns_gone, log.clone())?;
            }
            (Some(address), None)
        }
    };
    let settings = settings(config, target, part.single);
    let is_foreign = settings.adopts;
    let setup = Setup {
        target,
        sockets: config.sockets,
        pipe_size_bytes: config.pipe_size_bytes,
        pipes: part.limits.pipes,
        busy_poll_us: config.busy_poll_us,
    };
    let mut connected = connected;
    let is_sharing = share_connections(config, part.homes.len());
    let shared_cpus = is_sharing.then(|| worker_cpus(config)).transpose()?;
    let mut handoff = part.handoff.into_iter();
    let places = part.homes.into_iter().zip(&part.limits.connections);
    let seeds = places.map(|(home, &max_connections)| Seed {
        home,
        setup: setup.clone(),
        settings: Settings { max_connections, ..settings.clone() },
        log: log.clone(),
        connected: connected.take(),
        handoff: handoff.next(),
        ended: part.ended.clone(),
    });
    let (engine, mut crew) = if is_to_use_uring(config.engine, &log)? {
        (Uring::NAME, Crew::start::<Uring>(seeds.collect(), shared_cpus)?)
    } else {
        (Epoll::NAME, Crew::start::<Epoll>(seeds.collect(), shared_cpus)?)
    };
    let drain_timeout = Duration::from_millis(config.drain_timeout_ms.into());
    let (control, signals) = (&part.control, &part.signals);
    let served =
        Serving::new(&mut crew, follower, control, signals, drain_timeout, is_foreign).run();
    let Outcome { stats, last_end, unserved } = crew.stop()?;
    // The listener has counted before it said that this is the end.
    let unserved = unserved + u64::from(part.cut.get(0));
    let stopped = unserved + stats.iter().map(|stats| stats.stopped).sum::<u64>();
    let wants_summary = config.summary == Some(SummaryFormat::Json);
    let summary = wants_summary.then(|| Summary::new(engine, stats, unserved));
    let printed = summary.map_or(Ok(()), |summary| print_summary(&summary));
    served?;
    if stopped > 0 && !drain_timeout.is_zero() {
        return Err(Error::new(Kind::Cut, format!("connections cut at the end: {stopped}")));
    }
    printed?;
    let failed = !matches!(last_end, None | Some(End::Complete | End::Stopped));
    Ok(if part.single && failed { Kind::Connection.status() } else { 0 })
}

fn settings(config: &Config, target: Option<SocketAddr>, single: bool) -> Settings {
    let is_foreign = |one: &Forward| matches!(one.listen, ListenSide::Listener(_));
    Settings {
        transfer: config.transfer,
        grace_ms: config.reset_timeout_ms,
        clock: config.times.into(),
        target: target.map_or_else(|| "-C".to_owned(), |target| target.to_string()),
        single,
        adopts: config.forwards.iter().any(is_foreign),
        pipe_size_bytes: config.pipe_size_bytes,
        max_connections: u32::MAX,
        place: None,
    }
}

fn print_summary(summary: &Summary) -> Result<()> {
    let text = format!("{}\n", summary.to_json());
    let write = move || std::io::stdout().write_all(text.as_bytes());
    let why = match log::bounded(write) {
        Ok(Some(Ok(()))) => return Ok(()),
        Ok(Some(Err(error))) | Err(error) => error.to_string(),
        Ok(None) => "nobody reads standard output".to_owned(),
    };
    Err(Error::new(Kind::Socket, format!("--summary json: cannot write it: {why}")))
}

/// Which engine all workers use. A ring that is not to be had for want of memory or descriptors is
/// no reason to use another engine: that would hide the want.
fn is_to_use_uring(wanted: Engine, log: &Log) -> Result<bool> {
    if wanted == Engine::Epoll {
        return Ok(false);
    }
    match (uring::probe(), wanted) {
        (Err(refusal), Engine::Auto) if refusal.is_lasting() => {
            log.plain_line(format!("{refusal}; using epoll"));
            Ok(false)
        }
        (probed, _) => probed.map(|()| true).map_err(Error::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};

    /// The CPU that each worker is pinned to, and those it may run on while it splices.
    fn homes(options: &str, single: bool) -> Vec<Option<(usize, Vec<usize>)>> {
        let argv = format!("nsplice -l 127.0.0.1:1 -c 127.0.0.1:2 {options}");
        let argv = argv.split_whitespace().map(Into::into).collect();
        let Ok(Command::Run(args)) = parse(argv) else { panic!("{options}") };
        let config = args.into_config().expect("the options go together");
        let homes = worker_homes(&config, single).expect("CPUs can be told");
        homes.into_iter().map(|home| home.map(|home| (home.cpu, home.all.to_vec()))).collect()
    }

    #[test]
    fn workers_take_cpus_in_turn_and_the_only_connection_none() {
        let all = || vec![2, 5];
        assert_eq!(homes("--cpus 2,5", false), [Some((2, all())), Some((5, all()))]);
        assert_eq!(homes("--cpus 2,5 --workers 1", false), [Some((2, all()))]);
        assert_eq!(homes("--cpus 2,5 --workers 3", false)[2], Some((2, all())));
        assert_eq!(homes("--workers 2 --no-pin", false), [None, None]);
        assert_eq!(homes("", true), [None]);
        assert_eq!(homes("--cpus 2,5", true), [Some((2, all()))]);
    }
}
