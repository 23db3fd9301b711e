"""What was to be reached, and what was measured. Nothing is left out: what no file has is shown as
not measured."""

from dataclasses import dataclass

from . import works
from .tables import number, table

NOT_MEASURED = "not measured"
# How far `auto` may be from the better of copy and splice.
AUTO_MARGIN = 0.05


@dataclass(frozen=True)
class Goal:
    what: str
    work: str
    limit: float
    other: str = "reference"  # the ratio is to this one's; empty: no ratio
    key: str = "figure"
    least: bool = True  # the limit is the least that is wanted, not the most
    contender: str = "nsplice"
    pinned: bool = False

    def value(self, found):
        if self.other:
            return found.ratio(self.work, self.contender, self.other, self.key)
        return found.median(self.work, self.contender, self.key)


def most(what, work, limit, **others):
    return Goal(what, work, limit, least=False, **others)


TO_REFERENCE, TO_DIRECT = "/ netns_tcp_bridge", "/ no forwarder"
CPU = "forwarder CPU for a GB " + TO_REFERENCE
GOALS = (
    Goal(f"rate {TO_REFERENCE}", "bulk-1", 2.8),
    Goal(f"rate {TO_DIRECT}", "bulk-1", 0.85, "direct"),
    Goal(f"rate {TO_REFERENCE}", "bulk-8", 4.2),
    most(CPU, "bulk-1", 0.125, key="cpu"),
    most(CPU, "bulk-8", 0.125, key="cpu"),
    most(CPU, "copied-8", 0.125, key="cpu"),
    Goal(f"rate {TO_REFERENCE}", "rr-64Bx64", 1.4),
    most(f"p50 {TO_REFERENCE}", "rr-64Bx1", 1.0, key="p50_us"),
    most(f"p50 {TO_REFERENCE}", "rr-64Bx1", 1.0, key="p50_us", pinned=True),
    most(f"p50 with busy polling {TO_DIRECT}", "rr-64Bx1", 1.15, other="direct", key="p50_us",
         contender="nsplice-poll", pinned=True),
    Goal(f"rate {TO_REFERENCE}", "rr-16Kx16", 1.6),
    Goal(f"rate {TO_REFERENCE}", "rr-128Kx16", 4.0),
    Goal(f"rate {TO_REFERENCE}", "crr-16", 1.5),
    Goal("rate / HAProxy", "crr-16", 1.0, "haproxy"),
    most("bytes of RssAnon for each", "idle-1000", 512, other="", key="anon_bytes"),
    most("descriptors for each", "idle-1000", 2, other="", key="fds"),
    most("bytes of RssAnon for each", "idle-9000", 512, other="", key="anon_bytes"),
    most("descriptors for each", "idle-9000", 2, other="", key="fds"),
)


def tables(found, pinned):
    """The goals of single works, then those of all works."""
    auto_table, auto_rows = auto(found)
    ahead_table, verdicts = ahead(found)
    ahead_rows = [
        all_of(f"Works with {what} ahead of every contender", verdicts[key]) for key, what in AHEAD
    ]
    rows = [single(goal, pinned if goal.pinned else found) for goal in GOALS]
    parts = [
        table(["goal", "to reach", "measured", "reached"], rows + ahead_rows + auto_rows),
        "Ahead of every contender: the ratio of nsplice to each of the others, in the same rounds. "
        "Shown is the closest if nsplice is ahead of all, otherwise **all it is not ahead of**. Of "
        "p99 and CPU, and of the bytes of idle connections, less is better.",
        ahead_table,
        *one_worker(found),
        "`auto` over the better of copy and splice, the medians of the rounds' ratios:",
        auto_table,
    ]
    return "\n\n".join(parts)


def one_worker(found):
    """The same of nsplice with one worker, if that was measured."""
    ours = "nsplice-1"
    if ours not in found.contenders:
        return []
    rows, _ = ahead(found, ours=ours)
    return [f"The same with `--workers 1`, ahead {told(found, ours=ours)}:", rows]


def single(goal, found):
    title = works.work(goal.work).title + (", pinned" if goal.pinned else "")
    sign = "at least" if goal.least else "at most"
    row = [f"{title}: {goal.what}", f"{sign} {goal.limit:g}"]
    value = goal.value(found)
    if value is None:
        return [*row, NOT_MEASURED, "-"]
    reached = value >= goal.limit if goal.least else value <= goal.limit
    return [*row, number(value), yes(reached)]


