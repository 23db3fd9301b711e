//! nsplice against the tool it replaces, and against no forwarder at all: in each scenario client,
//! server and user must see the same. Where the reference is broken ("mended" in README.md) nsplice is
//! held against what it promises.

#![allow(clippy::unwrap_used)]

#[path = "scenarios/mod.rs"]
mod scenarios;
mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use scenarios::{Stage, Way, connection_in};
use support::streams::{accept, bounded, connect, read_to_end, receive, send};
use support::{Launch, PATIENCE, Program, TempDir, eventually, namespaces, skip};

const NSPLICE: Way = Way::Through(Program::Nsplice);
const REFERENCE: Way = Way::Through(Program::Reference);

/// A test for each scenario: the ways through it must not be told apart.
macro_rules! same {
    ($($name:ident: $first:ident, $second:ident;)+) => {
        $(
            #[test]
            fn $name() {
                let mut seen = Vec::new();
                for way in [$first, $second] {
                    if way == REFERENCE && let Err(reason) = Program::Reference.path() {
                        skip!("{reason}");
                    }
                    namespaces!(clients, targets);
                    seen.push(scenarios::$name(&Stage { way, clients, targets }));
                }
                assert_eq!(seen[0], seen[1], "{:?} and {:?} differ", $first, $second);
            }
        )+
    };
}

const DIRECT: Way = Way::Direct;

mod like_the_reference {
    use super::*;

    same! {
        echo: NSPLICE, REFERENCE;
        client_half_closes_first: NSPLICE, REFERENCE;
        server_half_closes_first: NSPLICE, REFERENCE;
        server_speaks_first: NSPLICE, REFERENCE;
        nothing_is_sent: NSPLICE, REFERENCE;
        big_both_ways: NSPLICE, REFERENCE;
        many_small_messages: NSPLICE, REFERENCE;
        ping_pong_does_not_stall: NSPLICE, REFERENCE;
        namespaces_as_files: NSPLICE, REFERENCE;
        namespaces_as_descriptors: NSPLICE, REFERENCE;
        only_the_connect_side_is_named: NSPLICE, REFERENCE;
        only_the_listen_side_is_named: NSPLICE, REFERENCE;
        both_address_families: NSPLICE, REFERENCE;
        no_namespace_is_named: NSPLICE, REFERENCE;
        inherited_listener: NSPLICE, REFERENCE;
        inherited_connections: NSPLICE, REFERENCE;
    }
}

mod like_no_forwarder {
    use super::*;

    same! {
        echo: NSPLICE, DIRECT;
        client_half_closes_first: NSPLICE, DIRECT;
        server_half_closes_first: NSPLICE, DIRECT;
        server_speaks_first: NSPLICE, DIRECT;
        nothing_is_sent: NSPLICE, DIRECT;
        big_both_ways: NSPLICE, DIRECT;
        many_small_messages: NSPLICE, DIRECT;
        ping_pong_does_not_stall: NSPLICE, DIRECT;
        ping_pong_in_two_writes_does_not_stall: NSPLICE, DIRECT;
        client_resets: NSPLICE, DIRECT;
        server_resets: NSPLICE, DIRECT;
    }
}

/// Client and server send to each other, then end their streams in turn.
fn talk<C: Read + Write, S: Read + Write>(
    mut client: C,
    mut server: S,
    end_client: impl FnOnce(&C),
) {
    send(&mut client, 1, 1000);
    receive(&mut server, 1, 1000);
    send(&mut server, 2, 1000);
    receive(&mut client, 2, 1000);
    end_client(&client);
    assert_eq!(read_to_end(&mut server).how, "eof");
    drop(server);
    assert_eq!(read_to_end(&mut client).how, "eof");
}

fn end_tcp(stream: &TcpStream) {
    stream.shutdown(std::net::Shutdown::Write).unwrap();
}

fn end_unix(stream: &UnixStream) {
    stream.shutdown(std::net::Shutdown::Write).unwrap();
}

