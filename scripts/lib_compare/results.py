"""Rounds as JSON, and what is computed from them."""

import json
import os
import statistics

FORMAT = 1


def load(path):
    with open(path) as file:
        document = json.load(file)
    if document.get("format") != FORMAT:
        raise SystemExit(f"compare: {path}: not a result of this version")
    return document


def save(path, document):
    """Replaces the file at once, a line for each series: so differences can be read."""
    lines = []
    for work, row in document["results"].items():
        series = ",\n".join(
            f"   {json.dumps(name)}: {json.dumps(rounds)}" for name, rounds in row.items()
        )
        lines.append(f"  {json.dumps(work)}: {{\n{series}\n  }}")
    head = {name: value for name, value in document.items() if name != "results"}
    text = json.dumps(head, indent=1)[:-2] + ',\n "results": {\n' + ",\n".join(lines) + "\n }\n}\n"
    with open(path + ".new", "w") as file:
        file.write(text)
    os.replace(path + ".new", path)


def middle(values):
    return statistics.median(values) if values else None


def by_round(mine, theirs, key):
    """A figure over the other's in each round that has both."""
    return [one[key] / other[key] for one, other in zip(mine, theirs)
            if key in one and other.get(key)]


class Results:
    """Several documents as one. A work is a single document's, the last one's that has it: what is
    compared was measured in the same rounds."""

    def __init__(self, documents):
        self.documents = documents
        self.works, self.contenders, self.origins = {}, {}, {}
        for document in documents:
            # Not in the order in which they were measured.
            for name, row in document["results"].items():
                self.works[name] = {one: row[one] for one in document["contenders"] if one in row}
            self.origins.update(dict.fromkeys(document["results"], document))
            self.contenders.update(document["contenders"])

    def title(self, contender):
        return self.contenders.get(contender, {"title": contender})["title"]

    def is_other(self, contender):
        """Whether it is neither ours, nor the reference, nor no forwarder."""
        return not contender.startswith("nsplice") and contender not in ("reference", "direct")

    def others(self):
        return [name for name in self.contenders if self.is_other(name)]

    def rounds(self, work, contender):
        return self.works.get(work, {}).get(contender, [])

    def values(self, work, contender, key="figure"):
        rounds = self.rounds(work, contender)
        return [one[key] for one in rounds if key in one]

    def median(self, work, contender, key="figure"):
        return middle(self.values(work, contender, key))

    def why_not(self, work, contender):
        """Why a contender has no figure, if it has none."""
        rounds = self.rounds(work, contender)
        if rounds and not self.values(work, contender):
            return rounds[-1]["cannot"]
        return None

    def ratio(self, work, contender, other, key="figure"):
        """The median over the rounds of one's figure over another's in the same round."""
        return middle(self.ratios(work, contender, other, key))

    def ratios(self, work, contender, other, key="figure"):
        return by_round(self.rounds(work, contender), self.rounds(work, other), key)

    def growth(self, contender, work, base, key):
        """The median over the rounds of a figure over that in another work, in the same round."""
        if self.origins[work] is not self.origins[base]:
            return None
        return middle(by_round(self.rounds(work, contender), self.rounds(base, contender), key))

    def best(self, work, contenders, key="figure", highest=True):
        """Who of the contenders has the best median."""
        medians = {name: self.median(work, name, key) for name in contenders}
        known = {name: value for name, value in medians.items() if value is not None}
        if not known:
            return None
        return (max if highest else min)(known, key=known.get)
