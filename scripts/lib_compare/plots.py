"""The plots: bars for each work, curves over message size and over connections."""

import re
from dataclasses import dataclass

from . import svg, works
from .tables import number


@dataclass(frozen=True)
class Style:
    label: str
    color: str
    width: float = 1.6
    dash: str = ""


STYLES = {
    "direct": ("#6b7280", 1.6, "5 4"),
    "reference": ("#c2410c", 2.2, ""),
    "nsplice": ("#1d4ed8", 3.0, ""),
    "nsplice-copy": ("#60a5fa", 1.6, "2 3"),
    "nsplice-splice": ("#7c3aed", 1.6, "2 3"),
    "haproxy": ("#15803d", 1.6, ""),
    "epoll-splice": ("#b08900", 1.6, ""),
}
BARS = {"direct": "#9ca3af", "reference": "#c2410c", "nsplice": "#1d4ed8"}
OURS, OTHERS = "#60a5fa", "#94a3b8"
SPREAD = "median of the rounds; {} show the smallest and the largest"
CUT = "; a bar with a gap is longer than shown"


def style(found, contender):
    color, width, dash = STYLES.get(contender, (OTHERS, 1.6, ""))
    return Style(found.title(contender), color, width, dash)


def bar_color(contender):
    return BARS.get(contender, OURS if contender.startswith("nsplice") else OTHERS)


def bar_panel(found, name, key, unit, factor=1.0):
    """The best first."""
    rows, cannot = [], []
    for contender in found.works[name]:
        values = [factor * value for value in found.values(name, contender, key)]
        label = found.title(contender)
        if values:
            middle = factor * found.median(name, contender, key)
            row = (label, bar_color(contender), middle, min(values), max(values), number(middle))
            rows.append(row)
        elif found.why_not(name, contender):
            cannot.append((label, "", None, 0, 0, "cannot"))
    rows.sort(key=lambda row: row[2], reverse=key == "figure")
    return {"title": works.work(name).title, "unit": unit, "rows": rows + cannot}


def rates(found, names, title="How much goes through"):
    panels = [bar_panel(found, name, "figure", works.work(name).figure) for name in names]
    note = "longer is better; " + SPREAD.format("whiskers") + CUT
    return svg.bars(title, note, panels)


def latencies(found, names):
    panels = [
        bar_panel(found, name, key, f"{label} us")
        for name in names if works.work(name).kind in ("rr", "crr")
        for key, label in (("p50_us", "p50"), ("p99_us", "p99"))
    ]
    return svg.bars("How long it takes", "shorter is better; " + SPREAD.format("whiskers") + CUT, panels)


def costs(found, names):
    """CPU of the forwarder: for a GB, or an operation."""
    panels = []
    for name in names:
        bulk = works.work(name).unit == "GB"
        unit, factor = ("ms / GB", 1e3) if bulk else ("us / op", 1e2)
        panels.append(bar_panel(found, name, "cpu", unit, factor))
    note = "the forwarder's CPU time, all its processes; shorter is better; "
    return svg.bars("What it costs", note + SPREAD.format("whiskers") + CUT, panels)


def curve(found, points, key, factor=1.0):
    """For each contender its points over x; `points` is [(x, work)]."""
    series = []
    for contender in contenders_of(found, points):
        line = []
        for x, name in points:
            values = [factor * value for value in found.values(name, contender, key)]
            if values:
                middle = factor * found.median(name, contender, key)
                line.append((x, middle, min(values), max(values)))
        if len(line) > 1:
            series.append((style(found, contender), line))
    # What matters is drawn last.
    return sorted(series, key=lambda one: one[0].width)


def contenders_of(found, points):
    """Those of the curve: who is at most of its points, without those of the main table only."""
    names = {contender: None for _, name in points for contender in found.works[name]}
    return [
        name for name in names
        if 2 * sum(bool(found.values(work, name)) for _, work in points) > len(points)
    ]


def curve_panels(found, points, ticks, x):
    def panel(title, y, key, factor):
        series = curve(found, points, key, factor)
        return {"title": title, "x": x, "y": y, "ticks": ticks, "series": series}

    return [
        panel("Forwarder CPU for an operation", "us, logarithmic", "cpu", 100.0),
        panel("Operations per second", "logarithmic", "figure", 1.0),
    ]


def curves(found, points, ticks, title, x, what="request and response of the same size"):
    note = f"{what}; " + SPREAD.format("shaded bands")
    legend = [style(found, contender) for contender in contenders_of(found, points)]
    return svg.curves(title, note, curve_panels(found, points, ticks, x), legend)


def size_points(found):
    """[(size, work)] of the curve over message size."""
    names = [name for name in found.works if re.fullmatch(r"rr-\d+[BKM]x16", name)]
    return sorted((works.work(name).size, name) for name in names)


def connection_points(found):
    """[(connections, work)] of the curve over connections."""
    names = [name for name in found.works if re.fullmatch(r"rr-64Bx\d+", name)]
    return sorted((works.work(name).connections, name) for name in names)


def opened_points(found):
    """[(connections at a time, work)] of the curve over connections that come and go."""
    names = [name for name in found.works if re.fullmatch(r"crr-\d+", name)]
    return sorted((works.work(name).connections, name) for name in names)


def sizes(found):
    points = size_points(found)
    ticks = [(size, works.size_name(size)) for size, _ in points]
    return curves(found, points, ticks, "Message size, 16 connections", "bytes, logarithmic")


def connections(found):
    points = connection_points(found)
    ticks = [(count, f"{count:,}") for count, _ in points]
    return curves(found, points, ticks, "Connections, 64 B messages", "connections, logarithmic")


def opened(found):
    points = opened_points(found)
    ticks = [(count, f"{count:,}") for count, _ in points]
    title, x = "Connections that come and go", "connections at a time, logarithmic"
    return curves(found, points, ticks, title, x, "connect, 64 bytes there and back, close")