fn bounded_unix(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The line about namespaces, where no option names one.
const NO_NETNS: &str = "No network-namespace-related option specified. \
                        Operating in a usual boring TCP forwarder mode.\n";

#[test]
fn an_inherited_client_is_forwarded_to_an_address() {
    namespaces!(clients, targets);
    let (client, accepted) = connection_in(&clients);
    let listener = targets.listen("127.0.0.1:0");
    let target = listener.local_addr().unwrap();
    let forwarder =
        Launch::nsplice().fd("-S", &accepted).connect_netns(&targets).connect(target).start();
    drop(accepted);
    talk(client, accept(&listener), end_tcp);
    forwarder.finish().assert_clean();
}

#[test]
fn an_inherited_client_whose_target_refuses_is_reset_and_the_status_is_6() {
    namespaces!(clients, targets);
    let (mut client, accepted) = connection_in(&clients);
    let refusing = ([127, 0, 0, 1], targets.free_port([127, 0, 0, 1].into()));
    let forwarder =
        Launch::nsplice().fd("-S", &accepted).connect_netns(&targets).connect(refusing).start();
    drop(accepted);
    assert_eq!(read_to_end(&mut client).how, "ConnectionReset");
    let exit = forwarder.finish();
    assert_eq!(exit.code(), Some(6), "{exit:?}");
    assert!(exit.stderr.contains(&format!("127.0.0.1:{}", refusing.1)), "{exit:?}");
    assert!(exit.stderr.contains("ECONNREFUSED"), "{exit:?}");
}

/// Exactly one connection.
#[test]
fn a_listener_with_an_inherited_target_forwards_one_connection() {
    namespaces!(clients, targets);
    let (connected, server) = connection_in(&targets);
    let launch =
        Launch::nsplice().listen_netns(&clients).listen(([127, 0, 0, 1], 0)).fd("-C", &connected);
    let forwarder = launch.start();
    drop(connected);
    let address = forwarder.address();
    let client = clients.enter(|| connect(address));
    let is_closed = || (!clients.listens(address.port())).then_some(());
    eventually("nothing listens with the first client", is_closed);
    talk(client, server, end_tcp);
    forwarder.finish().assert_clean();
    clients.enter(|| TcpStream::connect(address)).expect_err("nothing listens any more");
}

/// The listener may be inherited too.
#[test]
fn an_inherited_listener_with_an_inherited_target_forwards_one_connection() {
    namespaces!(clients, targets);
    let (connected, server) = connection_in(&targets);
    let listener = clients.listen("127.0.0.1:0");
    let address = listener.local_addr().unwrap();
    let forwarder = Launch::nsplice().listen_fd(&listener).fd("-C", &connected).start();
    drop(connected);
    talk(clients.enter(|| connect(address)), server, end_tcp);
    let exit = forwarder.finish();
    assert_eq!((exit.code(), exit.stderr.as_str()), (Some(0), NO_NETNS), "{exit:?}");
}

#[test]
fn one_descriptor_names_both_namespaces() {
    namespaces!(both);
    let listener = both.listen("127.0.0.1:0");
    let fd = both.as_fd().try_clone_to_owned().unwrap();
    let number = fd.as_raw_fd();
    let forwarder = Launch::nsplice()
        .inherit(fd, number)
        .option("-F", number.to_string())
        .option("-T", number.to_string())
        .listen(([127, 0, 0, 1], 0))
        .connect(listener.local_addr().unwrap())
        .start();
    let client = both.enter(|| connect(forwarder.address()));
    talk(client, accept(&listener), end_tcp);
    forwarder.stop().assert_clean();
}

#[test]
fn an_inherited_listener_may_be_a_unix_socket() {
    namespaces!(targets);
    let directory = TempDir::new();
    let path = directory.path().join("listener");
    let unix = UnixListener::bind(&path).unwrap();
    let listener = targets.listen("127.0.0.1:0");
    let target = listener.local_addr().unwrap();
    let forwarder =
        Launch::nsplice().listen_fd(&unix).connect_netns(&targets).connect(target).start();
    // Two clients: neither the first one nor its end ends the forwarder.
    for _ in 0..2 {
        let client = bounded_unix(UnixStream::connect(&path).unwrap());
        talk(client, accept(&listener), end_unix);
    }
    forwarder.stop().assert_clean();
}

#[test]
fn inherited_connections_may_be_unix_sockets() {
    let [(client, accepted), (connected, server)] = [(); 2].map(|()| UnixStream::pair().unwrap());
    let forwarder = Launch::nsplice().fd("-S", &accepted).fd("-C", &connected).start();
    drop((accepted, connected));
    talk(bounded_unix(client), bounded_unix(server), end_unix);
    let exit = forwarder.finish();
    assert_eq!((exit.code(), exit.stderr.as_str()), (Some(0), NO_NETNS), "{exit:?}");
}

#[test]
fn an_inherited_listener_may_be_non_blocking() {
    for handoff in ["socket", "connections"] {
        namespaces!(clients, targets);
        let inherited = clients.listen("127.0.0.1:0");
        inherited.set_nonblocking(true).unwrap();
        let listener = targets.listen("127.0.0.1:0");
        let forwarder = Launch::nsplice()
            .option("--handoff", handoff)
            .listen_fd(&inherited)
            .connect_netns(&targets)
            .connect(listener.local_addr().unwrap())
            .start();
        for _ in 0..3 {
            let client = clients.enter(|| connect(inherited.local_addr().unwrap()));
            talk(client, accept(&listener), end_tcp);
        }
        forwarder.stop().assert_clean();
    }
}

/// The client of a listening forwarder learns it as a reset, others are not disturbed.
#[test]
fn a_client_whose_target_refuses_is_reset() {
    namespaces!(clients, targets);
    let refusing = ([127, 0, 0, 1], targets.free_port([127, 0, 0, 1].into()));
    let forwarder = Launch::nsplice()
        .listen_netns(&clients)
        .connect_netns(&targets)
        .listen(([127, 0, 0, 1], 0))
        .connect(refusing)
        .start();
    // The reset may come before `connect` has returned.
    let address = forwarder.address();
    let how = match clients.enter(|| TcpStream::connect_timeout(&address, PATIENCE)) {
        Ok(client) => read_to_end(&mut bounded(client)).how,
        Err(error) => format!("{:?}", error.kind()),
    };
    assert_eq!(how, "ConnectionReset");
    let listener = targets.listen(("127.0.0.1", refusing.1));
    let client = clients.enter(|| connect(forwarder.address()));
    talk(client, accept(&listener), end_tcp);
    let exit = forwarder.stop();
    assert_eq!(exit.code(), Some(0), "{exit:?}");
    assert_eq!(exit.summary()["failed"], 1, "{exit:?}");
}
