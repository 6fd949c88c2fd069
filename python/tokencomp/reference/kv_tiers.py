"""Quantized pages of one layer's cache in plain tensors: which slots are in which, and in what order.

The specification of what a store does with ``Keep.kind`` and ``Keep.maps``; a page is not stored, its keys
and values are replaced by what dequantizing it gives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokencomp.methods.kv import ChannelMaps, Keep, PageSpec
from tokencomp.ops.kvquant import Axis
from tokencomp.ops.kvquant_pages import TIER_BITS, Tier
from tokencomp.reference.kvquant import Kind, kv_dequantize, kv_quantize


class Tiers:
    """Page types of the slots of all rows.

    Args:
        formats: of the page types 1, 2, ...
        shape: ``(B, Hkv, width)``.
        page: slots of a page.
    """

    def __init__(self, formats: Sequence[PageSpec], shape: tuple[int, int, int], page: int) -> None:
        self.formats, self.page = formats, page
        self.kind = torch.zeros(shape, dtype=torch.int32)
        self.number = torch.full(shape, -1, dtype=torch.int64)  # of the quantized page a slot is in
        self.maps: dict[tuple[int, int], ChannelMaps] = {}
        self.made = 0

    def quantize(self, k: Tensor, v: Tensor, position: Tensor, keep: Keep, b: int, h: int) -> Tensor:
        """Do to row (b, h), ``[width, D]`` keys and values, what ``keep`` says of kinds, in place.

        A token with a channel that float16 cannot hold, after the maps, is not quantized. ``position`` is
        ``[width]``. Returns the slots that stay, in their new order.
        """
        kept = keep.index[b, h, : int(keep.count[b, h])].long()
        if keep.kind is not None:
            wanted = keep.kind[b, h, : len(kept)]
            for kind in range(1, len(self.formats) + 1):
                fresh = kept[(wanted == kind) & (self.kind[b, h, kept] == 0)]
                fresh = fresh[self._fits(k[fresh], v[fresh], keep.maps, b, h)]
                for slots in fresh[: len(fresh) // self.page * self.page].split(self.page):
                    if len(slots):
                        self._write(k, v, slots, kind, keep.maps, b, h)
        return self._order(kept, position, b, h)

    def _maps(self, maps: ChannelMaps | None, b: int, h: int) -> ChannelMaps:
        """Those of the row's first quantized page."""
        if (b, h) in self.maps:
            return self.maps[b, h]
        return ChannelMaps(*(() if maps is None else (None if t is None else t[b, h] for t in maps)))

    def _fits(self, k: Tensor, v: Tensor, maps: ChannelMaps | None, b: int, h: int) -> Tensor:
        own, fits = self._maps(maps, b, h), torch.ones(len(k), dtype=torch.bool)
        for x, scale, bias in ((k, own.k_scale, own.k_bias), (v, own.v_scale, own.v_bias)):
            y = x.float() - (0.0 if bias is None else bias)
            y = y * (1.0 if scale is None else scale)
            fits &= (y.abs() <= torch.finfo(torch.float16).max).all(-1)
        return fits

    def _write(
        self, k: Tensor, v: Tensor, slots: Tensor, kind: int, maps: ChannelMaps | None, b: int, h: int
    ) -> None:
        spec, found = self.formats[kind - 1], self._maps(maps, b, h)
        self.maps[b, h] = found
        k[slots] = through(k[slots], spec.k, spec.k_axis, spec.k_group, found.k_scale, found.k_bias)
        v[slots] = through(v[slots], spec.v, spec.v_axis, spec.v_group, found.v_scale, found.v_bias)
        self.kind[b, h, slots], self.number[b, h, slots] = kind, self.made
        self.made += 1

    def _order(self, kept: Tensor, position: Tensor, b: int, h: int) -> Tensor:
        """A page of the first slots that are not quantized, quantized pages as they came, the others.

        That page leads where there are more such slots, and they begin before what is quantized. A quantized
        page stays as long as one of its slots does.
        """
        number = self.number[b, h]
        plain = kept[number[kept] < 0]
        pages = [(number == n).nonzero()[:, 0] for n in number[kept].unique().tolist() if n >= 0]
        leads = len(plain) > self.page and bool(pages) and position[plain[0]] < position[pages[0][0]]
        first = self.page if leads else 0
        return torch.cat([plain[:first], *pages, plain[first:]])


def through(
    x: Tensor, tier: Tier, axis: Axis, group: int, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """What comes back of a page ``x`` ``[P, D]`` stored as ``tier``, in its dtype."""
    there = x.shape[1] if axis == "token" else x.shape[0]
    kind: Kind = "fp8" if tier == "fp8" else "int"
    scale, bias = (None if t is None else t.float()[None, None] for t in (scale, bias))
    options = {"axis": axis, "group": min(group, there), "pre_scale": scale, "pre_bias": bias, "kind": kind}
    page, bits = x.float()[None, None], TIER_BITS[tier]
    codes, params = kv_quantize(page, bits, dtype=torch.float32, **options)  # type: ignore[arg-type]
    return kv_dequantize(codes, params, bits, dtype=torch.float32, **options)[0, 0].to(x.dtype)  # type: ignore[arg-type]
