"""The yardstick for the merge family: judges that hold any implementation to the specification.

Errors are against float64; the tolerance is twice the error of the same maths by torch in float32, plus
rounding.
"""

from typing import Any

import torch
from cases_merge import Call
from tokencomp import reference
from torch import Tensor
from yardstick import NOISE

INF = float("inf")


def tolerance(torch32: Tensor, exact: Tensor) -> float:
    """Twice torch's largest error plus rounding of the largest number, over finite entries."""
    both = torch32.isfinite() & exact.isfinite()
    if not bool(both.any()):
        return 0.0
    error = (torch32[both].double() - exact[both]).abs().max()
    return float(2 * error + NOISE * exact[both].abs().max().clamp(min=1.0))


def assert_matches(call: Call, value: Tensor, index: Tensor) -> None:
    """Every listed column is the next best up to the tolerance, with its own value, and listed once."""
    options = dict(call.options)
    top, least = options.pop("top"), options.pop("min_similarity")
    exact = reference.match_matrix(*call.arguments, **options)
    close = tolerance(reference.match_matrix(*call.arguments, **options, dtype=torch.float32), exact)
    batch, rows, columns = exact.shape
    assert value.dtype == torch.float32
    assert index.dtype == torch.int32
    assert value.shape == index.shape == ((batch, rows) if top == 1 else (batch, rows, top))
    value, index = value.reshape(batch, rows, top).double(), index.reshape(batch, rows, top).long()
    exact = torch.nn.functional.pad(exact, (0, max(0, top - columns)), value=-INF)
    best = exact.sort(dim=-1, descending=True).values[..., :top]
    none = best == -INF
    assert torch.equal(value == -INF, none), "places without a column"
    assert bool((index[none] == -1).all()), "an index where there is no column"
    assert bool(((value - best).abs()[~none] <= close).all()), "a value is not the next best"
    assert torch.equal(index == -1, none | (value < least)), "the zero class"
    listed = exact.gather(-1, index.clamp(min=0))
    assert bool(((listed - value).abs()[index >= 0] <= close).all()), "a value is not that of its column"
    ordered = torch.where(index >= 0, index, -1 - torch.arange(top)).sort(dim=-1).values
    assert bool((ordered[..., 1:] != ordered[..., :-1]).all()), "a column is listed twice"
    assert bool((value[..., 1:] <= value[..., :-1]).all()), "values are not sorted"


def assert_energies(call: Call, energy: Tensor) -> None:
    exact = reference.energy_score(*call.arguments, **call.options)
    torch32 = reference.energy_score(*call.arguments, **call.options, dtype=torch.float32)
    assert energy.dtype == torch.float32
    assert energy.shape == exact.shape
    assert torch.equal(energy == -INF, exact == -INF)
    there = exact != -INF
    assert bool(((energy.double() - exact).abs()[there] <= tolerance(torch32, exact)).all())


def assert_merged(call: Call, y: Tensor, size: Tensor) -> None:
    x, _, out_tokens = call.arguments
    exact, exact_size = reference.merge_tokens(*call.arguments, **call.options)
    torch32, size32 = reference.merge_tokens(*call.arguments, **call.options, dtype=torch.float32)
    assert y.dtype == x.dtype
    assert size.dtype == torch.float32
    assert y.shape == (x.shape[0], out_tokens, x.shape[2])
    _same(size, size32, exact_size)
    _same(y, torch32.to(x.dtype), exact)


def _same(got: Tensor, torch32: Tensor, exact: Tensor) -> None:
    finite = exact.isfinite()
    assert torch.equal(got.double()[~finite].nan_to_num(nan=1.5), exact[~finite].nan_to_num(nan=1.5)), (
        "not finite"
    )
    wrong = (got.double() - exact).abs()[finite] > tolerance(torch32, exact)
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} elements"


def run_reference(name: str, call: Call, **options: Any) -> Any:
    """An operator of the specification in float32."""
    return getattr(reference, name)(*call.arguments, **call.options, **options)
