"""One measurement: a server, a forwarder, a client, and what they used meanwhile."""

import contextlib
import os
import subprocess
import sys

from . import contenders, programs, works
from .netns import Netns
from .programs import Failed

OPENING_S = 65  # longest time to open all connections; nsplice-load gives up a little earlier


class Usage:
    """CPU time so far: forwarder, server, the machine, and what its host took."""

    def __init__(self, forwarder, server):
        pids = {"cpu": forwarder, "server_cpu": server}
        self.seconds = {
            name: programs.cpu_seconds(child.pid) for name, child in pids.items() if child
        }
        self.seconds["busy"], self.seconds["steal"] = programs.machine_seconds()

    def since(self, earlier):
        return {name: value - earlier.seconds[name] for name, value in self.seconds.items()}


class Bench:
    def __init__(self, options):
        self.load = options.load
        self.seconds, self.warmup = options.seconds, options.warmup
        self.congestion = options.congestion
        first, last = (("--cpu", str(cpu)) for cpu in (0, os.cpu_count() - 1))
        self.client_cpu, self.server_cpu = (first, last) if options.pin else ((), ())

    def measure(self, contender, work):
        """A round's record; {"cannot": why} if the contender cannot do the work."""
        why_not = contender.why_not(work.sockets)
        if why_not:
            return {"cannot": why_not}
        try:
            with contextlib.ExitStack() as stack:
                # Fresh, so that no port, no TIME_WAIT and no closing ring is left of the last one.
                listen_netns, connect_netns = Netns(self.congestion), Netns(self.congestion)
                stack.callback(listen_netns.close)
                stack.callback(connect_netns.close)
                place = stack.enter_context(contenders.place(listen_netns, connect_netns))
                return self.measure_at(place, contender, work, stack)
        except Failed as failure:
            return {"cannot": str(failure)}

    def measure_at(self, place, contender, work, stack):
        server = self.start_server(place.connect_netns, work.server)
        stack.callback(programs.stop, server)
        forwarder, netns, port = None, place.connect_netns, contenders.SERVER_PORT
        if contender.launch:
            forwarder = contender.start(place)
            stack.callback(programs.stop, forwarder)
            netns, port = place.listen_netns, contenders.LISTEN_PORT

        def check():
            if forwarder and forwarder.poll() is not None:
                status = forwarder.returncode
                raise Failed(f"{contender.name} ended with status {status}: {place.log_text()}")

        def begin(options, seconds, warmup):
            client = self.start_client(netns, port, options, seconds, warmup)
            stack.callback(programs.stop, client)
            try:
                programs.read_line(client, "connections", OPENING_S + warmup, check)
            except Failed:
                check()  # its end says more than what the client saw of it
                raise
            return client

        if work.kind == "idle":
            return self.measure_idle(begin, forwarder, work, check)
        beside = None
        if work.beside:
            # It outlasts whatever the client may take, and is ended with the round.
            beside = begin(work.beside, self.warmup + self.seconds + 2 * OPENING_S, 0.2)
        busy = [
            programs.start([sys.executable, "-c", "while True: pass"]) for _ in range(work.busy)
        ]
        for program in busy:
            stack.callback(programs.stop, program)
        client = begin(work.client, self.seconds, self.warmup)
        before = Usage(forwarder, server)
        beside_before = beside and so_far(beside, check)
        report = self.report(client, check)
        usage = Usage(forwarder, server).since(before)
        if any(program.poll() is not None for program in busy):
            raise Failed("a busy program beside ended before the client")
        result = record(work, report, usage)
        if beside:
            result |= beside_record(work, beside_before, so_far(beside, check), result["errors"])
        return result

    def measure_idle(self, begin, forwarder, work, check):
        """What holding connections takes, beyond what the first one made the forwarder take."""
        one = begin((*work.client[:-1], "1"), 0.1, 0)
        self.report(one, check)
        programs.stop(one)
        before = programs.memory(forwarder.pid)
        client = begin(work.client, self.seconds, 0)
        after = programs.memory(forwarder.pid)
        cpu = programs.cpu_seconds(forwarder.pid)
        report = self.report(client, check)
        if report["held"] != work.connections or report["errors"]:
            raise Failed(f"holds {report['held']} of {work.connections} connections")
        each = {name: (after[name] - before[name]) / work.connections for name in after}
        cpu = programs.cpu_seconds(forwarder.pid) - cpu
        share = cpu / report["seconds"]
        return rounded({"figure": each["anon_bytes"], **each, "cpu_share": share, "errors": 0})

    def report(self, client, check):
        return programs.read_line(client, "client", self.seconds + programs.START_S, check)

    def start_server(self, netns, options):
        command = [self.load, "server", "--netns", netns.path, *options, *self.server_cpu]
        command += ["--listen", f"127.0.0.1:{contenders.SERVER_PORT}"]
        server = programs.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            programs.read_line(server, "the load server", programs.START_S)
        except Failed as failure:
            raise SystemExit(f"compare: {failure}") from failure
        return server

    def start_client(self, netns, port, options, seconds, warmup):
        command = [self.load, "client", "--netns", netns.path, *options, *self.client_cpu]
        command += ["--connect", f"127.0.0.1:{port}"]
        command += ["--seconds", str(seconds), "--warmup", str(warmup), "--progress"]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # Its connections stay open until its standard input ends: closing them is not measured.
        return programs.start(command, stdin=subprocess.PIPE, **pipe)


def so_far(beside, check):
    """What the client beside the measured one has done until now; Failed if it is at its end."""
    try:
        beside.stdin.write(b"\n")
    except BrokenPipeError:
        pass  # what it left behind says why
    report = programs.read_line(beside, "the client beside", programs.START_S, check)
    if not report.get("so_far"):
        raise Failed("the client beside ended before the one that was measured")
    return report


def beside_record(work, before, after, errors):
    """What went on beside the measured time, and the errors of both."""
    result = {"errors": errors + after["errors"]}
    if work.idle:
        if after["held"] != work.idle:
            raise Failed(f"holds {after['held']} of {work.idle} connections beside")
        return rounded(result)
    seconds = after["seconds"] - before["seconds"]
    # Each operation moves a message there and back.
    moved = (after["operations"] - before["operations"]) * 2 * works.BESIDE_BYTES
    return rounded({"beside": moved * 8 / 1e9 / seconds, **result})


def record(work, report, usage):
    """The figures of a round; costs are seconds for each GB or each 10,000 operations."""
    bulk = work.kind == "bulk"
    units = report["bytes"] / 1e9 if bulk else report["operations"] / 1e4
    if not units:
        raise Failed("nothing went through while it was measured")
    result = {"figure": report["gbit_per_second"] if bulk else report["per_second"]}
    for name in ("p50_us", "p99_us", "p999_us"):
        if name in report:
            result[name] = report[name]
    steal = usage.pop("steal")
    usage["client_cpu"] = report["client_cpu_seconds"]
    result |= {name: seconds / units for name, seconds in usage.items()}
    result |= {"steal": steal / report["seconds"], "errors": report["errors"]}
    return rounded(result)


def rounded(figures):
    """Five digits are more than any of them is good for."""
    return {name: float(f"{value:.5g}") for name, value in figures.items()}
