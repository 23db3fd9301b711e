//! The fake engine: the calls of a worker, turned into changes of the world.

use std::cell::{RefCell, RefMut};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::socket::SockaddrStorage;
use nsplice::engine::{Buffer, Completion, Engine, Outcome, Sleep, Token};
use nsplice::flow::Side;

use crate::memory::PipeState;
use crate::requests::{Kind, Posted, Report, Request};
use crate::world::{Entered, Stage, World, side, trace};

/// The world as all its parts share it.
pub type Shared = Rc<RefCell<World>>;

/// An engine without a kernel.
pub struct FakeEngine {
    world: Shared,
}

/// A socket of the world; dropping it closes it.
pub struct FakeSocket {
    pub id: usize,
    world: Option<Shared>,
}

/// A pipe of the world; dropping it closes it.
pub struct FakePipe {
    id: usize,
    world: Option<Shared>,
}

impl FakeSocket {
    pub fn new(world: &Shared, id: usize) -> Self {
        Self { id, world: Some(Rc::clone(world)) }
    }
}

impl Drop for FakeSocket {
    fn drop(&mut self) {
        // While a failure is reported the world may be in use; it is not looked at any more.
        if let Some(mut world) = self.world.as_ref().and_then(|world| world.try_borrow_mut().ok())
            && !std::thread::panicking()
        {
            world.check_close(self.id);
            world.sockets[self.id].status = crate::socket::Status::Closed;
        }
    }
}

impl Drop for FakePipe {
    fn drop(&mut self) {
        if let Some(mut world) = self.world.as_ref().and_then(|world| world.try_borrow_mut().ok()) {
            world.pipes[self.id].state = PipeState::Closed;
        }
    }
}

impl FakeEngine {
    pub fn new(world: &Shared) -> Self {
        Self { world: Rc::clone(world) }
    }

    fn world(&self) -> RefMut<'_, World> {
        let mut world = self.world.borrow_mut();
        world.call();
        world
    }

    fn begin(&self, token: Token, socket: usize, kind: Kind) {
        let mut world = self.world();
        trace!(world, "{token:?} on socket {socket}: {kind:?}");
        let request = Request { token, socket, kind, is_cancelled: false };
        world.check_request(&request);
        world.sockets[socket].in_flight += 1;
        world.entered.push(Entered::Begin(request));
    }

    fn decode(&self, posted: &Posted) -> Outcome<FakeSocket> {
        let armed = !posted.is_last;
        match posted.report {
            Report::Accepted(result) => {
                let arrive =
                    |index| FakeSocket::new(&self.world, self.world.borrow_mut().arrive(index));
                Outcome::Accepted(result.map(arrive))
            }
            Report::Done(result) => Outcome::Done(result),
            Report::Received { result, more } => {
                let buffer = |(id, len)| Buffer::received(id, len);
                Outcome::Received { result: result.map(|filled| filled.map(buffer)), more }
            }
            Report::Readable(urgent) => Outcome::Readable(urgent),
            Report::Sent(result) => Outcome::Sent(result),
            Report::Watched { writable, failed } => Outcome::Watched { writable, failed, armed },
        }
    }
}

impl Engine for FakeEngine {
    type Socket = FakeSocket;
    type Pipe = FakePipe;

    fn accept(&mut self, token: Token, listener: &FakeSocket) {
        let world = self.world();
        let (served, most) = (world.served(), world.plan.max_connections);
        drop(world);
        assert!(served < most as usize, "accepts beyond {most} connections");
        self.begin(token, listener.id, Kind::Accept);
    }

    fn connect(&mut self, token: Token, socket: &FakeSocket) {
        self.begin(token, socket.id, Kind::Connect);
        self.world.borrow_mut().connections[socket.id / 2].is_connecting = true;
    }

    fn recv(&mut self, token: Token, socket: &FakeSocket) {
        self.begin(token, socket.id, Kind::Recv);
    }

    fn readable(&mut self, token: Token, socket: &FakeSocket) {
        self.begin(token, socket.id, Kind::Readable);
    }

