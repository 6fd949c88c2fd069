"""The CUDA kernel of the prefill family on the emulator beyond one run per case: schedules, devices and the
checker that finds races, accesses out of bounds and reads of memory nobody wrote.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_prefill import PrefillCase, operator_arguments
from cases_prefill_pages import FORMATS, PagedCase
from cases_prefill_pages import operator_arguments as paged_arguments
from cases_score import ScoreCase
from emulator import SCHEDULES, settings
from prefill_yardstick import assert_attention

ROOT = Path(__file__).resolve().parent.parent

# Every shape of the kernel: both engines, 64 and 128 rows, each head dimension; lists, columns, ragged ends.
BASE = ScoreCase(1, 2, 1, 70, 150, 40, "bfloat16")
SMALL = [
    PrefillCase(replace(BASE, bias="head", softcap=2.0), sinks=True),
    PrefillCase(replace(BASE, T=150, D=24, window=80), 24, "random", "q", "kv", 128, 128),
    PrefillCase(replace(BASE, T=20, D=90, dtype="float16", lengths=(140,), starts=(9,))),
    PrefillCase(replace(BASE, D=128, dtype="float16", layout="sliced"), lists="random", columns="q"),
    PrefillCase(replace(BASE, Hq=1, D=180), lists="random", columns="one", block_k=128),
    PrefillCase(replace(BASE, Hq=1, T=66, S=66, D=250), dv=200),
    PrefillCase(replace(BASE, dtype="float32", position="shared"), lists="random", columns="q"),
    PrefillCase(replace(BASE, Hq=1, T=33, S=70, D=130, dtype="float32", causal=False), dv=17),
]

# Every way to read a page: rows and pieces of rows, each format, sixteen tokens at a time and single columns.
MIXED = PagedCase(1, 2, 1, 70, 64, 16, 9, "bfloat16", tuple(FORMATS), maps=True)
PAGED = [
    MIXED,
    replace(MIXED, lists=True, holes=True, P=32, places=5),
    replace(MIXED, T=130, D=128, P=64, places=3, dtype="float16"),
    replace(MIXED, Hq=1, T=20, D=256, dtype="float32", rows="left", only=True),
    PagedCase(1, 2, 1, 70, 40, 16, 9, "bfloat16", holes=True, layout="slots", bias="head"),
    PagedCase(1, 2, 1, 30, 33, 32, 4, "float32", lists=True, dv=24),
]


@pytest.fixture(params=["emu", "emu_race"])
def library(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The operators in the plain build, and under the checker."""
    path = ROOT / "build" / "lib" / f"libtokencomp_{request.param}.so"
    if not path.is_file():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: build it with `make test-libraries`")
    torch.ops.load_library(str(path))
    return getattr(torch.ops, f"tokencomp_{request.param}")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("device", ["sm_90", "sm_80"])
def test_every_kernel(library: Any, case: PrefillCase, device: str) -> None:
    arguments, options = operator_arguments(case)
    with settings(TOKENCOMP_EMU_DEVICE=device):
        got = library.flash_prefill(*arguments, **options)
    assert_attention(got, *case.call())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
@pytest.mark.parametrize("case", [SMALL[1], SMALL[3], SMALL[6]], ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(
    library: Any, case: PrefillCase, schedule: dict[str, str]
) -> None:
    arguments, options = operator_arguments(case)
    want = library.flash_prefill(*arguments, **options)
    with settings(**schedule):
        got = library.flash_prefill(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.name)
@pytest.mark.parametrize("device", ["sm_90", "sm_80"])
def test_pages(library: Any, case: PagedCase, device: str) -> None:
    arguments, options = paged_arguments(case, "mma16")
    with settings(TOKENCOMP_EMU_DEVICE=device):
        got = library.flash_prefill(*arguments, **options)
    assert_attention(got, *case.call("mma16"))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
def test_every_schedule_gives_pages_the_same_bits(library: Any, schedule: dict[str, str]) -> None:
    arguments, options = paged_arguments(PAGED[1], "mma16")
    want = library.flash_prefill(*arguments, **options)
    with settings(**schedule):
        got = library.flash_prefill(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
