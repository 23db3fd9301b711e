"""The generated parts of docs/benchmarks.md and README.md, docs/plots, and docs/levers.md."""

import glob
import os
import re

from . import goals, levers, machine, plots, tables, works
from .contenders import ROOT
from .netns import read, write
from .results import Results, load
from .tables import number, table

DOCS, README, PLOTS = "docs/benchmarks.md", "README.md", "docs/plots"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->"


def files(paths):
    """What the docs should be: {path: text}."""
    documents = [load(path) for path in paths or published()]
    of_levers = [one for one in documents if one.get("kind") == levers.KIND]
    documents = [one for one in documents if one.get("kind") != levers.KIND]
    wanted = of_benchmarks(documents) if documents else {}
    if of_levers:
        wanted[levers.DOCS] = levers.text(of_levers)
    return wanted


def published():
    """The results that docs/ has, what is to be shown last at the end."""
    paths = []
    for name in ("benchmarks", "levers"):
        more = glob.glob(os.path.join(ROOT, f"docs/{name}-*.json"))
        paths += [os.path.join(ROOT, f"docs/{name}.json"), *sorted(more)]
    return [path for path in paths if os.path.exists(path)]


def of_benchmarks(documents):
    found, pinned, packed = (
        Results([one for one in documents if machine.place(one) == place])
        for place in (machine.SPREAD, machine.PINNED, machine.ONE_CPU)
    )
    pictures = draw(found)
    wanted = {f"{PLOTS}/{name}": picture for name, picture in pictures.items()}
    wanted[DOCS] = replaced(DOCS, measured(found, pinned, packed, pictures))
    wanted[README] = replaced(README, summary(found, packed, pictures))
    return wanted


def write_all(paths):
    os.makedirs(os.path.join(ROOT, PLOTS), exist_ok=True)
    for path, text in files(paths).items():
        write(os.path.join(ROOT, path), text)
        print(f"wrote {path}")


def check(paths):
    """Fails unless the docs are what the results say."""
    for path, text in files(paths).items():
        whole = os.path.join(ROOT, path)
        if not os.path.exists(whole) or read(whole) != text:
            names = " ".join(["scripts/compare --render", *paths])
            raise SystemExit(f"compare: {path} is not what the results say: {names}")


def replaced(path, text):
    """The file with the text between its markers."""
    whole = read(os.path.join(ROOT, path))
    if whole.count(BEGIN) != 1 or whole.count(END) != 1:
        raise SystemExit(f"compare: {path}: not one pair of {BEGIN.strip()} and {END}")
    before, rest = whole.split(BEGIN)
    return f"{before}{BEGIN}{text.strip()}\n{END}{rest.split(END)[1]}"


def main_works(found):
    """The works of the bars: the main table's, as far as they were measured."""
    return [name for name in works.MAIN if name in found.works]


def draw(found):
    names = main_works(found)
    pictures = {}
    if names:
        few = [name for name in works.OVERVIEW if name in names]
        pictures["overview.svg"] = plots.rates(found, few)
        pictures["rates.svg"] = plots.rates(found, names)
        pictures["costs.svg"] = plots.costs(found, names)
        pictures["latencies.svg"] = plots.latencies(found, names)
    for name, points, plot in (
        ("sizes.svg", plots.size_points(found), plots.sizes),
        ("connections.svg", plots.connection_points(found), plots.connections),
        ("opened.svg", plots.opened_points(found), plots.opened),
    ):
        if len(points) > 2:
            pictures[name] = plot(found)
    return pictures


# --- Parts ------------------------------------------------------------------------------------


def measured(found, pinned, packed, pictures):
    """All there is, for docs/benchmarks.md."""
    parts = ["### Machine and contenders", conditions(found), contender_table(found)]
    parts += ["### To reach", goals.tables(found, pinned)]
    names = main_works(found)
    parts += ["### Each work", *images(pictures, "rates.svg", "costs.svg", "latencies.svg")]
    parts.append(tables.all_works(found, names, "####"))
    left = [name for name in found.works if name not in names]
    for title, picture, points_of, table_of in (
        ("Message size", "sizes.svg", plots.size_points, size_table),
        ("Connections", "connections.svg", plots.connection_points, connection_table),
        ("Connections that come and go", "opened.svg", plots.opened_points, opened_table),
    ):
        if picture in pictures:
            parts += [f"### {title}", *images(pictures, picture), table_of(found)]
            points = [name for _, name in points_of(found) if name in left]
            parts.append(tables.all_works(found, points, "####"))
            left = [name for name in left if name not in points]
    if left:
        parts += ["### Other works", tables.all_works(found, left, "####")]
    if packed.works:
        ahead, _ = goals.ahead(packed, list(packed.works))
        intro = "Ratios of nsplice to each of the others, as above; ahead "
        intro += goals.told(packed, list(packed.works)) + "."
        parts += ["### All on one CPU", conditions(packed), intro, ahead]
        parts.append(tables.all_works(packed, packed.works, "####"))
    if pinned.works:
        parts += ["### Client and server on CPUs of their own", conditions(pinned)]
        parts.append(tables.all_works(pinned, pinned.works, "####"))
    return "\n\n".join(part for part in parts if part)


