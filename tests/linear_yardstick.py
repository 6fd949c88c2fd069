"""How close is close enough for linear attention; see yardstick.py."""

from typing import Any

import torch
from cases_linear import LinearCase
from tokencomp import reference
from torch import Tensor
from yardstick import NOISE


def check_case(operator: Any, case: LinearCase) -> None:
    """Run a case through ``decay_linear_attention`` and hold it to the yardstick.

    Outputs may miss by twice what the recurrence in float32 by torch misses, rounded to the working type, at
    the size of the largest output; states likewise.
    """
    arguments, options = case.call()
    got = operator(*arguments, **options)
    exact = reference.decay_linear_attention(*arguments, **options)
    torch32 = reference.decay_linear_attention(*arguments, **options, dtype=torch.float32)
    dtype = arguments[0].dtype
    for what, ours, want, theirs, kind in zip(
        ("out", "state"), got, exact, (torch32[0].to(dtype), torch32[1]), (dtype, torch.float32), strict=True
    ):
        assert ours.dtype == kind
        assert ours.is_contiguous()
        _assert_close(what, ours.double(), want, theirs.double())


def _assert_close(what: str, ours: Tensor, want: Tensor, theirs: Tensor) -> None:
    assert ours.shape == want.shape
    if not want.numel():
        return
    allowed = 2 * (theirs - want).abs().max() + NOISE * want.abs().max()
    error = (ours - want).abs().max()
    assert bool(error <= allowed), f"{what}: error {error:.3g}, allowed {allowed:.3g}"
