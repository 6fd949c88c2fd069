"""The decode family against float64 by the yardstick of torch in the working dtype."""

from typing import Any

import torch
from cases_decode import DecodeCase
from cases_decode_types import TypesCase
from tokencomp import reference
from torch import Tensor
from yardstick import NOISE, assert_scores

# Largest relative error of one rounding to the dtype: our roundings are not where torch's are.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_dense(arguments: tuple[Any, ...], options: dict[str, Any]) -> Call:
    """The call on keys and values as torch would keep them: dequantized to the dtype of q, without pages."""
    q, k_pages, v_pages, table, lengths = arguments
    options = dict(options)
    quantized = options.pop("quantized")
    halves = ((k_pages, "k"), (v_pages, "v"))
    found = [
        reference.paged_rows(pages, table, quantized=quantized, half=half, dtype=torch.float32)
        for pages, half in halves
    ]
    there = found[0][1]
    bias = torch.where(there, 0.0, -torch.inf)
    if options.get("key_bias") is not None:
        bias = bias + options["key_bias"][..., : bias.shape[-1]]
    rows = [rows.to(q.dtype) for rows, _ in found]
    return (q, *rows, None, lengths), options | {"key_bias": bias}


def attention_in(dtype: torch.dtype, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """What torch's fused attention computes: float32 logits and sums, the rest rounded to ``dtype``."""
    q, _, v_pages, table, lengths = arguments
    asked = {**options, "logits_out": True, "dtype": torch.float32}
    _, lse, z = reference.paged_decode(*arguments, **asked)
    top = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), 0.0)
    top = top.nan_to_num(neginf=0.0)
    p = torch.exp(z - top)
    v = v_pages if table is None else reference.paged_rows(v_pages, table)[0]
    v = v.repeat_interleave(q.shape[1] // lengths.shape[1], dim=1)
    v = torch.where((z > -torch.inf).any(2)[..., None], v, torch.zeros((), dtype=v.dtype))
    share = torch.exp(top - lse[..., None])
    out = (p.to(dtype).float() @ v.float()) * torch.where(lse[..., None] > -torch.inf, share, 0.0)
    return out.to(dtype).float()


def assert_attention(case: DecodeCase | TypesCase, out: Tensor, lse: Tensor, logits: Tensor) -> None:
    """``out`` by the yardstick, ``lse`` and ``logits`` against float32 torch."""
    arguments, options = case.call()
    dtype = arguments[0].dtype
    exact = reference.paged_decode(*arguments, **options)
    plain: Call = arguments, options
    if options.get("quantized") is not None:
        plain = as_dense(arguments, options)
    torch32 = reference.paged_decode(*plain[0], **plain[1], dtype=torch.float32)
    assert out.dtype == dtype
    assert_scores(lse, exact[1], torch32[1], what="lse", signed=True)
    assert_scores(logits, exact[2], torch32[2], what="logits")
    assert_close(out, exact[0], attention_in(dtype, *plain), what="out")


def assert_close(out: Tensor, exact: Tensor, theirs: Tensor, *, what: str) -> None:
    """Errors relative to the largest element; twice the peer's, plus one rounding."""
    assert out.shape == exact.shape, f"{what}: shape {list(out.shape)}, expected {list(exact.shape)}"
    if not exact.numel():
        return
    size = exact.abs().max().clamp(min=1e-30)
    allowed = 2 * (theirs.double() - exact).abs().max() / size + ROUNDING[out.dtype] + NOISE
    error = (out.double() - exact).abs().max() / size
    assert error <= allowed, f"{what}: relative error {error:.3g}, allowed {allowed:.3g}"
