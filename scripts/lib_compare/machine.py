"""What the figures were measured on."""

import os
import re
import subprocess

from .contenders import ROOT
from .netns import read


def facts():
    cpuinfo = read("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    memory = re.search(r"MemTotal:\s*(\d+)", read("/proc/meminfo"))
    return {
        "cpu": model[1].strip() if model else os.uname().machine,
        "virtual": bool(re.search(r"\bhypervisor\b", cpuinfo)),
        "cpus": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / (1 << 20)),
        "kernel": os.uname().release,
    }


# What a run depends on: what the programs are built of and by, and what starts and measures them.
MEASURED_BY = (
    "src benches examples Cargo.toml Cargo.lock .cargo build.rs rust-toolchain rust-toolchain.toml "
    "scripts"
).split()


def commit():
    """The commit that last changed what a run depends on, and whether that has changed since."""
    paths = ["--", *MEASURED_BY]
    last = git("log", "-1", "--format=%h", *paths)
    return (last or "unknown") + ("-dirty" if git("status", "--porcelain", *paths) else "")


def git(*arguments):
    command = ["git", "-c", "safe.directory=*", *arguments]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            text=True, check=False)
    return result.stdout.strip()


def sentence(document):
    machine, settings = document["machine"], document["settings"]
    virtual = "virtual " if machine["virtual"] else ""
    # A kernel's suffix names its builder, not its behaviour.
    kernel = re.match(r"[\d.]+", machine["kernel"])[0]
    return (
        f"{document['date']}, nsplice {document['commit']}; {machine['cpus']} {virtual}CPUs "
        f"({machine['cpu']}), {machine['memory_gib']} GiB, Linux {kernel}, "
        f"{settings['congestion']}; {rounds(document)} of {settings['seconds']:g} s after "
        f"{settings['warmup']:g} s of warm-up, load {document['load_before']:.1f} before"
        + PLACES[place(document)]
    )


# Where client, server and forwarder run: anywhere; client and server on CPUs of their own; all on
# one. What was measured so is something else each, not to be mixed.
SPREAD, PINNED, ONE_CPU = "spread", "pinned", "one CPU"
PLACES = {SPREAD: "", PINNED: ", client and server pinned", ONE_CPU: ", all on one CPU"}


def place(document):
    settings = document["settings"]
    # Earlier files do not name what they do not have.
    return ONE_CPU if settings.get("one_cpu") else PINNED if settings["pin"] else SPREAD


def rounds(document):
    counts = {
        len(series) for row in document["results"].values() for series in row.values() if series
    }
    low, high = min(counts, default=0), max(counts, default=0)
    count = str(low) if low == high else f"{low} to {high}"
    return count + (" round" if high == 1 else " rounds")
