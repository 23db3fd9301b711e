//! More connections of one worker become readable at once than its completion queue has room for.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::Signal;
use support::streams::{accept, connect};
use support::{Launch, namespaces, skip};

/// More than 8,192.
const CONNECTIONS: usize = 8_700;

#[test]
fn nobody_is_lost_when_more_is_complete_than_the_queue_holds() {
    let (_, descriptors) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if descriptors < 2 * CONNECTIONS as u64 + 200 {
        skip!("{descriptors} descriptors are not enough for {CONNECTIONS} connections");
    }
    namespaces!(clients, targets);
    let server = targets.listen("127.0.0.1:0");
    let forwarder = Launch::nsplice()
        .option("--workers", "1")
        .listen_netns(&clients)
        .connect_netns(&targets)
        .listen(([127, 0, 0, 1], 0))
        .connect(server.local_addr().unwrap())
        .start();
    let address = forwarder.address();
    let connections = clients.enter(|| {
        (0..CONNECTIONS).map(|_| (connect(address), accept(&server))).collect::<Vec<_>>()
    });
    let connector = forwarder.connector();
    connector.stop();
    for (mut client, mut server) in connections.iter().map(|(client, server)| (client, server)) {
        client.write_all(b"u").unwrap();
        server.write_all(b"d").unwrap();
    }
    connector.signal(Signal::SIGCONT);
    for (mut client, mut server) in connections.iter().map(|(client, server)| (client, server)) {
        let mut bytes = [0; 2];
        server.read_exact(&mut bytes[..1]).unwrap();
        client.read_exact(&mut bytes[1..]).unwrap();
        assert_eq!(bytes, *b"ud");
    }
    drop(connections);
    forwarder.stop().assert_clean();
}
