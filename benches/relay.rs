//! Whole relays side by side: bytes and messages through real sockets, by the same clients and
//! servers for every contender. `cargo bench --bench relay`, `-- --test` to run each once,
//! `-- bulk/nsplice` to choose; criterion leaves its report in target/criterion.
//!
//! Every relay is a process of its own and has one thread that moves bytes; clients and servers
//! are two threads of this process. All run in a fresh network namespace where that is allowed.
//! `direct` is the same without a relay: what sockets, clients and servers alone cost. What
//! criterion runs one after the other meets the machine in different moods: for ratios to quote,
//! `scripts/compare` measures in interleaved rounds. This benchmark is for changes of one
//! contender, and for a look at the whole field.

use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use criterion::{AxisScale, BenchmarkId, Criterion, PlotConfiguration, SamplingMode, Throughput};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{Shutdown, shutdown};

use peers::{Clients, Exchange};
use relays::Relay;
use support::Netns;

#[path = "relay/check.rs"]
mod check;
#[path = "relay/contenders.rs"]
mod contenders;
#[path = "relay/peers.rs"]
mod peers;
#[path = "relay/relays.rs"]
mod relays;
#[path = "../tests/support/mod.rs"]
mod support;

/// What forwards, if anything.
#[derive(Clone, Copy)]
enum Means {
    Direct,
    /// A baseline: a kind of `contenders`.
    Baseline(&'static str),
    /// nsplice with this `--transfer`.
    Nsplice(&'static str),
}

/// What is measured, under which name.
struct Contender {
    name: String,
    means: Means,
    /// Whether it was seen to forward all it is given.
    checked: Cell<bool>,
}

/// What clients ask of servers. Its figures are those of one exchange: with several connections,
/// each has one under way, and the time is shared out among them.
struct Work {
    group: &'static str,
    /// What tells it from others of its group, a number.
    parameter: usize,
    connections: usize,
    exchange: Exchange,
    throughput: Throughput,
}

/// Bytes of one exchange of bulk: some 5 ms for a fast relay.
const BULK_BYTES: usize = 32 << 20;

/// Measured time of one contender in one work, and time before it that does not count: with all
/// contenders and works some eight minutes.
const MEASURED: Duration = Duration::from_millis(1500);
const WARM_UP: Duration = Duration::from_millis(300);
const SAMPLES: usize = 20;
/// Criterion's default, ten times as many, takes as long as measuring does.
const RESAMPLES: usize = 10_000;

/// Closed connections that keep their port for a minute, at most.
const TIME_WAIT_MAX: &str = "4096";

/// Longest wait for anything: far above what a relay needs, so that reaching it means a fault.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    if relays::is_baseline() {
        return contenders::main();
    }
    // First: it asks cargo for its directory, which may want to be connected.
    let mut criterion = Criterion::default()
        .measurement_time(MEASURED)
        .warm_up_time(WARM_UP)
        .sample_size(SAMPLES)
        .nresamples(RESAMPLES)
        .configure_from_args();
    match enter_netns() {
        Ok(congestion) => eprintln!("relay: in a network namespace of its own, {congestion}"),
        Err(error) => eprintln!("relay: on this machine's own loopback interface: {error}"),
    }
    let contenders = contenders();
    for works in works().chunk_by(|one, other| one.group == other.group) {
        bench(&mut criterion, works, &contenders);
    }
    criterion.final_summary();
    ExitCode::SUCCESS
}

fn contenders() -> Vec<Contender> {
    let contender = |name: String, means| Contender { name, means, checked: Cell::new(false) };
    let mut all = vec![contender("direct".into(), Means::Direct)];
    for kind in contenders::KINDS {
        all.push(contender(kind.name.into(), Means::Baseline(kind.name)));
    }
    for transfer in ["auto", "copy", "splice"] {
        all.push(contender(format!("nsplice-{transfer}"), Means::Nsplice(transfer)));
    }
    all
}

