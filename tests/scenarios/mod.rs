//! What a client and a server can do with a connection and what a user can do with the options,
//! once for all programs: each scenario returns what was seen, and knows no program.

#![allow(unreachable_pub)] // Public means: for the test file that includes this one.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::support::streams::{accept, bounded, connect, exchange, read_to_end, receive, send};
use crate::support::{Forwarder, Launch, Netns, Program};

/// What lies between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nothing: both are in one namespace.
    Direct,
    Through(Program),
}

/// Where a scenario takes place.
pub struct Stage {
    pub way: Way,
    pub clients: Netns,
    pub targets: Netns,
}

/// What client, server and user saw. Equal texts mean that they cannot tell the programs apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub client: String,
    pub server: String,
    /// What the program printed, where that does not depend on when it was stopped.
    pub user: String,
}

impl Stage {
    fn launch(&self) -> Launch {
        match self.way {
            Way::Direct => panic!("there is no program on the direct way"),
            Way::Through(program) => Launch::new(program),
        }
    }

    /// One connection of which each end does its part. A panic in one ends the scenario.
    fn talk(
        &self,
        client: impl FnOnce(TcpStream) -> String + Send,
        server: impl FnOnce(TcpStream) -> String + Send,
    ) -> Seen {
        let listener = self.targets.listen("127.0.0.1:0");
        let target = listener.local_addr().unwrap();
        let forwarder = (self.way != Way::Direct).then(|| {
            self.launch()
                .listen_netns(&self.clients)
                .connect_netns(&self.targets)
                .listen(([127, 0, 0, 1], 0))
                .connect(target)
                .start()
        });
        let (netns, address) = match &forwarder {
            Some(forwarder) => (&self.clients, forwarder.address()),
            None => (&self.targets, target),
        };
        let stream = netns.enter(|| connect(address));
        let seen = both(|| client(stream), || server(accept(&listener)));
        if let Some(forwarder) = forwarder {
            forwarder.stop();
        }
        seen
    }
}

/// Lets both ends act at once.
fn both(client: impl FnOnce() -> String, server: impl FnOnce() -> String + Send) -> Seen {
    std::thread::scope(|scope| {
        let server = scope.spawn(server);
        let client = client();
        let server = server.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Seen { client, server, user: String::new() }
    })
}

/// Reads to the end and says what came.
fn rest(stream: &mut impl Read) -> String {
    let ended = read_to_end(stream);
    format!("{} bytes ({:x}), {}", ended.bytes, ended.hash, ended.how)
}

// What clients and servers do.

pub fn echo(stage: &Stage) -> Seen {
    stage.talk(echo_client, echo_server)
}

/// Sends, ends its stream, expects all of it back.
fn echo_client(mut stream: TcpStream) -> String {
    send(&mut stream, 1, 10_000);
    receive(&mut stream, 1, 10_000);
    stream.shutdown(Shutdown::Write).unwrap();
    format!("echo of 10000 bytes, then {}", rest(&mut stream))
}

fn echo_server(mut stream: TcpStream) -> String {
    let mut reader = stream.try_clone().unwrap();
    let copied = std::io::copy(&mut reader, &mut stream).unwrap();
    format!("{copied} bytes, then eof")
}

pub fn client_half_closes_first(stage: &Stage) -> Seen {
    stage.talk(
        |mut stream| {
            send(&mut stream, 1, 10_000);
            stream.shutdown(Shutdown::Write).unwrap();
            rest(&mut stream)
        },
        |mut stream| {
            let request = rest(&mut stream);
            // The client's stream has ended; what it asked for still reaches it.
            send(&mut stream, 2, 200_000);
            request
        },
    )
}

pub fn server_half_closes_first(stage: &Stage) -> Seen {
    stage.talk(
        |mut stream| {
            let greeting = rest(&mut stream);
            send(&mut stream, 1, 300_000);
            greeting
        },
        |mut stream| {
            send(&mut stream, 2, 20_000);
            stream.shutdown(Shutdown::Write).unwrap();
            rest(&mut stream)
        },
    )
}

pub fn server_speaks_first(stage: &Stage) -> Seen {
    stage.talk(
        |mut stream| {
            let mut banner = [0; 4];
            stream.read_exact(&mut banner).unwrap();
            stream.write_all(b"QUIT").unwrap();
            format!("{banner:?}, then {}", rest(&mut stream))
        },
        |mut stream| {
            stream.write_all(b"220 ").unwrap();
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap();
            format!("{answer:?}")
        },
    )
}

