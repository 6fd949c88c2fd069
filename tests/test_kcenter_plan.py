"""The plans of ``kcenter_greedy``: pure functions, checked without running a kernel."""

import itertools
from typing import Any

import pytest
from cases import FIRSTS, OBJECTIVES
from tokencomp import native

MATRIX_LIMIT = 64 << 20  # bytes of N x N floats in flight


def plan(**problem: Any) -> dict[str, Any]:
    return native.kcenter_cpu_plan(**{"item_bytes": 1 << 20} | problem)


def test_few_picks_never_make_a_matrix() -> None:
    assert plan(objective="max_min", B=1, N=2880, k=64, threads=2)["path"] == "lazy"
    assert plan(objective="max_sum", B=1, N=2880, k=64, threads=2)["path"] == "stream"


def test_matrix_pays_earlier_beyond_the_cache() -> None:
    problem = {"objective": "max_sum", "B": 1, "N": 2880, "k": 200, "threads": 2}
    assert plan(**problem, item_bytes=12 << 20)["path"] == "stream"
    assert plan(**problem, item_bytes=47 << 20)["path"] == "gram"


def test_pairs_that_are_needed_anyway_are_kept() -> None:
    problem = {"objective": "max_min", "B": 1, "N": 2880, "threads": 2}
    assert plan(**problem, k=288)["path"] == "lazy"
    assert plan(**problem, k=288, all_pairs=True)["path"] == "gram"
    assert plan(**problem, k=28, all_pairs=True)["path"] == "lazy"
    assert plan(**problem | {"N": 8192}, k=4096, all_pairs=True)["path"] == "lazy"


def test_negative_weights_are_not_lazy() -> None:
    """A stale score bounds the true one only where minima shrink it, which a negative weight turns around."""
    assert (
        plan(objective="max_min", nonnegative_weights=False, B=1, N=2880, k=64, threads=2)["path"] == "stream"
    )


def problems() -> list[dict[str, Any]]:
    """A grid that is dense where plans change."""
    sizes = [1, 2, 63, 64, 577, *range(1000, 9000, 97), 1 << 16, 1 << 20]
    return [
        {"objective": objective, "B": batch, "N": n, "k": max(1, n // part)}
        for objective, batch, n, part in itertools.product(
            OBJECTIVES, (0, 1, 2, 3, 17, 300), sizes, (1, 2, 3, 7, 15, 50)
        )
    ]


def test_matrix_memory_is_bounded() -> None:
    paths = set()
    for problem, threads in itertools.product(problems(), (1, 2, 3, 64)):
        got = plan(**problem, threads=threads)
        paths.add(got["path"])
        if got["path"] == "gram":
            items_in_flight = min(problem["B"], threads) if got["across_items"] else 1
            assert 4 * problem["N"] ** 2 * items_in_flight <= MATRIX_LIMIT, problem
    assert paths == {"lazy", "stream", "gram"}


def test_unknown_objective() -> None:
    with pytest.raises(ValueError, match="objective must be one of 'max_min', 'max_sum', got 'min'"):
        plan(objective="min", B=1, N=1, k=1, threads=1)


H200 = {"sm_count": 132, "smem_per_block": 227 << 10, "max_cluster": 8}
A100 = {"sm_count": 108, "smem_per_block": 163 << 10, "max_cluster": 1}


def cuda(device: dict[str, int] = H200, first: str = "index0", **problem: Any) -> list[dict[str, Any]]:
    """The plan taken, then every candidate."""
    return native.kcenter_cuda_plans(first=first, **{"C": 1024, "element_bytes": 2} | problem, **device)


def cuda_problems() -> list[dict[str, Any]]:
    return [
        {"B": batch, "N": n, "k": max(1, n // part), "element_bytes": size, "first": first}
        for batch, n, part, size, first in itertools.product(
            (1, 2, 16, 256), (1, 63, 576, 2880, 4096, 4097, 65536, 1 << 20), (1, 10, 1000), (2, 4), FIRSTS
        )
    ]


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_cuda_plans_fit_the_device(device: dict[str, int]) -> None:
    """There is always a plan, it fits, it is the quickest of those that do, and the others say why not."""
    for problem in cuda_problems():
        taken, *candidates = cuda(device, **problem)
        possible = [plan for plan in candidates if plan["refused"] is None]
        assert taken["refused"] is None, problem
        assert taken["smem"] <= device["smem_per_block"], problem
        assert taken["microseconds"] == min(plan["microseconds"] for plan in possible), problem
        assert all(plan["refused"] for plan in candidates if plan not in possible)
        for plan in possible:
            clusters = plan["name"].startswith("cluster") and not plan["name"].startswith("cluster1,")
            assert not clusters or device["max_cluster"] > 1, problem
            assert not plan["name"].startswith(("gram", "grid")) or plan["blocks"] <= device["sm_count"], (
                problem
            )


def test_cuda_matrix_memory_is_bounded() -> None:
    for problem in cuda_problems():
        gram = next(plan for plan in cuda(**problem)[1:] if plan["name"] == "gram")
        if problem["N"] > 4096:
            assert gram["refused"] is not None
        elif gram["refused"] is None:
            assert 4 * problem["N"] ** 2 * gram["items"] <= MATRIX_LIMIT, problem
            assert gram["items"] >= 1


def test_cuda_lazy_needs_scores_that_shrink() -> None:
    def refused(shrinking: bool) -> set[str | None]:
        plans = cuda(B=1, N=2880, k=288, shrinking=shrinking)[1:]
        return {plan["refused"] for plan in plans if plan["name"].endswith("lazy")}

    assert None in refused(shrinking=True)
    assert refused(shrinking=False) == {"stale scores bound the true ones only under max_min without weights"}


def test_cuda_target_shape() -> None:
    """The floor of the design's target, (1, 576, 1024, 58) in bf16 on an H200, leaves room for 60 us."""
    taken = cuda(B=1, N=576, k=58, first="largest_nn")[0]
    assert taken["name"] == "gram"
    assert 10 < taken["microseconds"] < 60


def test_cuda_unknown_rule() -> None:
    with pytest.raises(
        ValueError, match="first must be one of 'largest_nn', 'index0', 'centroid', got 'last'"
    ):
        cuda(B=1, N=1, k=1, first="last")