def summary(found, packed, pictures):
    """What README shows."""
    parts = [
        main_table(found),
        "The figures are medians of interleaved rounds; of a p50 less is better. The best of the "
        f"others is the best of {others_named(found)}. {conditions(found)} Of all works, idle "
        f"connections included, nsplice is ahead of everybody {goals.told(found)}. "
        f"{on_one_cpu(packed)}Every figure, its spread and the method are in "
        "[docs/benchmarks.md](docs/benchmarks.md); "
        "[docs/performance.md](docs/performance.md) says why it is behind where it is.",
        *images(pictures, "overview.svg", "sizes.svg", "connections.svg", "opened.svg",
                folder="docs/plots"),
    ]
    return "\n\n".join(part for part in parts if part)


def on_one_cpu(packed):
    if not packed.works:
        return ""
    return (
        "Where client, server and forwarder share one CPU, so that nothing depends on who runs "
        f"where, it is {goals.told(packed, list(packed.works))}. "
    )


def images(pictures, *names, folder="plots"):
    words = {
        "overview.svg": "Bars: what goes through",
        "rates.svg": "Bars: what goes through, each work", "costs.svg": "Bars: CPU, each work",
        "latencies.svg": "Bars: latency, each work", "sizes.svg": "Curves over message size",
        "connections.svg": "Curves over the number of connections",
        "opened.svg": "Curves over the number of connections that come and go",
    }
    return [f"![{words[name]}]({folder}/{name})" for name in names if name in pictures]


def conditions(found):
    """Of every document that still has a work."""
    sentences = []
    for document in found.documents:
        if any(origin is document for origin in found.origins.values()):
            sentences.append(machine.sentence(document))
    return "Measured " + "; and ".join(dict.fromkeys(sentences)) + "."


def others_named(found):
    """With the versions of what is no relay of this project."""
    named = []
    for name in found.others():
        # Without what a distribution added.
        version = re.split("[-+]", found.contenders[name]["version"] or "")[0]
        is_relay = found.title(name).endswith("relay")
        named.append(found.title(name) + (f" {version}" if version and not is_relay else ""))
    return ", ".join(named)


def contender_table(found):
    rows = [
        [one["title"], one["version"] or "-", one["settings"]]
        for one in found.contenders.values()
    ]
    return table(["contender", "version", "settings"], rows)


def main_table(found):
    head = ["work", "no forwarder", "netns_tcp_bridge", "best of the others", "nsplice",
            "ratio to netns_tcp_bridge", "forwarder CPU: netns_tcp_bridge", "nsplice"]
    rows = []
    for name in main_works(found):
        work = works.work(name)
        alone = work.kind == "rr" and work.connections == 1
        key, unit = ("p50_us", "p50 us") if alone else ("figure", work.figure)

        def shown(contender):
            bulk = found.median(name, contender, "beside")
            beside = f" beside {number(bulk)} Gbit/s" if bulk is not None else ""
            return number(found.median(name, contender, key)) + beside

        best = found.best(name, found.others(), key, highest=not alone)
        ratio = found.ratio(name, "nsplice", "reference", key)
        cost = {"GB": " s/GB", "10k": " s/10k"}[work.unit]
        rows.append([
            f"{work.title}, {unit}",
            shown("direct"),
            shown("reference"),
            f"{shown(best)} ({found.title(best)})" if best else "-",
            shown("nsplice"),
            "-" if ratio is None else f"{ratio:.2f}",
            number(found.median(name, "reference", "cpu")) + cost,
            number(found.median(name, "nsplice", "cpu")) + cost,
        ])
    return table(head, rows)


def size_table(found):
    return (
        "Forwarder CPU in us for an operation, which is a request and its response; the last "
        "column is `auto` over the better of copy and splice, the median of the rounds' ratios:\n\n"
        + curve_table(found, plots.size_points(found), "size", works.size_name, auto_over_better)
    )


def connection_table(found):
    points = plots.connection_points(found)
    text = "Forwarder CPU in us for an operation:\n\n"
    text += curve_table(found, points, "connections", "{:,}".format)
    text += "\n\nWhat an operation costs, over what it costs the same with 100 connections:\n\n"
    return text + flat_table(found, points, 100)


def opened_table(found):
    points = plots.opened_points(found)
    text = "Forwarder CPU in us for a connection, which is opened, has one exchange and ends:\n\n"
    text += curve_table(found, points, "at a time", "{:,}".format)
    text += "\n\nThe same, over what it is with 16 at a time:\n\n"
    return text + flat_table(found, points, 16)


def flat_table(found, points, base):
    """Costs over those of the point at `base`, in the same rounds: how flat the curves are."""
    contenders = [name for name in plots.contenders_of(found, points) if name != "direct"]
    of_base = dict(points).get(base)
    rows = []
    for contender in contenders:
        times = [of_base and found.growth(contender, name, of_base, "cpu") for _, name in points]
        cells = ["-" if growth is None else f"{growth:.2f}" for growth in times]
        rows.append([found.title(contender), *cells])
    return table(["contender", *(f"{count:,}" for count, _ in points)], rows)


def curve_table(found, points, head, label, extra=None):
    contenders = plots.contenders_of(found, points)
    rows = []
    for x, name in points:
        row = [label(x)]
        for contender in contenders:
            if contender == "direct":
                continue
            cost = found.median(name, contender, "cpu")
            row.append(number(100 * cost) if cost is not None else "-")
        rows.append(row + ([extra(found, name)] if extra else []))
    titles = [found.title(name) for name in contenders if name != "direct"]
    return table([head, *titles] + (["auto / better"] if extra else []), rows)


def auto_over_better(found, name):
    ratio = goals.over_better(found, name)
    return "-" if ratio is None else f"{ratio:.2f}"
