"""Slots and pages of other engines' caches: their layouts by strides, scores, selection, compaction."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tokencomp import integrations as tc
from tokencomp import methods, recipes
from tokencomp.integrations import KeptSlots, PagedKV
from torch import Tensor

LENS = [37, 0, 64, 1, 50]
HEADS, DIM, VDIM = 2, 8, 6


@dataclass
class Engine:
    """The same tokens in an engine's pages and dense."""

    pages: PagedKV
    buffers: list[Tensor]
    k: Tensor  # [B, Hkv, S, D], zeros behind the last
    v: Tensor


def table_of(page: int, lens: list[int]) -> tuple[Tensor, int]:
    """Pages in a random order; what is behind a sequence's last one must not be looked at."""
    need = [-(-n // page) for n in lens]
    order = torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(page)).int()
    table = torch.full((len(lens), max(need) + 1), 10**6, dtype=torch.int32)
    for b, (n, row) in enumerate(zip(need, order.split([*need, 3])[:-1], strict=True)):
        table[b, :n] = row
    return table, sum(need) + 3


def fill(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def put(layout: str, page: int, dtype: torch.dtype = torch.float32) -> Engine:
    table, count = table_of(page, LENS)
    lens = torch.tensor(LENS, dtype=torch.int32)
    k, v = (
        fill((len(LENS), HEADS, max(LENS), DIM), dtype, 1),
        fill((len(LENS), HEADS, max(LENS), DIM), dtype, 2),
    )
    shape = (count, 2, HEADS, page, DIM) if layout == "hnd" else (count, 2, page, HEADS, DIM)
    both = torch.full(shape, float("nan"), dtype=dtype)
    inner = both if layout == "hnd" else both.transpose(2, 3)
    for b, n in enumerate(LENS):
        k[b, :, n:], v[b, :, n:] = 0, 0
        for s in range(n):
            inner[table[b, s // page], 0, :, s % page] = k[b, :, s]
            inner[table[b, s // page], 1, :, s % page] = v[b, :, s]
    if layout == "vllm":
        pages = tc.flash_pages(*both.unbind(1), table, lens)
        return Engine(pages, [both], k, v)
    pages = tc.flashinfer_pages(
        both, *tc.flashinfer_lists(table, lens, page), layout="HND" if layout == "hnd" else "NHD"
    )
    return Engine(pages, [both], k, v)


@pytest.mark.parametrize("layout", ["vllm", "nhd", "hnd"])
@pytest.mark.parametrize("page", [1, 16, 32, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layouts_are_seen_in_place(layout: str, page: int, dtype: torch.dtype) -> None:
    engine = put(layout, page, dtype)
    pages = engine.pages
    assert pages.host_lens == tuple(LENS)
    assert pages.k.untyped_storage().data_ptr() == engine.buffers[0].untyped_storage().data_ptr()
    k, v = pages.gather()
    assert torch.equal(k, engine.k)
    assert torch.equal(v, engine.v)


@pytest.mark.parametrize("page", [1, 16])
def test_lists_and_tables_are_each_other(page: int) -> None:
    table, _ = table_of(page, LENS)
    lens = torch.tensor(LENS, dtype=torch.int32)
    indptr, indices, last = tc.flashinfer_lists(table, lens, page)
    assert indptr.tolist() == [0, *torch.tensor([-(-n // page) for n in LENS]).cumsum(0).tolist()]
    back, lens_back = tc.flashinfer_table(indptr, indices, last, page)
    assert torch.equal(lens_back, lens)
    for b, n in enumerate(LENS):
        count = -(-n // page)
        assert torch.equal(back[b, :count], table[b, :count])
        assert (back[b, count:] == -1).all()
    wide, _ = tc.flashinfer_table(indptr, indices[: int(indptr[-1])], last, page, places=99)
    assert torch.equal(wide[:, : back.shape[1]], back)


def row_scores(score: Callable[[Tensor, Tensor, int], Tensor], engine: Engine) -> Tensor:
    """``score(k, v, head)`` of each sequence alone, in float64; -inf behind."""
    out = torch.full(engine.k.shape[:3], float("-inf"), dtype=torch.float64)
    for b, n in enumerate(LENS):
        for h in range(HEADS):
            if n:
                out[b, h, :n] = score(engine.k[b, h, :n].double(), engine.v[b, h, :n].double(), b * HEADS + h)
    return out


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", ["vllm", "nhd", "hnd"])
def test_scores_from_keys_are_the_formulas(layout: str) -> None:
    engine = put(layout, 16)
    close(tc.kv_scores(engine.pages, "knorm"), row_scores(lambda k, v, r: -k.norm(dim=-1), engine))

    def keydiff(k: Tensor, v: Tensor, row: int) -> Tensor:
        unit = k / k.norm(dim=-1, keepdim=True)
        mean = unit.sum(0)
        return -(unit @ mean) / mean.norm()

    close(tc.kv_scores(engine.pages), row_scores(keydiff, engine))


def attention(q: Tensor, k: Tensor) -> Tensor:
    """``[T, n]``: causal softmax of the last T queries over the keys of one head; rows before it: 0."""
    rows, n = q.shape[0], k.shape[0]
    logits = q.double() @ k.T * k.shape[1] ** -0.5
    place = n - rows + torch.arange(rows)[:, None]
    p = logits.masked_fill(torch.arange(n) > place, float("-inf")).softmax(-1)
    return torch.where(place >= 0, p, 0.0)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_from_queries_are_the_formulas(group: int, dtype: torch.dtype) -> None:
    engine = put("vllm", 16, dtype)
    q = fill((len(LENS), HEADS * group, 7, DIM), dtype, 5)

    def received(k: Tensor, v: Tensor, row: int) -> Tensor:
        b, h = divmod(row, HEADS)
        weight = 0.9 ** torch.arange(6, -1, -1, dtype=torch.float64)
        heads = range(h * group, (h + 1) * group)
        return sum(((attention(q[b, i], k) * weight[:, None]).sum(0) for i in heads), torch.zeros(len(k)))

    method = methods.A2SF(budget=32, gamma=0.9, truncate=0.0)
    close(tc.kv_scores(engine.pages, method, q=q), row_scores(received, engine), 1e-4)


def test_scores_of_snapkv_and_rkv_are_the_recipes() -> None:
    engine = put("nhd", 32)
    q, lens = fill((len(LENS), HEADS * 2, 8, DIM), torch.float32, 6), torch.tensor(LENS)
    for name, wanted in (
        ("snapkv", recipes.window_score(q, engine.k, lengths=lens)),
        ("rkv", recipes.rkv_score(q, engine.k, lengths=lens)),
    ):
        method = methods.SnapKV(window=8) if name == "snapkv" else methods.RKV()
        got = tc.kv_scores(engine.pages, method, q=q)
        there = torch.arange(max(LENS)) < (lens - 8)[:, None, None]
        torch.testing.assert_close(
            torch.where(there, got, 0.0), torch.where(there, wanted.float(), 0.0), atol=1e-5, rtol=1e-5
        )
        assert (got.masked_fill(torch.arange(max(LENS)) < lens[:, None, None], 0) <= 0).all()


def test_last_queries_are_taken_from_packed_ones() -> None:
    start = torch.tensor([0, 5, 5, 7, 20], dtype=torch.int32)
    q = fill((20, 3, 4), torch.float32, 7)
    got = tc.last_queries(q, start, 4)
    for b in range(4):
        own = q[int(start[b]) : int(start[b + 1])][-4:]
        padded = torch.cat([torch.zeros(4 - len(own), 3, 4), own])
        assert torch.equal(got[b], padded.transpose(0, 1))


def by_hand(score: Tensor, length: int, k: int, sinks: int, recent: int) -> list[int]:
    def worth(i: int) -> tuple[bool, float, int]:
        value = float(score[i])
        return i < sinks or i >= length - recent, -float("inf") if value != value else value, -i

    return sorted(sorted(range(length), key=worth, reverse=True)[:k])


@pytest.mark.parametrize("sides", [(0, 0), (4, 0), (2, 5)])
def test_one_set_for_all_heads_and_layers(sides: tuple[int, int]) -> None:
    layers = [fill((len(LENS), HEADS, 64), torch.float32, 20 + i).mul(4).round() for i in range(3)]  # ties
    layers[1][2, 0, 7] = float("nan")
    lens = torch.tensor(LENS, dtype=torch.int32)
    kept = tc.kept_slots(layers, lens, 12, sinks=sides[0], recent=sides[1])
    total = sum((layer.mean(1) for layer in layers), torch.zeros(()))
    for b, n in enumerate(LENS):
        wanted = by_hand(total[b], n, 12, *sides)
        assert kept.index[b].tolist() == wanted + [-1] * (12 - len(wanted))
        assert int(kept.count[b]) == len(wanted)
    seen: list[Tensor] = []
    again = tc.kept_slots(layers, lens, 12, sinks=sides[0], recent=sides[1],
                                    across=lambda s: seen.append(s) or s)  # fmt: skip
    assert torch.equal(again.index, kept.index)
    assert seen[0].shape == (len(LENS), 1, 64)


def test_a_set_for_each_head_and_budgets_for_each_sequence() -> None:
    score = fill((len(LENS), HEADS, 64), torch.bfloat16, 30)
    lens, budgets = torch.tensor(LENS, dtype=torch.int32), torch.tensor([3, 9, 20, 0, 9])
    kept = tc.kept_slots(score, lens, 20, budgets=budgets, per_head=True)
    for b, n in enumerate(LENS):
        for h in range(HEADS):
            wanted = by_hand(score[b, h], n, int(budgets[b]), 0, 0)
            assert kept.index[b, h].tolist() == wanted + [-1] * (20 - len(wanted))


@pytest.mark.parametrize("reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("page", [1, 16])
def test_kept_pages_make_a_shorter_table(reduce: str, per_head: bool, page: int) -> None:
    table, _ = table_of(page, LENS)
    lens = torch.tensor(LENS, dtype=torch.int32)
    score = fill((len(LENS), HEADS, max(LENS)), torch.float32, 40)
    kept = tc.kept_pages(score, table, lens, 3, page_size=page, reduce=reduce, per_head=per_head)
    rows = score if per_head else score.mean(1, keepdim=True)
    for b, n in enumerate(LENS):
        pages = [p.double() for p in rows.new_tensor(range(n)).split(page)] if n else []
        for h in range(rows.shape[1]):
            worth = [getattr(rows[b, h][p.long()], reduce)() for p in pages]
            wanted = by_hand(torch.tensor(worth), len(pages), 3, 1, 1)
            got = (
                KeptSlots(kept.index[b, h], kept.count[b, h])
                if per_head
                else KeptSlots(kept.index[b], kept.count[b])
            )
            new, left, freed = (
                (t[b, h] if per_head else t[b]) for t in (kept.block_table, kept.seq_lens, kept.freed)
            )
            assert got.index.tolist() == wanted + [-1] * (3 - len(wanted))
            assert new.tolist() == [int(table[b, p]) for p in wanted] + [-1] * (3 - len(wanted))
            assert int(left) == sum(len(pages[p]) for p in wanted)
            assert sorted(set(freed.tolist()) - {-1}) == sorted(
                int(table[b, p]) for p in range(len(pages)) if p not in wanted
            )


@pytest.mark.parametrize("layout", ["vllm", "nhd", "hnd"])
@pytest.mark.parametrize("per_head", [False, True])
def test_compaction_moves_survivors_to_the_front(layout: str, per_head: bool) -> None:
    engine = put(layout, 16, torch.float16)
    before = engine.buffers[0].clone()
    score = fill((len(LENS), HEADS, max(LENS)), torch.float32, 50)
    kept = tc.kept_slots(score, engine.pages.seq_lens, 20, sinks=2, recent=3, per_head=per_head)
    lens = tc.compact_(engine.pages, kept)
    assert lens.tolist() == [min(n, 20) for n in LENS]
    k, v = engine.pages.gather()
    for b, n in enumerate(lens.tolist()):
        for h in range(HEADS):
            slots = (kept.index[b, h] if per_head else kept.index[b])[:n].long()
            assert torch.equal(k[b, h, :n], engine.k[b, h, slots])
            assert torch.equal(v[b, h, :n], engine.v[b, h, slots])
    unused = [p for p in range(len(before)) if p not in used(engine.pages)]
    assert unused
    torch.testing.assert_close(engine.buffers[0][unused], before[unused], equal_nan=True, rtol=0, atol=0)


def used(pages: PagedKV) -> set[int]:
    return {
        int(p)
        for row, n in zip(pages.block_table, pages.host_lens, strict=True)
        for p in row[: -(-n // pages.page_size)]
    }


def test_shared_pages_are_not_overwritten() -> None:
    engine = put("vllm", 16)
    table = engine.pages.block_table.clone()
    table[2, :3] = table[0, :3]  # sequence 2 begins with the pages of sequence 0
    pages = tc.flash_pages(
        engine.pages.k.transpose(1, 2), engine.pages.v.transpose(1, 2), table, engine.pages.seq_lens
    )
    kept = tc.kept_slots(tc.kv_scores(pages, "knorm"), pages.seq_lens, 20)
    with pytest.raises(RuntimeError, match="kv_compact_"):
        tc.compact_(pages, kept)


def test_no_sequences() -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    pages = tc.flash_pages(
        torch.zeros(4, 16, 2, 8), torch.zeros(4, 16, 2, 8), torch.zeros(0, 3, dtype=torch.int32), empty
    )
    assert tc.kv_scores(pages).shape == (0, 2, 0)
    kept = tc.kept_slots(torch.zeros(0, 2, 5), empty, 4)
    assert kept.index.shape == (0, 4)


INT = torch.tensor([3], dtype=torch.int32)
TABLE = torch.tensor([[0]], dtype=torch.int32)
CACHE = torch.zeros(2, 16, 2, 8)
ERRORS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: tc.flash_pages(CACHE[0], CACHE, TABLE, INT),
        r"flash_pages: k_cache must have shape \[pages, P, Hkv, D\], got \[16, 2, 8\]",
    ),
    (
        lambda: tc.flash_pages(CACHE, CACHE[:1], TABLE, INT),
        r"flash_pages: v must be \[pages, heads, P\] = \[2, 2, 16\]",
    ),
    (
        lambda: tc.flash_pages(CACHE, CACHE, TABLE.long(), INT),
        r"flash_pages: block_table must be int32 \[B, places\]",
    ),
    (
        lambda: tc.flash_pages(CACHE, CACHE, TABLE, INT + 14),
        r"flash_pages: seq_lens\[0\] must be in \[0, places \* P = 16\], got 17",
    ),
    (
        lambda: tc.flash_pages(CACHE, CACHE, TABLE, INT, host_lens=[3, 4]),
        r"flash_pages: host_lens must be B=1 numbers, got 2",
    ),
    (
        lambda: tc.flashinfer_pages(CACHE, INT, INT, INT),
        r"flashinfer_pages: kv_cache must be \[pages, 2, P, Hkv, D\], got \[2, 16, 2, 8\]",
    ),
    (
        lambda: tc.flashinfer_table(INT, INT, INT, 16),
        r"flashinfer_table: indptr must be \[B \+ 1 = 2\], got \[1\]",
    ),
    (
        lambda: tc.flashinfer_table(INT.long(), INT, INT, 16),
        r"flashinfer_table: indptr must be int32 with one dimension",
    ),
    (lambda: tc.flashinfer_lists(TABLE, INT, 0), r"flashinfer_lists: page_size must be >= 1, got 0"),
    (
        lambda: tc.kv_scores(pages(), "nosuch"),
        r"kv_scores: method must be one of \[.*'knorm'.* or an object, got 'nosuch'",
    ),
    (lambda: tc.kv_scores(pages(), "divprune"), r"kv_scores: method must be one of .*, got 'divprune'"),
    (
        lambda: tc.kv_scores(pages(), methods.ToDRE()),
        r"kv_scores: method must be a method that scores slots, got ToDRE",
    ),
    (
        lambda: tc.kv_scores(pages(), "snapkv"),
        r"kv_scores: q must be \[B, Hq, T, D\] for SnapKV, which looks at queries, got None",
    ),
    (
        lambda: tc.kv_scores(pages(), "h2o", q=torch.zeros(1, 3, 4, 8)),
        r"kv_scores: q must be \[B=1, a multiple of Hkv=2, T, D=8\], got \[1, 3, 4, 8\]",
    ),
    (
        lambda: tc.kept_slots(torch.zeros(1, 2), INT, 4),
        r"kept_slots: scores must have shape \[B, H, S\], got \[1, 2\]",
    ),
    (
        lambda: tc.kept_slots([torch.zeros(1, 2, 5), torch.zeros(1, 2, 6)], INT, 4),
        r"kept_slots: scores\[1\] must be \[B=1, H, S=5\], got \[1, 2, 6\]",
    ),
    (lambda: tc.kept_slots([], INT, 4), r"kept_slots: scores must be of one layer or more, got none"),
    (
        lambda: tc.kept_slots(torch.zeros(1, 2, 5), INT, 4, sinks=3, recent=2),
        r"kept_slots: budget must be >= 5 \(sinks \+ recent, and 1\), got 4",
    ),
    (
        lambda: tc.kept_slots(torch.zeros(1, 2, 5), INT, 4, budgets=INT[:0]),
        r"kept_slots: budgets must be \[B=1\], got \[0\]",
    ),
    (
        lambda: tc.kept_slots([torch.zeros(1, 2, 5)] * 2, INT, 4, per_head=True),
        r"kept_slots: scores must be of one layer with per_head, got 2 layers",
    ),
    (
        lambda: tc.kept_pages(torch.zeros(1, 2, 5), TABLE, INT, 1, page_size=16),
        r"kept_pages: budget must be >= first \+ recent = 2 pages, got 1",
    ),
    (
        lambda: tc.kept_pages(torch.zeros(1, 2, 5), TABLE, INT, 2, page_size=16, recent=0),
        r"kept_pages: first and recent must be >= 0 and >= 1, got \(1, 0\)",
    ),
    (
        lambda: tc.kept_pages(torch.zeros(1, 2, 5), TABLE.float(), INT, 2, page_size=16),
        r"kept_pages: block_table must be int32 \[B=1, places\]",
    ),
    (
        lambda: tc.compact_(pages(), KeptSlots(TABLE.view(1, 1, 1), TABLE)),
        r"compact_: kept.index must be \[B=1, K\] or \[B=1, Hkv=2, K\], got \[1, 1, 1\]",
    ),
    (
        lambda: tc.last_queries(CACHE, INT, 4),
        r"last_queries: q must have shape \[tokens, Hq, D\], got \[2, 16, 2, 8\]",
    ),
]


def pages() -> PagedKV:
    return tc.flash_pages(CACHE, CACHE, TABLE, INT)


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors_say_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
