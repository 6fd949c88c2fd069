"""The CUDA kernels of the topk family on the emulator beyond one run per case: every plan, schedule and
device, and the checker that finds races, accesses out of bounds and reads of memory nobody wrote.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases_topk import TopkCase
from emulator import SCHEDULES, settings
from tokencomp import reference

ROOT = Path(__file__).resolve().parent.parent
PLANS = [f"{team},{slots}" for team in ("cluster1", "cluster4", "grid2") for slots in ("resident", "stream")]

ROWS = [
    TopkCase("topk_select", (2, 700), 90, lengths=(700, 33), keep=0.05, options={"head": 3, "tail": 9}),
    TopkCase("topk_select", (2, 1100), 1100, dtype="bfloat16", data="few", k_per_row=(1100, 300)),
    TopkCase("topk_select", (2, 130), 20, dtype="float16", data="odd", keep=0.5, options={"tail": 1}),
    TopkCase("topk_select", (2, 40), 7, data="nan", lengths=(0, 40), options={"head": 50}),
    TopkCase("topp_select", (2, 700), 700, data="softmax", lengths=(650, 700), options={"p": 0.9, "tail": 5}),
    TopkCase("topp_select", (2, 1100), 300, dtype="bfloat16", data="odd", options={"p": 0.5, "min_k": 4}),
    TopkCase("topp_select", (2, 60), 60, data="zero", options={"p": 0.5}),
]
ITEMS = [
    TopkCase("topk_budget", (2, 5, 300), 400, options={"floor": 30}),
    TopkCase("topk_budget", (1, 3, 9000), 2000, dtype="bfloat16", data="few", lengths=(9000, 100, 0)),
    TopkCase("topk_budget", (2, 300, 7), 900, data="odd", options={"floor": 2}),
]
by_name = {"ids": lambda case: case.name}


@pytest.fixture(params=["emu", "emu_race"])
def namespace(request: pytest.FixtureRequest) -> Any:
    """The operators in the plain build, and under the checker."""
    path = ROOT / "build" / "lib" / f"libtokencomp_{request.param}.so"
    if not path.is_file():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: build it with `make test-libraries`")
    torch.ops.load_library(str(path))
    return getattr(torch.ops, f"tokencomp_{request.param}")


def run(namespace: Any, case: TopkCase) -> tuple[torch.Tensor, ...]:
    args, options = case.arguments()
    result = getattr(namespace, case.op)(*args, **options)
    return (result,) if isinstance(result, torch.Tensor) else result


def check(namespace: Any, case: TopkCase) -> None:
    args, options = case.arguments()
    want = getattr(reference, case.op)(*args, **options)
    want = (want,) if isinstance(want, torch.Tensor) else want
    assert all(torch.equal(a, b) for a, b in zip(run(namespace, case), want, strict=True))


@pytest.mark.parametrize("case", ROWS, **by_name)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(namespace: Any, plan: str, case: TopkCase) -> None:
    with settings(TOKENCOMP_TOPK_PLAN=plan):
        check(namespace, case)


@pytest.mark.parametrize("case", ITEMS, **by_name)
def test_budgets(namespace: Any, case: TopkCase) -> None:
    check(namespace, case)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
@pytest.mark.parametrize("plan", PLANS)
def test_every_schedule(namespace: Any, plan: str, schedule: dict[str, str]) -> None:
    with settings(TOKENCOMP_TOPK_PLAN=plan, **schedule):
        for case in (ROWS[0], ROWS[4]):
            check(namespace, case)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
def test_budgets_under_every_schedule(namespace: Any, schedule: dict[str, str]) -> None:
    with settings(**schedule):
        check(namespace, ITEMS[0])


@pytest.mark.parametrize("case", [*ROWS, ITEMS[0]], **by_name)
def test_device_without_clusters(namespace: Any, case: TopkCase) -> None:
    with settings(TOKENCOMP_EMU_DEVICE="sm_80"):
        check(namespace, case)


def test_impossible_plan_is_an_error(namespace: Any) -> None:
    for plan, reason in (
        ("fast", "no plan has this name"),
        ("cluster3,stream", "not a size of a cluster"),
        ("cluster16,stream", "not a size of a cluster"),
        ("grid0,stream", "a team has at least one block"),
        ("grid3,stream", "not all blocks would be resident together"),
    ):
        with settings(TOKENCOMP_TOPK_PLAN=plan), pytest.raises(RuntimeError, match=reason):
            run(namespace, ROWS[0])
    with (
        settings(TOKENCOMP_TOPK_PLAN="cluster2,stream", TOKENCOMP_EMU_DEVICE="sm_80"),
        pytest.raises(RuntimeError, match="no thread-block clusters"),
    ):
        run(namespace, ROWS[0])
