"""The CUDA kernels of the score family on the emulator beyond one run per case: schedules, devices and the
checker that finds races, accesses out of bounds and reads of memory nobody wrote.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_score import ScoreCase, operator_arguments
from emulator import SCHEDULES, settings
from tokencomp import reference
from yardstick import assert_scores

ROOT = Path(__file__).resolve().parent.parent

# One for every kernel shape: both engines, few and many rows, ragged ends, each head dimension of a ring.
SMALL = [
    ScoreCase(1, 4, 2, 70, 90, 40, "bfloat16", bias="head", weight="sparse", heads="kv_sum"),
    ScoreCase(1, 2, 1, 20, 150, 24, bias="masked", position="shared"),
    ScoreCase(2, 3, 1, 3, 140, 17, "float16", lengths=(140, 50), reduce="max", heads="kv_max"),
    ScoreCase(1, 2, 1, 66, 66, 130, "bfloat16", softcap=2.0, layout="sliced"),
    ScoreCase(1, 1, 1, 40, 40, 200, starts=(9,), reduce="max"),
]
NAMES = ("column_score", "diagonal_score", "attention_lse", "qk_scores", "head_vote", "decay_score_")


@pytest.fixture(params=["emu", "emu_race"])
def library(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The operators in the plain build, and under the checker."""
    path = ROOT / "build" / "lib" / f"libtokencomp_{request.param}.so"
    if not path.is_file():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: build it with `make test-libraries`")
    torch.ops.load_library(str(path))
    return getattr(torch.ops, f"tokencomp_{request.param}")


def run(library: Any, name: str, case: ScoreCase) -> tuple[torch.Tensor, ...]:
    arguments, options = operator_arguments(name, case)
    out = getattr(library, name)(*arguments, **options)
    if out is None:
        out = (arguments[0], options["count"], options["last"], options["interval"])
    return out if isinstance(out, tuple) else (out,)


def expected(name: str, case: ScoreCase, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    arguments, options = operator_arguments(name, case)
    if name == "decay_score_":
        score = arguments[0].to(dtype)
        reference.decay_score_(score, *arguments[1:], **options)
        return (score,)
    out = getattr(reference, name)(*arguments, **options, dtype=dtype)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["sm_90", "sm_80"])
def test_every_kernel(library: Any, name: str, case: ScoreCase, device: str) -> None:
    with settings(TOKENCOMP_EMU_DEVICE=device):
        got = run(library, name, case)
    exact, torch32 = (expected(name, case, d) for d in (torch.float64, torch.float32))
    for ours, *want in zip(got, exact, torch32, strict=False):
        assert_scores(ours, *want, what=name)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize("case", SMALL[:3], ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(
    library: Any, name: str, case: ScoreCase, schedule: dict[str, str]
) -> None:
    want = run(library, name, case)
    with settings(**schedule):
        got = run(library, name, case)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
