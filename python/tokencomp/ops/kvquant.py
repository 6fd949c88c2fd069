"""Quantization of KV caches: wrappers and fake kernels of the kvquant operators of ``torch.ops.tokencomp``.

Pages of quantized keys and values are in ``tokencomp.ops.kvquant_pages``.
"""

from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokencomp._typed import typed
from tokencomp.ops import _check, _namespace

Axis = Literal["token", "channel"]
Layout = Literal["linear", "mma16_k", "mma16_v"]
Rounding = Literal["even", "away"]
Kind = Literal["int", "fp8"]


class ChannelStats(NamedTuple):
    """Statistics over tokens, each ``[B, H, D]`` float32."""

    absmax: Tensor
    min: Tensor
    max: Tensor
    mean: Tensor


@typed
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
) -> tuple[Tensor, Tensor]:
    """Keys or values as codes of 2, 3, 4 or 8 bits, with a step and a minimum for every group.

    With ``y = (x - pre_bias) * pre_scale`` and L = 2^bits - 1, a group has ``step = fp16((max y - min y) /
    L)`` and ``minimum = fp16(min y)``, rounded *before* codes are fitted to them: ``code = clamp(round((y -
    minimum) / step), 0, L)``, and ``y' = step * code + minimum`` comes back. Arithmetic is float32, one
    rounding an operation: CPU and CUDA make the same bytes. Error: ``step / 2 + 2^-11 (|minimum| + 2 L
    step)``, where the second part is the rounding of the grid itself. Bits an element: ``bits + 32 / group``.

    ``axis="token"``: groups of channels of one token (QServe, arXiv 2405.04532; MiKV, arXiv 2402.18096).
    ``axis="channel"``: groups of tokens of one channel, for keys, whose channels differ in size (KIVI, arXiv
    2402.02750). ``kind="fp8"``: e4m3 codes of ``y / step`` with ``step = fp16(max |y| / 448)`` and minimum 0.

    A group whose values are all equal has step 0 and codes 0: it comes back as its fp16 minimum. A group that
    holds NaN or an infinity, or whose step or minimum is beyond fp16 (65504), gets NaN for both: it comes
    back as NaN, never as a wrong number, and ``params.isnan()`` tells which tokens to keep in 16 bits.

    Args:
        x: ``[B, H, S, D]``, float32, float16 or bfloat16, any strides with D contiguous; D <= 256 and ``D *
            bits`` a multiple of 8 (3 bits: D a multiple of 8). The mma16 layouts take D = 64, 128 or 256 and
            S a multiple of 16.
        bits: 2, 3, 4 or 8; 8 for ``kind="fp8"``.
        group: divides D (``token``) or S (``channel``; mma16 layouts: a multiple of 16); -1 is all of it.
        pre_scale: ``[B, H, D]`` factors, not 0 (MiKV's balancer; 1 / c of ZipCache, arXiv 2405.14256).
        pre_bias: ``[B, H, D]``, taken off first (a frozen mean of keys).
        layout: ``linear`` packs tokens one after the other, channel d in byte ``d % R`` of R = D bits / 8;
            ``mma16_k`` and ``mma16_v`` are the order of tensor-core fragments (``csrc/core/bitpack.h``).
        rounding: of ties in integer codes, to even or away from zero.

    Returns:
        ``codes`` ``[B, H, S, D * bits / 8]`` uint8, and ``params`` float16, (step, minimum) in the last
        dimension: ``[B, H, S, D / group, 2]`` or ``[B, H, S / group, D, 2]``.

    Raises:
        RuntimeError: a shape, dtype, device, choice or number that is not as above.
    """
    codes, params = _namespace.op("kv_quantize")(
        x,
        bits,
        axis=axis,
        group=group,
        pre_scale=_check.as_float32(pre_scale),
        pre_bias=_check.as_float32(pre_bias),
        layout=layout,
        rounding=rounding,
        kind=kind,
    )
    return codes, params


