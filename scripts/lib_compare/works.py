"""The works, whose names are a small language, and the standard set.

bulk-8           8 connections, sent as fast as they go, dropped unread by the server
copied-8         the same, but the server reads the bytes
rr-64Bx16        requests and responses of 64 bytes on 16 connections (B, K and M for the size)
crr-16           connect, 64 bytes there and back, close; 16 at a time
idle-9000        9000 connections that have been answered once and are held
rr-64Bx1+bulk    beside 8 connections with bulk both ways through the same forwarder (or crr)
rr-64Bx1+idle9000   beside 9000 idle connections through the same forwarder (or crr)
bulk-8+busy2     beside 2 programs that use up what they get of the CPUs (any but idle)
"""

import re
from dataclasses import dataclass

BESIDE_BYTES = 1 << 20  # of a message of the bulk beside a work
UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20}
GRAMMAR = re.compile(
    r"(?!idle.*busy)(?:(?P<stream>bulk|copied)-(?P<streams>[1-9]\d*)"
    r"|idle-(?P<held>[1-9]\d*)"
    r"|(?:rr-(?P<size>[1-9]\d*)(?P<unit>[BKM])x(?P<asked>[1-9]\d*)|crr-(?P<opened>[1-9]\d*))"
    r"(?:\+(?P<beside>bulk|idle(?P<idle>[1-9]\d*)))?)"
    r"(?:\+busy(?P<busy>[1-9]\d*))?"
)


@dataclass(frozen=True)
class Work:
    name: str
    kind: str  # bulk, rr, crr or idle
    connections: int
    size: int
    server: tuple  # options of nsplice-load server
    client: tuple  # options of nsplice-load client
    beside: tuple  # the same for a second client, or nothing
    idle: int  # connections of that client, if they are idle
    busy: int  # programs that use the CPUs up meanwhile
    unit: str  # that costs are given for
    figure: str  # the unit of the result
    title: str

    @property
    def sockets(self):
        """Connections through the forwarder at a time."""
        return self.connections + self.idle


def work(name):
    """The work of that name; ValueError if there is none."""
    match = GRAMMAR.fullmatch(name)
    if not match:
        raise ValueError(f"no work {name}; a work is like " + first_words())
    size, server, unit, figure = 64, ("--mode", "rr", "--size", "64"), "10k", "/s"
    if match["stream"]:
        kind, connections, unit, figure = "bulk", int(match["streams"]), "GB", "Gbit/s"
        server = ("--mode", "discard" if match["stream"] == "bulk" else "sink")
        title = "Bulk" if match["stream"] == "bulk" else "Bulk, read by the server"
    elif match["size"]:
        kind, connections = "rr", int(match["asked"])
        size = int(match["size"]) * UNITS[match["unit"]]
        server = ("--mode", "rr", "--size", str(size))
        title = f"{size_name(size)} request/response"
    elif match["opened"]:
        kind, connections, title = "crr", int(match["opened"]), "Connect, 64 B, close"
    else:
        kind, connections, title = "idle", int(match["held"]), "Idle"
        unit, figure = "connection", "B"
    title += f", {connections:,} connection" + ("s" if connections > 1 else "")
    beside = ()
    if match["idle"]:
        beside = ("--work", "idle", "--size", str(size), "--connections", match["idle"])
        title += f" beside {int(match['idle']):,} idle ones"
    elif match["beside"]:
        # An echo serves both: it answers whatever comes.
        server = ("--mode", "echo")
        beside = ("--work", "rr", "--size", str(BESIDE_BYTES), "--connections", "8")
        title += " beside 8 with bulk"
    client = ("--work", kind, "--size", str(size), "--connections", str(connections))
    idle, busy = int(match["idle"] or 0), int(match["busy"] or 0)
    if busy:
        title += f" beside {busy} busy program" + ("s" if busy > 1 else "")
    return Work(
        name, kind, connections, size, server, client, beside, idle, busy, unit, figure, title
    )


def size_name(size):
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size // factor} {unit}"
    return f"{size} B"


def first_words():
    return ", ".join(line.split()[0] for line in __doc__.splitlines()[2:] if line)


# --- The standard set -------------------------------------------------------------------------

MAIN = (
    "bulk-1 bulk-8 copied-8 rr-64Bx1 rr-64Bx64 rr-16Kx16 rr-128Kx16 crr-16 rr-64Bx1+bulk".split()
)
OVERVIEW = "bulk-1 bulk-8 rr-64Bx64 rr-128Kx16 crr-16".split()
IDLE = ["idle-1000", "idle-9000"]
SIZES = [f"rr-{size}x16" for size in "64B 256B 1K 4K 16K 64K 128K 256K 1M".split()]
CONNECTIONS = [f"rr-64Bx{count}" for count in (1, 10, 100, 1000, 5000)] + ["rr-64Bx1+idle9000"]
OPENED = [f"crr-{count}" for count in (1, 16, 64, 256, 1000)]
ON_ONE_CPU = (
    "bulk-1 bulk-8 copied-8 rr-64Bx1 rr-64Bx4 rr-64Bx16 rr-64Bx64 rr-64Bx1000 rr-1Kx16 rr-4Kx16 "
    "rr-16Kx16 rr-64Kx16 rr-128Kx16 rr-256Kx16 rr-1Mx16 crr-1 crr-16 crr-64 crr-256 rr-64Bx1+bulk"
).split()

MAIN_CONTENDERS = (
    "direct reference nsplice nsplice-1 haproxy haproxy-auto nginx socat proxyd pasta "
    "tokio-8k tokio-64k tokio-uring uring-splice epoll-splice"
).split()
# socat has a process for each connection, which takes as long as the measurement.
MANY_CONTENDERS = [name for name in MAIN_CONTENDERS if name != "socat"]


def standard():
    """Works and who does each, in order."""
    plan = {name: list(MAIN_CONTENDERS) for name in MAIN}
    plan["rr-64Bx1"].append("nsplice-poll")
    for name in IDLE:
        plan[name] = [other for other in MAIN_CONTENDERS if other != "direct"]
    for name in SIZES:
        plan.setdefault(name, list(MAIN_CONTENDERS))
        plan[name] += ["nsplice-copy", "nsplice-splice"]
    for name in CONNECTIONS + OPENED:
        plan.setdefault(name, list(MANY_CONTENDERS))
    return plan


def on_one_cpu():
    """The same where all share a CPU. One worker is what nsplice has there by itself."""
    plan = {name: [other for other in MANY_CONTENDERS if other != "nsplice-1"]
            for name in ON_ONE_CPU}
    for name in set(SIZES).intersection(plan):
        plan[name] += ["nsplice-copy", "nsplice-splice"]
    return plan
