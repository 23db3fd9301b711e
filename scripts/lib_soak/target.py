"""The program that connections are forwarded to. Its orders are lines of JSON on standard input.

{"listen": PATH}: listen in this namespace, too; {"close": PATH}: no longer there; {"finish": true}:
answer when no connection is left. It ends with its standard input.
"""

import asyncio
import json
import os
import sys
import time

from lib_compare.netns import Netns

from . import wire
from .wire import Ended, Header, Peer

FINISH_S = 60


class Named(Netns):
    """A network namespace that somebody else made."""

    def __init__(self, path):
        self.fd, self.path = os.open(path, os.O_RDONLY), path


class Target:
    def __init__(self, seed, port, records):
        self.block, self.port = wire.block_of(seed), port
        self.records = open(records, "w", buffering=1)
        self.listeners = {}
        self.connections = set()

    async def serve(self):
        orders = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        while line := await orders.readline():
            order, value = json.loads(line).popitem()
            await getattr(self, order)(value)
            print(json.dumps({order: value}), flush=True)

    async def listen(self, path):
        namespace = Named(path)
        listener = self.listeners[path] = namespace.listen(self.port)
        namespace.close()
        listener.setblocking(False)
        asyncio.get_running_loop().add_reader(listener, self.accept, listener)

    async def close(self, path):
        listener = self.listeners.pop(path)
        asyncio.get_running_loop().remove_reader(listener)
        listener.close()

    async def finish(self, _):
        if self.connections:
            await asyncio.wait(self.connections, timeout=FINISH_S)

    def accept(self, listener):
        try:
            for _ in range(64):
                sock, (_, port) = listener.accept()
                peer = Peer(sock)
                peer.port = port
                task = asyncio.create_task(self.connection(peer))
                self.connections.add(task)
                task.add_done_callback(self.connections.discard)
        except BlockingIOError:
            pass

    async def connection(self, peer):
        began = time.monotonic()
        outcome, detail = await peer.end(self.work(peer))
        record = [peer.number, peer.port, outcome, peer.sent, peer.received, began,
                  time.monotonic(), peer.waited_s, detail]
        self.records.write(json.dumps(record) + "\n")

    async def work(self, peer):
        data = await peer.receive_exactly(wire.HEADER.size)
        if len(data) < wire.HEADER.size:
            raise Ended("early", f"{len(data)} bytes of a header")
        header = Header(*wire.HEADER.unpack(data))
        if header.magic != wire.MAGIC:
            raise Ended("wrong", f"no header: {data.hex()}")
        peer.name(header.number, self.block)
        if header.mode == wire.ASK:
            return await self.answer(peer)
        peer.reset_at = header.reset_at or None
        await wire.pump(peer, peer.down, header.down, peer.up, header.up,
                        header.mode == wire.UP_FIRST, header.pause_ms / 1000)

    async def answer(self, peer):
        peer.silence_s = wire.QUESTION_S
        while question := await peer.receive_exactly(wire.QUESTION.size):
            if len(question) < wire.QUESTION.size:
                raise Ended("early", "in a question")
            asked, answered = wire.QUESTION.unpack(question)
            await peer.receive_stream(peer.up, asked)
            await peer.send_stream(peer.down, answered)
        peer.shutdown()


if __name__ == "__main__":
    asyncio.run(Target(sys.argv[1], int(sys.argv[2]), sys.argv[3]).serve())
