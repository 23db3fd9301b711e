"""A program that loads the forwarder with some kinds of work; see LOADS.

Its orders are lines on standard input: `quiet` ends all but the idle connections, is answered when
that is done, and `stop` ends those, too. It also ends with its standard input.
"""

import asyncio
import json
import random
import sys
import time

from . import wire
from .wire import Ended, Header, Peer

LARGEST_BYTES = 20_000_000
# Slow readers are to fill all there is between them and the sender: two sockets, and a pipe.
SLOW_LEAST_BYTES = 8_000_000
STORM_AT_A_TIME = 1000
IDLE_OPENED_PER_S = 500


def size(rng, least=1, most=LARGEST_BYTES):
    """As often between 1 and 2 as between 1 million and 2 million."""
    return min(most, int(least * (most / least) ** rng.random() + 0.5))


class Clients:
    def __init__(self, settings):
        self.seed, self.rank = settings["seed"], settings["rank"]
        self.block = wire.block_of(settings["block"])
        self.address = ("127.0.0.1", settings["port"])
        self.count = self.held = 0
        self.quiet, self.stop = asyncio.Event(), asyncio.Event()
        self.records = open(settings["records"], "w", buffering=1)
        self.loads = settings["loads"]

    async def run(self):
        orders = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        active, idle = [], []
        for kind, amount in self.loads.items():
            work = getattr(self, kind)
            tasks = idle if kind == "idle" else active
            # Each has its own numbers, so that they do not depend on who comes first.
            tasks += [asyncio.create_task(work(amount, index, self.random(kind, index)))
                      for index in range(1 if kind == "storm" else amount)]
        await orders.readline()
        self.quiet.set()
        for task in active:
            await task
        while self.held < len(idle):
            await asyncio.sleep(0.01)
        print(json.dumps({"held": self.held}), flush=True)
        await orders.readline()
        self.stop.set()
        for task in idle:
            await task
        print(json.dumps({"connections": self.count}), flush=True)
        await orders.read()

    def random(self, kind, index):
        return random.Random(f"{self.seed} {self.rank} {kind} {index}")

    async def connection(
        self, kind, work, mode=wire.ASK, up=0, down=0, plan=None, reset_at=0, pause_ms=0
    ):
        """Does `work` with a new connection, and writes down how it ended."""
        number = self.rank << 40 | self.count
        self.count += 1
        began = time.monotonic()

        async def all_of_it(peer):
            peer.name(number, self.block)
            targets_plan = reset_at if plan == "target" else 0
            header = Header(wire.MAGIC, number, mode, up, down, targets_plan, pause_ms)
            await peer.send_all(wire.HEADER.pack(*header))
            peer.reset_at = reset_at if plan == "client" else None
            await work(peer)

        counts, port = (0,) * 4, None
        try:
            peer = await Peer.connect(self.address)
            port = peer.port
            outcome, detail = await peer.end(all_of_it(peer))
            counts = (peer.sent, peer.received, peer.exchanges, peer.waited_s)
        except Ended as ended:
            outcome, detail = ended.outcome, ended.detail
        record = [number, port, kind, plan, outcome, *counts, began, time.monotonic(), detail]
        self.records.write(json.dumps(record) + "\n")

    async def streams(self, kind, mode, up, down, pause_s=0, **plan):
        """A connection with one stream each way."""
        async def work(peer):
            receives_first = mode == wire.DOWN_FIRST
            await wire.pump(peer, peer.up, up, peer.down, down, receives_first, pause_s)

        await self.connection(kind, work, mode, up, down, **plan)

    async def ask(self, peer, asked, answered):
        await peer.send_all(wire.QUESTION.pack(asked, answered))
        await peer.send_stream(peer.up, asked)
        await peer.receive_stream(peer.down, answered)
        peer.exchanges += 1

    @staticmethod
    async def until(event, seconds):
        """Waits for an event or so long; returns whether it was the event."""
        try:
            await asyncio.wait_for(event.wait(), seconds)
            return True
        except TimeoutError:
            return False

    # The kinds of load, each until it is to be quiet.

    async def bulk(self, _amount, _index, rng):
        while not self.quiet.is_set():
            up, down = size(rng), size(rng)
            up, down = rng.choice([(up, down), (up, down), (up, 0), (0, down)])
            await self.streams("bulk", rng.choice(wire.STREAM_MODES), up, down)
            await self.until(self.quiet, rng.uniform(0, 0.04))

    async def slow(self, _amount, _index, rng):
        while not self.quiet.is_set():
            pause_s = rng.uniform(0.5, 4)
            up, down = (size(rng, SLOW_LEAST_BYTES) for _ in range(2))
            slow = rng.choice(["client", "target", "both"])
            pause_ms = 0 if slow == "client" else int(pause_s * 1000)
            own_pause_s = 0 if slow == "target" else pause_s
            await self.streams("slow", wire.BOTH, up, down, own_pause_s, pause_ms=pause_ms)
            await self.until(self.quiet, rng.uniform(0, 0.2))

    async def reset(self, _amount, _index, rng):
        while not self.quiet.is_set():
            up, down = size(rng), size(rng)
            mode, plan = rng.choice(wire.STREAM_MODES), rng.choice(["client", "target"])
            at = wire.HEADER.size + rng.randint(1, up + down)
            await self.streams("reset", mode, up, down, plan=plan, reset_at=at)
            await self.until(self.quiet, rng.uniform(0, 0.1))

    async def messages(self, _amount, _index, rng):
        async def work(peer):
            ends = time.monotonic() + rng.uniform(1, 60)
            while not self.quiet.is_set() and time.monotonic() < ends:
                most = rng.choice([64, 4000, 200_000])
                await self.ask(peer, size(rng, 1, most), size(rng, 1, most))
                await asyncio.sleep(rng.uniform(0, 0.05))
            await peer.finish()

        while not self.quiet.is_set():
            await self.connection("messages", work)
            await self.until(self.quiet, rng.uniform(0, 0.1))

    async def storm(self, amount, _index, rng):
        """`amount` connections a second, in bursts."""
        active = set()
        while not self.quiet.is_set():
            burst = rng.randint(1, amount // 5)
            for _ in range(min(burst, STORM_AT_A_TIME - len(active))):
                task = asyncio.create_task(self.short(size(rng, 1, 2000), size(rng, 1, 2000)))
                active.add(task)
                task.add_done_callback(active.discard)
            await self.until(self.quiet, burst / amount)
        if active:
            await asyncio.wait(active)

    async def short(self, asked, answered):
        async def work(peer):
            await self.ask(peer, asked, answered)
            await peer.finish()

        await self.connection("storm", work)

    async def idle(self, _amount, index, rng):
        async def work(peer):
            ends = time.monotonic() + rng.uniform(30, 300)
            # Large at first: nothing that this takes may be kept while it is idle.
            await self.ask(peer, size(rng, 64, 100_000), size(rng, 64, 100_000))
            self.held += 1
            try:
                while not self.stop.is_set():
                    await self.until(self.stop, rng.uniform(2, 30))
                    if self.quiet.is_set() and not self.stop.is_set():
                        continue
                    await self.ask(peer, 64, 64)
                    if time.monotonic() > ends:
                        break
            finally:
                self.held -= 1
            await peer.finish()

        await self.until(self.quiet, index / IDLE_OPENED_PER_S)
        while not self.stop.is_set():
            await self.connection("idle", work)
            await self.until(self.quiet, rng.uniform(0, 0.1))


if __name__ == "__main__":
    asyncio.run(Clients(json.loads(sys.argv[1])).run())