    fn send(&mut self, token: Token, socket: &FakeSocket, buffer: &Buffer, more: bool) {
        let (start, len) = (buffer.range().start, buffer.len());
        self.begin(token, socket.id, Kind::Send { buffer: buffer.id(), start, len, more });
        if let Some(received) = self.world.borrow_mut().buffers.get(buffer.id()) {
            received.sends += 1;
        }
    }

    fn watch(&mut self, token: Token, socket: &FakeSocket) {
        // It looks at once: what is true already is reported.
        self.begin(token, socket.id, Kind::Watch { has_changed: true });
        self.world.borrow_mut().sockets[socket.id].watch = Some(token);
    }

    fn pause(&mut self, token: Token, ms: u32) {
        // One that comes back may pause before it asks for anything else.
        let known = |world: RefMut<World>| world.connection_of(token).or(world.returning);
        let connection = known(self.world()).expect("a flow pauses");
        // It is no socket's request, but none may be in flight when the flow closes.
        self.begin(token, 2 * connection, Kind::Pause { ms, due_ms: 0 });
    }

    fn cancel(&mut self, token: Token) {
        let mut world = self.world();
        trace!(world, "cancel {token:?}");
        world.accept_cancelled |= token == Token::Accept;
        world.entered.push(Entered::Cancel(token));
    }

    fn close(&mut self, mut socket: FakeSocket) {
        socket.world = None;
        let mut world = self.world();
        trace!(world, "close socket {}", socket.id);
        world.check_close(socket.id);
        world.haunt(socket.id);
        world.entered.push(Entered::Close(socket.id));
    }

    fn let_go(&mut self, socket: &FakeSocket) {
        let mut world = self.world();
        trace!(world, "socket {} leaves", socket.id);
        world.check_leave(socket.id);
        world.haunt(socket.id);
        world.sockets[socket.id].watch = None;
        // It gets another where it goes on.
        let connection = &mut world.connections[socket.id / 2];
        (connection.name, connection.delivered_at_tick) = (None, None);
        world.leaves += 1;
        if side(socket.id) == Side::Listen {
            world.left.push_back(socket.id / 2);
        }
    }

    fn target_socket(&mut self) -> Result<FakeSocket, Errno> {
        let mut world = self.world();
        let index = world.newest.take().expect("a target is for a client");
        let connection = &mut world.connections[index];
        if let Some(errno) = connection.no_socket {
            connection.stage = Stage::Refused;
            return Err(errno);
        }
        connection.stage = Stage::Served;
        Ok(FakeSocket::new(&self.world, world.open(2 * index + 1)))
    }

    fn shutdown(&mut self, socket: &FakeSocket) {
        let mut world = self.world();
        trace!(world, "shutdown socket {}", socket.id);
        world.check_shutdown(socket.id);
        world.sockets[socket.id].is_shut = true;
    }

    fn reset(&mut self, socket: &FakeSocket) {
        let mut world = self.world();
        trace!(world, "reset socket {}", socket.id);
        world.check_reset(socket.id);
        world.sockets[socket.id].is_reset = true;
    }

    fn is_at_mark(&self, socket: &FakeSocket) -> bool {
        let world = self.world();
        let is_at_mark = world.sockets[socket.id].is_at_mark();
        trace!(world, "socket {} is at a mark: {is_at_mark}", socket.id);
        is_at_mark
    }

    fn recv_urgent(&mut self, socket: &FakeSocket) -> Result<Option<u8>, Errno> {
        let mut world = self.world();
        let result = world.recv_urgent(socket.id);
        trace!(world, "receive urgent from socket {}: {result:?}", socket.id);
        // The end is read for good by a receive.
        world.told_by_read(socket.id, result.map(|_| false));
        result
    }

    fn send_urgent(&mut self, socket: &FakeSocket, byte: u8) -> Result<(), Errno> {
        let mut world = self.world();
        let result = world.send_urgent(socket.id, byte);
        trace!(world, "send {byte} as urgent to socket {}: {result:?}", socket.id);
        world.told_by_write(socket.id, result.map(|()| 1));
        result
    }

