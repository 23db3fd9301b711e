"""What became of each connection: what its client wrote down, held against what its target did."""

import collections
import json

from . import wire

Client = collections.namedtuple(
    "Client", "number port kind plan outcome sent received exchanges waited_s began ended detail")
Served = collections.namedtuple(
    "Served", "number port outcome sent received began ended waited_s detail")

# So long after the target listens again a client may still hear that it was refused.
REFUSAL_LATE_S = 10


class Kind:
    """A row of the table."""

    FIELDS = ("connections", "exchanges", "sent", "checked", "as_planned", "by_fault", "failures")

    def __init__(self):
        for name in self.FIELDS:
            setattr(self, name, 0)
        self.waited_s = 0.0

    def row(self):
        return {name: getattr(self, name) for name in (*self.FIELDS, "waited_s")}


class File:
    """The records of one program, as far as they are written."""

    def __init__(self, path, record):
        self.path, self.record, self.rest = path, record, ""
        self.file = None

    def read(self):
        if self.file is None:
            try:
                self.file = open(self.path)
            except FileNotFoundError:
                return
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        for line in lines:
            yield self.record(*json.loads(line))


class Ledger:
    """`faults` has what was done to the forwarder and the target, in its order."""

    def __init__(self, faults):
        self.faults = faults
        self.files = []
        self.clients, self.served = {}, {}  # those whose other end is not known yet
        self.kinds = collections.defaultdict(Kind)
        self.failures = []
        self.nameless = 0  # target's connections that were reset before their header came
        self.sums = collections.Counter()

    def add(self, path, record):
        self.files.append(File(path, record))

    def read(self):
        for file in self.files:
            for record in file.read():
                if file.record is Client:
                    self.clients[record.number] = record
                elif record.number is None:
                    self.take_nameless(record)
                    continue
                else:
                    self.served[record.number] = record
                if record.number in self.clients and record.number in self.served:
                    number = record.number
                    self.settle(self.clients.pop(number), self.served.pop(number))

    def finish(self):
        """All programs have ended: what has no other end by now has none."""
        self.read()
        for client in self.clients.values():
            self.settle(client, None)
        for served in self.served.values():
            self.fail("no client knows of it, but the target does", served)
        self.clients, self.served = {}, {}

    def take_nameless(self, record):
        self.sums["target_received"] += record.received
        self.nameless += 1
        if record.outcome != "reset":
            self.fail(f"a connection without a header: {record.outcome} {record.detail}", record)

    def settle(self, client, served):
        kind = self.kinds[client.kind]
        kind.connections += 1
        kind.exchanges += client.exchanges
        kind.sent += client.sent + (served.sent if served else 0)
        kind.checked += client.received + (served.received if served else 0)
        kind.waited_s = max(kind.waited_s, client.waited_s)
        self.sums["client_sent"] += client.sent
        self.sums["client_received"] += client.received
        if served:
            self.sums["target_sent"] += served.sent
            self.sums["target_received"] += served.received
        why = self.fault_in(client, served)
        if why is None:
            if client.plan is not None:
                kind.as_planned += 1
        elif fault := self.excuse(client, served):
            kind.by_fault += 1
            fault.ended += 1
        else:
            kind.failures += 1
            self.fail(why, client, served)

    @staticmethod
    def fault_in(client, served):
        """What is wrong with a connection, if anything is."""
        if served and (served.received > client.sent or client.received > served.sent):
            return "more arrived than was sent"
        if client.plan is None:
            if client.outcome != "complete":
                return f"client: {client.outcome}"
            if served is None:
                return "the target knows nothing of it"
            if served.outcome != "complete":
                return f"target: {served.outcome}"
            if (client.sent, client.received) != (served.received, served.sent):
                return "not all arrived"
            return None
        # The end that resets on purpose is closed; the other may have been done already.
        ends = {"client": client, "target": served}
        by = ends.pop(client.plan)
        other = ends.popitem()[1]
        if by is None or by.outcome != "closed":
            return f"{client.plan}: {by.outcome if by else 'knows nothing of it'}, not closed"
        if other and other.outcome not in ("reset", "complete"):
            return f"the other end of a reset: {other.outcome}"
        if other and wire.resets_late(client.number) and other.received != by.sent:
            return "not all arrived that was sent before a reset"
        return None

    def excuse(self, client, served):
        """The fault that had to end it: the target refused it, and never heard of it."""
        if client.outcome != "reset" or client.received or served:
            return None
        for fault in self.faults:
            late = client.ended - fault.until_s
            if fault.refuses and client.began <= fault.until_s and client.ended >= fault.since_s:
                return fault if late <= REFUSAL_LATE_S else None
        return None

    def fail(self, why, *ends):
        last = max(end.ended for end in ends if end)
        silence_s = wire.SILENCE_S if any(end and end.outcome == "silent" for end in ends) else 0
        before = [fault for fault in self.faults if fault.since_s <= last - silence_s]
        fault = before[-1] if before else None
        if fault:
            fault.failures += 1
        self.failures.append({
            "why": why, "during_or_after": fault.describe() if fault else "no fault yet",
            "ends": [end._asdict() for end in ends if end],
        })
