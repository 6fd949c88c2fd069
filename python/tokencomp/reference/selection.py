"""Which tokens the baselines keep: chance, even steps, and the two ends. All int64, ascending.

Every method has to beat these, so they protect nothing by themselves: ``random_keep`` may drop the first or
the last token, ``stride_keep`` always keeps the last one, ``ends_keep`` both ends.
"""

import math

import torch
from torch import Generator, Tensor

SINKS = 4


def _check(name: str, n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"{name}: k must be in [1, N={n}], got {k}")


def random_keep(n: int, k: int, rows: int, generator: Generator) -> Tensor:
    """``[rows, k]``: in each row k of n tokens, all sets equally likely. Drawn on the CPU."""
    _check("random_keep", n, k)
    return torch.rand(rows, n, generator=generator).argsort(dim=1)[:, :k].sort(dim=1).values


def stride_keep(n: int, k: int) -> Tensor:
    """``[k]``: the last token of each of k equal parts of n tokens, ``(i + 1) * n // k - 1``."""
    _check("stride_keep", n, k)
    return (torch.arange(k) + 1) * n // k - 1


def grid_keep(rows: int, columns: int, k: int) -> Tensor:
    """``[k]``: tokens of a raster of ``rows`` x ``columns``, at nearly equal steps in both directions."""
    _check("grid_keep", rows * columns, k)
    lines = min(rows, max(math.ceil(k / columns), round(math.sqrt(k * rows / columns))))
    kept = []
    for line in range(lines):
        count = k * (line + 1) // lines - k * line // lines
        row = (2 * line + 1) * rows // (2 * lines)
        kept += [row * columns + (2 * i + 1) * columns // (2 * count) for i in range(count)]
    return torch.tensor(kept)


def ends_keep(n: int, k: int, sinks: int = SINKS) -> Tensor:
    """``[k]``: the first ``sinks`` tokens (at most k) and the last ones (StreamingLLM, arXiv 2309.17453)."""
    _check("ends_keep", n, k)
    first = min(sinks, k)
    return torch.cat([torch.arange(first), torch.arange(n - k + first, n)])
