"""The layouts of quantized codes in plain PyTorch: where each code lies, written from the fragments of
``mma.m16n8k16`` rather than from the C++ header, so that the two can be held against each other.
"""

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["linear", "mma16_k", "mma16_v"]

BLOCK = 16  # tokens of a block of the mma16 layouts


def _keys(width: int, t: Tensor, d: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Byte and shift of fields of keys in a block of 16 tokens."""
    j, e, c, h = d // 16, d % 2, d % 8 // 2, d % 16 // 8
    row, half = t % 8, t // 8
    steps = size // 16  # of 16 channels
    if width == 16:
        words = 2 * steps
        return _chunked(t * 4 * words, c, 2 * j + h, words, 4) * 4 + 2 * e, 0 * d
    if width == 8:
        return _chunked(t * 4 * steps, c, j, steps, 4) * 4 + 2 * h + e, 0 * d
    if width == 4:
        words = steps // 2
        n = 4 * e + 2 * (j % 2) + h
        return _chunked(t * 4 * words, c, j // 2, words, 4) * 4 + n // 2, n % 2 * 4
    if width == 2:
        words = steps // 4  # of one token; a row holds those of t and t + 8
        n = 8 * e + 2 * (j % 4) + h
        at = _chunked(row * 8 * words, c, half * words + j // 4, 2 * words, 4)
        return at * 4 + n // 4, n % 4 * 2
    place = half * 2 * steps + 2 * j + h  # among the bits of equal e
    n = 16 * e + place % 16
    words = max(1, steps // 4)
    at = _chunked(row * 4 * words, c, place // 16, words, 4)
    return at * 4 + n // 8, n % 8


def _values(width: int, t: Tensor, d: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Byte and shift of fields of values in a block of 16 tokens."""
    m, g, e, c, h = d // 8, d % 8, t % 2, t % 8 // 2, t // 8
    lane, steps = 4 * g + c, size // 8
    if width == 16:
        return _chunked(0 * d, lane, 2 * m + h, 2 * steps, 32) * 4 + 2 * e, 0 * d
    if width == 8:
        return _chunked(0 * d, lane, m, steps, 32) * 4 + 2 * h + e, 0 * d
    per = {4: 2, 2: 4, 1: 8}[width]  # steps of a word
    n = 16 // width * e + 2 * (m % per) + h
    at = _chunked(0 * d, lane, m // per, steps // per, 32)
    return at * 4 + n * width // 8, n * width % 8


def _chunked(base: Tensor, lane: Tensor, word: Tensor, words: int, lanes: int) -> Tensor:
    """Number of a word: lanes read chunks of up to four words, one chunk of all lanes after the other."""
    chunk = min(4, words)
    return base + word // chunk * lanes * chunk + lane * chunk + word % chunk


def places(layout: Layout, width: int, size: int) -> tuple[Tensor, Tensor]:
    """Byte and shift, each ``[tokens, size]``, of every field of a unit: a row, or a block of 16 tokens."""
    d = torch.arange(size)
    if layout == "linear":
        if width == 16:
            return 2 * d[None], 0 * d[None]
        row = size * width // 8
        return (d % row)[None], (d // row * width)[None]
    t, d = torch.arange(BLOCK)[:, None].expand(BLOCK, size), d.expand(BLOCK, size)
    return (_keys if layout == "mma16_k" else _values)(width, t, d, size)


def _planes(bits: int) -> list[tuple[int, int]]:
    """Width and first bit of each plane."""
    return [(2, 0), (1, 2)] if bits == 3 else [(bits, 0)]


def pack(codes: Tensor, bits: int, layout: Layout) -> Tensor:
    """Integer codes ``[..., S, D]`` as bytes ``[..., S, D * bits / 8]``; 16-bit codes too."""
    *outer, tokens, size = codes.shape
    unit = 1 if layout == "linear" else BLOCK
    blocks = codes.reshape(-1, unit * size).to(torch.int64)
    parts = []
    for width, first in _planes(bits):
        byte, shift = (p.reshape(-1) for p in places(layout, width, size))
        field = (blocks >> first) & ((1 << width) - 1)
        out = torch.zeros(blocks.shape[0], unit * size * width // 8, dtype=torch.int64)
        if width == 16:
            out.index_add_(1, byte, field & 255)
            out.index_add_(1, byte + 1, field >> 8)
        else:
            out.index_add_(1, byte, field << shift)
        parts.append(out)
    return torch.cat(parts, 1).to(torch.uint8).reshape(*outer, tokens, size * bits // 8)


def unpack(packed: Tensor, bits: int, layout: Layout) -> Tensor:
    """The inverse of ``pack``: int64 codes ``[..., S, D]``."""
    *outer, tokens, width_bytes = packed.shape
    size, unit = width_bytes * 8 // bits, 1 if layout == "linear" else BLOCK
    blocks = packed.reshape(-1, unit * width_bytes).to(torch.int64)
    codes = torch.zeros(blocks.shape[0], unit * size, dtype=torch.int64)
    begin = 0
    for width, first in _planes(bits):
        byte, shift = (p.reshape(-1) for p in places(layout, width, size))
        if width == 16:
            codes = blocks[:, byte] | blocks[:, byte + 1] << 8
        else:
            codes |= (blocks[:, begin + byte] >> shift & ((1 << width) - 1)) << first
        begin += unit * size * width // 8
    return codes.reshape(*outer, tokens, size)
