"""The CUDA kernels of the decode family on the emulator beyond one run per case: schedules, devices and the
checker that finds races, accesses out of bounds and reads of memory nobody wrote.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_decode import DecodeCase, StatesCase
from cases_decode_types import TypesCase
from decode_yardstick import assert_attention
from emulator import SCHEDULES, settings

ROOT = Path(__file__).resolve().parent.parent

# One for every kernel shape: each head dimension of a ring, rows that are not whole chunks, float32, several
# blocks of rows, ragged rows, lists, masks by row.
SMALL = [
    DecodeCase(1, 4, 1, 1, (150,), 64, "bfloat16", 32, logits=True),
    DecodeCase(1, 7, 1, 3, (140,), 96, "float16", 16, window=60, position="both"),
    DecodeCase(2, 4, 2, 1, (70, 0, 33), 128, "bfloat16", 64, lists="counted", bias="masked", sinks=True),
    DecodeCase(1, 2, 1, 2, (66,), 256, "float16", 16, layout="engine", softcap=2.0),
    DecodeCase(1, 2, 1, 1, (40,), 33, "bfloat16", 32, pages="holes"),
    DecodeCase(1, 5, 1, 4, (90,), 80, "float32", 16, lists="some", logits=True),
    DecodeCase(1, 2, 1, 1, (40,), 200, "float32", 64, window=9),
]

# Pages of several types: every tier, axis and size of step; each head dimension, rows of a block, page size.
MIXED = ("int4c+int2t32", "int8t64+int8c", "int2t+int3c", "int3t32+int4t", "fp8c+fp8t", "int4t+int4c16")
TYPES = [
    TypesCase(MIXED[:5], 1, 4, 1, 1, (333,), 128, "bfloat16", 64, logits=True, tail="any"),
    TypesCase(MIXED, 1, 16, 1, 1, (150,), 128, "float16", 32, maps="k_scale k_bias v_scale v_bias"),
    TypesCase(MIXED, 1, 7, 1, 3, (140,), 64, "bfloat16", 16, window=60, position=True, tail="any"),
    TypesCase(
        MIXED[:3], 2, 4, 2, 1, (70, 0, 133), 64, "float16", 64, lists="counted", bias="masked", sinks=True
    ),
    TypesCase(MIXED[2:4], 1, 2, 1, 2, (100,), 256, "float16", 64, softcap=2.0, holes=True),
    TypesCase(MIXED, 1, 3, 1, 2, (70,), 64, "float32", 16, logits=True),
]
TYPES = [case.on("emu") for case in TYPES]


@pytest.fixture(params=["emu", "emu_race"])
def library(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The operators in the plain build, and under the checker."""
    path = ROOT / "build" / "lib" / f"libtokencomp_{request.param}.so"
    if not path.is_file():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: build it with `make test-libraries`")
    torch.ops.load_library(str(path))
    return getattr(torch.ops, f"tokencomp_{request.param}")


def run(library: Any, case: DecodeCase | TypesCase) -> tuple[torch.Tensor, ...]:
    arguments, options = case.arguments()
    out: tuple[torch.Tensor, ...] = library.paged_decode(*arguments, **options)
    return out


@pytest.mark.parametrize("parts", ["", "1", "3"])
@pytest.mark.parametrize("case", SMALL + TYPES, ids=lambda case: case.name)
@pytest.mark.parametrize("device", ["sm_90", "sm_80"])
def test_every_kernel(library: Any, case: DecodeCase | TypesCase, device: str, parts: str) -> None:
    with settings(TOKENCOMP_EMU_DEVICE=device, TOKENCOMP_DECODE_PARTS=parts):
        got = run(library, case)
    assert_attention(case, got[0], got[1], got[2])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
@pytest.mark.parametrize("case", SMALL + TYPES, ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(
    library: Any, case: DecodeCase | TypesCase, schedule: dict[str, str]
) -> None:
    with settings(TOKENCOMP_DECODE_PARTS="3"):
        want = run(library, case)
        with settings(**schedule):
            got = run(library, case)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("off", [1, 4])
def test_working_pages_that_are_not_aligned(library: Any, off: int) -> None:
    """Beside quantized pages: their rows are copied element by element."""
    (q, k, v, *rest), options = TYPES[0].arguments()
    want = library.paged_decode(q, k, v, *rest, **options)
    k, v = (torch.cat([x, x, x], -1)[..., off : off + 128] for x in (k, v))
    k, v = (x.copy_(y) for x, y in zip((k, v), TYPES[0].arguments()[0][1:3], strict=True))
    got = library.paged_decode(q, k, v, *rest, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("empty", ["", "some"])
def test_merge_states(library: Any, empty: str) -> None:
    (out, lse), _ = StatesCase(3, (2, 5), 70, "bfloat16", empty).call()
    got, total = library.merge_states(out, lse)
    known = torch.where(lse.isnan(), -torch.inf, lse)
    torch.testing.assert_close(total, known.logsumexp(0), rtol=1e-6, atol=1e-6)
    weight = torch.exp(known - total)[..., None]
    want = torch.where(weight > 0, weight * out.float(), 0.0).sum(0)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=1e-2)


def test_plan_asked_for_must_be_possible(library: Any) -> None:
    with (
        settings(TOKENCOMP_DECODE_PARTS="65"),
        pytest.raises(
            RuntimeError, match=r"paged_decode: TOKENCOMP_DECODE_PARTS must be in \[1, 64\], got '65'"
        ),
    ):
        run(library, SMALL[0])
