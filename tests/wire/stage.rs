//! Where scripts take place: two namespaces and what lies between client and server.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, socket, sockopt,
};

use super::end::{End, LIMIT};
use super::others::Other;
use crate::support::{Forwarder, Launch, Netns, Program};

/// What lies between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nothing: both are in one namespace.
    Direct,
    Nsplice {
        /// `None`: the one that it chooses, or that NSPLICE_TEST_ENGINE has it come to.
        engine: Option<&'static str>,
        transfer: &'static str,
        handoff: &'static str,
        /// The connection has had some short messages.
        has_talked: bool,
    },
    /// netns_tcp_bridge.
    Reference,
    /// A forwarder that knows no namespaces: client and server are in one.
    Other(Other),
}

/// Every way through nsplice.
pub const NSPLICE: [Way; 6] = [
    nsplice(None, "auto", "socket"),
    nsplice(None, "auto", "connections"),
    nsplice(None, "copy", "socket"),
    nsplice(None, "copy", "connections"),
    nsplice(None, "splice", "socket"),
    nsplice(None, "splice", "connections"),
];

/// How a connection is handed over makes no difference to the engine.
pub const NSPLICE_ON_EPOLL: [Way; 3] = [
    nsplice(Some("epoll"), "auto", "socket"),
    nsplice(Some("epoll"), "copy", "socket"),
    nsplice(Some("epoll"), "splice", "socket"),
];

/// io_uring workers wait for such sockets in another way (`tests/readiness.rs`).
pub const NSPLICE_THAT_TALKED: Way =
    Way::Nsplice { engine: None, transfer: "auto", handoff: "socket", has_talked: true };

const fn nsplice(
    engine: Option<&'static str>,
    transfer: &'static str,
    handoff: &'static str,
) -> Way {
    Way::Nsplice { engine, transfer, handoff, has_talked: false }
}

/// Short messages each way after which a connection has had enough of them.
const ROUNDS: usize = 12;

/// A listening server, and how clients reach it.
pub struct Route {
    pub listener: Option<TcpListener>,
    /// Where clients connect to.
    pub address: SocketAddr,
    pub clients: Netns,
    forwarder: Option<Between>,
}

/// A running forwarder.
enum Between {
    Ours(Box<Forwarder>),
    Other(super::others::Running),
}

/// The namespaces of one way. Routes are kept, so that most scripts share a forwarder, as
/// connections do.
pub struct Stage {
    pub way: Way,
    clients: Netns,
    pub targets: Netns,
    routes: RefCell<BTreeMap<Option<usize>, Rc<Route>>>,
}

impl Stage {
    pub fn new(way: Way) -> std::io::Result<Self> {
        let targets = Netns::new()?;
        let apart = matches!(way, Way::Nsplice { .. } | Way::Reference);
        let clients = if apart { Netns::new()? } else { targets.clone() };
        Ok(Self { way, clients, targets, routes: RefCell::default() })
    }

    /// A connection from end to end: the client, then the server. `receive_bytes`: the size of
    /// both receive buffers, if it is to be a certain one. `stall`: waits that are noted. `None`: no
    /// connection comes about.
    pub fn pair(&self, receive_bytes: Option<usize>, stall: Duration) -> Option<(End, End)> {
        let cached = self.routes.borrow().get(&receive_bytes).cloned();
        let route = cached.unwrap_or_else(|| {
            let listener = self.targets.listen("127.0.0.1:0");
            set_receive_buffer(&listener, receive_bytes);
            let route = Rc::new(self.route_to(Ok(listener)));
            self.routes.borrow_mut().insert(receive_bytes, route.clone());
            route
        });
        let client = route.connect(receive_bytes).ok()?;
        let server = route.accept()?;
        if let Way::Nsplice { has_talked: true, .. } = self.way {
            talk(&client, &server);
            if let Some(Between::Ours(forwarder)) = &route.forwarder {
                assert!(forwarder.connector().in_sets().len() >= 2, "they wait by themselves");
            }
        }
        let given_up = Arc::new(AtomicBool::new(false));
        let end = |stream, side| End::new(stream, side, given_up.clone()).with_stall(stall);
        Some((end(client, 0), end(server, 1)))
    }

    /// Forgets the forwarders, which may have connections that nobody waits for.
    pub fn forget(&self) {
        self.routes.borrow_mut().clear();
    }

