"""The CUDA kernels of the paged cache on the emulator beyond one run per case: every kernel and branch under
the checker that finds races, accesses out of bounds and reads of memory nobody wrote, and other schedules.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import Backend
from cases_kvcache import LAYOUTS, KVCase
from emulator import SCHEDULES, settings
from kvcache_yardstick import bits, check_all, run_in_place
from tokencomp.ops import _namespace

ROOT = Path(__file__).resolve().parent.parent

# Units of 16 bytes and of one element, rows longer than a tile of a compaction, several tiles of members.
CASES = [
    KVCase(((150, 3), (0, 90)), D=32, P=32, T=5, padded="left", dtype="bfloat16", layout=layout)
    for layout in LAYOUTS
] + [
    KVCase(((70,), (33,)), D=20, Dv=7, dtype="float16", T=3, padded="right"),
    KVCase(((600,),), D=8, P=64, T=2, keep=0.6),
    KVCase(((300,),), D=5, keep=0.3),
]


@pytest.fixture(params=["emu", "emu_race"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The operators in the plain build, and under the checker."""
    path = ROOT / "build" / "lib" / f"libtokencomp_{request.param}.so"
    if not path.is_file():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: build it with `make test-libraries`")
    torch.ops.load_library(str(path))
    _namespace.add_namespace(f"tokencomp_{request.param}")
    return Backend(request.param, f"tokencomp_{request.param}", "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operators(kernels: Backend, case: KVCase) -> None:
    check_all(kernels, case)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
@pytest.mark.parametrize("case", CASES[2:4], ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(kernels: Backend, case: KVCase, schedule: dict[str, str]) -> None:
    merge = (*case.kept(), case.members(), *case.mixture())
    for name, arguments, options in (
        ("kv_append_", case.tokens()[0], {}),
        ("kv_compact_", case.kept(), {}),
        ("kv_compact_", case.kept(), {"order": "holefill"}),
        ("evict_merge_", merge, {"keys": "direction", "by_norm": True}),
    ):
        want = run_in_place(kernels, name, case.cache(), *arguments, **options)
        with settings(**schedule):
            got = run_in_place(kernels, name, case.cache(), *arguments, **options)
        for x, y in zip(got.parts[:2], want.parts[:2], strict=True):
            assert torch.equal(bits(x), bits(y)), name