@typed
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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What ``kv_quantize`` stored: ``x' = (step * code + minimum) / pre_scale + pre_bias``.

    Args:
        codes, params: contiguous, as ``kv_quantize`` returns them; the other arguments as given there.
        dtype: float32, float16 or bfloat16, rounded to at the end.

    Returns:
        ``[B, H, S, D]`` of ``dtype``.

    Raises:
        RuntimeError: a shape, dtype, device, choice or number that is not as above.
    """
    x: Tensor = _namespace.op("kv_dequantize")(
        codes,
        params,
        bits,
        axis=axis,
        group=group,
        pre_scale=_check.as_float32(pre_scale),
        pre_bias=_check.as_float32(pre_bias),
        layout=layout,
        kind=kind,
        dtype=dtype,
    )
    return x


@typed
def kv_repack(codes: Tensor, bits: int, source: Layout, target: Layout) -> Tensor:
    """The same codes in another layout.

    Args:
        codes: ``[B, H, S, D * bits / 8]`` uint8, contiguous, in layout ``source``.
        bits: 2, 3, 4, 8, or 16: elements of a 16-bit dtype, viewed as bytes.
        source, target: layouts as in ``kv_quantize``.

    Returns:
        Codes of the same shape in layout ``target``.

    Raises:
        RuntimeError: a shape, dtype, choice or number that is not as above.
    """
    out: Tensor = _namespace.op("kv_repack")(codes, bits, source, target)
    return out


@typed
def hadamard(x: Tensor, signs: Tensor | None = None, *, inverse: bool = False) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension: ``H (signs * x) / sqrt(D)``.

    Spreads outlier channels over all channels before per-token quantization (QuaRot, arXiv 2404.00456).
    Rotate queries with the same signs: dot products are unchanged. Without signs it is its own inverse.

    Args:
        x: ``[..., D]``, float32, float16 or bfloat16, D a power of two up to 256; computed in float32.
        signs: ``[D]`` of 1 and -1.
        inverse: undo it: ``signs * H x / sqrt(D)``.

    Returns:
        Contiguous, shape and dtype of ``x``.

    Raises:
        RuntimeError: a shape, dtype or device that is not as above.
    """
    sheet = x if x.dim() == 4 else x.reshape(1, 1, prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1)
    out: Tensor = _namespace.op("hadamard")(sheet, _check.as_float32(signs), inverse=inverse)
    return out if x.dim() == 4 else out.view(x.shape)


@typed
def channel_stats(x: Tensor, *, lengths: Tensor | None = None, starts: Tensor | None = None) -> ChannelStats:
    """Largest magnitude, minimum, maximum and mean of each channel over the tokens of a sequence.

    What balancers and mean removal are made of (``tokencomp.recipes``). A NaN makes the statistics of its
    channel NaN; an empty range has zeros.

    Args:
        x: ``[B, H, S, D]``, float32, float16 or bfloat16, any strides with D contiguous, D <= 256.
        lengths: ``[B]`` integers: only tokens below count (right padding).
        starts: ``[B]`` integers: only tokens from here on count (left padding).

    Returns:
        ``(absmax, min, max, mean)``, each ``[B, H, D]`` float32.

    Raises:
        RuntimeError: a shape, dtype or device that is not as above.
        ValueError: ``lengths`` or ``starts`` outside [0, S]. Checked on CPU, on CUDA only under
            ``TOKENCOMP_CHECKED=1``, never inside torch.compile; unchecked they are clamped.
    """
    for name, value in (("lengths", lengths), ("starts", starts)):
        if value is not None and x.dim() == 4 and _check.checked(x, value):
            _check.check_within("channel_stats", name, value, 0, x.shape[2], "S")
    out = _namespace.op("channel_stats")(x, lengths=_check.as_int32(lengths), starts=_check.as_int32(starts))
    return ChannelStats(*out.unbind())


# --- fake kernels: shapes -----------------------------------------------------------------------------------


def param_shape(shape: Any, axis: str, group: int) -> tuple[Any, ...]:
    """Shape of the parameters of ``[..., S, D]``."""
    *outer, tokens, size = shape
    if axis == "token":
        return (*outer, tokens, 1 if group == -1 else size // group, 2)
    return (*outer, tokens // group if group != -1 else 1 if tokens else 0, size, 2)


def _check_sheet(op: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise RuntimeError(f"{op}: x must have shape [B, H, S, D], got {list(x.shape)}")


@_namespace.fake("kv_quantize")
def _kv_quantize_fake(
    x: Tensor, bits: int, *, axis: str = "token", group: int, **_: Any
) -> tuple[Tensor, Tensor]:
    _check_sheet("kv_quantize", x)
    *outer, tokens, size = x.shape
    codes = x.new_empty((*outer, tokens, size * bits // 8), dtype=torch.uint8)
    return codes, x.new_empty(param_shape(x.shape, axis, group), dtype=torch.float16)


@_namespace.fake("kv_dequantize")
def _kv_dequantize_fake(codes: Tensor, params: Tensor, bits: int, *, dtype: torch.dtype, **_: Any) -> Tensor:
    *outer, width = codes.shape
    return codes.new_empty((*outer, width * 8 // bits), dtype=dtype)


@_namespace.fake("kv_repack")
def _kv_repack_fake(codes: Tensor, bits: int, source: str, target: str) -> Tensor:
    return torch.empty_like(codes)


@_namespace.fake("hadamard")
def _hadamard_fake(x: Tensor, signs: Tensor | None = None, **_: Any) -> Tensor:
    _check_sheet("hadamard", x)
    return x.new_empty(x.shape)


@_namespace.fake("channel_stats")
def _channel_stats_fake(x: Tensor, **_: Any) -> Tensor:
    _check_sheet("channel_stats", x)
    return x.new_empty((4, x.shape[0], x.shape[1], x.shape[3]), dtype=torch.float32)
