"""How close is close enough: error(ours) <= 2 x error(same maths by torch in float32) + rounding noise.

Both errors are against float64 on the same data. Nothing here is tuned to an implementation.
"""

import torch
from cases import Inputs
from tokencomp.reference import Replay, replay
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
NOISE = 4 * EPS


def assert_agrees(inputs: Inputs, index: Tensor, value: Tensor) -> None:
    """Hold the picks and values of any implementation of ``kcenter_greedy`` to the specification.

    Every pick is judged after the picks before it. Its score may miss the best available one by twice the
    tolerance (once for each of the two scores), its value the exact one by the tolerance.
    """
    x, k, options = inputs.x, inputs.k, inputs.options
    assert index.dtype == torch.int32
    assert value.dtype == torch.float32
    assert index.shape == value.shape == (x.shape[0], k)
    exact = replay(x, index, **options)
    torch32 = replay(x, index, **options, dtype=torch.float32)
    magnitude = _magnitude(inputs)
    score_tolerance = _tolerance(torch32.score, exact.score, magnitude)
    value_tolerance = _tolerance(torch32.values, exact.values, magnitude)
    wrong = exact.gap > 2 * score_tolerance
    assert not wrong.any(), _report("picks", wrong, index, exact, score_tolerance)
    finite = exact.value.isfinite()
    assert torch.equal(value.double()[~finite], exact.value[~finite]), "values: infinities differ"
    wrong = finite & ~((value.double() - exact.value).abs() <= value_tolerance)
    assert not wrong.any(), _report("values", wrong, value, exact, value_tolerance)


def _tolerance(torch32: Tensor, exact: Tensor, magnitude: float) -> Tensor:
    """``[k]``: twice the largest error of torch's float32 so far, plus rounding of the largest number."""
    both = torch32.isfinite() & exact.isfinite()
    error = torch.where(both, (torch32.double() - exact).abs(), 0.0)
    largest = torch.where(both, exact.abs(), 0.0).clamp(min=magnitude)
    so_far = [t.amax(dim=(0, 2)).cummax(0).values for t in (error, largest)]
    return 2 * so_far[0] + NOISE * so_far[1]


def _magnitude(inputs: Inputs) -> float:
    """Size of one cost before cancellation: rounding is relative to it."""
    metric = inputs.options.get("metric", "cosine")
    if metric == "cosine":
        return 1.0
    square = inputs.x.float().square().sum(-1)
    square = square[square.isfinite()]
    return float(square.max()) if metric == "dot" and square.numel() else 0.0


def _report(what: str, wrong: Tensor, got: Tensor, exact: Replay, tolerance: Tensor) -> str:
    b, j = (int(i) for i in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} wrong {what}, the first in item {b} at pick {j}: got {got[b, j].item()}, "
        f"gap {exact.gap[b, j].item():.3g}, exact value {exact.value[b, j].item():.9g}, "
        f"tolerance {tolerance[j].item():.3g}"
    )


def assert_scores(
    got: Tensor, exact: Tensor, torch32: Tensor, *, what: str = "scores", signed: bool = False
) -> None:
    """Hold numbers to float64 by the yardstick: each may miss by twice torch's largest error at its size.

    Errors are relative to the number's size (at least 1e-30), or, where numbers have signs, to the largest;
    ``signed`` says that they could have, as logarithms do: one near 0 is not more exact than the others.
    """
    assert got.dtype == torch.float32
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, expected {list(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got.double()[~finite], exact[~finite]), f"{what}: infinities or NaN differ"
    if not finite.any():
        return
    ours, want, theirs = got.double()[finite], exact[finite], torch32.double()[finite]
    signed = signed or bool((want < 0).any())
    size = (want.abs().max().expand_as(want) if signed else want).clamp(min=1e-30)
    allowed = 2 * ((theirs - want).abs() / size).max() + NOISE
    error = (ours - want).abs() / size
    assert bool((error <= allowed).all()), f"{what}: relative error {error.max():.3g}, allowed {allowed:.3g}"