pub fn nothing_is_sent(stage: &Stage) -> Seen {
    stage.talk(
        |mut stream| {
            stream.shutdown(Shutdown::Write).unwrap();
            rest(&mut stream)
        },
        |mut stream| rest(&mut stream),
    )
}

pub fn big_both_ways(stage: &Stage) -> Seen {
    const BYTES: u64 = 20_000_000;
    let part = |send_seed, receive_seed| {
        move |mut stream: TcpStream| {
            exchange(&stream, send_seed, receive_seed, BYTES);
            stream.shutdown(Shutdown::Write).unwrap();
            format!("{BYTES} bytes, then {}", rest(&mut stream))
        }
    };
    stage.talk(part(1, 2), part(2, 1))
}

/// Sizes grow from 1 to 1000 bytes and none is sent before the one before it was answered.
pub fn many_small_messages(stage: &Stage) -> Seen {
    stage.talk(
        |mut stream| {
            for size in 1..=1000 {
                send(&mut stream, size, size);
                receive(&mut stream, !size, size);
            }
            stream.shutdown(Shutdown::Write).unwrap();
            format!("1000 answers, then {}", rest(&mut stream))
        },
        |mut stream| {
            for size in 1..=1000 {
                receive(&mut stream, size, size);
                send(&mut stream, !size, size);
            }
            format!("1000 messages, then {}", rest(&mut stream))
        },
    )
}

/// A round stalls for 40 ms when Nagle's algorithm waits for a delayed acknowledgement; an honest
/// one takes a fraction of a millisecond. A busy machine makes a few slow ones, never this many.
const ROUNDS: u32 = 300;
const STALL: Duration = Duration::from_millis(35);
const STALLS_MAX: u32 = 10;

pub fn ping_pong_does_not_stall(stage: &Stage) -> Seen {
    stage.talk(|stream| ping(stream, &[1]), |stream| pong(stream, 1))
}

/// A message in two writes is what stalls a forwarder that leaves Nagle's algorithm on.
pub fn ping_pong_in_two_writes_does_not_stall(stage: &Stage) -> Seen {
    stage.talk(|stream| ping(stream, &[1, 2]), |stream| pong(stream, 2))
}

fn ping(mut stream: TcpStream, message: &[u8]) -> String {
    let mut answer = vec![0; message.len()];
    let mut stalls = 0;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for byte in message {
            stream.write_all(std::slice::from_ref(byte)).unwrap();
        }
        stream.read_exact(&mut answer).unwrap();
        stalls += u32::from(start.elapsed() >= STALL);
    }
    assert!(stalls <= STALLS_MAX, "{stalls} of {ROUNDS} rounds stall");
    format!("{ROUNDS} rounds")
}

fn pong(mut stream: TcpStream, bytes: usize) -> String {
    let mut message = vec![0; bytes];
    for _ in 0..ROUNDS {
        stream.read_exact(&mut message).unwrap();
        for byte in &message {
            stream.write_all(std::slice::from_ref(byte)).unwrap();
        }
    }
    rest(&mut stream)
}

/// Closes without the usual ending: the peer's stream is cut off, and it shall know.
fn reset(stream: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger).unwrap();
}

pub fn client_resets(stage: &Stage) -> Seen {
    stage.talk(
        |mut stream| {
            send(&mut stream, 1, 1000);
            // The answer shows that the server has the bytes: a reset may overtake them otherwise.
            receive(&mut stream, 2, 1);
            reset(stream);
            "reset".to_owned()
        },
        |mut stream| {
            receive(&mut stream, 1, 1000);
            send(&mut stream, 2, 1);
            rest(&mut stream)
        },
    )
}

pub fn server_resets(stage: &Stage) -> Seen {
    stage.talk(
        |mut stream| {
            receive(&mut stream, 1, 1000);
            send(&mut stream, 2, 1);
            rest(&mut stream)
        },
        |mut stream| {
            send(&mut stream, 1, 1000);
            receive(&mut stream, 2, 1);
            reset(stream);
            "reset".to_owned()
        },
    )
}

// What users do.

