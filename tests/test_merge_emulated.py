"""The CUDA kernels of the merge family on the emulator beyond one run per case: every kernel and branch under
the checker that finds races, accesses out of bounds and reads of memory nobody wrote, and other schedules.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_merge import Call, EnergyCase, MatchCase
from cases_merge_map import MODES, MapCase, MergeCase, StepCase
from emulator import SCHEDULES, settings
from merge_yardstick import assert_energies, assert_matches, assert_merged, run_reference

ROOT = Path(__file__).resolve().parent.parent

MATCHES = [
    MatchCase(B=1, Na=70, Nb=131, C=40),  # columns split among three blocks
    MatchCase(B=3, Na=37, Nb=50, C=64, dtype="bfloat16", layout="halves"),  # one split, chunks of 16 bytes
    MatchCase(B=2, Na=66, Nb=65, C=24, dtype="float16", Ka=31, Kb=80, weighted=True, masked=True, bad=(2, 7)),
    MatchCase(B=1, Na=65, Nb=70, C=19, C2=8, alpha=0.3, band=9, protect=(2, 3)),
    MatchCase(B=1, Na=70, Nb=70, C=12, itself=False),
    MatchCase(B=1, Na=70, Nb=70, C=12, itself=False, top=5, Ka=33, Kb=66),
    MatchCase(B=2, Na=20, Nb=90, C=16, top=7, dtype="bfloat16"),
    MatchCase(B=1, Na=67, Nb=40, C=9, top=32, band=12, zero=(3,), min_similarity=0.1),
]
ENERGIES = [
    EnergyCase(B=1, N=70, C=24),
    EnergyCase(B=2, N=64, C=17, kind="gauss", dtype="float16", prefix=3, masked=True, bad=(9,)),
    EnergyCase(B=1, N=130, C=8, kind="paper", dtype="bfloat16", margin=0.9),
]
MAPS = [
    MapCase(2, 61, 13, prefix=5, ties=True),
    MapCase(1, 700, 200, order="similarity", holes=0.2),
    MapCase(2, 40, 9, lists=(20, 11, 6), prefix=2, order="position"),
    MapCase(2, 40, 20, lists=(20, 11, 6), prefix=0),
]
MERGES = [
    *(MergeCase(2, 41, 37, 23, mode=m, sized=True, weighted=True, dtype="bfloat16") for m in MODES),
    *(MergeCase(2, 40, 64, 17, mode=m, sized=True) for m in MODES),  # chunks of 16 bytes
    MergeCase(1, 300, 8, 2, dtype="float16"),  # long groups
    MergeCase(1, 64, 1, 13000),  # more counters than shared memory holds
]
STEPS = [StepCase(2, 70, 24, 16, 20, prefix=2), StepCase(1, 41, 9, 8, 7, lists=(9, 9, 20), dtype="bfloat16")]


@pytest.fixture(params=["emu", "emu_race"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The operators in the plain build, and under the checker."""
    path = ROOT / "build" / "lib" / f"libtokencomp_{request.param}.so"
    if not path.is_file():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: build it with `make test-libraries`")
    torch.ops.load_library(str(path))
    return getattr(torch.ops, f"tokencomp_{request.param}")


by_name = {"ids": lambda case: case.name}


@pytest.mark.parametrize("case", MATCHES, **by_name)
def test_match(kernels: Any, case: MatchCase) -> None:
    call = case.inputs()
    assert_matches(call, *kernels.cosine_match(*call.arguments, **call.options))


@pytest.mark.parametrize("case", ENERGIES, **by_name)
def test_energy(kernels: Any, case: EnergyCase) -> None:
    call = case.inputs()
    assert_energies(call, kernels.energy_score(*call.arguments, **call.options))


@pytest.mark.parametrize("case", MAPS, **by_name)
def test_map(kernels: Any, case: MapCase) -> None:
    call = case.inputs()
    got = kernels.bipartite_map(*call.arguments, **call.options)
    assert torch.equal(got, run_reference("bipartite_map", call))


@pytest.mark.parametrize("case", MERGES, **by_name)
def test_merge(kernels: Any, case: MergeCase) -> None:
    call = case.inputs()
    assert_merged(call, *kernels.merge_tokens(*call.arguments, **call.options))


@pytest.mark.parametrize("case", STEPS, **by_name)
def test_step(kernels: Any, case: StepCase) -> None:
    call = case.inputs()
    y, size, token_map = kernels.bipartite_merge(*call.arguments, **call.options)
    options = {key: call.options[key] for key in ("mode", "size", "weight")}
    assert_merged(Call((call.arguments[0], token_map, y.shape[1]), options), y, size)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
def test_every_schedule_gives_the_same_bits(kernels: Any, schedule: dict[str, str]) -> None:
    calls = [
        (kernels.cosine_match, MATCHES[0]),
        (kernels.cosine_match, MATCHES[4]),
        (kernels.energy_score, ENERGIES[0]),
        (kernels.bipartite_map, MAPS[2]),
        (kernels.merge_tokens, MERGES[0]),
    ]
    for operator, case in calls:
        call = case.inputs()
        want = operator(*call.arguments, **call.options)
        with settings(**schedule):
            got = operator(*call.arguments, **call.options)
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else ((got, want),)
        assert all(torch.equal(*pair) for pair in pairs), case.name
