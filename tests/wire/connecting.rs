//! What happens while there is no connection to the target yet, or none to be had.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{Backlog, listen};

use super::end::{End, LIMIT, STALL, STALLED};
use super::rows::Seen;
use super::stage::{Route, SYN_SENT, Stage, Way, tcp_states};
use crate::support::eventually;
use crate::support::streams::connect;

/// The target refuses the connection.
pub fn refused(stage: &Stage) -> Seen {
    let port = stage.targets.free_port([127, 0, 0, 1].into());
    fail(&stage.route_to(Err(([127, 0, 0, 1], port).into())))
}

/// There is no route to the target.
pub fn no_network(stage: &Stage) -> Seen {
    fail(&stage.route_to(Err(([192, 0, 2, 1], 9).into())))
}

/// There is one, and the router tells that the target's host cannot be reached.
pub fn no_host(stage: &Stage) -> Seen {
    stage.targets.reject([192, 0, 2, 2].into());
    fail(&stage.route_to(Err(([192, 0, 2, 2], 9).into())))
}

/// The target does not answer, until the kernel gives up.
pub fn timed_out(stage: &Stage) -> Seen {
    stage.targets.sysctl("net/ipv4/tcp_syn_retries", "1");
    fail(&Busy::new(stage).route)
}

fn fail(route: &Route) -> Seen {
    let client = match route.connect(None) {
        Ok(stream) => {
            let mut client = end(stream, 0);
            client.unhurried();
            client.read_to_end();
            client.into_notes()
        }
        // The same for the client, a moment earlier.
        Err(errno) => vec![format!("{errno:?}")],
    };
    Seen { client, server: Vec::new() }
}

/// A listener that answers no one, as its queue is full of the connection that comes with it.
struct Busy {
    _filler: TcpStream,
    route: Route,
}

impl Busy {
    fn new(stage: &Stage) -> Self {
        let listener: TcpListener = stage.targets.listen("127.0.0.1:0");
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        // A queue of length 0 holds one; the next one's packets are dropped, and sent again.
        let filler = stage.targets.enter(|| connect(address));
        Self { _filler: filler, route: stage.route_to(Ok(listener)) }
    }

    /// Makes room in the queue.
    fn recover(&self) {
        self.route.accept().expect("the filler is in the queue");
    }
}

fn end(stream: TcpStream, side: u64) -> End {
    End::new(stream, side, Arc::new(AtomicBool::new(false)))
}

fn is_connecting(stage: &Stage) -> bool {
    tcp_states(&stage.targets).contains(&SYN_SENT)
}

/// Waits for an attempt to connect to the target; false if there is none.
fn attempted(stage: &Stage) -> bool {
    let deadline = Instant::now() + LIMIT;
    while !is_connecting(stage) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

fn no_attempt() -> Seen {
    Seen { client: Vec::new(), server: vec!["no attempt to connect".to_owned()] }
}

pub fn reset_while_connecting(stage: &Stage) -> Seen {
    give_up_while_connecting(stage, |_| {})
}

pub fn reset_after_bytes_while_connecting(stage: &Stage) -> Seen {
    give_up_while_connecting(stage, |client| {
        client.send(1000);
        client.wait_until_acknowledged();
    })
}

pub fn reset_after_half_close_while_connecting(stage: &Stage) -> Seen {
    give_up_while_connecting(stage, |client| {
        client.send(1000);
        client.shut();
        client.wait_until_acknowledged();
    })
}

/// The client has lost interest: nobody is to be connected for it.
fn give_up_while_connecting(stage: &Stage, before: fn(&mut End)) -> Seen {
    let busy = Busy::new(stage);
    let mut client = end(busy.route.begin_to_connect(), 0);
    if !attempted(stage) {
        return no_attempt();
    }
    if stage.way != Way::Direct {
        before(&mut client);
    }
    client.reset();
    let reset_at = Instant::now();
    let mut cancelled = Some(Duration::ZERO);
    while is_connecting(stage) {
        cancelled = Some(reset_at.elapsed()).filter(|&time| time < LIMIT / 3);
        if cancelled.is_none() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut server = Vec::new();
    match cancelled {
        Some(time) if time < STALL => server.push("no connection".to_owned()),
        Some(_) => server.push(format!("no connection{STALLED}")),
        None => {
            busy.recover();
            let accepted = busy.route.accept();
            server.push(if accepted.is_some() { "a connection" } else { "attempts" }.to_owned());
        }
    }
    Seen { client: client.into_notes(), server }
}

/// What a client says before the target answers is said to it later.
pub fn half_close_while_connecting(stage: &Stage) -> Seen {
    speak_while_connecting(stage, 1000)
}

pub fn end_while_connecting(stage: &Stage) -> Seen {
    speak_while_connecting(stage, 0)
}

fn speak_while_connecting(stage: &Stage, bytes: u64) -> Seen {
    let busy = Busy::new(stage);
    let route = &busy.route;
    std::thread::scope(|scope| {
        let client = scope.spawn(move || {
            let mut client = end(route.connect(None)?, 0);
            client.send(bytes);
            client.shut();
            client.wait_until_acknowledged();
            Ok::<_, Errno>(client)
        });
        if !attempted(stage) {
            return no_attempt();
        }
        // Without a forwarder the client itself is the one that waits.
        eventually("the client has spoken", || {
            (client.is_finished() || stage.way == Way::Direct).then_some(())
        });
        busy.recover();
        let Some(server) = busy.route.accept() else {
            return Seen { client: Vec::new(), server: vec!["no connection".to_owned()] };
        };
        let mut server = end(server, 1);
        server.unhurried();
        server.read_to_end();
        server.send(500);
        server.shut();
        let mut client = client.join().unwrap().unwrap();
        client.read_to_end();
        Seen { client: client.into_notes(), server: server.into_notes() }
    })
}
