"""The table of what kernels were designed to reach."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from backends import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import targets
from targets import Target

ENTRY: dict[str, Any] = {"what": "w", "family": "f", "case": "^a ", "ours": "tokencomp", "than": "peer"}


def document() -> dict[str, Any]:
    rows = [
        {"family": "f", "case": case, "name": name, "seconds": seconds, "flops": 4e9, "bytes": size}
        for case, name, seconds, size in (
            ("a 1", "tokencomp", 0.5, 1e9),
            ("a 1", "peer", 2.0, 2e9),
            ("a 2", "tokencomp", 1.0, 1e9),
            ("a 2", "peer", 2.0, 2e9),
            ("a 3", "tokencomp", 1.0, 1e9),  # without the peer
            ("b", "tokencomp", 9.0, 1e9),
        )
    ]
    machine = {"cpu": "c", "threads": "2", "clock": "wall", "date": "d"}
    return {"machine": machine, "ceilings": {"f": {"bf16_gflops": 16.0, "copy_gbytes": 4.0}}, "rows": rows}


@pytest.mark.parametrize(
    ("bound", "measured", "met"),
    [
        ({"least": 3}, [4.0, 2.0], [True, False]),
        ({"most": 0.3}, [0.25, 0.5], [True, False]),
        ({"rate": 2}, [2.0, 1.0], [True, False]),
        ({"share": 0.3, "than": "bf16"}, [0.5, 0.25, 0.25], [True, False, False]),
        ({"share": 0.3, "than": "copy"}, [0.5, 0.25, 0.25], [True, False, False]),
    ],
)
def test_measured(bound: dict[str, Any], measured: list[float], met: list[bool]) -> None:
    target = Target.read(ENTRY | bound)
    found = target.measured(document())
    assert found == pytest.approx(measured)
    assert [target.met(value) for value in found] == met


def test_a_target_that_nothing_measures_is_an_error() -> None:
    with pytest.raises(ValueError, match="no measurement of 'tokencomp' in f: 'c'"):
        Target.read(ENTRY | {"case": "c", "least": 1}).measured(document())
    with pytest.raises(ValueError, match="exactly one of least, most, share, rate"):
        Target.read(ENTRY)


def test_what_is_missed_wants_a_reason() -> None:
    entries = [ENTRY | {"least": 3}, ENTRY | {"least": 3, "limit": "memory"}, ENTRY | {"least": 2}]
    text, bare = targets.page(document(), [Target.read(entry) for entry in entries])
    assert bare == ["w"]
    assert "| w | >= 3 times peer | 2.00 to 4.00 | 1 of 2 | memory |" in text
    assert "| w | >= 2 times peer | 2.00 to 4.00 | yes |  |" in text


def test_every_target_is_in_the_committed_results_and_missed_ones_are_explained() -> None:
    results = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    text, bare = targets.page(results, list(targets.every()))
    assert bare == []
    assert Path(ROOT / "bench" / "TARGETS.md").read_text() == text
