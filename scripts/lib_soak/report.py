"""A run's tables, as Markdown, which is what is printed, too; and docs/soak.md around them."""

import collections

LOADS = {
    "bulk": "Bulk streams, 1 B to 20 MB",
    "slow": "Readers that stop for seconds, 8 to 20 MB",
    "reset": "Streams that one end resets",
    "messages": "Questions and answers, long connections",
    "storm": "Bursts of short connections, one exchange each",
    "idle": "Idle connections, used from time to time",
}
SHOWN_FAILURES = 20

PAGE = """\
# Soak: can it be left alone?

<!-- Written by scripts/soak --render; the text is in scripts/lib_soak/report.py. -->

`scripts/soak` runs `nsplice` between two network namespaces under a mixture of loads while faults
are injected, and fails if a single connection is not served to its last byte that no fault had to
end. Needs root and Python 3.11.

```sh
scripts/soak                                              # a minute, --handoff socket
scripts/soak --seconds 600 --handoff connections --json FILE
scripts/soak --render FILE [FILE...] --markdown docs/soak.md      # writes this page
```

## What it does

All of this goes on at the same time, in two processes of clients and one of targets:

- **bulk**: streams of random sizes in both directions, or in one; both at once, or the second
  after the end of the first, through a half-closed connection;
- **slow**: the same, large, with one end or both that stop reading for up to four seconds;
- **reset**: either end resets (SO_LINGER 0) anywhere in the streams, at once or when all it has
  sent is acknowledged. The other end has to see the reset, unless it has had everything before;
  what arrived must be what was sent first, and all of it if it was acknowledged;
- **messages**: questions and answers of 1 B to 200 KB on connections that last up to a minute;
- **storm**: bursts of connections, one exchange each;
- **idle**: two thousand connections that are held throughout, each used now and then.

Every byte of a connection follows from the connection's number, in each direction from another
place in a block of random bytes. Both ends compare each byte as it comes. So they need no hash, can
tell which byte is the first wrong one, and check what a reset has cut off, too. Each end writes
down how the connection ended and how much it sent and got; the two records of each connection are
held against each other. Every operation on a socket has a time limit, {silence_s} s without
progress.

Faults, one after another, in an order, at times and for times (up to two seconds) that follow from
the seed:

| fault | what is done | what it may end |
|---|---|---|
| connector, listener out of descriptors | RLIMIT_NOFILE of the process is lowered until none to \
{spare} are left | nothing |
| connector, listener stopped | SIGSTOP, later SIGCONT | nothing |
| target restarted | its listening socket is closed, and opened again later | connections it has \
not accepted: the client must see a reset, before any byte, and the target know nothing of them |
| namespace replaced | the mounted name of the connect side's namespace is deleted, and made anew \
later for another namespace (`--netns-gone reopen`) | nothing: connections in the old one go on |

At the end the idle connections alone are left for a second. They must have two descriptors each and
nothing else, and the forwarder must be at rest (at most {rest_cpu:.0%} of a CPU). Then all
connections end, and it must have given back what they took:

- descriptors of each kind, and threads, are as they were after the warm-up: a few seconds of the
  same load, with one stop of the connector. Pipes that are kept for reuse may be added, {pipes} in
  each worker;
- memory, without what is mapped of files, may have grown by {growth} MiB, for what the allocator
  keeps, and by {growth_each} KiB for each connection that there were more at a time than in the
  warm-up: the table of flows, of less than 512 bytes each, doubles and is not made smaller. A leak
  of 64 bytes for each connection is more than that after a minute;
- receive buffers are counted apart with io_uring: those that a burst needs stay, and the further
  pages of each are touched when a read first comes to them. With epoll, where they cannot be told from
  other memory, two of them (20 KiB each) may be added for each of the most connections at a time.

Then SIGTERM must end it with status 0, it must have logged nothing but the faults' traces, and its
summary must agree with what both ends counted: the connections exactly; the bytes are at least what
arrived and at most what was sent, which differ by what was under way to an end that was reset.

## How to replay

The seed is printed, and with `--seed` all sizes, orders, pauses and faults are drawn again as they
were. What happens at the same time is not the same: the kernel's and the machine's timing differ.
A failure names the connection, both ends' records, and the fault during or after which it happened.
The port is the one that nsplice's log (`-v`) has for a client, and the one it connected from in the
target's record.

The kernel's memory for TCP is the whole machine's. A program that takes it all has connections
reset, of whomever; a run that met this says so, and fails.

## Results
"""


