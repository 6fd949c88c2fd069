"""Quantization of KV caches in plain PyTorch: the specification of the kvquant family.

With ``dtype=torch.float32`` it makes the very bytes that the operators make; with float64 it is what their
errors are measured against.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from tokencomp.reference.kvquant_layout import Layout, pack, unpack

Axis = Literal["token", "channel"]
Rounding = Literal["even", "away"]
Kind = Literal["int", "fp8"]

LARGEST_FP8 = 448.0


def kv_quantize(
    x: Tensor,
    bits: int,
    *,
    axis: Axis = "token",
    group: int,
    pre_scale: Tensor | None = None,
    pre_bias: Tensor | None = None,
    layout: Layout = "linear",
    rounding: Rounding = "even",
    kind: Kind = "int",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """As ``ops.kv_quantize``; all arithmetic in ``dtype``."""
    y = x.to(dtype)
    if pre_bias is not None:
        y = y - pre_bias[:, :, None].to(dtype)
    if pre_scale is not None:
        y = y * pre_scale[:, :, None].to(dtype)
    groups = _grouped(y, axis, group)
    step, minimum = _grid(groups, _across(axis), bits, kind)
    usable = step > 0
    scaled = (groups - minimum.to(dtype)) / torch.where(usable, step, 1).to(dtype)
    if kind == "fp8":
        fp8 = scaled.nan_to_num(0.0).clamp(-LARGEST_FP8, LARGEST_FP8).float().to(torch.float8_e4m3fn)
        codes = fp8.view(torch.uint8).to(torch.int64)
    else:
        inside = scaled.nan_to_num(0.0).clamp(0, 2**bits - 1)
        codes = (inside.round() if rounding == "even" else round_away(inside)).to(torch.int64)
    codes = torch.where(usable, codes, 0)
    across = _across(axis)
    params = torch.stack([step.squeeze(across), minimum.squeeze(across)], -1)
    return pack(codes.reshape(x.shape), bits, layout), params


def kv_dequantize(
    codes: Tensor,
    params: Tensor,
    bits: int,
    *,
    axis: Axis = "token",
    group: int,
    pre_scale: Tensor | None = None,
    pre_bias: Tensor | None = None,
    layout: Layout = "linear",
    kind: Kind = "int",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """As ``ops.kv_dequantize``; arithmetic and result in ``dtype``."""
    integers = unpack(codes, bits, layout)
    number = integers.to(dtype)
    if kind == "fp8":
        number = integers.to(torch.uint8).view(torch.float8_e4m3fn).to(dtype)
    step, minimum = params.to(dtype).unbind(-1)
    across = _across(axis)
    y = _grouped(number, axis, group) * step.unsqueeze(across) + minimum.unsqueeze(across)
    x = y.reshape(integers.shape)
    if pre_scale is not None:
        x = x / pre_scale[:, :, None].to(dtype)
    if pre_bias is not None:
        x = x + pre_bias[:, :, None].to(dtype)
    return x


def kv_repack(codes: Tensor, bits: int, source: Layout, target: Layout) -> Tensor:
    """As ``ops.kv_repack``."""
    return pack(unpack(codes, bits, source), bits, target)


def hadamard(
    x: Tensor, signs: Tensor | None = None, *, inverse: bool = False, dtype: torch.dtype = torch.float64
) -> Tensor:
    """As ``ops.hadamard``; a product with the matrix."""
    size = x.shape[-1]
    matrix = torch.ones(1, 1, dtype=dtype)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    y = x.to(dtype)
    if signs is not None and not inverse:
        y = y * signs.to(dtype)
    y = y @ matrix / math.sqrt(size)
    return y * signs.to(dtype) if signs is not None and inverse else y


def channel_stats(
    x: Tensor,
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``ops.channel_stats``; absmax, min, max and mean in ``dtype``."""
    batch, heads, tokens, size = x.shape
    t = torch.arange(tokens)
    inside = torch.ones(batch, tokens, dtype=torch.bool)
    if lengths is not None:
        inside &= t < lengths[:, None]
    if starts is not None:
        inside &= t >= starts[:, None]
    out = torch.zeros(4, batch, heads, size, dtype=dtype)
    for b in range(batch):
        if bool(inside[b].any()):
            rows = x[b][:, inside[b]].to(dtype)
            stats = rows.abs().amax(1), rows.amin(1), rows.amax(1), rows.mean(1)
            out[:, b] = torch.stack([torch.where(rows.isnan().any(1), math.nan, s) for s in stats])
    absmax, smallest, largest, mean = out.unbind()
    return absmax, smallest, largest, mean


def round_away(x: Tensor) -> Tensor:
    """Nearest whole number of numbers that are not negative, halves upwards."""
    return x.floor() + (x - x.floor() >= 0.5)


def _grouped(y: Tensor, axis: Axis, group: int) -> Tensor:
    """``[B, H, S, D / group, group]``, or ``[B, H, S / group, group, D]`` along channels."""
    b, h, s, d = y.shape
    if axis == "token":
        group = d if group == -1 else group
        return y.reshape(b, h, s, d // group, group)
    group = max(s, 1) if group == -1 else group
    return y.reshape(b, h, s // group, group, d)


def _across(axis: Axis) -> int:
    """The dimension of a group's elements."""
    return -1 if axis == "token" else 3


def _grid(groups: Tensor, across: int, bits: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """Step and minimum in float16, the dimension of the group kept; NaN where they cannot be held."""
    smallest, largest = groups.amin(across, keepdim=True), groups.amax(across, keepdim=True)
    if kind == "fp8":
        step = (torch.maximum(largest, -smallest) / LARGEST_FP8).half()
        minimum = torch.zeros_like(step)
    else:
        step = ((largest - smallest) / (2**bits - 1)).half()
        minimum = smallest.half()
    held = groups.isfinite().all(across, keepdim=True) & step.isfinite() & minimum.isfinite()
    return torch.where(held, step, math.nan), torch.where(held, minimum, math.nan)
