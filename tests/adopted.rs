//! A listening socket that another program made (`-L`): its clients are served as those of nsplice's
//! own are, whatever that program has asked for, and whether they came before nsplice or after.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};
use support::calls::{SIOCATMARK, int_ioctl, set_option};
use support::streams::{accept, bounded, connect};
use support::{Forwarder, Launch, Netns, PATIENCE, TempDir, eventually, namespaces};

const HANDOFFS: [&str; 2] = ["socket", "connections"];

/// Options by level and name, with a value that would be noticed.
const OPTIONS: [(&str, i32, i32, i32); 5] = [
    ("TCP_CORK", libc::IPPROTO_TCP, libc::TCP_CORK, 1),
    ("SO_RCVLOWAT", libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1000),
    // What is sent is told of in the socket's error queue.
    ("SO_TIMESTAMPING", libc::SOL_SOCKET, libc::SO_TIMESTAMPING, 1 << 1 | 1 << 4),
    ("IP_RECVERR", libc::IPPROTO_IP, libc::IP_RECVERR, 1),
    ("SO_OOBINLINE", libc::SOL_SOCKET, libc::SO_OOBINLINE, 0),
];

/// A client that came before nsplice and one that came after, each with its server.
struct Stage {
    forwarder: Forwarder,
    connections: [(TcpStream, TcpStream); 2],
}

impl Stage {
    /// `early`: what the first client does before nsplice is there.
    fn new(
        handoff: &str,
        listener: &TcpListener,
        targets: &Netns,
        early: impl FnOnce(&TcpStream),
    ) -> Self {
        let target = targets.listen("127.0.0.1:0");
        let connect = || connect(listener.local_addr().unwrap());
        let first = connect();
        early(&first);
        let forwarder = Launch::nsplice()
            .option("--handoff", handoff)
            .listen_fd(listener)
            .connect_netns(targets)
            .connect(target.local_addr().unwrap())
            .start();
        let serve = |client: TcpStream| (client, accept(&target));
        let connections = [serve(first), serve(connect())];
        Self { forwarder, connections }
    }
}

fn send_urgent(stream: &TcpStream) {
    assert_eq!(send(stream.as_raw_fd(), b"U", MsgFlags::MSG_OOB), Ok(1));
}

/// Sends nine ordinary bytes, and in the middle of them an urgent one.
fn say(mut stream: &TcpStream) {
    stream.write_all(b"12345").unwrap();
    send_urgent(stream);
    stream.write_all(b"6789").unwrap();
}

/// Reads that; a read stops before the urgent byte.
fn assert_said(mut stream: &TcpStream, case: &str) {
    setsockopt(stream, sockopt::OobInline, &true).unwrap();
    eventually("all is there", || (int_ioctl(stream, libc::FIONREAD) == Ok(10)).then_some(()));
    let mut before = [0; 5];
    stream.read_exact(&mut before).unwrap();
    assert_eq!(before, *b"12345", "{case}");
    assert_eq!(int_ioctl(stream, SIOCATMARK), Ok(1), "{case}: no mark after 5 bytes");
    let mut rest = [0; 5];
    stream.read_exact(&mut rest).unwrap();
    assert_eq!(rest, *b"U6789", "{case}");
}

#[test]
fn an_urgent_byte_keeps_its_place_also_of_a_client_who_waited() {
    for handoff in HANDOFFS {
        namespaces!(targets);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stage = Stage::new(handoff, &listener, &targets, say);
        say(&stage.connections[1].0);
        for ((_, server), when) in stage.connections.iter().zip(["early", "late"]) {
            assert_said(server, &format!("{handoff}, {when}"));
        }
        stage.forwarder.stop().assert_clean();
    }
}

#[test]
fn what_the_other_program_asked_for_is_not_noticed() {
    for handoff in HANDOFFS {
        for (name, level, option, value) in OPTIONS {
            namespaces!(targets);
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            set_option(&listener, level, option, value).unwrap();
            let stage = Stage::new(handoff, &listener, &targets, |_| {});
            for ((client, server), when) in stage.connections.iter().zip(["early", "late"]) {
                converse(client, server, &format!("{handoff}, {name}, {when}"));
            }
            let ticks = stage.forwarder.connector().cpu_ticks();
            std::thread::sleep(Duration::from_millis(200));
            let ticks = stage.forwarder.connector().cpu_ticks() - ticks;
            assert!(ticks < 10, "{handoff}, {name}: {ticks} of 20 ticks when idle");
            for (client, server) in &stage.connections {
                end(client, server, name);
            }
            drop(stage.connections);
            let exit = stage.forwarder.stop();
            exit.assert_clean();
            assert_eq!(exit.summary()["failed"], 0, "{handoff}, {name}: {exit:?}");
        }
    }
}

