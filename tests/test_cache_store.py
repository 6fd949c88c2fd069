"""Pages and slots of a cache against lists of tokens."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokencomp.cache import LayerStore, Pool, forward_of
from tokencomp.methods.kv import Keep, MergeSpec, Side
from torch import Tensor

D, P = 4, 16
SIDES = {"score": Side(torch.float32, -1.0)}


def pool(**options: Any) -> Pool:
    return Pool(P, D, D + 2, torch.float32, torch.device("cpu"), **options)


def check(store: LayerStore, model: list[list[list[tuple[int, float]]]]) -> None:
    """``model[b][h]`` is a list of (position, value)."""
    k, v = store.gather()
    position = store.position()
    for b, heads in enumerate(model):
        for h, row in enumerate(heads):
            n = len(row)
            assert store.host_lengths[b, h] == n == int(store.lengths[b, h])
            assert position[b, h, :n].tolist() == [p for p, _ in row]
            assert k[b, h, :n, 0].tolist() == [x for _, x in row]
            assert v[b, h, :n, 1].tolist() == [x + 0.5 for _, x in row]
            assert not k[b, h, n:].any()
            assert store.state["score"][b, h, :n].tolist() == [x for _, x in row]
            assert (store.state["score"][b, h, n:] == -1).all()


def write(store: LayerStore, model: Any, seen: Any, values: Tensor, counts: Any) -> None:
    """Append ``values`` ``[B, Hkv, T]``, of which each row has ``counts[b]`` from the left."""
    k = values[..., None].expand(*values.shape, D).contiguous()
    v = k[..., :1].expand(*values.shape, D + 2) + 0.5
    given = np.array(counts, np.int32)
    full = (given == values.shape[2]).all()
    host = None if full else given
    starts = None if full else torch.zeros(len(counts), dtype=torch.int32)
    store.append(k, v, starts, None if full else torch.from_numpy(given), host)
    for b, heads in enumerate(model):
        for h, row in enumerate(heads):
            for t in range(counts[b]):
                store.state["score"][b, h, len(row)] = values[b, h, t]
                row.append((seen[b] + t, float(values[b, h, t])))
        seen[b] += counts[b]


@settings(max_examples=40)
@given(st.data())
def test_any_sequence_of_operations(data: st.DataObject) -> None:
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    own = pool()
    store = LayerStore(own, batch, heads, SIDES)
    model: Any = [[[] for _ in range(heads)] for _ in range(batch)]
    seen = [0] * batch
    number = 0
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["append", "append", "evict", "select", "crop", "copy"]))
        if what == "append":
            t = data.draw(st.integers(1, 40))
            counts = [data.draw(st.integers(0, t)) if data.draw(st.booleans()) else t for _ in model]
            values = torch.arange(number, number + len(model) * heads * t).view(len(model), heads, t).float()
            number += values.numel()
            write(store, model, seen, values, counts)
        elif what == "evict":
            kept = [
                [sorted(data.draw(st.sets(st.sampled_from(range(len(row)))))) if row else [] for row in hs]
                for hs in model
            ]
            width = max(1, max(len(row) for hs in kept for row in hs))
            index = torch.tensor(
                [[row + [-1] * (width - len(row)) for row in hs] for hs in kept], dtype=torch.int32
            )
            count = (index >= 0).sum(-1).int()
            store.compact(Keep(index, count, ragged=True), np.array(seen, np.int32))
            model = [
                [[row[i] for i in k] for row, k in zip(hs, ks, strict=True)]
                for hs, ks in zip(model, kept, strict=True)
            ]
        elif what == "select":
            rows = data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=4))
            store.select(torch.tensor(rows))
            model = [copy.deepcopy(model[r]) for r in rows]
            seen = [seen[r] for r in rows]
        elif what == "crop":
            seen = [max(0, s - data.draw(st.integers(0, 9))) for s in seen]
            store.crop(np.array(seen, np.int32))
            model = [[[t for t in row if t[0] < s] for row in hs] for hs, s in zip(model, seen, strict=True)]
        else:
            before, store = store, copy.deepcopy(store)
            before.release()
            own = store.pool
        if any(row for hs in model for row in hs):
            check(store, model)
        used = {int(p) for p in store.pages}
        assert own.book.in_use == len(used)
        assert (
            own.book.refcount(store.pages) == np.bincount(store.pages, minlength=own.capacity)[store.pages]
        ).all()
    store.release()
    assert own.book.in_use == 0


def test_evicted_pages_go_back_and_are_used_again() -> None:
    own = pool()
    stores = [LayerStore(own, 1, 2, {}) for _ in range(2)]
    x = torch.randn(1, 2, 100, D)
    stores[0].append(x, torch.randn(1, 2, 100, D + 2))
    assert own.book.in_use == 2 * 7
    held = own.capacity
    index = torch.arange(20, dtype=torch.int32).expand(1, 2, -1)
    assert stores[0].compact(Keep(index, torch.full((1, 2), 20)), np.array([100], np.int32)) == 160
    assert own.book.in_use == 2 * 2
    stores[1].append(x[:, :, :70], torch.randn(1, 2, 70, D + 2))
    assert own.book.in_use == 2 * 2 + 2 * 5
    assert own.capacity == held


def test_heads_of_different_lengths_hold_different_pages() -> None:
    own = pool()
    store = LayerStore(own, 1, 2, {})
    store.append(torch.randn(1, 2, 100, D), torch.randn(1, 2, 100, D + 2))
    index = torch.full((1, 2, 80), -1, dtype=torch.int32)
    index[0, 0], index[0, 1, :3] = torch.arange(80), torch.arange(3)
    store.compact(Keep(index, torch.tensor([[80, 3]]), ragged=True), np.array([100], np.int32))
    assert store.host_lengths.tolist() == [[80, 3]]
    assert own.book.in_use == 5 + 1


def test_whole_pages_leave_without_a_move() -> None:
    own = pool()
    store = LayerStore(own, 1, 1, {})
    k = torch.arange(60.0)[None, None, :, None].expand(1, 1, 60, D).contiguous()
    store.append(k, torch.zeros(1, 1, 60, D + 2))
    before = store.pages.tolist()
    kept = [*range(16), *range(32, 60)]
    index = torch.tensor(kept, dtype=torch.int32)[None, None]
    store.compact(Keep(index, torch.tensor([[44]]), whole_pages=True), np.array([60], np.int32))
    assert store.pages.tolist() == [before[0], before[2], before[3]]
    assert store.gather()[0][0, 0, :, 0].tolist() == kept
    assert store.position()[0, 0, :44].tolist() == kept


def test_a_shared_page_is_copied_before_it_is_written() -> None:
    own = pool()
    store = LayerStore(own, 1, 1, {})
    store.append(torch.ones(1, 1, 20, D), torch.ones(1, 1, 20, D + 2))
    store.select(torch.tensor([0, 0]))
    assert own.book.in_use == 2
    k = torch.tensor([2.0, 3.0])[:, None, None, None].expand(2, 1, 1, D).contiguous()
    store.append(k, torch.ones(2, 1, 1, D + 2))
    assert own.book.in_use == 3  # the full one is shared still
    assert store.gather()[0][:, 0, 20, 0].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("fork", [False, True])
def test_merged_slots_of_one_row_leave_its_copies_alone(fork: bool) -> None:
    own = pool()
    store = LayerStore(own, 1, 1, {})
    v = torch.arange(4.0)[None, None, :, None].expand(1, 1, 4, D + 2).contiguous()
    store.append(torch.ones(1, 1, 4, D), v)
    other = None
    if fork:
        store.select(torch.tensor([0, 0]))
        other = copy.copy(store)
    batch = 2 if fork else 1
    one = lambda *x: torch.tensor(x)[None, None].expand(batch, 1, -1)  # noqa: E731
    merge = MergeSpec(one(2, 3).int(), one(0, -1).int(), one(1.0, 1.0), one(1.0, 1.0))
    keep = Keep(one(0, 1).int(), torch.full((batch, 1), 2).int(), merge)
    store.compact(keep, np.full(batch, 4, np.int32))
    assert store.gather()[1][0, 0, :, 0].tolist() == [1.0, 1.0]  # (0 + 2) / 2, and what was there
    assert own.book.in_use == batch
    assert other is None or other.pool is own


def test_the_limit_is_kept_and_nothing_is_lost() -> None:
    own = pool(limit=3 * P * (2 * D + 2) * 4)
    store = LayerStore(own, 1, 2, {})
    x = torch.randn(1, 2, 10, D)
    store.append(x, torch.zeros(1, 2, 10, D + 2))
    with pytest.raises(
        MemoryError, match=r"2 more pages of 16 slots \(\d+ bytes\) are needed where 2 of \d are in use"
    ):
        store.append(torch.randn(1, 2, 10, D), torch.zeros(1, 2, 10, D + 2))
    assert torch.equal(store.gather()[0], x)
    assert own.book.in_use == 2
    store.append(x[:, :, :6], torch.zeros(1, 2, 6, D + 2))
    assert store.size == 16


def test_memory_that_the_device_does_not_have() -> None:
    own = pool()
    with pytest.raises(MemoryError, match="more pages of 16 slots"):
        own.reserve(2**50)
    assert own.capacity == 0


def test_page_sizes() -> None:
    with pytest.raises(ValueError, match="page must be 16, 32 or 64 slots, got 20"):
        Pool(20, D, D, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("columns", [0, 5])
def test_padding_is_packed(columns: int) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    what = forward_of(5, 3, columns, np.zeros(3, np.int32), 0, mask, torch.device("cpu"))
    assert what.step == (columns > 0)
    assert what.rows == [3, 2, 0]
    packing = what.packing
    assert packing is not None
    x = torch.arange(15.0).view(3, 1, 5, 1) + 1
    packed = packing.pack(x)
    assert packed.shape[2] == 3
    for b, real in enumerate([[3.0, 4, 5], [6.0, 8], []]):
        start = int(packing.starts[b])
        assert start == (3 - len(real) if what.step else 0)
        assert packed[b, 0, start : start + len(real), 0].tolist() == real
    assert torch.equal(packing.unpack(packed), x * mask[:, None, :, None])


def test_no_padding_needs_no_packing() -> None:
    what = forward_of(
        5, 2, 0, np.zeros(2, np.int32), 0, torch.ones(2, 5, dtype=torch.bool), torch.device("cpu")
    )
    assert what.packing is None
    assert what.counts is None


def test_a_shrunk_pool_keeps_pages_and_their_uses() -> None:
    pool = Pool(16, 3, 2, torch.float32, torch.device("cpu"))
    pages = pool.allocate(12)
    pool.k_pages[:] = torch.arange(pool.capacity, dtype=torch.float32)[:, None, None, None]
    pool.book.retain(pages[[3, 8, 8]])
    pool.book.free(pages[[0, 1, 2, 4, 5, 7, 9, 10, 8]])
    number = pool.shrink()
    assert number is not None
    assert number[[3, 6, 8, 11]].tolist() == [0, 1, 2, 3]
    assert (pool.capacity, pool.book.in_use, pool.peak) == (4, 4, 12)
    assert pool.book.refcount(np.arange(4, dtype=np.int32)).tolist() == [2, 1, 2, 1]
    assert pool.k_pages[:, 0, 0, 0].tolist() == [3, 6, 8, 11]
    assert pool.shrink() is None
    assert pool.allocate(1).tolist() == [4]
