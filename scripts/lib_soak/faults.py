"""What is done to the forwarder and the target while connections are served."""

import ctypes
import os
import signal
import time

from lib_compare.netns import Netns, call, libc
from lib_compare.programs import Failed

CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20000, 0x1000, 0x4000, 0x40000, 2
# Always allowed in a namespace, and not paced as BBR is.
CONGESTION = "reno"
LONGEST_S = 2.0
# Descriptors left to a process that runs out of them.
SPARE_MOST = 16
FOLLOWED = "new connections are in the new namespace now"
FOLLOW_S = 10


class Name:
    """A name of a namespace, as `ip netns` makes them: a file that it is mounted on.

    The mounts are seen by this process and those it starts, and go with them.
    """

    def __init__(self, directory):
        call("unshare", CLONE_NEWNS)
        call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
        self.path = os.path.join(directory, "targets")

    def set(self, netns):
        with open(self.path, "w"):
            pass
        call("mount", netns.path.encode(), self.path.encode(), None, ctypes.c_ulong(MS_BIND), None)

    def delete(self):
        call("umount2", self.path.encode(), MNT_DETACH)
        os.unlink(self.path)


class Fault:
    """One time that one kind of fault was there."""

    def __init__(self, kind, refuses=False):
        self.kind, self.refuses = kind, refuses
        self.since_s = time.monotonic()
        self.until_s = float("inf")
        self.ended = self.failures = 0

    def row(self):
        lasted = self.until_s - self.since_s
        return {"kind": self.kind, "since_s": self.since_s, "seconds": lasted, "ended": self.ended,
                "failures": self.failures}

    def describe(self):
        return f"{self.kind}, begun at {self.since_s:.1f}"


class Faults:
    """One kind after another, each for some time, at times that follow from the seed."""

    KINDS = [
        "connector out of descriptors", "listener out of descriptors", "connector stopped",
        "listener stopped", "target restarted", "namespace replaced",
    ]

    def __init__(self, soak, rng):
        self.soak, self.rng = soak, rng
        self.done = []

    def run(self, ends):
        """Round after round until `ends`."""
        while time.monotonic() < ends:
            for kind in self.rng.sample(self.KINDS, len(self.KINDS)):
                pause_s, lasts_s = self.rng.uniform(0.3, 1.5), self.rng.uniform(0.2, LONGEST_S)
                if time.monotonic() + pause_s + lasts_s > ends:
                    return self.soak.wait(max(0, ends - time.monotonic()))
                self.soak.wait(pause_s)
                self.inject(kind, lasts_s)

    def inject(self, kind, lasts_s):
        fault = Fault(kind, refuses=kind == "target restarted")
        self.done.append(fault)
        name = kind.split()[0]
        try:
            if kind.endswith("out of descriptors"):
                self.exhaust(name, lasts_s)
            elif kind.endswith("stopped"):
                self.stop(name, lasts_s)
            elif name == "target":
                self.restart_target(lasts_s)
            else:
                self.replace_namespace(lasts_s)
        finally:
            fault.until_s = time.monotonic()

    def exhaust(self, name, lasts_s):
        forwarder = self.soak.forwarder
        before = forwarder.leave_descriptors(name, self.rng.randint(0, SPARE_MOST))
        try:
            self.soak.wait(lasts_s)
        finally:
            forwarder.limit_descriptors(name, before)

    def stop(self, name, lasts_s):
        pid = self.soak.forwarder.pids[name]
        os.kill(pid, signal.SIGSTOP)
        try:
            self.soak.wait(lasts_s)
        finally:
            os.kill(pid, signal.SIGCONT)

    def restart_target(self, lasts_s):
        path = self.soak.targets_netns[-1].path
        self.soak.order({"close": path})
        self.soak.wait(lasts_s)
        self.soak.order({"listen": path})

    def replace_namespace(self, lasts_s):
        """The target stays in the old one, too, for connections that are being made there."""
        soak = self.soak
        new = Netns(CONGESTION)
        soak.order({"listen": new.path})
        soak.targets_netns.append(new)
        followed = soak.forwarder.log().count(FOLLOWED)
        soak.name.delete()
        soak.wait(lasts_s)
        soak.name.set(new)
        deadline = time.monotonic() + FOLLOW_S
        while soak.forwarder.log().count(FOLLOWED) == followed:
            if time.monotonic() > deadline:
                raise Failed(f"nsplice is not in the new namespace after {FOLLOW_S} s")
            soak.wait(0.05)
        # The one before lives on as long as connections do.
        while len(soak.targets_netns) > 2:
            old = soak.targets_netns.pop(0)
            soak.order({"close": old.path})
            old.close()