/// All works, those of a group next to each other.
fn works() -> Vec<Work> {
    let exchange =
        Exchange { request_bytes: 64, response_bytes: 64, drops: false, reconnects: false };
    let bulk = |connections| Work {
        group: "bulk",
        parameter: connections,
        connections,
        exchange: Exchange {
            request_bytes: BULK_BYTES,
            response_bytes: 1,
            drops: true,
            ..exchange
        },
        throughput: Throughput::Bytes(BULK_BYTES as u64),
    };
    let request_response = |group, connections, bytes| Work {
        group,
        parameter: bytes,
        connections,
        exchange: Exchange { request_bytes: bytes, response_bytes: bytes, ..exchange },
        throughput: Throughput::Bytes(bytes as u64),
    };
    let sizes = [64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10];
    let mut all = vec![bulk(1), bulk(8)];
    all.extend(sizes.map(|bytes| request_response("request-response-x1", 1, bytes)));
    all.extend(sizes.map(|bytes| request_response("request-response-x64", 64, bytes)));
    all.push(Work {
        group: "connect-exchange-close",
        parameter: 16,
        connections: 16,
        exchange: Exchange { reconnects: true, ..exchange },
        throughput: Throughput::Elements(1),
    });
    all
}

/// Measures every contender in each work, one right after the other.
fn bench(criterion: &mut Criterion, works: &[Work], contenders: &[Contender]) {
    let mut group = criterion.benchmark_group(works[0].group);
    // Sizes double and double again.
    let scale = PlotConfiguration::default().summary_scale(AxisScale::Logarithmic);
    group.sampling_mode(SamplingMode::Flat).plot_config(scale);
    for work in works {
        group.throughput(work.throughput.clone());
        for contender in contenders {
            let mut rig = None; // made on first use: a filter may leave this one out
            group.bench_function(BenchmarkId::new(&contender.name, work.parameter), |bencher| {
                let rig = rig.get_or_insert_with(|| contender.rig(work).expect(&contender.name));
                bencher.iter_custom(|count| rig.run(count).expect(&contender.name));
            });
        }
    }
    group.finish();
}

impl Contender {
    /// What forwards to `target`, and where clients are to connect.
    fn start(&self, target: SocketAddr) -> io::Result<(Option<Relay>, SocketAddr)> {
        let relay = match self.means {
            Means::Direct => return Ok((None, target)),
            Means::Baseline(kind) => Relay::start(relays::baseline(kind, target))?,
            Means::Nsplice(transfer) => Relay::start(relays::nsplice(transfer, target))?,
        };
        let address = relay.address;
        Ok((Some(relay), address))
    }

    /// Everything for a work. A relay that loses anything must not be measured, so the first
    /// time it is checked.
    fn rig(&self, work: &Work) -> io::Result<Rig> {
        if !self.checked.replace(true) {
            let target = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let (_relay, address) = self.start(target.local_addr()?)?;
            check::check(address, &target);
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let (relay, address) = self.start(listener.local_addr()?)?;
        let clients = Clients::new(address, work.connections, work.exchange)?;
        let (served, exchange) = (listener.try_clone()?, work.exchange);
        let server = Some(thread::spawn(move || peers::serve(served, exchange)));
        Ok(Rig { clients, _relay: relay, listener, server })
    }
}

/// Clients, servers and what is between them.
struct Rig {
    clients: Clients,
    _relay: Option<Relay>,
    listener: TcpListener,
    server: Option<JoinHandle<io::Result<()>>>,
}

impl Rig {
    /// Does `count` exchanges on each connection; the time that one took.
    fn run(&mut self, count: u64) -> io::Result<Duration> {
        let start = Instant::now();
        self.clients.run(count)?;
        Ok(start.elapsed() / self.clients.connections() as u32)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // It ends when the listener fails, and with it its connections.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Read);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// Enters a new network namespace, and says which congestion control it has.
///
/// The default of some machines, BBR, paces loopback. Only algorithms on the
/// initial namespace's list may be chosen in another one.
fn enter_netns() -> io::Result<String> {
    const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
    const CHOSEN: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

    let netns = Netns::new()?;
    // Short connections use up ports: a closed one keeps its for a while.
    netns.sysctl("net/ipv4/ip_local_port_range", "10240 65535");
    // When half of the ports are taken, each connect searches among thousands, and that search would
    // be measured. `scripts/compare` keeps as many.
    netns.sysctl("net/ipv4/tcp_max_tw_buckets", TIME_WAIT_MAX);
    let allowed = fs::read_to_string(ALLOWED)?;
    let listed = allowed.split_whitespace().any(|name| name == "cubic");
    // The list is the whole machine's: it is put back at once, which changes no choice made.
    let widened = !listed && fs::write(ALLOWED, format!("{} cubic", allowed.trim())).is_ok();
    let _ = netns.enter(|| fs::write(CHOSEN, "cubic"));
    if widened {
        fs::write(ALLOWED, &allowed)?;
    }
    setns(&netns, CloneFlags::CLONE_NEWNET)?;
    Ok(fs::read_to_string(CHOSEN)?.trim().to_owned())
}
