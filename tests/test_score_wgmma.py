"""The column sweep with warpgroup products (sm_90a) on the emulator: every case it can take, odd ends,
schedules, the checker, and when it is taken.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases_score import SCORE_CASES, ScoreCase, operator_arguments
from emulator import SCHEDULES, settings
from test_score_emulated import library  # noqa: F401  a fixture
from tokencomp import reference
from torch import Tensor
from yardstick import assert_scores

by_name = {"ids": lambda case: case.name}
PLAN = "TOKENCOMP_SCORE_PLAN"
BASE = ScoreCase(2, 4, 2, 150, 300, 64, "bfloat16")


def taken(case: ScoreCase) -> bool:
    fits = case.D <= 128 and case.D % 8 == 0 and case.softcap is None and case.layout != "sliced"
    return fits and case.B * case.T * case.S > 0 and case.work <= 20_000_000


def in_16_bits(case: ScoreCase) -> ScoreCase:
    return replace(case, dtype="bfloat16", slow=False) if case.dtype == "float32" else case


CASES = list(dict.fromkeys(in_16_bits(case) for case in SCORE_CASES if taken(case)))
# Odd and even numbers of tiles, parts, blocks of keys, heads of a group, each head dimension of a kernel.
CASES += [replace(BASE, T=t) for t in (127, 128, 129, 257, 385)] + [replace(BASE, T=900, S=900, B=1, D=16)]
CASES += [replace(BASE, D=d, dtype="float16") for d in (8, 72, 96, 104, 128)]
CASES += [replace(BASE, Hq=7, Hkv=1, heads="kv_max", reduce="max"), replace(BASE, T=300, S=257, window=40)]


def column_score(library: Any, case: ScoreCase) -> Tensor:  # noqa: F811
    arguments, options = operator_arguments("column_score", case)
    out: Tensor = library.column_score(*arguments, **options)
    return out


def check(library: Any, case: ScoreCase) -> Tensor:  # noqa: F811
    got = column_score(library, case)
    c = case.call()
    want = [
        reference.column_score(c.q, c.k, c.lse, **c.sight, **c.rows, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    ]
    assert_scores(got, *want)
    return got


@pytest.fixture
def plain() -> Any:
    from backends import make_backend

    make_backend("emu")
    return torch.ops.tokencomp_emu


def test_there_are_cases() -> None:
    assert len(CASES) > 80


@pytest.mark.parametrize("case", CASES, **by_name)
def test_column_score(plain: Any, case: ScoreCase) -> None:
    with settings(**{PLAN: "wgmma"}):
        check(plain, case)


RACED = [
    replace(BASE, B=1, T=300, S=270, bias="head", weight="sparse", heads="kv_sum"),
    replace(BASE, B=1, Hq=1, Hkv=1, T=140, S=40, D=96, position="shared", reduce="max", dtype="float16"),
    replace(BASE, Hq=1, Hkv=1, T=70, S=90, D=128, lengths=(90, 20), power=2),
]


@pytest.mark.parametrize("case", RACED, **by_name)
def test_under_the_checker(library: Any, case: ScoreCase) -> None:  # noqa: F811
    with settings(**{PLAN: "wgmma"}):
        check(library, case)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
def test_every_schedule_gives_the_same_bits(library: Any, schedule: dict[str, str]) -> None:  # noqa: F811
    case = replace(BASE, B=1, Hq=2, Hkv=1, T=270, S=40, D=16)
    with settings(**{PLAN: "wgmma"}):
        want = column_score(library, case)
        with settings(**schedule):
            got = column_score(library, case)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "device", "plan"),
    [
        ({}, "sm_90", "wgmma"),
        ({"D": 128}, "sm_90", "wgmma"),
        ({}, "sm_80", "mma"),
        ({"T": 64}, "sm_90", "mma"),
        ({"D": 192}, "sm_90", "mma"),
        ({"softcap": 2.0}, "sm_90", "mma"),
        ({"layout": "sliced"}, "sm_90", "mma"),
    ],
)
def test_which_sweep_is_taken(plain: Any, change: dict[str, Any], device: str, plan: str) -> None:
    """Sums in another order differ in their last bits: that tells which kernel ran."""
    case = replace(BASE, **{"T": 200, **change})
    with settings(TOKENCOMP_EMU_DEVICE=device):
        got = column_score(plain, case)
        with settings(**{PLAN: plan}):
            assert torch.equal(got, column_score(plain, case))
    if plan == "wgmma":
        with settings(**{PLAN: "mma"}):
            assert not torch.equal(got, column_score(plain, case))


@pytest.mark.parametrize(
    ("change", "environment", "why"),
    [
        ({"D": 136}, {}, "D is more than 128"),
        ({"dtype": "float32"}, {}, "float32 has no products of that kind"),
        ({"softcap": 2.0}, {}, "there is a soft cap"),
        ({"layout": "sliced"}, {}, "rows are not whole 16-byte chunks"),
        ({"D": 20}, {}, "rows are not whole 16-byte chunks"),
        ({}, {"TOKENCOMP_EMU_DEVICE": "sm_80"}, "the GPU is not an sm_90"),
    ],
)
def test_a_plan_that_cannot_be(
    plain: Any, change: dict[str, Any], environment: dict[str, str], why: str
) -> None:
    message = re.escape(f"column_score: {PLAN} must name a possible plan, got 'wgmma': {why}")
    with settings(**{PLAN: "wgmma"}, **environment), pytest.raises(RuntimeError, match=message):
        column_score(plain, replace(BASE, **change))


def test_a_plan_that_is_none(plain: Any) -> None:
    message = f"column_score: {PLAN} must be 'mma' or 'wgmma', got 'fast'"
    with settings(**{PLAN: "fast"}), pytest.raises(RuntimeError, match=message):
        column_score(plain, BASE)