    /// A way to a server of one's own, or to an address where there is none.
    pub fn route_to(&self, target: Result<TcpListener, SocketAddr>) -> Route {
        let (target, listener) = match target {
            Ok(listener) => (listener.local_addr().unwrap(), Some(listener)),
            Err(address) => (address, None),
        };
        let forwarder = self.forwarder_to(target);
        let address = match &forwarder {
            None => target,
            Some(Between::Ours(forwarder)) => forwarder.address(),
            Some(Between::Other(running)) => running.address,
        };
        Route { listener, address, clients: self.clients.clone(), forwarder }
    }

    fn forwarder_to(&self, target: SocketAddr) -> Option<Between> {
        let launch = match self.way {
            Way::Direct => return None,
            Way::Other(other) => return Some(Between::Other(other.start(&self.targets, target))),
            Way::Reference => Launch::new(Program::Reference),
            Way::Nsplice { engine, transfer, handoff, has_talked } => {
                let launch = Launch::nsplice();
                // It is not to go to another one.
                let launch = if has_talked { launch.option("--workers", "1") } else { launch };
                let launch = launch.option("--transfer", transfer).option("--handoff", handoff);
                engine.into_iter().fold(launch, Launch::engine)
            }
        };
        let launch = launch.listen_netns(&self.clients).connect_netns(&self.targets);
        let forwarder = launch.listen(([127, 0, 0, 1], 0)).connect(target).start();
        Some(Between::Ours(Box::new(forwarder)))
    }

    /// Ends the forwarders that are still there; nsplice must end well, and have nothing to report.
    pub fn finish(self) {
        for route in self.routes.into_inner().into_values() {
            let route = Rc::into_inner(route).expect("no script keeps a route");
            if let Some(Between::Ours(forwarder)) = route.forwarder {
                let exit = forwarder.stop();
                if matches!(self.way, Way::Nsplice { .. }) {
                    exit.assert_clean();
                }
            }
        }
    }
}

/// Sends short messages there and back.
fn talk(mut client: &TcpStream, mut server: &TcpStream) {
    let mut message = [7; 64];
    for _ in 0..ROUNDS {
        client.write_all(&message).unwrap();
        server.read_exact(&mut message).unwrap();
        server.write_all(&message).unwrap();
        client.read_exact(&mut message).unwrap();
    }
}

impl Route {
    /// Connects a client; only the attempt is waited for.
    pub fn connect(&self, receive_bytes: Option<usize>) -> Result<TcpStream, nix::errno::Errno> {
        self.clients.enter(|| {
            let socket = tcp_socket(SockFlag::empty());
            set_receive_buffer(&socket, receive_bytes);
            connect(&socket, self.address)?;
            Ok(socket.into())
        })
    }

    /// Begins to connect a client. Through a forwarder that succeeds, whatever the target does.
    pub fn begin_to_connect(&self) -> TcpStream {
        self.clients.enter(|| {
            let socket = tcp_socket(SockFlag::SOCK_NONBLOCK);
            let begun = connect(&socket, self.address);
            assert!(matches!(begun, Ok(()) | Err(nix::errno::Errno::EINPROGRESS)), "{begun:?}");
            socket.into()
        })
    }

    /// The next connection of the server, if one comes.
    pub fn accept(&self) -> Option<TcpStream> {
        let listener = self.listener.as_ref()?;
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::try_from(LIMIT).unwrap()).unwrap();
        (ready > 0).then(|| listener.accept().unwrap().0)
    }
}

fn tcp_socket(flags: SockFlag) -> OwnedFd {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap()
}

fn connect(socket: &OwnedFd, address: SocketAddr) -> nix::Result<()> {
    nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(address))
}

/// Before the connection exists, as the size decides how large its window can get.
fn set_receive_buffer(socket: &impl AsFd, bytes: Option<usize>) {
    let Some(bytes) = bytes else { return };
    // The plain option goes no further than a sysctl that is small on many machines.
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        setsockopt(socket, sockopt::RcvBuf, &bytes).unwrap();
    }
}

/// A TCP state as /proc/net/tcp writes it.
pub const SYN_SENT: u8 = 2;
pub const TIME_WAIT: u8 = 6;
pub const LISTEN: u8 = 10;

/// The states of all IPv4 TCP sockets of a namespace.
pub fn tcp_states(netns: &Netns) -> Vec<u8> {
    let table = netns.enter(|| std::fs::read_to_string("/proc/thread-self/net/tcp")).unwrap();
    let state = |line: &str| {
        let field = line.split_whitespace().nth(3).expect("the fourth field is the state");
        u8::from_str_radix(field, 16).unwrap()
    };
    table.lines().skip(1).map(state).collect()
}
