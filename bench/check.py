"""Compares two result files of bench/run.py, or of one bench, and names the ratios that got worse.

    python bench/check.py OLD.json NEW.json [--limit 0.2]

A ratio is a peer's time over ours, both of one run. It got worse where it fell by more than the limit even
after all four times are granted their noise: what odd and even repeats disagree by. Peers count with their
own changes too; the lines say who moved. Exit status: 0 nothing got worse, 1 something did, 2 the files
cannot be compared: they are of different machines or have no ratio in common.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAME = ("cpu", "isa", "threads", "clock", "gpu")  # facts of a machine that two runs must share
LIMIT = 0.2

Document = dict[str, Any]
Key = tuple[str, str, str, str]  # family, case, ours, peer


@dataclass(frozen=True)
class Ratio:
    """Of one run."""

    ours: float  # seconds
    peer: float
    noise: float

    @property
    def value(self) -> float:
        return self.peer / self.ours


def ratios(document: Document) -> dict[Key, Ratio]:
    """All of a run: every measurement of ours against every baseline of its case."""
    peers: dict[tuple[str, str], list[Document]] = {}
    for row in document["rows"]:
        if row["baseline"]:
            peers.setdefault((row["family"], row["case"]), []).append(row)
    return {
        (row["family"], row["case"], row["name"], peer["name"]): Ratio(
            row["seconds"], peer["seconds"], row.get("noise", 0.0) + peer.get("noise", 0.0)
        )
        for row in document["rows"]
        if not row["baseline"]
        for peer in peers.get((row["family"], row["case"]), [])
    }


def worse(old: Ratio, new: Ratio, limit: float) -> bool:
    return new.value * (1 + old.noise + new.noise) < old.value * (1 - limit)


def line(key: Key, old: Ratio, new: Ratio) -> str:
    family, case, name, peer = key
    change, noise = new.value / old.value - 1, old.noise + new.noise
    return (
        f"{family}: {case}: {name} x {peer} {old.value:.2f} -> {new.value:.2f} ({change:+.0%}, "
        f"noise {noise:.0%}; {name} takes {new.ours / old.ours:.2f} of its time before, "
        f"{peer} {new.peer / old.peer:.2f})"
    )


def summary(old: dict[Key, Ratio], new: dict[Key, Ratio]) -> list[str]:
    """The geometric mean of each family's changes, and what the new run no longer has."""
    lines = []
    for family in sorted({key[0] for key in old.keys() | new.keys()}):
        keys = [key for key in old.keys() & new.keys() if key[0] == family]
        gone = sum(key[0] == family for key in old.keys() - new.keys())
        text = f"{family}: {len(keys)} ratios"
        if keys:
            mean = math.exp(sum(math.log(new[key].value / old[key].value) for key in keys) / len(keys))
            text += f", on average {mean:.2f} of before"
        lines.append(text + (f"; {gone} not measured any more" if gone else ""))
    return lines


def compare(before: Document, after: Document, limit: float = LIMIT) -> int:
    """Print what changed; the exit status."""
    for fact in SAME:
        then, now = (document["machine"].get(fact) for document in (before, after))
        if then != now:
            print(f"check.py: cannot compare: {fact} is {now}, was {then}")
            return 2
    old, new = ratios(before), ratios(after)
    if not old.keys() & new.keys():
        print("check.py: cannot compare: no ratio in common")
        return 2
    print("\n".join(summary(old, new)))
    found = [key for key in new if key in old and worse(old[key], new[key], limit)]
    for key in sorted(found, key=lambda key: new[key].value / old[key].value):
        print(f"worse: {line(key, old[key], new[key])}")
    print(f"{len(found)} ratios fell by more than {limit:.0%} and noise")
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--limit", type=float, default=LIMIT, help="share of a ratio that may be lost")
    args = parser.parse_args()
    return compare(json.loads(args.old.read_text()), json.loads(args.new.read_text()), args.limit)


if __name__ == "__main__":
    raise SystemExit(main())