def tables(document):
    """Everything about a run, as Markdown."""
    parts = [sentence(document), loads(document)]
    if document["faults"]:
        parts.append(faults(document["faults"]))
    figures = document["figures"]
    if "after" in figures:
        parts.append(footprints(figures))
    if "summary" in figures:
        parts.append(counters(figures))
    parts.append(verdict(document))
    return "\n\n".join(parts)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def sentence(document):
    settings, facts, figures = (document[name] for name in ("settings", "machine", "figures"))
    text = (
        f"{document['date']}, nsplice {document['commit']}, {settings['build']} build, "
        f"`--handoff {settings['handoff']}`, {settings['engine']}; {facts['cpus']} CPUs "
        f"({facts['cpu']}), Linux {facts['kernel'].split('-')[0]}; seed {settings['seed']}, "
        f"{settings['seconds']:g} s"
    )
    if "cpu_s" in figures:
        text += (
            f". The forwarder took {figures['cpu_s']:.1f} s of CPU, all that ran on the machine "
            f"{figures['machine_s']:.1f} s; with the idle connections alone the forwarder took "
            f"{figures['cpu_at_rest']:.2%} of a CPU"
        )
    return text + (
        f". Most connections at a time: {document['peak']['connections']:,}. The machine held a "
        f"sleeping program up by {document['held_up_s']:.2f} s at most."
    )


def loads(document):
    head = ["load", "connections", "exchanges or streams done", "MB sent", "MB checked",
            "reset as planned", "ended by a fault", "failures", "longest wait, s"]
    total = collections.Counter()
    rows = []
    for name, title in LOADS.items():
        if row := document["loads"].get(name):
            rows.append(load_row(title, row, f"{row['waited_s']:.2f}"))
            total.update(row)
    return table(head, [*rows, load_row("all", total, "")])


def load_row(title, row, waited):
    return [
        title, f"{row['connections']:,}", f"{row['exchanges']:,}", f"{row['sent'] / 1e6:,.1f}",
        f"{row['checked'] / 1e6:,.1f}", f"{row['as_planned']:,}", f"{row['by_fault']:,}",
        row["failures"], waited,
    ]


def faults(done):
    sums = collections.defaultdict(collections.Counter)
    for fault in done:
        added = {name: fault[name] for name in ("seconds", "ended", "failures")}
        sums[fault["kind"]].update(added, times=1)
    head = ["fault", "times", "seconds in all", "connections it ended, as it must",
            "connections that failed in or after it"]
    return table(head, [
        [kind, row["times"], f"{row['seconds']:.1f}", f"{row['ended']:,}", row["failures"]]
        for kind, row in sums.items()
    ])


def footprints(figures):
    def cells(footprint, name):
        process = footprint[name]
        fds = process["fds"]
        others = sum(fds.values()) - fds.get("socket", 0) - fds.get("pipe", 0)
        return [fds.get("socket", 0), fds.get("pipe", 0), others, process["threads"],
                process["memory_bytes"] >> 10, process["buffers_bytes"] >> 10]

    head = ["process", "sockets", "ends of pipes", "other descriptors", "threads", "memory, KiB",
            "receive buffers, KiB"]
    rows = []
    for name in figures["before"]:
        pairs = zip(cells(figures["before"], name), cells(figures["after"], name))
        rows.append([name, *(f"{before:,} to {after:,}" for before, after in pairs)])
    return "After the warm-up, and at the end:\n\n" + table(head, rows)


def counters(figures):
    head = ["counter", "summary", "both ends counted"]
    rows = []
    for name, (least, most) in figures["counted"].items():
        counted = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        rows.append([f"`{name}`", f"{figures['summary'][name]:,}", counted])
    errors = ", ".join(f"{name} {count:,}" for name, count in figures["summary"]["errors"].items())
    return table(head, rows) + f"\n\nErrors in the summary: {errors or 'none'}."


def verdict(document):
    failed = document["failed_connections"]
    lines = [f"- {text}" for text in document["failures"][:SHOWN_FAILURES]]
    for failure in failed[:SHOWN_FAILURES]:
        ends = "; ".join(str(end) for end in failure["ends"])
        lines.append(f"- {failure['why']} (during or after: {failure['during_or_after']}): {ends}")
    hidden = len(document["failures"]) + len(failed) - len(lines)
    if hidden > 0:
        lines.append(f"- and {hidden} more")
    return "\n".join(["Failures:", "", *lines]) if lines else "Nothing failed."


def page(documents, limits):
    parts = [PAGE.format(**limits)]
    for document in documents:
        settings = document["settings"]
        parts.append(f"### --handoff {settings['handoff']}, {settings['engine']}, "
                     f"{settings['seconds']:g} s\n\n```sh\n{document['command']}\n```\n\n"
                     f"{tables(document)}\n")
    return "\n".join(parts)
