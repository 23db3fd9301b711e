"""What goes over a connection: streams that both ends can make, and sockets with a time limit.

A client begins with a header that says what is to happen. Every byte after it follows from the
connection's number, so both ends know what must arrive, compare it as it comes, and can say which
byte is the first wrong one; a hash would tell at the end only, and nothing of what a reset cut off.
"""

import asyncio
import collections
import errno
import fcntl
import random
import socket
import struct
import termios
import time

# A prime: bytes that are left out or doubled are noticed, unless they are so many.
BLOCK_BYTES = (1 << 22) - 3
CHUNK_BYTES = 256 << 10
# Without progress for so long a connection counts as silent. Longer than any fault and what is
# left to do after it, and than three repetitions of a SYN.
SILENCE_S = 30
# And this is how long a target waits for the next question.
QUESTION_S = 300

TCP_CLOSE = 7  # of the states of TCP_INFO

UP, DOWN = 0, 1  # from the client to the target, and back

Header = collections.namedtuple("Header", "magic number mode up down reset_at pause_ms")
HEADER = struct.Struct("!4sQBQQQI")
MAGIC = b"soak"
QUESTION = struct.Struct("!II")  # how many bytes follow, and how many are to be answered
# ASK: questions, each answered. The others are one stream in either direction: both at the same
# time; the target's after the end of the client's; the client's after the end of the target's.
ASK, BOTH, UP_FIRST, DOWN_FIRST = range(4)
STREAM_MODES = [BOTH, UP_FIRST, DOWN_FIRST]


class Ended(Exception):
    """How a connection ended, if not as it should.

    reset: by the other side; closed: by this side, on purpose; silent: nothing happened for
    SILENCE_S; early: a clean end too early; wrong: other bytes than were sent.
    """

    def __init__(self, outcome, detail=""):
        super().__init__(outcome, detail)
        self.outcome, self.detail = outcome, detail


def block_of(seed):
    """The bytes all streams consist of; long enough for a chunk from anywhere in the block."""
    block = random.Random(f"block {seed}").randbytes(BLOCK_BYTES)
    return block + block[:CHUNK_BYTES]


def chunk_of(number):
    """How much a connection's ends hand to the kernel at once: 4 KiB to 256 KiB."""
    return CHUNK_BYTES >> number % 7


def resets_late(number):
    """Whether an end resets when all it has sent is acknowledged: then all of it must arrive."""
    return number % 2 == 0


class Stream:
    """One direction of a connection: the block over and over, from a place of its own."""

    def __init__(self, block, number, direction):
        self.block, self.view = block, memoryview(block)
        self.start = (2 * number + direction) * 2654435761 % BLOCK_BYTES
        self.position = 0

    def at(self):
        return (self.start + self.position) % BLOCK_BYTES

    def next(self, most):
        """The next bytes to send; `advance` says how many were."""
        at = self.at()
        return self.view[at:at + min(most, CHUNK_BYTES)]

    def advance(self, count):
        self.position += count

    def check(self, data):
        """Takes what has arrived, at most a chunk."""
        at = self.at()
        if not self.block.startswith(data, at):
            first = next(i for i, byte in enumerate(data) if byte != self.block[at + i])
            found = self.block.find(data[first:first + 32])
            here = (found - self.start) % BLOCK_BYTES
            origin = f"is this stream's byte {here}, or another's" if found >= 0 else "is nobody's"
            raise Ended("wrong", f"byte {self.position + first} and on: what came {origin}")
        self.position += len(data)


