"""Pages of quantized keys and values in plain PyTorch: the specification of their bytes."""

from typing import Any

import torch
from torch import Tensor

from tokencomp.ops.kvquant_pages import TIER_BITS, PageFormat
from tokencomp.reference.kvquant import kv_quantize


def kv_page(
    k: Tensor,
    v: Tensor,
    page: PageFormat,
    *,
    k_scale: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> Tensor:
    """``[page_bytes]`` uint8 of one page without empty slots, 0 between its sections.

    ``k``, ``v`` are ``[P, D]``, the maps ``[D]``; as ``ops.kv_page_write_`` writes it.
    """
    out = torch.zeros(page.page_bytes, dtype=torch.uint8)
    maps = {"k": (k_scale, k_bias), "v": (v_scale, v_bias)}
    starts = iter(page.sections)
    for which, x in (("k", k), ("v", v)):
        scale, bias = (None if m is None else m[None, None] for m in maps[which])
        stored = kv_quantize(
            x[None, None], TIER_BITS[_of(page, "tier", which)], pre_scale=scale, pre_bias=bias,
            dtype=torch.float32, **_options(page, which),
        )  # fmt: skip
        for part in stored:
            data, start = part.contiguous().view(torch.uint8).flatten(), next(starts)
            out[start : start + data.numel()] = data
    return out


def _of(page: PageFormat, name: str, which: str) -> Any:
    return getattr(page, f"{name}_{which}")


def _options(page: PageFormat, which: str) -> dict[str, Any]:
    return {
        "axis": _of(page, "axis", which),
        "group": _of(page, "group", which),
        "layout": "linear" if page.layout == "linear" else f"mma16_{which}",
        "kind": "fp8" if _of(page, "tier", which) == "fp8" else "int",
    }