/// An echo through a forwarder to a server in the namespace of the targets. Ends the forwarder.
fn echo_through(stage: &Stage, address: SocketAddr, launch: Launch) -> Seen {
    let server = stage.targets.listen("127.0.0.1:0");
    let forwarder = launch.connect(server.local_addr().unwrap()).start();
    let mut seen = both(
        || echo_client(stage.clients.enter(|| connect(with_port(address, &forwarder)))),
        || echo_server(accept(&server)),
    );
    seen.user = forwarder.stderr();
    forwarder.stop();
    seen
}

/// The address, with the forwarder's port where it has none.
fn with_port(mut address: SocketAddr, forwarder: &Forwarder) -> SocketAddr {
    if address.port() == 0 {
        address.set_port(forwarder.address().port());
    }
    address
}

const LOCALHOST: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

pub fn namespaces_as_files(stage: &Stage) -> Seen {
    let launch =
        stage.launch().listen_netns(&stage.clients).connect_netns(&stage.targets).listen(LOCALHOST);
    echo_through(stage, LOCALHOST.into(), launch)
}

pub fn namespaces_as_descriptors(stage: &Stage) -> Seen {
    let launch = stage
        .launch()
        .listen_netns_fd(&stage.clients)
        .connect_netns_fd(&stage.targets)
        .listen(LOCALHOST);
    echo_through(stage, LOCALHOST.into(), launch)
}

/// The side that no option names stays in the caller's namespace.
pub fn only_the_connect_side_is_named(stage: &Stage) -> Seen {
    let launch =
        stage.launch().inside(&stage.clients).connect_netns(&stage.targets).listen(LOCALHOST);
    echo_through(stage, LOCALHOST.into(), launch)
}

pub fn only_the_listen_side_is_named(stage: &Stage) -> Seen {
    let launch =
        stage.launch().inside(&stage.targets).listen_netns(&stage.clients).listen(LOCALHOST);
    echo_through(stage, LOCALHOST.into(), launch)
}

/// Both kinds of client reach `[::]`.
pub fn both_address_families(stage: &Stage) -> Seen {
    let any: SocketAddr = "[::]:0".parse().unwrap();
    let seen = ["127.0.0.1:0", "[::1]:0"].map(|address| {
        let launch =
            stage.launch().listen_netns(&stage.clients).connect_netns(&stage.targets).listen(any);
        echo_through(stage, address.parse().unwrap(), launch)
    });
    let join =
        |field: fn(&Seen) -> &String| seen.each_ref().map(|seen| field(seen).as_str()).join("; ");
    Seen { client: join(|s| &s.client), server: join(|s| &s.server), user: join(|s| &s.user) }
}

/// A user who names no namespace is told so.
pub fn no_namespace_is_named(stage: &Stage) -> Seen {
    let one = Stage { clients: stage.targets.clone(), targets: stage.targets.clone(), ..*stage };
    let launch = one.launch().inside(&one.targets).listen(LOCALHOST);
    let seen = echo_through(&one, LOCALHOST.into(), launch);
    let line = "No network-namespace-related option specified. \
                Operating in a usual boring TCP forwarder mode.\n";
    assert_eq!(seen.user, line);
    seen
}

pub fn inherited_listener(stage: &Stage) -> Seen {
    let listener = stage.clients.listen("127.0.0.1:0");
    let launch = stage.launch().listen_fd(&listener).connect_netns(&stage.targets);
    echo_through(stage, listener.local_addr().unwrap(), launch)
}

/// `-S` with `-C`: one connection, both ends inherited; afterwards the program ends by itself.
pub fn inherited_connections(stage: &Stage) -> Seen {
    let (client, accepted) = connection_in(&stage.clients);
    let (connected, server) = connection_in(&stage.targets);
    let launch = stage.launch().fd("-S", &accepted).fd("-C", &connected);
    single(launch, client, server, (accepted, connected))
}

/// The two ends of a connection within a namespace.
pub fn connection_in(netns: &Netns) -> (TcpStream, TcpStream) {
    let listener = netns.listen("127.0.0.1:0");
    let client = netns.enter(|| connect(listener.local_addr().unwrap()));
    (client, accept(&listener))
}

/// An echo through a program that forwards one connection and then ends.
fn single<T: AsFd>(launch: Launch, client: TcpStream, server: TcpStream, passed: (T, T)) -> Seen {
    let forwarder = launch.start();
    // The program's copies must be the last ones, or no end of stream gets through.
    drop(passed);
    let mut seen = both(|| echo_client(client), || echo_server(bounded(server)));
    let exit = forwarder.finish();
    seen.user = format!("status {:?}, {}", exit.code(), exit.stderr);
    seen
}
