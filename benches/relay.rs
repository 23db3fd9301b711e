//! Whole relays side by side: bytes and messages through real sockets, by the same client and
//! server for every contender. `cargo bench --bench relay`, `-- --test` to run each once,
//! `-- bulk/nsplice` to choose; criterion leaves its report in target/criterion.
//!
//! Every relay is a process of its own; client and server are two threads of this one. All run in
//! a fresh network namespace where that is allowed. What criterion runs one after the other meets
//! the machine in different moods: for ratios to quote, `scripts/compare` measures in interleaved
//! rounds. This benchmark is for changes of one contender, and for a look at the whole field.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::MsgFlags;

use peers::Peers;
use relays::{Relay, readable};

#[allow(dead_code, unreachable_pub, clippy::unwrap_used)] // the tests use more of it
#[path = "../tests/support/netns.rs"]
mod netns;
#[path = "relay/peers.rs"]
mod peers;
#[path = "relay/relays.rs"]
mod relays;

/// A relay to measure: its name, and the command that forwards to an address. A command prints
/// the address it listens at as its first line; SIGTERM ends it. No command: no relay.
type Contender = (&'static str, fn(SocketAddr) -> Option<Command>);

const CONTENDERS: &[Contender] = &[
    ("direct", |_| None),
    ("tokio-8k", |target| Some(relays::tokio(8 << 10, target))),
    ("tokio-64k", |target| Some(relays::tokio(64 << 10, target))),
    ("nsplice-auto", |target| Some(relays::nsplice("auto", target))),
    ("nsplice-copy", |target| Some(relays::nsplice("copy", target))),
    ("nsplice-splice", |target| Some(relays::nsplice("splice", target))),
];

/// What the client asks of the server: on each connection, again and again, a request answered by
/// a response. One exchange on every connection is one iteration.
struct Work {
    name: &'static str,
    connections: usize,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    /// [`BULK_BYTES`] to the server; the response says that the last byte has arrived.
    Bulk,
    /// Requests and responses of this size.
    RequestResponse { bytes: usize },
}

const WORKS: &[Work] = &[
    Work { name: "1", connections: 1, kind: Kind::Bulk },
    Work { name: "8", connections: 8, kind: Kind::Bulk },
    Work { name: "64Bx1", connections: 1, kind: Kind::RequestResponse { bytes: 64 } },
    Work { name: "64Bx64", connections: 64, kind: Kind::RequestResponse { bytes: 64 } },
    Work { name: "16Kx16", connections: 16, kind: Kind::RequestResponse { bytes: 16 << 10 } },
];

/// Bytes of one iteration of bulk, on all connections together: some 10 ms for a fast relay.
const BULK_BYTES: usize = 64 << 20;

/// Measured time of one contender in one work, and time before it that does not count.
const MEASURED: Duration = Duration::from_secs(3);
const WARM_UP: Duration = Duration::from_millis(500);
const SAMPLES: usize = 20;

/// Longest wait for anything: far above what a relay needs, so that reaching it means a fault.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() {
    if let Some(order) = relays::tokio_order() {
        return relays::run_tokio(&order).expect("the relay can listen and accept");
    }
    match enter_netns() {
        Ok(congestion) => eprintln!("relay: in a network namespace of its own, {congestion}"),
        Err(error) => eprintln!("relay: on this machine's own loopback interface: {error}"),
    }
    let mut criterion = Criterion::default()
        .measurement_time(MEASURED)
        .warm_up_time(WARM_UP)
        .sample_size(SAMPLES)
        .configure_from_args();
    for work in WORKS {
        bench(&mut criterion, work);
    }
    criterion.final_summary();
}

/// Measures every contender in one work, one right after the other.
fn bench(criterion: &mut Criterion, work: &'static Work) {
    let (group, throughput) = match work.kind {
        Kind::Bulk => ("bulk", Throughput::Bytes(BULK_BYTES as u64)),
        Kind::RequestResponse { .. } => {
            ("request-response", Throughput::Elements(work.connections as u64))
        }
    };
    let mut group = criterion.benchmark_group(group);
    group.sampling_mode(SamplingMode::Flat).throughput(throughput);
    for &(name, command) in CONTENDERS {
        let mut rig = None; // made on first use: a filter may leave this one out
        group.bench_function(BenchmarkId::new(name, work.name), |bencher| {
            let rig = rig.get_or_insert_with(|| Rig::new(work, command).expect(name));
            bencher.iter_custom(|iterations| rig.run(iterations).expect(name));
        });
    }
    group.finish();
}

/// A client, a server and what is between them, connected and ready.
struct Rig {
    client: Peers,
    _relay: Option<Relay>,
}

impl Rig {
    fn new(work: &Work, command: fn(SocketAddr) -> Option<Command>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let target = listener.local_addr()?;
        let relay = command(target).map(Relay::start).transpose()?;
        let address = relay.as_ref().map_or(target, |relay| relay.address);

        let (request, response, receive) = match work.kind {
            // Dropped unread: leaves a relay more of the machine it shares with its peers.
            Kind::Bulk => (BULK_BYTES / work.connections, 1, MsgFlags::MSG_TRUNC),
            Kind::RequestResponse { bytes } => (bytes, bytes, MsgFlags::empty()),
        };
        let mut client = Peers::new(MsgFlags::empty())?;
        let mut server = Peers::new(receive)?;
        for _ in 0..work.connections {
            client.add(TcpStream::connect(address)?, request, response)?;
            if !readable(&listener)? {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no connection at the server"));
            }
            server.add(listener.accept()?.0, response, request)?;
        }
        // Ends with its connections. Nobody waits for that: a relay that hangs may keep them.
        thread::spawn(move || drop(server.serve()));
        Ok(Self { client, _relay: relay })
    }

    /// Does `iterations` exchanges on each connection.
    fn run(&mut self, iterations: u64) -> io::Result<Duration> {
        let start = Instant::now();
        self.client.ask(iterations)?;
        Ok(start.elapsed())
    }
}

/// Enters a new network namespace, and says which congestion control it has.
///
/// The default of some machines, BBR, paces loopback (kernel-fact 29). Only algorithms on the
/// initial namespace's list may be chosen in another one.
fn enter_netns() -> io::Result<String> {
    const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
    const CHOSEN: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

    let netns = netns::Netns::new()?;
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
