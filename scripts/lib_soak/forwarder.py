"""nsplice under test: starting it, what /proc says about it, and ending it."""

import collections
import itertools
import json
import os
import resource
import select
import subprocess

from lib_compare import programs
from lib_compare.netns import read
from lib_compare.programs import Failed

# Empty pipes that a worker keeps for reuse: POOL_MAX of src/pipe.rs.
POOLED_PIPES = 32
BUFFERS_BYTES = 160 << 20
LISTEN_PORT, TARGET_PORT = 7000, 7001  # each in a namespace of its own


class Forwarder:
    """Two processes: `pids` has them by name."""

    def __init__(self, program, options, listen_path, connect_path, directory):
        self.log_path = os.path.join(directory, "log")
        reader, writer = os.pipe()
        self.command = [
            program, "-f", listen_path, "-l", f"127.0.0.1:{LISTEN_PORT}", "-t", connect_path,
            "-c", f"127.0.0.1:{TARGET_PORT}", "--handoff", options.handoff,
            "--engine", options.engine, "--netns-gone", "reopen", "--summary", "json",
        ]
        with open(self.log_path, "w") as log:
            self.child = programs.start([*self.command, "--ready-fd", str(writer)], stderr=log,
                                        stdout=subprocess.PIPE, pass_fds=[writer])
        os.close(writer)
        with open(reader) as ready:
            # It is readable, at its end, also when the program has ended.
            is_told = select.select([ready], [], [], programs.START_S)[0]
            if not is_told or not ready.readline():
                raise Failed(f"nsplice does not start: {self.log()}")
        listener, connector = programs.tree(self.child.pid)
        self.pids = {"listener": listener, "connector": connector}
        self.cpu_s = {name: 0.0 for name in self.pids}

    def log(self):
        return read(self.log_path)

    def check(self):
        if self.child.poll() is not None:
            raise Failed(f"nsplice ended with status {self.child.returncode}: {self.log()}")

    def footprint(self):
        """Of each process: open descriptors by kind, threads, and memory of its own in bytes."""
        return {name: footprint(pid) for name, pid in self.pids.items()}

    def limit_descriptors(self, name, soft):
        """Sets RLIMIT_NOFILE of a process; returns what it was."""
        before = resource.prlimit(self.pids[name], resource.RLIMIT_NOFILE)
        resource.prlimit(self.pids[name], resource.RLIMIT_NOFILE, (soft, before[1]))
        return before[0]

    def leave_descriptors(self, name, spare):
        """Leaves a process so many descriptors below its limit; returns what the limit was."""
        used = {int(fd) for fd in os.listdir(f"/proc/{self.pids[name]}/fd")}
        free = (fd for fd in itertools.count() if fd not in used)
        return self.limit_descriptors(name, next(itertools.islice(free, spare, None)))

    def cpu(self):
        return programs.cpu_seconds(self.child.pid)

    def end(self):
        """Ends it with SIGTERM; returns its summary."""
        self.child.terminate()
        try:
            output = self.child.communicate(timeout=programs.START_S)[0]
        except subprocess.TimeoutExpired:
            raise Failed(f"nsplice does not end within {programs.START_S} s") from None
        if self.child.returncode != 0:
            raise Failed(f"nsplice ended with status {self.child.returncode}: {self.log()}")
        return json.loads(output)


def footprint(pid):
    kinds = collections.Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            kinds[os.readlink(f"/proc/{pid}/fd/{fd}").split(":")[0].split("/")[-1]] += 1
        except FileNotFoundError:  # closed meanwhile
            pass
    return {
        "fds": dict(sorted(kinds.items())),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        **memory(pid),
    }


def memory(pid):
    """Resident memory of its own, without what is mapped of files, in bytes; the receive buffers
    of the io_uring engine apart.

    A burst touches buffers that stay then, and of each the further pages when a read first comes to
    it: that would hide what grows for other reasons. Each worker's are a mapping of 160 MiB
    (MAX_BUFFERS of src/engine/uring/buffers.rs); no other is as large.
    """
    anon = buffers = 0
    for line in read(f"/proc/{pid}/smaps").splitlines():
        name, *values = line.split()
        if "-" in name:
            first, last = (int(address, 16) for address in name.split("-"))
            is_buffers = last - first >= BUFFERS_BYTES and len(values) == 4
        elif name == "Anonymous:":
            anon += int(values[0]) << 10
            buffers += int(values[0]) << 10 if is_buffers else 0
    return {"memory_bytes": anon - buffers, "buffers_bytes": buffers}


def is_as_before(now, before, unused, workers):
    """Whether nothing was added but pipes kept for reuse, each with two ends: in each worker so
    many more than `unused` had, the footprint before any connection."""
    for name, process in now.items():
        pooled = 2 * POOLED_PIPES * workers if name == "connector" else 0
        if process["fds"].get("pipe", 0) > unused[name]["fds"].get("pipe", 0) + pooled:
            return False
        fds, fds_before = ({**each["fds"], "pipe": 0} for each in (process, before[name]))
        if fds != fds_before or process["threads"] != before[name]["threads"]:
            return False
    return True