    fn adopt(&mut self, _: &FakeSocket) {}

    fn has_failed(&mut self, socket: &FakeSocket) -> bool {
        self.world().sockets[socket.id].rst
    }

    fn failure(&self, socket: &FakeSocket) -> Option<Errno> {
        let mut world = self.world();
        let errno = world.sockets[socket.id].error.take();
        trace!(world, "socket {} has failed: {errno:?}", socket.id);
        world.sockets[socket.id].told_nothing |= errno.is_none();
        errno.inspect(|&errno| world.told_error(socket.id, errno))
    }

    fn unsent(&self, socket: &FakeSocket) -> u32 {
        let mut world = self.world();
        world.sockets[socket.id].keeps_back = false;
        let unsent = world.sockets[socket.id].unsent(world.now_ms);
        trace!(world, "socket {} has {unsent} bytes unsent", socket.id);
        unsent.min(u64::from(u32::MAX)) as u32
    }

    fn peer(&self, socket: &FakeSocket) -> Option<SockaddrStorage> {
        let address = std::net::SocketAddr::from(([192, 0, 2, 1], socket.id as u16));
        Some(SockaddrStorage::from(address))
    }

    fn give_back(&mut self, buffer: Buffer) {
        let mut world = self.world();
        trace!(world, "give back buffer {}", buffer.id());
        let received = world.buffers.give_back(buffer.id());
        let received = received.unwrap_or_else(|| panic!("buffer {} given twice", buffer.id()));
        assert!(received.sends == 0, "buffer {} given back while it is sent", buffer.id());
    }

    fn take_pipe(&mut self) -> Option<(FakePipe, u32)> {
        let mut world = self.world();
        let no_pipe = world.weather.no_pipe;
        if world.rng.percent(no_pipe) {
            return None;
        }
        let id = world.empty_pipe()?;
        let capacity = world.pipes[id].capacity;
        trace!(world, "take pipe {id} of {capacity} bytes");
        Some((FakePipe { id, world: Some(Rc::clone(&self.world)) }, capacity as u32))
    }

    fn release_pipe(&mut self, mut pipe: FakePipe) {
        pipe.world = None;
        let mut world = self.world();
        let held = &mut world.pipes[pipe.id];
        held.state = if held.content.is_none() { PipeState::InPool } else { PipeState::Closed };
        trace!(world, "release pipe {}", pipe.id);
    }

    fn fill(&mut self, socket: &FakeSocket, pipe: &mut FakePipe, len: u32) -> Result<u32, Errno> {
        let mut world = self.world();
        let result = world.fill(socket.id, pipe.id, u64::from(len));
        trace!(world, "fill pipe {} from socket {}: {len}: {result:?}", pipe.id, socket.id);
        // A fill of nothing is no end, and a failure it tells not always the last there is to
        // read: what is behind an urgent mark can still be received.
        if let Err(errno) = result
            && errno != Errno::ENOMEM
        {
            world.told_error(socket.id, errno);
        }
        result
    }

    fn drain(&mut self, pipe: &mut FakePipe, socket: &FakeSocket, len: u32) -> Result<u32, Errno> {
        let mut world = self.world();
        let result = world.drain(pipe.id, socket.id, u64::from(len));
        trace!(world, "drain pipe {} into socket {}: {len}: {result:?}", pipe.id, socket.id);
        world.told_by_write(socket.id, result);
        result
    }

    fn wait(&mut self, sleep: Sleep) -> Result<(), Errno> {
        self.world.borrow_mut().wait(sleep);
        Ok(())
    }

    fn completion(&mut self) -> Option<Completion<FakeSocket>> {
        let posted = self.world.borrow_mut().inbox.pop_front()?;
        trace!(self.world.borrow(), "{:?}: {:?}", posted.token, posted.report);
        self.world.borrow_mut().told(&posted);
        Some(Completion { token: posted.token, outcome: self.decode(&posted) })
    }
}
