"""The CUDA kernels of k-center on the emulator beyond one run per case: every plan, schedule and device, and
the checker that finds races, accesses out of bounds and reads of memory nobody wrote.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import Inputs, KCenterCase
from emulator import LAZY_PLANS, PLANS, SCHEDULES, settings
from tokencomp import reference
from yardstick import assert_agrees

ROOT = Path(__file__).resolve().parent.parent

SMALL = [
    KCenterCase(B=1, N=70, C=40, k=9),
    KCenterCase(B=3, N=37, C=24, k=7, objective="max_sum", first="centroid", dtype="bfloat16"),
    KCenterCase(B=2, N=66, C=19, k=66, first="index0", dtype="float16"),
    KCenterCase(B=2, N=41, C=16, k=12, metric="l2", lengths=(41, 5), weighted=True, bad_rows=(2, 7)),
]


@pytest.fixture(params=["emu", "emu_race"])
def kernel(request: pytest.FixtureRequest) -> Iterator[object]:
    """The operator in the plain build, and under the checker."""
    path = ROOT / "build" / "lib" / f"libtokencomp_{request.param}.so"
    if not path.is_file():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: build it with `make test-libraries`")
    torch.ops.load_library(str(path))
    return getattr(torch.ops, f"tokencomp_{request.param}").kcenter_greedy


def run(kernel: object, call: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return kernel(call.x, call.k, **call.options)


def plans_and_cases() -> Iterator[tuple[str, KCenterCase]]:
    for case in SMALL:
        lazy = case.objective == "max_min" and not case.weighted
        for plan in PLANS + (LAZY_PLANS if lazy else []):
            yield plan, case


@pytest.mark.parametrize(
    ("plan", "case"), list(plans_and_cases()), ids=lambda part: getattr(part, "name", part)
)
def test_every_plan(kernel: object, plan: str, case: KCenterCase) -> None:
    call = case.inputs()
    with settings(TOKENCOMP_KCENTER_PLAN=plan):
        assert_agrees(call, *run(kernel, call))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
@pytest.mark.parametrize("plan", PLANS + LAZY_PLANS)
def test_every_schedule_gives_the_same_bits(kernel: object, plan: str, schedule: dict[str, str]) -> None:
    call = SMALL[0].inputs()
    with settings(TOKENCOMP_KCENTER_PLAN=plan):
        want = run(kernel, call)
        with settings(**schedule):
            got = run(kernel, call)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_device_without_clusters(kernel: object, case: KCenterCase) -> None:
    call = case.inputs()
    with settings(TOKENCOMP_EMU_DEVICE="sm_80"):
        assert_agrees(call, *run(kernel, call))


def test_impossible_plan_is_an_error(kernel: object) -> None:
    call = SMALL[0].inputs()
    for plan in ("cluster3000,resident", "grid0,stream", "fast"):
        with (
            settings(TOKENCOMP_KCENTER_PLAN=plan),
            pytest.raises(RuntimeError, match="TOKENCOMP_KCENTER_PLAN"),
        ):
            run(kernel, call)
    weighted = SMALL[3].inputs()
    with (
        settings(TOKENCOMP_KCENTER_PLAN="cluster1,lazy"),
        pytest.raises(RuntimeError, match="stale scores bound the true ones only"),
    ):
        run(kernel, weighted)
    with (
        settings(TOKENCOMP_KCENTER_PLAN="cluster4,stream", TOKENCOMP_EMU_DEVICE="sm_80"),
        pytest.raises(RuntimeError, match="no thread-block clusters"),
    ):
        run(kernel, call)


def test_short_items_are_written(kernel: object) -> None:
    """Holes are written by the kernel: the outputs of empty and short items are complete."""
    call = KCenterCase(B=2, N=9, C=8, k=9, lengths=(0, 3)).inputs()
    index, value = run(kernel, call)
    want, _ = reference.kcenter_greedy(call.x, call.k, **call.options)
    assert torch.equal(index, want)
    assert (value[index < 0] == float("-inf")).all()
