"""How close is close enough for prefill attention; see yardstick.py."""

from typing import Any

import torch
from cases_prefill import PrefillCase
from tokencomp import reference
from torch import Tensor
from yardstick import NOISE, assert_scores


def assert_attention(
    got: tuple[Tensor, Tensor], arguments: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    """Hold ``(out, lse)`` to float64.

    Outputs may miss by twice what the same arithmetic in float32 by torch misses, with probabilities and
    outputs rounded to the working type, at the size of the largest output.
    """
    q, dtype = arguments[0], arguments[0].dtype
    exact = reference.flash_prefill(*arguments, **options)
    torch32 = reference.flash_prefill(*arguments, **options, dtype=torch.float32, round_to=dtype)
    out, lse = got
    assert out.dtype == dtype
    assert out.shape == exact[0].shape == (*q.shape[:3], arguments[2].shape[-1])
    assert out.is_contiguous()
    assert_scores(lse, exact[1], torch32[1], what="lse", signed=True)
    finite = exact[0].isfinite()
    assert torch.equal(out.isnan(), exact[0].isnan())
    if not finite.any():
        return
    ours, want, theirs = out.double()[finite], exact[0][finite], torch32[0].double()[finite]
    size = want.abs().max()
    allowed = 2 * (theirs - want).abs().max() + NOISE * size
    error = (ours - want).abs().max()
    assert bool(error <= allowed), f"out: error {error:.3g}, allowed {allowed:.3g}"
    nothing = exact[1] == -torch.inf
    assert bool((out[nothing] == 0).all())


def check_case(flash_prefill: Any, case: PrefillCase) -> None:
    """Run a case through ``flash_prefill`` and hold it to the yardstick."""
    arguments, options = case.call()
    assert_attention(flash_prefill(*arguments, **options), arguments, options)
