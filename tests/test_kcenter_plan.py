"""The CPU plan of ``kcenter_greedy``: a pure function, checked without running a kernel."""

import itertools
from typing import Any

import pytest
from cases import OBJECTIVES
from tokencomp import _host

MATRIX_LIMIT = 64 << 20  # bytes of N x N floats in flight


def plan(**problem: Any) -> dict[str, Any]:
    return _host.kcenter_cpu_plan(**problem)


def test_few_picks_never_make_a_matrix() -> None:
    assert plan(objective="max_min", B=1, N=2880, k=64, threads=2)["path"] == "lazy"
    assert plan(objective="max_sum", B=1, N=2880, k=64, threads=2)["path"] == "stream"


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