class Peer:
    """A connected socket, its counters, and the reset that was planned for it."""

    def __init__(self, sock):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.fd = sock, sock.fileno()
        self.number = None  # the connection's, as soon as it is known
        self.port = None  # of the end that connected: forwarder's logs name it
        self.sent = self.received = self.exchanges = 0
        self.reset_at = None  # bytes sent and received after which this side resets
        self.chunk, self.silence_s = CHUNK_BYTES, SILENCE_S
        self.was_reset = False  # the kernel says so once; both directions must know
        self.waited_s = 0.0  # longest time without progress

    def name(self, number, block):
        """It is this connection's: its streams follow."""
        self.number, self.chunk = number, chunk_of(number)
        self.up, self.down = (Stream(block, number, direction) for direction in (UP, DOWN))

    @classmethod
    async def connect(cls, address):
        peer = cls(socket.socket())
        try:
            code = peer.sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                await peer.writable()
                code = peer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise Ended("reset", f"connect: {errno.errorcode[code]}")
            peer.port = peer.sock.getsockname()[1]
        except BaseException:
            peer.sock.close()
            raise
        return peer

    async def readable(self):
        loop = asyncio.get_running_loop()
        await self.wait(loop.add_reader, loop.remove_reader)

    async def writable(self):
        loop = asyncio.get_running_loop()
        await self.wait(loop.add_writer, loop.remove_writer)

    async def wait(self, add, remove):
        ready = asyncio.get_running_loop().create_future()
        add(self.fd, lambda: ready.done() or ready.set_result(None))
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.silence_s):
                await ready
        except TimeoutError:
            raise Ended("silent", f"{self.sent} sent, {self.received} received") from None
        finally:
            remove(self.fd)
        self.waited_s = max(self.waited_s, time.monotonic() - began)

    async def send(self, data):
        """Sends some of it; returns how much."""
        while True:
            try:
                count = self.sock.send(data)
                break
            except BlockingIOError:
                await self.writable()
            except (ConnectionResetError, BrokenPipeError) as error:
                raise self.reset_seen(error) from None
        self.sent += count
        self.keep_plan()
        return count

    async def receive(self, most=CHUNK_BYTES):
        """The next bytes; none at the end."""
        while True:
            try:
                data = self.sock.recv(most)
                break
            except BlockingIOError:
                await self.readable()
            except (ConnectionResetError, BrokenPipeError) as error:
                raise self.reset_seen(error) from None
        if not data and self.was_reset:
            raise Ended("reset")
        self.received += len(data)
        self.keep_plan()
        return data

    def reset_seen(self, error):
        self.was_reset = True
        return Ended("reset", errno.errorcode[error.errno])

    def keep_plan(self):
        if self.reset_at is not None and self.sent + self.received >= self.reset_at:
            raise Ended("closed")

    async def send_all(self, data):
        view = memoryview(data)
        while view:
            view = view[await self.send(view):]

    async def send_stream(self, stream, total):
        while total:
            count = await self.send(stream.next(min(total, self.chunk)))
            stream.advance(count)
            total -= count

    async def receive_stream(self, stream, total):
        while total:
            data = await self.receive(min(total, CHUNK_BYTES))
            if not data:
                raise Ended("early", f"{total} bytes of an exchange missing")
            stream.check(data)
            total -= len(data)

    async def receive_exactly(self, total):
        """So many bytes; fewer at the end."""
        data = b""
        while len(data) < total and (more := await self.receive(total - len(data))):
            data += more
        return data

    def shutdown(self):
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:  # the reset has been told already
            raise self.reset_seen(error) from None

    async def finish(self):
        """Ends this side's stream and waits for the other's end."""
        self.shutdown()
        if await self.receive():
            raise Ended("wrong", "bytes after the last answer")

    async def acknowledged(self):
        """Waits until the other side's kernel has all that was sent."""
        deadline = time.monotonic() + SILENCE_S
        while struct.unpack("i", fcntl.ioctl(self.fd, termios.TIOCOUTQ, bytes(4)))[0]:
            if self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE:
                raise Ended("reset", "before all was acknowledged")
            if time.monotonic() > deadline:
                raise Ended("silent", f"{self.sent} sent, not all acknowledged")
            await asyncio.sleep(0.001)

    async def end(self, work):
        """Does `work`, and closes; returns how it ended, and what there is to say about it."""
        outcome, detail = "complete", ""
        try:
            try:
                await work
            except Ended as ended:
                if ended.outcome == "closed" and self.number and resets_late(self.number):
                    await self.acknowledged()
                raise
        except Ended as ended:
            outcome, detail = ended.outcome, ended.detail
        if outcome != "complete":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        return outcome, detail


async def pump(peer, out, out_bytes, into, into_bytes, receives_first=False, pause_s=0.0):
    """Both directions at one end, each to its end.

    `receives_first`: sends when the other side has ended. `pause_s`: stops reading for so long
    after a third.
    """
    has_received = asyncio.Event()

    async def send():
        if receives_first:
            await has_received.wait()
        try:
            await peer.send_stream(out, out_bytes)
            peer.shutdown()
        except Ended as ended:
            # What came before the reset is still to be read and checked.
            if ended.outcome != "reset":
                raise

    async def receive():
        left, pause_at = into_bytes, into_bytes - into_bytes // 3
        pauses = pause_s > 0
        while True:
            if pauses and left <= pause_at:
                pauses = False
                await asyncio.sleep(pause_s)
            data = await peer.receive()
            if not data:
                break
            into.check(data)
            left -= len(data)
            if left < 0:
                raise Ended("wrong", f"{-left} bytes more than were sent")
        if left:
            raise Ended("early", f"{left} of {into_bytes} bytes missing")
        has_received.set()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            group.create_task(receive())
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    if peer.was_reset:
        raise Ended("reset")
    peer.exchanges += 1
