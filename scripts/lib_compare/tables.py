"""Markdown tables."""

import statistics

from . import works


def number(value, digits=3):
    """A number for people: some significant digits, thousands in groups."""
    if value is None:
        return "-"
    if abs(value) >= 10 ** digits:
        value = round(value)
        return f"{value:,}"
    text = f"{value:.{digits}g}"
    if "e" in text:
        text = f"{value:.6f}".rstrip("0")
    return text


def spread(values):
    """Median and, behind it, the smallest and the largest round."""
    if not values:
        return "-"
    middle = statistics.median(values)
    return f"{number(middle)} ({number(min(values))}-{number(max(values))})"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def of_work(found, name):
    """All contenders in one work."""
    work = works.work(name)
    if work.kind == "idle":
        return of_idle(found, name)
    timed = work.kind != "bulk"
    unit = {"GB": "s/GB", "10k": "s/10k"}[work.unit]
    head = ["contender", work.figure, "x reference", "x direct"]
    head += ["p50 us", "p99 us", "p99.9 us"] if timed else []
    beside = work.beside and not work.idle
    head += ["bulk beside Gbit/s"] if beside else []
    head += [f"forwarder CPU {unit}", f"machine busy {unit}", "errors"]
    rows = []
    for contender in found.works[name]:
        row, why = [found.title(contender)], found.why_not(name, contender)
        if why:
            rows.append(row + [f"cannot: {why}"] + [""] * (len(head) - 2))
            continue
        row.append(spread(found.values(name, contender)))
        for other in ("reference", "direct"):
            ratio = found.ratio(name, contender, other)
            row.append("-" if ratio is None else f"{ratio:.2f}")
        for key in ("p50_us", "p99_us", "p999_us") if timed else ():
            row.append(spread(found.values(name, contender, key)))
        row += [spread(found.values(name, contender, "beside"))] if beside else []
        row += [spread(found.values(name, contender, key)) for key in ("cpu", "busy")]
        row.append(number(sum(found.values(name, contender, "errors"))))
        rows.append(row)
    return table(head, rows)


def of_idle(found, name):
    head = ["contender", "RssAnon B", "Pss B", "descriptors", "CPU while idle"]
    rows = []
    for contender in found.works[name]:
        why = found.why_not(name, contender)
        cells = [f"cannot: {why}", "", "", ""] if why else [
            number(found.median(name, contender, "anon_bytes")),
            number(found.median(name, contender, "pss_bytes")),
            f"{found.median(name, contender, 'fds'):.1f}",
            f"{100 * found.median(name, contender, 'cpu_share'):.1f} %",
        ]
        rows.append([found.title(contender), *cells])
    return table(head, rows)


def all_works(found, names, heading="###"):
    parts = []
    for name in names:
        parts.append(f"{heading} {works.work(name).title} (`{name}`)\n\n{of_work(found, name)}")
    return "\n\n".join(parts)
