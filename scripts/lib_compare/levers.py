"""What the options of nsplice change, and what a change in its source does: nsplice as it is beside
variants of itself, in the same rounds. docs/levers.md is written from such results."""

import re

from . import machine, works
from .results import Results
from .tables import number, spread, table

DOCS = "docs/levers.md"
KIND = "levers"  # of the documents of such results
# More are no heading.
MANY_VARIANTS = 7

# One option each. What is the default anyway is there to show how far apart two alike come out.
OPTIONS = (
    "--workers 1", "--workers 2", "--no-pin", "--transfer copy", "--transfer splice",
    "--pipe-size 64K", "--pipe-size 128K", "--pipe-size 256K", "--pipe-size 1M",
    "--handoff socket", "--handoff connections", "--engine epoll", "--engine epoll --workers 1",
)
WORKS = "bulk-1 bulk-8 rr-64Bx1 rr-64Bx64 rr-16Kx16 rr-128Kx16 crr-16 rr-64Bx1+bulk".split()
# What pinning does to a worker that is not alone on the CPUs.
BUSY_OPTIONS = ("--workers 1", "--no-pin", "--handoff socket")
BUSY_WORKS = "bulk-8+busy1 rr-64Bx1+busy1 rr-64Bx1+busy2 rr-64Bx64+busy1 crr-16+busy1".split()
# The same with client and server on CPUs of their own (--pin).
PINNED_OPTIONS = ("--busy-poll 50", "--workers 1", "--workers 2", "--no-pin")
PINNED_WORKS = "bulk-1 bulk-8 rr-64Bx1 rr-64Bx64 crr-16".split()

HEAD = """# What each option and each change does

Written by `scripts/compare --render` from docs/levers.json, docs/levers-pinned.json and
docs/levers-builds*.json, as far as they are there. They have every round; docs/performance.md says
what came of it.

```sh
scripts/compare --levers --json docs/levers.json
# with client and server on CPUs of their own:
scripts/compare --levers --pin --json docs/levers-pinned.json
# builds with a change each, beside the program as it is:
scripts/compare --levers --contenders nsplice --json docs/levers-builds.json \\
    --contender 'what was changed=PROGRAM' --contender 'something else=PROGRAM OPTIONS'
scripts/compare --render
```

The works are those of docs/benchmarks.md. In each round nsplice as it is and all variants do each
work in turn. Shown are medians and, in parentheses, the smallest and the largest round; a ratio is
to nsplice as it is in the same round. A variant that is the default anyway, such as
`--pipe-size 1M`, shows how far apart two alike come out: what differs less is not told apart here."""


def name_of(options):
    return re.sub(r"\W+", "-", options).strip("-")


def options_for(pin):
    """The variants by name."""
    return {name_of(text): text for text in (PINNED_OPTIONS if pin else OPTIONS)}


def plan(pin):
    """Works and who does each, in order."""
    made = {name: ["nsplice", *options_for(pin)] for name in (PINNED_WORKS if pin else WORKS)}
    if not pin:
        made |= {name: ["nsplice", *map(name_of, BUSY_OPTIONS)] for name in BUSY_WORKS}
    return made


def text(documents):
    """The whole page. What is compared is of a single document."""
    parts = [HEAD]
    for document in documents:
        found = Results([document])
        place = machine.PLACES[machine.place(document)]
        names = list(variants(found))
        whole = len(names) > MANY_VARIANTS
        parts.append(f"## {f'{len(names)} variants' if whole else ', '.join(names)}{place}")
        parts += ["; ".join(names) + "."] if whole else []
        parts.append(f"Measured {machine.sentence(document)}.")
        for name in found.works:
            parts += [f"### {works.work(name).title} (`{name}`)", of_work(found, name)]
    return "\n\n".join(parts) + "\n"


def variants(found):
    """The titles, each option once: `--workers 1` and `--workers 2` are of one."""
    titles = [found.title(name) for name in found.contenders if name != "nsplice"]
    return dict.fromkeys(
        f"`{title.split()[0]}`" if title.startswith("--") else title for title in titles
    )


def of_work(found, name):
    work = works.work(name)
    timed = work.kind in ("rr", "crr")
    head = ["variant", work.figure, "ratio"] + (["p50 us", "ratio", "p99 us"] if timed else [])
    head += ["bulk beside Gbit/s"] if work.beside and not work.idle else []
    head += [f"forwarder CPU s/{work.unit}", "ratio", "errors"]
    rows = []
    for variant in found.works[name]:
        title, why = found.title(variant), found.why_not(name, variant)
        row = [f"`{title}`" if title.startswith("--") else title]
        if why:
            rows.append([*row, f"cannot: {why}", *[""] * (len(head) - 2)])
            continue

        def shown(key, ratio=True):
            row.append(spread(found.values(name, variant, key)))
            if ratio:
                row.append(spread(found.ratios(name, variant, "nsplice", key)))

        shown("figure")
        if timed:
            shown("p50_us")
            shown("p99_us", ratio=False)
        if "bulk beside Gbit/s" in head:
            shown("beside", ratio=False)
        shown("cpu")
        rows.append([*row, number(sum(found.values(name, variant, "errors")))])
    return table(head, rows)
