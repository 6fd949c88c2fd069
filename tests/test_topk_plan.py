"""The CUDA plans of ``topk_select`` and ``topp_select``: pure functions, checked without running a kernel."""

import itertools
from typing import Any

import pytest
from tokencomp import native

H200 = {"sm_count": 132, "smem_per_block": 227 << 10, "max_cluster": 8}
A100 = {"sm_count": 108, "smem_per_block": 163 << 10, "max_cluster": 1}


def plans(device: dict[str, int] = H200, **problem: Any) -> list[dict[str, Any]]:
    """The plan taken, then every candidate."""
    return native.topk_cuda_plans(**{"element_bytes": 4, "by_mass": False} | problem, **device)


def problems() -> list[dict[str, Any]]:
    sizes = (0, 1, 1000, 8192, 32768, 50000, 131072, 1 << 20, 1 << 24)
    return [
        {"R": r, "S": s, "element_bytes": b, "by_mass": m}
        for r, s, b, m in itertools.product((1, 2, 8, 64, 1000, 1 << 20), sizes, (2, 4), (False, True))
    ]


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_plans_fit_the_device(device: dict[str, int]) -> None:
    """There is always a plan, it fits, it is the quickest of those that do, and the others say why not."""
    for problem in problems():
        taken, *candidates = plans(device, **problem)
        possible = [plan for plan in candidates if plan["refused"] is None]
        assert taken["refused"] is None, problem
        assert taken["smem"] <= device["smem_per_block"], problem
        assert taken["microseconds"] == min(plan["microseconds"] for plan in possible), problem
        for plan in possible:
            if plan["name"].startswith("grid"):
                assert problem["R"] * plan["size"] <= device["sm_count"], problem
            else:
                assert plan["size"] <= device["max_cluster"], problem


def test_slots_fit_where_they_are_resident() -> None:
    for problem in problems():
        for plan in plans(**problem)[1:]:
            if plan["refused"] is None and plan["name"].endswith("resident"):
                assert plan["smem"] >= 16384 + 4 * -(-problem["S"] // plan["size"]), problem


def test_longer_rows_get_more_blocks() -> None:
    sizes = [plans(R=1, S=s)[0]["size"] for s in (1000, 8192, 32768, 131072, 1 << 20)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] >= 8


def test_many_rows_get_one_block_each() -> None:
    assert plans(R=1000, S=8192)[0]["name"] == "cluster1,resident"


def test_before_clusters_long_rows_get_a_grid() -> None:
    assert plans(A100, R=1, S=1 << 20)[0]["name"].startswith("grid")