def yes(reached):
    return "yes" if reached else "**no**"


def all_of(what, verdicts):
    """The row of a goal that is to be reached many times: True, False, or None if not measured."""
    unknown = verdicts.count(None)
    measured = f"{verdicts.count(True)}" + (f", {unknown} {NOT_MEASURED}" if unknown else "")
    reached = "-" if unknown == len(verdicts) else yes(verdicts.count(True) == len(verdicts))
    return [what, f"all {len(verdicts)}", measured, reached]


# --- Ahead of every contender -----------------------------------------------------------------

AHEAD = (("figure", "rate or bytes"), ("p99_us", "p99"), ("cpu", "forwarder CPU"))


def ahead(found, names=None, ours="nsplice"):
    """A row for each of the works, all that the standard set or a file has unless they are named,
    and by key whether ours is ahead of all others in each."""
    names = names or list(dict.fromkeys([*works.standard(), *found.works]))
    rows, verdicts = [], {key: [] for key, _ in AHEAD}
    for name in names:
        work = works.work(name)
        # Also those that were not run: they stand behind, as without a figure.
        against = dict.fromkeys([*works.MAIN_CONTENDERS, *found.works.get(name, [])])
        against = [other for other in against if other == "reference" or found.is_other(other)]
        row = [work.title + (" (bytes)" if work.kind == "idle" else "")]
        for key, _ in AHEAD:
            if applies(work, key):
                least = key == "figure" and work.kind != "idle"
                cell, verdict = against_each(found, name, ours, against, key, least)
                verdicts[key].append(verdict)
            else:
                cell = "-"
            row.append(cell)
        without = [found.title(other) for other in against if not found.values(name, other)]
        rows.append([*row, ", ".join(without) or "-"])
    return table(["work", *(what for _, what in AHEAD), "without a figure"], rows), verdicts


def told(found, names=None, ours="nsplice"):
    """How often ours is ahead of everybody."""
    _, verdicts = ahead(found, names, ours)
    return ", ".join(f"in {verdicts[key].count(True)} of {len(verdicts[key])} by {what}"
                     for key, what in AHEAD)


def applies(work, key):
    if key == "p99_us":
        return work.kind in ("rr", "crr")
    return key == "figure" or work.kind != "idle"


def against_each(found, name, ours, others, key, least):
    """The text of a cell, and whether ours is ahead of all in it."""
    ratios = {other: found.ratio(name, ours, other, key) for other in others}
    known = sorted(
        ((ratio, other) for other, ratio in ratios.items() if ratio is not None), reverse=not least
    )
    if not known:
        return NOT_MEASURED, None
    behind = [(ratio, other) for ratio, other in known if (ratio < 1 if least else ratio > 1)]
    shown = behind or known[:1]
    text = ", ".join(f"{number(ratio)} {found.title(other)}" for ratio, other in shown)
    return f"**{text}**" if behind else text, not behind


# --- `auto` -----------------------------------------------------------------------------------


def auto(found):
    """A row for each message size."""
    rows, verdicts = [], {"figure": [], "cpu": []}
    for name in works.SIZES:
        row = [works.size_name(works.work(name).size)]
        for key, least in (("figure", True), ("cpu", False)):
            ratio = over_better(found, name, key, least)
            within = None
            if ratio is not None:
                within = ratio >= 1 - AUTO_MARGIN if least else ratio <= 1 + AUTO_MARGIN
            verdicts[key].append(within)
            row += [NOT_MEASURED if ratio is None else f"{ratio:.2f}",
                    "-" if within is None else yes(within)]
        rows.append(row)
    margin = f"{100 * AUTO_MARGIN:g} %"
    summary = [
        all_of(f"Sizes with {what} of `auto` within {margin} of the better of copy and splice",
               verdicts[key])
        for key, what in (("figure", "rate"), ("cpu", "forwarder CPU"))
    ]
    head = ["size", "rate", f"within {margin}", "forwarder CPU", f"within {margin}"]
    return table(head, rows), summary


def over_better(found, name, key="cpu", least=False):
    """auto over the better one, or None unless both were measured."""
    ratios = [found.ratio(name, "nsplice", other, key)
              for other in ("nsplice-copy", "nsplice-splice")]
    return None if None in ratios else (min if least else max)(ratios)
