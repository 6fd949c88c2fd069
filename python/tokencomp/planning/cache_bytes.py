"""What caches hold, by the arithmetic of the code that allocates them; tests compare with real ones."""

from dataclasses import dataclass
from typing import Any

import torch

from tokencomp.cache.pool import SLACK
from tokencomp.cache.tables import places_for
from tokencomp.methods.eviction import Evicting
from tokencomp.methods.quantizing import Quantizing, page_format
from tokencomp.planning.shapes import Shape

INT = 4  # bytes of an entry of tables, lengths and positions
PROMPT = 8  # bytes a sequence: its length as methods remember it


@dataclass(frozen=True)
class Bytes:
    """Of one cache."""

    pages: int  # of keys and values after the prompt: pages with their grids, free slots of last pages
    side: int  # tables, lengths, positions, queries that the method keeps
    other: int  # layers with sliding attention
    most: int  # that are allocated at a time while tokens are generated: pages are copied when they get more
    bits: float  # an element of keys and values takes

    @property
    def held(self) -> int:
        """After the prompt."""
        return self.pages + self.side + self.other


def models_own(shape: Shape, prompt: int, new: int, batch: int, dtype: torch.dtype) -> Bytes:
    """Of transformers' ``DynamicCache``, which copies the keys of a layer, then the values, in every step."""
    token = 2 * shape.kv_heads * shape.head_dim * dtype.itemsize * batch
    other = _sliding(shape, prompt, batch, dtype)
    end = shape.layers * token * (prompt + new) + _sliding(shape, prompt + new, batch, dtype)
    return Bytes(
        pages=shape.layers * token * prompt,
        side=0,
        other=other,
        most=end + (token * (prompt + new) // 2 if new else 0),
        bits=8.0 * dtype.itemsize,
    )


def paged(
    shape: Shape,
    method: Any,
    prompt: int,
    new: int,
    batch: int,
    dtype: torch.dtype,
    *,
    page: int,
    chunk: int | None = None,
) -> Bytes:
    """Of a ``PagedKVCache`` with ``method``: one of those that quantize, or that evict a fixed number.

    Args:
        shape: of the model.
        method: ``Uniform``, ``Tiered``, ``SnapKV`` and others whose heads hold equal numbers of tokens.
        prompt: tokens of each sequence's prompt.
        new: tokens generated after it.
        batch: sequences.
        dtype: of the model.
        page: slots of a page.
        chunk: tokens of a forward where the prompt comes in several; None: in one.
    """
    after = _at(shape, method, prompt, prompt, batch, dtype, page)
    other = _sliding(shape, prompt, batch, dtype)
    if new == 0 and chunk is None:
        return Bytes(after.bytes, after.side, other, after.bytes + after.side + other, after.bits)
    end = _at(shape, method, prompt, prompt + new, batch, dtype, page)
    extra = 0 if chunk is None else batch * shape.kv_heads * _pages(min(chunk, prompt), page)
    counts = {kind: count + (extra if kind is None else 0) for kind, count in end.counts.items()}
    grown = sum((n + n // SLACK) * end.sizes[kind] for kind, n in counts.items())
    copied = max(n * end.sizes[kind] for kind, n in counts.items())
    most = grown + copied + max(after.side, end.side) + _sliding(shape, prompt + new, batch, dtype)
    return Bytes(after.bytes, after.side, other, most, after.bits)


@dataclass(frozen=True)
class _Pools:
    """Pages by type, None: in the working dtype."""

    counts: dict[Any, int]
    sizes: dict[Any, int]
    side: int
    bits: float

    @property
    def bytes(self) -> int:
        return sum(n * self.sizes[kind] for kind, n in self.counts.items())


def _at(
    shape: Shape, method: Evicting, prompt: int, tokens: int, batch: int, dtype: torch.dtype, page: int
) -> _Pools:
    """After ``tokens``, of which ``prompt`` were the prompt; behind it, the most there can be."""
    if isinstance(method, Quantizing):
        return _quantized(shape, method, prompt, tokens, batch, dtype, page)
    rows, width = batch * shape.kv_heads, 2 * shape.head_dim * dtype.itemsize
    budgets = method.resolve(prompt, shape.layers, rows=rows, slot_bytes=width, page=page)
    every = tokens - prompt if method.every == 0 else min(tokens - prompt, method.every)
    count = side = 0
    for budget in budgets:
        slots = min(budget, prompt) + every
        kept = slots if budget < prompt else 0
        count += rows * _pages(slots, page)
        side += _side(rows, batch, _pages(slots, page), kept)
    if tokens == prompt:
        side += shape.layers * batch * shape.heads * _window(method) * width // 2
    return _Pools({None: count}, {None: page * width}, side, 8.0 * dtype.itemsize)


def _window(method: Any) -> int:
    """Queries of the prompt that are kept until the first decode step."""
    return int(getattr(method, "window", 0))


def _quantized(
    shape: Shape, method: Quantizing, prompt: int, tokens: int, batch: int, dtype: torch.dtype, page: int
) -> _Pools:
    rows, width = batch * shape.kv_heads, 2 * shape.head_dim * dtype.itemsize
    held = method.resolve(tokens, shape.layers, rows=rows, slot_bytes=width, page=page)[0]
    waiting = 0 if tokens == prompt else len(method.specs) * (page - 1) + max(0, method.every - 1)
    counts: dict[Any, int] = {None: 0}
    sizes: dict[Any, int] = {None: page * width}
    side, bits, slots = 0, 0.0, 0
    for layer in range(shape.layers):
        placed = method.placed(held, page, layer, shape.layers)
        pages = sum(placed.values()) // page
        rest = min(tokens, held - pages * page + waiting)
        counts[None] += rows * _pages(rest, page)
        for spec, count in placed.items():
            form = page_format(spec, page, shape.head_dim)
            counts[spec] = counts.get(spec, 0) + rows * count // page
            sizes[spec] = form.page_bytes
            bits += form.bits * count
        bits += 8.0 * dtype.itemsize * rest
        slots += rest + pages * page
        side += _side(rows, batch, _pages(rest, page), rest if pages or held < tokens else 0, pages, page)
    return _Pools(counts, sizes, side, bits / max(1, slots))


def _side(rows: int, batch: int, working: int, kept: int, quantized: int = 0, page: int = 1) -> int:
    """Of a layer: table, length and base of each row, positions of what an eviction left; and the same of
    quantized pages and of both together.
    """
    own = INT * (rows * (places_for(working) + 2 + kept) + batch) + PROMPT * batch
    if not quantized:
        return own
    return own + INT * rows * (quantized * page + places_for(working + quantized) + 1)


def _sliding(shape: Shape, tokens: int, batch: int, dtype: torch.dtype) -> int:
    held = min(tokens, max(0, shape.window - 1))
    return 2 * shape.sliding * shape.kv_heads * shape.head_dim * dtype.itemsize * batch * held


def _pages(slots: int, page: int) -> int:
    return -(-slots // page)