/// Short messages in several writes. Held back, each takes 200 ms.
fn converse(client: &TcpStream, server: &TcpStream, case: &str) {
    let started = Instant::now();
    for _ in 0..10 {
        for (mut from, mut to) in [(client, server), (server, client)] {
            for byte in *b"abc" {
                from.write_all(&[byte]).unwrap();
            }
            let mut read = [0; 3];
            to.read_exact(&mut read).unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_eq!(read, *b"abc", "{case}");
        }
    }
    let taken = started.elapsed();
    assert!(taken < Duration::from_secs(1), "{case}: {taken:?} for ten exchanges");
}

/// The client ends its stream and waits for a late answer: nothing has failed.
fn end(mut client: &TcpStream, mut server: &TcpStream, case: &str) {
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut asked = Vec::new();
    server.read_to_end(&mut asked).unwrap();
    assert_eq!(asked, *b"last", "{case}");
    server.write_all(b"answer").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap_or_else(|error| panic!("{case}: {error}"));
    assert_eq!(answer, *b"answer", "{case}");
}

/// A unix-domain socket has no error queue, and gives bytes to who asks for that.
#[test]
fn what_a_unix_domain_peer_said_before_the_start_is_forwarded() {
    for option in ["-S", "-C"] {
        namespaces!(netns);
        let (mut peer, given) = UnixStream::pair().unwrap();
        peer.write_all(b"early").unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        let listener = netns.listen("127.0.0.1:0");
        let launch = Launch::nsplice().fd(option, &given);
        let address = listener.local_addr().unwrap();
        let (forwarder, mut far) = if option == "-S" {
            let forwarder = launch.connect_netns(&netns).connect(address).start();
            (forwarder, accept(&listener))
        } else {
            let forwarder = launch.listen_netns(&netns).listen(([127, 0, 0, 1], 0)).start();
            let far = netns.enter(|| connect(forwarder.address()));
            (forwarder, far)
        };
        drop(given);
        let mut said = Vec::new();
        far.read_to_end(&mut said).unwrap();
        assert_eq!(said, *b"early", "{option}");
        far.write_all(b"late").unwrap();
        drop(far);
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = Vec::new();
        peer.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, *b"late", "{option}");
        forwarder.finish().assert_clean();
    }
}

/// More than there are buffers at first, of clients who say something and are gone.
#[test]
fn what_unix_domain_clients_said_before_they_went_is_forwarded() {
    const CLIENTS: usize = 100;
    for handoff in HANDOFFS {
        namespaces!(targets);
        let directory = TempDir::new();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let say = |number: usize| {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(&[number as u8; 1000]).unwrap();
        };
        (0..CLIENTS).for_each(say);
        let target = targets.listen("127.0.0.1:0");
        let forwarder = Launch::nsplice()
            .option("--handoff", handoff)
            .listen_fd(&listener)
            .connect_netns(&targets)
            .connect(target.local_addr().unwrap())
            .start();
        let mut heard = [false; CLIENTS];
        for _ in 0..CLIENTS {
            let mut said = Vec::new();
            accept(&target).read_to_end(&mut said).unwrap();
            let number = usize::from(said[0]);
            assert_eq!(said, [said[0]; 1000], "{handoff}");
            assert!(!std::mem::replace(&mut heard[number], true), "{handoff}: {number} twice");
        }
        assert_eq!(heard, [true; CLIENTS], "{handoff}");
        forwarder.stop().assert_clean();
    }
}

/// The error queue looks like a failure to who asks for no more than that.
#[test]
fn a_full_error_queue_is_no_failure_and_no_work() {
    namespaces!(targets);
    let target = targets.listen("127.0.0.1:0");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = connect(listener.local_addr().unwrap());
    let given = bounded(listener.accept().unwrap().0);
    // Told of in the queue of the socket that is given to nsplice.
    set_option(&given, libc::SOL_SOCKET, libc::SO_TIMESTAMPING, 1 << 1 | 1 << 4).unwrap();
    (&given).write_all(b"before").unwrap();
    let forwarder = Launch::nsplice()
        .option("--summary", "json")
        .fd("-S", &given)
        .connect_netns(&targets)
        .connect(target.local_addr().unwrap())
        .start();
    drop(given);
    let server = accept(&target);
    let mut before = [0; 6];
    (&client).read_exact(&mut before).unwrap();
    converse(&client, &server, "-S");
    let connector = forwarder.processes()[0].children()[0];
    let ticks = connector.cpu_ticks();
    std::thread::sleep(Duration::from_millis(200));
    let ticks = connector.cpu_ticks() - ticks;
    assert!(ticks < 10, "{ticks} of 20 ticks when idle");
    end(&client, &server, "-S");
    drop((client, server));
    let exit = forwarder.finish();
    assert_eq!(exit.summary()["failed"], 0, "{exit:?}");
}
