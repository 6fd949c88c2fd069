"""Which tokens the baselines keep."""

import pytest
import torch
from tokencomp import reference


def test_selections_are_complete_ascending_and_in_range() -> None:
    for rows in range(1, 8):
        for columns in (1, 2, 3, 7, 20):
            n = rows * columns
            for k in range(1, n + 1):
                drawn = reference.random_keep(n, k, 2, torch.Generator().manual_seed(k))
                for kept in (
                    reference.grid_keep(rows, columns, k), reference.stride_keep(n, k),
                    reference.ends_keep(n, k), *drawn,
                ):  # fmt: skip
                    assert kept.dtype == torch.int64
                    assert len(kept) == k
                    assert (kept.diff() > 0).all()
                    assert kept[0] >= 0
                    assert kept[-1] < n
                assert reference.stride_keep(n, k)[-1] == n - 1


def test_selections_by_hand() -> None:
    assert reference.stride_keep(10, 4).tolist() == [1, 4, 6, 9]
    assert reference.ends_keep(10, 6).tolist() == [0, 1, 2, 3, 8, 9]
    assert reference.ends_keep(10, 3).tolist() == [0, 1, 2]
    assert reference.grid_keep(4, 4, 4).tolist() == [5, 7, 13, 15]


def test_random_keep_is_uniform_and_nested() -> None:
    rows = reference.random_keep(10, 3, 20_000, torch.Generator().manual_seed(0))
    share = torch.bincount(rows.flatten(), minlength=10) / 20_000
    assert (share - 0.3).abs().max() < 0.015
    few, many = (reference.random_keep(50, k, 1, torch.Generator().manual_seed(3))[0] for k in (7, 20))
    assert set(few.tolist()) < set(many.tolist())


@pytest.mark.parametrize("k", [0, 11])
def test_selections_refuse_what_they_cannot_keep(k: int) -> None:
    for call in (
        lambda: reference.random_keep(10, k, 1, torch.Generator()),
        lambda: reference.stride_keep(10, k),
        lambda: reference.ends_keep(10, k),
        lambda: reference.grid_keep(2, 5, k),
    ):
        with pytest.raises(ValueError, match=rf"k must be in \[1, N=10\], got {k}"):
            call()
