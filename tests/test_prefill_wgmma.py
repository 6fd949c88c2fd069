"""Prefill attention with warpgroup products (sm_90a) on the emulator: every case it can take, odd ends,
schedules, the checker, and when it is taken.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases_prefill import PREFILL_CASES, PrefillCase, operator_arguments
from cases_score import ScoreCase
from emulator import SCHEDULES, settings
from prefill_yardstick import assert_attention
from test_prefill_emulated import library  # noqa: F401  a fixture
from torch import Tensor

by_name = {"ids": lambda case: case.name}
PLAN = "TOKENCOMP_PREFILL_PLAN"
BASE = ScoreCase(1, 2, 1, 150, 300, 64, "bfloat16")
TILES = 48  # of 128 rows by 128 keys, that a case may have


def in_its_domain(case: PrefillCase) -> PrefillCase:
    """The case in a 16-bit type, with lists for 128 rows."""
    dtype = "bfloat16" if case.base.dtype == "float32" else case.base.dtype
    base = replace(case.base, dtype=dtype, slow=False)
    return replace(case, base=base, block_q=128 if case.lists else case.block_q)


def taken(case: PrefillCase) -> bool:
    c, dv = case.base, case.dv or case.base.D
    fits = max(c.D, dv) <= 128 and c.D % 8 == dv % 8 == 0 and c.softcap is None and c.layout != "sliced"
    tiles = c.B * c.Hq * -(-c.T // 128) * -(-c.S // 128)
    return fits and c.B * c.T > 0 and tiles <= TILES


CASES = list(dict.fromkeys(in_its_domain(case) for case in PREFILL_CASES if taken(case)))
# Odd and even numbers of tiles and items, each head dimension of a kernel, more items than blocks of threads.
CASES += [PrefillCase(replace(BASE, Hq=1, T=t, S=t)) for t in (127, 128, 129, 257, 385, 640)]
CASES += [
    PrefillCase(replace(BASE, T=130, S=260, D=d, dtype="float16"), dv=v) for d, v in ((8, 128), (72, 8))
]
CASES += [
    PrefillCase(replace(BASE, Hq=1, T=300, S=600, D=128), lists="random", columns=c, block_q=128, block_k=k)
    for c, k in (("", 64), ("", 128), ("q", 64), ("one", 128))
]


def flash_prefill(library: Any, case: PrefillCase) -> tuple[Tensor, Tensor]:  # noqa: F811
    arguments, options = operator_arguments(case)
    out: tuple[Tensor, Tensor] = library.flash_prefill(*arguments, **options)
    return out


@pytest.fixture
def plain() -> Any:
    from backends import make_backend

    make_backend("emu")
    return torch.ops.tokencomp_emu


def test_there_are_cases() -> None:
    assert len(CASES) > 80
    assert {case.lists for case in CASES} >= {"", "all", "random", "diagonal", "empty"}


@pytest.mark.parametrize("case", CASES, **by_name)
def test_flash_prefill(plain: Any, case: PrefillCase) -> None:
    with settings(**{PLAN: "wgmma"}):
        got = flash_prefill(plain, case)
    assert_attention(got, *case.call())


@pytest.mark.parametrize("case", [case for case in CASES if case.base.T > 64], **by_name)
def test_the_other_version_on_the_same_cases(plain: Any, case: PrefillCase) -> None:
    """Which an sm_90 takes only when told to."""
    with settings(**{PLAN: "mma"}):
        got = flash_prefill(plain, case)
    assert_attention(got, *case.call())


RACED = [
    PrefillCase(replace(BASE, bias="head", lengths=(260,), starts=(9,)), sinks=True),
    PrefillCase(replace(BASE, Hq=5, T=130, S=200, D=24), None, "random", "q", "one", 128, 64),
    PrefillCase(
        replace(BASE, Hq=1, D=128, dtype="float16", window=90), lists="all", columns="q", block_q=128
    ),
]


@pytest.mark.parametrize("case", RACED, **by_name)
def test_under_the_checker(library: Any, case: PrefillCase) -> None:  # noqa: F811
    with settings(**{PLAN: "wgmma"}):
        got = flash_prefill(library, case)
    assert_attention(got, *case.call())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
@pytest.mark.parametrize("dim", [16, 72])
def test_every_schedule_gives_the_same_bits(library: Any, schedule: dict[str, str], dim: int) -> None:  # noqa: F811
    base = replace(BASE, Hq=1, T=140, S=300, D=dim)
    case = PrefillCase(base, lists="random", columns="q", block_q=128)
    with settings(**{PLAN: "wgmma"}):
        want = flash_prefill(library, case)
        with settings(**schedule):
            got = flash_prefill(library, case)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


WIDE = {"lists": "random", "block_q": 128}


@pytest.mark.parametrize(
    ("change", "options", "device", "plan"),
    [
        ({}, {}, "sm_90", "wgmma"),
        ({"D": 128}, {}, "sm_90", "wgmma"),
        ({}, WIDE, "sm_90", "wgmma"),
        ({}, {}, "sm_80", "mma"),
        ({"T": 64}, {}, "sm_90", "mma"),
        ({"D": 136}, {}, "sm_90", "mma"),
        ({}, {"dv": 136}, "sm_90", "mma"),
        ({"softcap": 2.0}, {}, "sm_90", "mma"),
        ({"layout": "sliced"}, {}, "sm_90", "mma"),
        ({}, {"lists": "random"}, "sm_90", "mma"),
    ],
)
def test_which_version_is_taken(
    plain: Any, change: dict[str, Any], options: dict[str, Any], device: str, plan: str
) -> None:
    """Sums in another order differ in their last bits: that tells which kernel ran."""
    case = PrefillCase(replace(BASE, **change), **options)
    with settings(TOKENCOMP_EMU_DEVICE=device):
        _, got = flash_prefill(plain, case)
        with settings(**{PLAN: plan}):
            assert torch.equal(got, flash_prefill(plain, case)[1])
    if plan == "wgmma":
        with settings(**{PLAN: "mma"}):
            assert not torch.equal(got, flash_prefill(plain, case)[1])


@pytest.mark.parametrize(
    ("change", "options", "environment", "why"),
    [
        ({"D": 136}, {}, {}, "D or Dv is more than 128"),
        ({}, {"dv": 256}, {}, "D or Dv is more than 128"),
        ({"dtype": "float32"}, {}, {}, "float32 has no products of that kind"),
        ({"softcap": 2.0}, {}, {}, "there is a soft cap"),
        ({}, {"lists": "all"}, {}, "lists are for blocks of 64 queries"),
        ({"layout": "sliced"}, {}, {}, "rows are not whole 16-byte chunks"),
        ({"D": 20}, {}, {}, "rows are not whole 16-byte chunks"),
        ({}, {"dv": 20}, {}, "rows are not whole 16-byte chunks"),
        ({}, {}, {"TOKENCOMP_EMU_DEVICE": "sm_80"}, "the GPU is not an sm_90"),
    ],
)
def test_a_plan_that_cannot_be(
    plain: Any, change: dict[str, Any], options: dict[str, Any], environment: dict[str, str], why: str
) -> None:
    message = re.escape(f"flash_prefill: {PLAN} must name a possible plan, got 'wgmma': {why}")
    with settings(**{PLAN: "wgmma"}, **environment), pytest.raises(RuntimeError, match=message):
        flash_prefill(plain, PrefillCase(replace(BASE, **change), **options))


def test_a_plan_that_is_none(plain: Any) -> None:
    message = f"flash_prefill: {PLAN} must be 'mma' or 'wgmma', got 'fast'"
    with settings(**{PLAN: "fast"}), pytest.raises(RuntimeError, match=message):
        flash_prefill(plain, PrefillCase(BASE))
