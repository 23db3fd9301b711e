"""The course of a run: warm-up, baseline, load with faults, rest, and what is left of it."""

import contextlib
import copy
import datetime
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time

from lib_compare import machine, programs
from lib_compare.netns import Netns, read
from lib_compare.programs import Failed

from . import forwarder
from .faults import CONGESTION, LONGEST_S, SPARE_MOST, Faults, Name
from .forwarder import LISTEN_PORT, TARGET_PORT, Forwarder
from .ledger import Client, Ledger, Served
from .wire import SILENCE_S

SCRIPTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What each program of clients does: coroutines of a kind, `storm` connections a second.
LOADS = [
    {"bulk": 4, "slow": 6, "reset": 4},
    {"messages": 12, "storm": 300, "idle": 2000},
]
WARM_UP_S = 3
TICK_S = 0.25
ORDER_S = 30
# All that is under way when the load is to stop: the largest streams, to readers that wait, while
# everything else ends, too.
FINISH_S = 90
BASELINE_S = 30
REST_S = 1.0
# The limits that docs/soak.md explains.
REST_CPU_MOST = 0.1
GROWTH_BYTES = 1 << 20
GROWTH_EACH_BYTES = 1 << 10
EPOLL_BUFFERS_EACH_BYTES = 40 << 10
LIMITS = {
    "silence_s": SILENCE_S, "spare": SPARE_MOST, "rest_cpu": REST_CPU_MOST,
    "pipes": forwarder.POOLED_PIPES, "growth": GROWTH_BYTES >> 20,
    "growth_each": GROWTH_EACH_BYTES >> 10,
}
# More would say the same.
FAILURES_KEPT = 1000
SETTINGS = ("seconds", "seed", "handoff", "engine", "build")

# What it may log, each a trace of a fault.
EXPECTED_LINES = re.compile(
    "the name was deleted; waiting for it$|new connections are in the new namespace now$"
    "|cannot connect: ECONN(REFUSED|RESET)|(cannot accept|clients wait|cannot take connections): "
    "EMFILE|(cannot (connect|accept|take connections)|clients wait): [0-9]+ more times$"
)


