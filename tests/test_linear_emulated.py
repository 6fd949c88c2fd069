"""The CUDA kernel of the linear family on the emulator beyond one run per case: schedules, and the checker
that finds races, accesses out of bounds and reads of memory nobody wrote.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_linear import LinearCase
from emulator import SCHEDULES, settings
from linear_yardstick import check_case

ROOT = Path(__file__).resolve().parent.parent

# Every shape of the kernel: each head dimension and type, ragged ends, parts of the values, a state and none.
SMALL = [
    LinearCase(1, 2, 1, 70, 40, 33, state=True, layout="sliced"),
    LinearCase(2, 1, 1, 33, 64, 64, "bfloat16", lengths=(33, 5)),
    LinearCase(1, 1, 1, 40, 100, 20, "float16", state=True),
    LinearCase(1, 1, 1, 65, 128, 32),
    LinearCase(1, 1, 1, 33, 200, 40, "bfloat16", state=True, layout="hf"),
    LinearCase(1, 2, 2, 1, 256, 7, state=True),
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
def test_every_kernel(library: Any, case: LinearCase, device: str) -> None:
    with settings(TOKENCOMP_EMU_DEVICE=device):
        check_case(library.decay_linear_attention, case)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
@pytest.mark.parametrize("case", SMALL[:2], ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(library: Any, case: LinearCase, schedule: dict[str, str]) -> None:
    arguments, options = case.call()
    want = library.decay_linear_attention(*arguments, **options)
    with settings(**schedule):
        got = library.decay_linear_attention(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
