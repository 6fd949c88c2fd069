"""Rows of working tokens and quantized pages as plain lists, which a store is held to."""

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokencomp import reference
from tokencomp.cache import LayerStore
from tokencomp.methods.kv import ChannelMaps, Keep
from tokencomp.ops.kvquant_pages import PageFormat
from tokencomp.reference.page_pools import pool_rows
from torch import Tensor

NEVER = -1.0  # the side array of a slot without a token


@dataclass(eq=False)
class Token:
    position: int
    k: Tensor
    v: Tensor
    score: float


@dataclass(eq=False)
class Page:
    """A quantized page: its bytes and what they say, by the specification."""

    kind: int
    data: Tensor
    tokens: list[Token]


@dataclass(eq=False)
class Row:
    working: list[Token] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    maps: dict[str, Tensor] = field(default_factory=dict)  # those that its pages are written with

    def seen(self, size: int) -> list[tuple[int, Token]]:
        """(type, token) in the order of ``methods.kv``."""
        working = [(0, token) for token in self.working]
        quantized = [(page.kind, token) for page in self.pages for token in page.tokens]
        leads = (
            quantized and len(working) > size and self.working[0].position < self.pages[0].tokens[0].position
        )
        head = working[:size] if leads else []
        return [*head, *quantized, *working[len(head) :]]

    def keep(
        self, slots: list[int], kinds: list[int], formats: list[PageFormat], maps: dict[str, Tensor]
    ) -> None:
        """Only the slots that are listed stay, of the types they should be of."""
        size, seen = formats[0].tokens, self.seen(formats[0].tokens)
        self.maps = self.maps if self.pages else maps
        kept = {id(seen[slot][1]): kind for slot, kind in zip(slots, kinds, strict=True)}
        self.pages = [page for page in self.pages if any(id(token) in kept for token in page.tokens)]
        self.working = [token for token in self.working if id(token) in kept]
        for kind, page in enumerate(formats, 1):
            chosen = [t for t in self.working if kept[id(t)] == kind and able(t, self.maps)]
            chosen = chosen[: len(chosen) // size * size]
            for first in range(0, len(chosen), size):
                self.pages.append(self.quantized(kind, page, chosen[first : first + size]))
            gone = {id(token) for token in chosen}
            self.working = [token for token in self.working if id(token) not in gone]

    def quantized(self, kind: int, page: PageFormat, tokens: list[Token]) -> Page:
        k, v = (torch.stack([getattr(token, name) for token in tokens]) for name in "kv")
        data = reference.kv_page(k, v, page, **self.maps)
        held = zip(tokens, *(read(data, page, half, self.maps).to(k.dtype) for half in "kv"), strict=True)
        return Page(kind, data, [Token(t.position, k, v, t.score) for t, k, v in held])

    def crop(self, seen: int) -> None:
        self.working = [token for token in self.working if token.position < seen]
        whole = [page for page in self.pages if page.tokens[-1].position < seen]
        cut = [t for page in self.pages if page not in whole for t in page.tokens if t.position < seen]
        self.pages = whole
        self.working = sorted([*self.working, *cut], key=lambda token: token.position)


def read(data: Tensor, page: PageFormat, half: Any, maps: dict[str, Tensor]) -> Tensor:
    """``[P, D]`` of one page, by the specification."""
    y = pool_rows(data[None], page, half, dtype=torch.float32)[0]
    y = y / maps[f"{half}_scale"] if f"{half}_scale" in maps else y
    return y + maps[f"{half}_bias"] if f"{half}_bias" in maps else y


def able(token: Token, maps: dict[str, Tensor]) -> bool:
    for name, x in (("k", token.k), ("v", token.v)):
        y = x.float()
        if f"{name}_bias" in maps:
            y = y - maps[f"{name}_bias"]
        if f"{name}_scale" in maps:
            y = y * maps[f"{name}_scale"]
        if not bool((y.abs() <= 65504).all()):
            return False
    return True


@dataclass(eq=False)
class Model:
    """Rows ``[b][h]`` and the tokens seen of each sequence."""

    rows: list[list[Row]]
    seen: list[int]
    formats: list[PageFormat]

    def select(self, order: list[int]) -> None:
        self.rows = [copy.deepcopy(self.rows[b]) for b in order]
        self.seen = [self.seen[b] for b in order]

    def check(self, store: LayerStore) -> None:
        """The store shows exactly these rows, and its pages hold exactly these bytes."""
        size = self.formats[0].tokens
        k, v = store.gather()
        position, kinds, score = store.position(), store.kinds(), store.state["score"]
        assert position.shape == kinds.shape == score.shape == (*store.host_lengths.shape, store.width)
        assert store.size == max(len(row.seen(size)) for rows in self.rows for row in rows)
        for b, rows in enumerate(self.rows):
            for h, row in enumerate(rows):
                seen = row.seen(size)
                n = len(seen)
                assert int(store.lengths[b, h]) == store.host_lengths[b, h] == n
                assert kinds[b, h, :n].tolist() == [kind for kind, _ in seen]
                assert position[b, h, :n].tolist() == [token.position for _, token in seen]
                assert score[b, h, :n].tolist() == [token.score for _, token in seen]
                assert (score[b, h, n:] == NEVER).all()
                for got, name in ((k, "k"), (v, "v")):
                    want = [getattr(token, name) for _, token in seen]
                    if want:
                        torch.testing.assert_close(
                            got[b, h, :n], torch.stack(want), rtol=0, atol=0, equal_nan=True
                        )
                    assert not got[b, h, n:].any()
                if store.tiers is not None:
                    self._check_bytes(store, b, h, row)

    def _check_bytes(self, store: LayerStore, b: int, h: int, row: Row) -> None:
        assert store.tiers is not None
        entries = [entry for entry in store.tiers.entries[b, h].tolist() if entry >= 0]
        assert [entry >> 28 for entry in entries] == [page.kind for page in row.pages]
        for entry, page in zip(entries, row.pages, strict=True):
            pool = store.pool.quantized[page.kind - 1]
            same_page(pool.data[entry & ((1 << 28) - 1)], page.data, pool.format)


def same_page(got: Tensor, want: Tensor, page: PageFormat) -> None:
    """The bytes of all sections; what lies between them means nothing."""
    sizes = [
        page._code_bytes(page.tier_k), page._param_bytes(page.axis_k, page.group_k),
        page._code_bytes(page.tier_v), page._param_bytes(page.axis_v, page.group_v),
    ]  # fmt: skip
    for at, n in zip(page.sections, sizes, strict=True):
        assert torch.equal(got[at : at + n], want[at : at + n])


def books_are_exact(stores: list[LayerStore]) -> None:
    """Pages in use are those of the tables, as often as they are in them."""
    pool = stores[0].pool
    for kind, own in enumerate((pool, *pool.quantized)):
        pages = np.concatenate([store.pages_of(kind) for store in stores])
        assert own.book.in_use == len(set(pages.tolist()))
        assert (own.book.refcount(pages) == np.bincount(pages, minlength=own.capacity)[pages]).all()


def random_keep(
    rng: random.Random, model: Model, kinds: int, maps: ChannelMaps | None, *, all_stay: bool = False
) -> Keep:
    """Keeps and demotes at random, and tells the model; ``all_stay``: and the oldest are demoted."""
    size, lists = model.formats[0].tokens, []
    share, names = (
        1.0 if all_stay else rng.choice([1.0, 0.9, 0.5]),
        ("k_scale", "k_bias", "v_scale", "v_bias"),
    )
    old = all_stay or rng.random() < 0.5  # the oldest go to one type, as most methods have it
    for b, rows in enumerate(model.rows):
        for h, row in enumerate(rows):
            n = len(row.seen(size))
            slots = [slot for slot in range(n) if rng.random() < share]
            kind = [rng.randint(0, kinds) for _ in slots]
            if old:
                edge = max(0, len(slots) - rng.randint(0, size))
                kind = [1 if i < edge else 0 for i in range(len(slots))]
            own = {} if maps is None else zip(names, maps, strict=True)
            given = {name: m[b, h] for name, m in (own if own else []) if m is not None}
            row.keep(slots, kind, model.formats, given)
            lists.append((slots, kind))
    width = max(1, max(len(slots) for slots, _ in lists))
    index, kind = (
        torch.tensor([x + [-1] * (width - len(x)) for x in values], dtype=torch.int32).view(
            len(model.rows), -1, width
        )
        for values in zip(*lists, strict=True)
    )
    return Keep(index, (index >= 0).sum(-1).int(), ragged=True, kind=kind, maps=maps)


def fresh(rng: random.Random, batch: int, heads: int, tokens: int, width: int, dtype: Any) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randint(0, 1 << 30))
    return torch.randn(batch, heads, tokens, width, generator=generator).to(dtype)