class Soak:
    """A run. `failures` has what went wrong apart from single connections."""

    def __init__(self, options, program):
        self.options, self.program = options, program
        self.failures = []
        self.faults = Faults(self, random.Random(f"faults {options.seed}"))
        self.ledger = Ledger(self.faults.done)
        self.targets_netns = []
        self.clients, self.connections, self.ranks = [], 0, 0
        self.workers = len(os.sched_getaffinity(0))
        self.peak = {"connections": 0, "memory_bytes": {"listener": 0, "connector": 0}}
        self.held_up_s = 0.0  # longest time that a sleep here took longer than it should
        self.figures = {}

    def run(self):
        """Returns all that is known at the end."""
        with contextlib.ExitStack() as stack:
            stack.callback(programs.stop_all)
            try:
                self.set_up(stack)
                self.serve()
            except Failed as failure:
                self.failures.append(str(failure))
                self.ledger.read()
        return self.document()

    def set_up(self, stack):
        self.directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="nsplice-soak-"))
        self.clients_netns = Netns(CONGESTION)
        stack.callback(self.clients_netns.close)
        self.targets_netns.append(Netns(CONGESTION))
        stack.callback(lambda: [netns.close() for netns in self.targets_netns])
        self.name = Name(self.directory)
        self.name.set(self.targets_netns[0])
        stack.callback(self.name.delete)
        records = os.path.join(self.directory, "target")
        self.ledger.add(records, Served)
        self.target = self.start("target", [str(self.options.seed), str(TARGET_PORT), records])
        stack.callback(programs.stop, self.target)
        self.order({"listen": self.targets_netns[0].path})
        paths = self.clients_netns.path, self.name.path
        self.forwarder = Forwarder(self.program, self.options, *paths, self.directory)
        stack.callback(programs.stop, self.forwarder.child)

    def start(self, module, arguments):
        command = [sys.executable, "-B", "-m", f"lib_soak.{module}", *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return programs.start(command, cwd=SCRIPTS, **pipes)

    def order(self, order, seconds=ORDER_S):
        """Has the target do something."""
        self.target.stdin.write(json.dumps(order).encode() + b"\n")
        return programs.read_line(self.target, "the target", seconds)

    def tick(self):
        """Looks at everything: what has ended, and what is as large as never before."""
        self.forwarder.check()
        for child in (self.target, *self.clients):
            if child.poll() is not None:
                raise Failed(f"a program of the load ended with status {child.returncode}")
        self.ledger.read()
        footprint = self.forwarder.footprint()
        sockets = footprint["connector"]["fds"].get("socket", 0) // 2
        self.peak["connections"] = max(self.peak["connections"], sockets)
        for name, peak in self.peak["memory_bytes"].items():
            self.peak["memory_bytes"][name] = max(peak, footprint[name]["memory_bytes"])
        return footprint

    def wait(self, seconds):
        """Lets time pass, and looks."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            slept_s = time.monotonic()
            time.sleep(min(left, TICK_S))
            slept_s = time.monotonic() - slept_s
            self.held_up_s = max(self.held_up_s, slept_s - min(left, TICK_S))
            self.tick()

    def serve(self):
        self.unused = self.forwarder.footprint()
        self.start_clients("warm-up")
        self.wait(WARM_UP_S)
        # Afterwards all are served at once, which takes as many buffers as it ever does.
        self.faults.stop("connector", LONGEST_S)
        self.wait(1)
        self.stop_clients()
        warm_peak = self.peak["connections"]
        before = self.figures["before"] = self.at_rest(self.unused)
        cpu_s, machine_s = self.forwarder.cpu(), programs.machine_seconds()[0]
        began = time.monotonic()
        self.start_clients("load")
        self.faults.run(began + self.options.seconds)
        self.stop_clients()
        self.figures["seconds"] = time.monotonic() - began
        self.figures["cpu_s"] = self.forwarder.cpu() - cpu_s
        self.figures["machine_s"] = programs.machine_seconds()[0] - machine_s
        self.order({"finish": True}, FINISH_S)
        self.ledger.finish()
        after = self.figures["after"] = self.at_rest(before)
        self.check_machine()
        self.check_log()
        summary = self.figures["summary"] = self.forwarder.end()
        self.check_summary(summary)
        self.check_growth(before, after, warm_peak, summary["engine"])

    def start_clients(self, phase):
        for loads in LOADS:
            rank = self.ranks = self.ranks + 1
            records = os.path.join(self.directory, f"clients-{rank}")
            self.ledger.add(records, Client)
            settings = {"seed": f"{self.options.seed} {phase}", "block": self.options.seed,
                        "rank": rank, "port": LISTEN_PORT, "records": records, "loads": loads}
            with self.clients_netns.entered():
                self.clients.append(self.start("clients", [json.dumps(settings)]))

    def stop_clients(self):
        """Ends the load, but for the idle connections, which cost nothing; then those."""
        held = sum(answer["held"] for answer in self.tell_clients("quiet"))
        self.at_rest(self.unused, held)
        cpu_s = self.forwarder.cpu()
        self.wait(REST_S)
        share = self.figures["cpu_at_rest"] = (self.forwarder.cpu() - cpu_s) / REST_S
        if share > REST_CPU_MOST:
            self.failures.append(f"with {held} idle connections it takes {share:.2f} of a CPU")
        self.connections += sum(answer["connections"] for answer in self.tell_clients("stop"))
        for child in self.clients:
            programs.stop(child)
        self.clients = []

    def tell_clients(self, order):
        for child in self.clients:
            child.stdin.write(order.encode() + b"\n")
        deadline = time.monotonic() + FINISH_S
        return [
            programs.read_line(child, f"clients, told {order}", deadline - time.monotonic(),
                               self.tick)
            for child in self.clients
        ]

    def at_rest(self, before, held=0):
        """The footprint when nothing is left of connections but two sockets for each one held."""
        reference = copy.deepcopy(before)
        reference["connector"]["fds"]["socket"] += 2 * held
        deadline = time.monotonic() + BASELINE_S
        while True:
            now = self.tick()
            if forwarder.is_as_before(now, reference, self.unused, self.workers):
                return now
            if time.monotonic() > deadline:
                self.failures.append(f"something is left: {now}, was {reference}")
                return now
            time.sleep(TICK_S)

    def check_growth(self, before, after, warm_peak, engine):
        peak = self.peak["connections"]
        allowed = GROWTH_BYTES + GROWTH_EACH_BYTES * max(0, peak - warm_peak)
        if engine == "epoll":
            allowed += EPOLL_BUFFERS_EACH_BYTES * peak
        for name, process in after.items():
            growth = process["memory_bytes"] - before[name]["memory_bytes"]
            if growth > allowed:
                self.failures.append(f"the {name} grew by {growth} bytes, more than {allowed}")

    def check_machine(self):
        """The kernel's memory for TCP is all programs' of the machine: one that takes it all has
        connections reset, of whomever."""
        netns = [self.clients_netns, *self.targets_netns]
        count = self.figures["out_of_tcp_memory"] = sum(map(resets_for_memory, netns))
        if count:
            self.failures.append(
                f"the machine was out of memory for TCP, and its kernel reset {count} connections, "
                "which is not nsplice's doing: see net.ipv4.tcp_mem, and what else runs")

    def check_log(self):
        for line in self.forwarder.log().splitlines():
            if not EXPECTED_LINES.search(line):
                self.failures.append(f"nsplice said: {line}")

    def document(self):
        """All that is known, for report and as JSON."""
        options = self.options
        return {
            "date": datetime.date.today().isoformat(),
            "commit": machine.commit(),
            "machine": machine.facts(),
            "command": f"scripts/soak --seconds {options.seconds:g} --seed {options.seed} "
                       f"--handoff {options.handoff} --engine {options.engine} "
                       f"--build {options.build}",
            "settings": {name: getattr(options, name) for name in SETTINGS},
            "loads": {kind: row.row() for kind, row in self.ledger.kinds.items()},
            "faults": [fault.row() for fault in self.faults.done],
            "peak": self.peak,
            "held_up_s": self.held_up_s,
            "figures": self.figures,
            "failures": self.failures,
            "failed_connections": self.ledger.failures[:FAILURES_KEPT],
        }

    def check_summary(self, summary):
        """The forwarder's counters against those of the two ends."""
        kinds, sums = self.ledger.kinds.values(), self.ledger.sums
        resets = sum(kind.as_planned + kind.by_fault for kind in kinds)
        served = sum(kind.connections - kind.failures for kind in kinds) - resets
        between = {
            "connections": (self.connections, self.connections),
            # A side that resets may have had all by then, and the forwarder both ends.
            "completed": (served, served + resets),
            "stopped": (0, 0),
            # What is in a socket when it is reset has been sent, but does not arrive.
            "bytes_to_target": (sums["target_received"], sums["client_sent"]),
            "bytes_to_client": (sums["client_received"], sums["target_sent"]),
        }
        self.figures["counted"] = between
        for name, (least, most) in between.items():
            if not least <= summary[name] <= most:
                self.failures.append(f"summary: {name} is {summary[name]}, not {least} to {most}")
        if summary["completed"] + summary["failed"] != summary["connections"]:
            self.failures.append("summary: completed and failed are not all connections")


def resets_for_memory(netns):
    with netns.entered():
        names, values = read("/proc/thread-self/net/netstat").splitlines()[:2]
    return int(dict(zip(names.split(), values.split()))["TCPAbortOnMemory"])
