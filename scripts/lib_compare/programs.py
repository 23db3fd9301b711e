"""Starting and ending programs, and what /proc says about them."""

import json
import os
import resource
import select
import signal
import subprocess
import time

from .netns import read

START_S = 10  # longest time a program may take to start or to end
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

children = []  # every program started here and not yet ended


class Failed(Exception):
    """A contender cannot do a work; the text says why."""


def raise_nofile(wanted):
    """Lets this process and those it starts have so many descriptors, or as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(wanted, int(read("/proc/sys/fs/nr_open")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), max(hard, most)))
    except ValueError:  # root without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start(command, **options):
    """Starts a program as the leader of a process group of its own."""
    # Unbuffered, so that select tells of every line.
    child = subprocess.Popen(command, start_new_session=True, bufsize=0, **options)
    children.append(child)
    return child


def stop(child):
    """Ends a program and those it started: asks, waits, then insists."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(START_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream:
            stream.close()
    if child in children:
        children.remove(child)


def stop_all():
    for child in list(children):
        stop(child)


def poll_until(what, condition):
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {START_S} s")
        time.sleep(0.005)


def read_line(child, what, seconds, check=lambda: None):
    """The JSON of the next line of a program's output; `check` raises when waiting makes no sense any more."""
    deadline = time.monotonic() + seconds
    while not select.select([child.stdout], [], [], 0.2)[0]:
        check()
        if time.monotonic() > deadline:
            raise Failed(f"{what}: no answer within {seconds:.0f} s")
    line = child.stdout.readline()
    if not line:
        check()
        raise Failed(f"{what}: ended with status {child.wait(START_S)}")
    if not line.startswith(b"{"):
        raise Failed(f"{what}: {line.decode(errors='replace').strip()}")
    return json.loads(line)


def tree(pid):
    """The process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            threads = os.listdir(f"/proc/{parent}/task")
            for thread in threads:
                found += map(int, read(f"/proc/{parent}/task/{thread}/children").split())
        except OSError:  # it has ended
            pass
    return found


def cpu_seconds(pid):
    """utime + stime of a process, its descendants and those it has waited for.

    The clock of a process has them by the nanosecond; of children that ended only ticks are known.
    """
    seconds = 0.0
    for process in tree(pid):
        try:
            seconds += time.clock_gettime((~process << 3) | 2)
            fields = read(f"/proc/{process}/stat").rsplit(")", 1)[1].split()
            seconds += (int(fields[13]) + int(fields[14])) * TICK_S
        except OSError:
            pass
    return seconds


def machine_seconds():
    """Time that the CPUs for this program were not idle, and time that its host took from them.

    Idle time is what the kernel keeps exactly: of a CPU that sleeps between two ticks, the other
    columns of /proc/stat see nothing.
    """
    cpus = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    now = time.monotonic() * len(cpus)
    away = stolen = 0
    for name, *fields in map(str.split, read("/proc/stat").splitlines()):
        if name in cpus:
            _user, _nice, _system, idle, iowait, _irq, _softirq, steal = map(int, fields[:8])
            away += idle + iowait + steal
            stolen += steal
    return now - away * TICK_S, stolen * TICK_S


def memory(pid):
    """RssAnon and Pss in bytes, and descriptors, of a process and its descendants."""
    anon = pss = fds = 0
    for process in tree(pid):
        try:
            anon += kilobytes(f"/proc/{process}/status", "RssAnon:")
            pss += kilobytes(f"/proc/{process}/smaps_rollup", "Pss:")
            fds += len(os.listdir(f"/proc/{process}/fd"))
        except OSError:
            pass
    return {"anon_bytes": anon, "pss_bytes": pss, "fds": fds}


def kilobytes(path, name):
    for line in read(path).splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0
