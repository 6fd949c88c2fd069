"""What the operators of the paged cache refuse, and how they say so. The pages are left as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from cases_kvcache import Cache, KVCase
from kvcache_yardstick import assert_same
from torch import Tensor

CASE = KVCase(((20, 3), (0, 40)), D=8, T=2)
INT = torch.int32


def change(t: Tensor, value: Any, *place: int) -> Tensor:
    t = t.clone()
    t[place] = value
    return t


def arguments(name: str, cache: Cache) -> dict[str, Any]:
    """A call that is right, argument by argument."""
    call: dict[str, Any] = dict(
        zip(("k_pages", "v_pages", "block_table", "lengths"), cache.parts, strict=True)
    )
    index = torch.full((2, 2, 4), -1, dtype=INT)
    index[0, 0], index[1, 1, :2] = torch.tensor([1, 5, 17, 19]), torch.tensor([0, 39])
    count = torch.tensor([[4, 0], [0, 2]], dtype=INT)
    member = torch.full((2, 2, 3), -1, dtype=INT)
    member[0, 0, :2], member[1, 1] = torch.tensor([3, 0]), torch.tensor([8, 1, 1])
    if name == "kv_append_":
        (k, v), _ = CASE.tokens()
        call |= {"k": k, "v": v, "starts": torch.tensor([0, 1]), "counts": torch.tensor([2, 1])}
    elif name == "kv_compact_":
        call |= {"index": index, "count": count, "order": "stable", "out_table": None}
    elif name == "kv_gather":
        call |= {"index": index, "count": count, "size": 4}
    elif name == "rope_shift_":
        del call["v_pages"]
        position = torch.arange(40, dtype=INT).expand(2, 2, 40)
        call |= {
            "old_position": position,
            "new_position": position + 3,
            "inv_freq": torch.ones(4),
            "layout": "half",
        }
    else:
        call |= {"keep_index": index, "keep_count": count, "member_index": member}
        if name == "evict_merge_":
            target = torch.where(member >= 0, member.clamp(max=1), -1).int()
            call |= {"target": target, "weight": torch.ones(2, 2, 3), "center": torch.ones(2, 2, 4)}
    return call


STORES = ("kv_append_", "kv_compact_", "kv_gather", "rope_shift_", "evict_assign", "evict_merge_")
Change = Callable[[Any], Any]
OF_STORES: list[tuple[str, Change, str]] = [
    ("k_pages", lambda t: t[0], r"k_pages must have shape \[N, Hx, P, D\], got \[1, 16, 8\]"),
    ("k_pages", lambda t: t.int(), "k_pages must be float32, float16 or bfloat16, got Int"),
    ("k_pages", lambda t: t.expand(-1, 3, -1, -1), "k_pages must hold 1 or Hkv=2 heads a page, got 3"),
    ("k_pages", lambda t: t[:, :, :15], "k_pages must have pages of 16, 32 or 64 slots, got 15"),
    ("k_pages", lambda t: t[..., ::2], "k_pages must be contiguous in its last dimension, got stride 2"),
    ("block_table", lambda t: t[0], r"block_table must have shape \[B=2, Hkv=2, places\], got \[2, 5\]"),
    ("block_table", lambda t: t.float(), "block_table must be Int, got Float"),
    ("lengths", lambda t: t[0], r"lengths must have shape \[B, Hkv\], got \[2\]"),
    ("lengths", lambda t: change(t, -1, 0, 1), r"lengths must be >= 0, got -1 at \[0, 1\]"),
    ("block_table", lambda t: change(t, -1, 0, 0, 1), r"name a page for slot 16 of row \(0, 0\), got -1"),
    ("block_table", lambda t: change(t, 10**6, 0, 0, 1), r"in \[0, N=\d+\), got 1000000 at \[0, 0, 1\]"),
    ("block_table", lambda t: change(t, (1 << 28) + 1, 0, 0, 1), r"working pages, got .* 1 at \[0, 0, 1\]"),
    ("lengths", lambda t: change(t, 200, 0, 0), r"for 20[02] slots of row \(0, 0\), got 5 places of 16"),
]  # fmt: skip

OF_LISTS: list[tuple[str, str, Change, str]] = [
    ("kv_append_", "v_pages", lambda t: t.half(), "v_pages must have the dtype of k_pages, Float, got Half"),
    ("kv_append_", "v_pages", lambda t: t[:-1], r"v_pages must have shape \[N=\d+, Hx=1, P=16, Dv\], got"),
    ("kv_append_", "k", lambda t: t[:, :1], r"k must have shape \[B=2, Hkv=2, T=2, 8\], got \[2, 1, 2, 8\]"),
    ("kv_append_", "v", lambda t: t[..., :5], r"v must have shape \[.*, 8\], got \[2, 2, 2, 5\]"),
    ("kv_append_", "k", lambda t: t.double(), "k must have the dtype of k_pages, Float, got Double"),
    ("kv_append_", "starts", lambda t: change(t, 3, 1), r"starts must be in \[0, T=2\], got 3 at \[1\]"),
    ("kv_append_", "counts", lambda t: t + 1, r"counts must be in \[0, T-starts=2\], got 3 at \[0\]"),
    ("kv_append_", "counts", lambda t: t[:1], r"counts must have shape \[2\], got \[1\]"),
    ("kv_compact_", "index", lambda t: t.flip(2), r"ascending in \[0, length=20\), got 17 at \[0, 0, 1\]"),
    ("kv_compact_", "index", lambda t: change(t, 20, 0, 0, 3), r"\[0, length=20\), got 20 at \[0, 0, 3\]"),
    ("kv_compact_", "count", lambda t: t + 1, r"count must be in \[0, 4\], got 5 at \[0, 0\]"),
    ("kv_compact_", "count", lambda t: change(t, 1, 1, 0), r"\[0, length=0\), got -1 at \[1, 0, 0\]"),
    ("kv_compact_", "order", lambda _: "any", "order must be one of 'stable', 'holefill', got 'any'"),
    ("kv_gather", "index", lambda t: change(t, 20, 0, 0, 0), r"index must be in \[-1, length=20\), got 20"),
    ("kv_gather", "index", lambda _: None, "count must be None unless index is given"),
    ("kv_gather", "size", lambda _: -1, r"size must be in \[0, \d+\], got -1"),
    ("rope_shift_", "old_position", lambda t: t[:, :, :39], r"new_position must have shape \[2, 2, 39\]"),
    ("rope_shift_", "inv_freq", lambda t: t.repeat(2), r"between 1 and D/2=4 frequencies, got shape \[8\]"),
    ("rope_shift_", "layout", lambda _: "neox", "layout must be one of 'half', 'interleaved', got 'neox'"),
    ("evict_assign", "keep_index", lambda t: t.flip(2), r"keep_index must be ascending in"),
    ("evict_assign", "member_index", lambda t: change(t, 5, 0, 0, 0), "slots that are not kept, got 5 at"),
    ("evict_assign", "member_index", lambda t: change(t, 40, 1, 1, 0), r"length=40\), got 40 at \[1, 1, 0\]"),
    ("evict_merge_", "target", lambda t: change(t, 4, 0, 0, 0), r"in \[-1, keep_count=4\), got 4"),
    ("evict_merge_", "weight", lambda t: t[..., :2], r"weight must have shape \[2, 2, 3\], got \[2, 2, 2\]"),
]  # fmt: skip


def refuse(
    backend: Backend, name: str, argument: str, alter: Change, message: str, kind: type[Exception]
) -> None:
    cache = CASE.cache()
    call = arguments(name, cache)
    before = Cache(*cache.parts).clone()
    backend.run(name, **call)  # so that it is the change that is refused
    cache = before.clone()
    call = arguments(name, cache)
    call[argument] = alter(call[argument])
    with pytest.raises(kind, match=f"{name}: .*{message}"):
        backend.run(name, **call)
    assert_same(cache, before)


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize(("argument", "alter", "message"), OF_STORES, ids=[m for _, _, m in OF_STORES])
def test_stores(cpu_backend: Backend, name: str, argument: str, alter: Change, message: str) -> None:
    refuse(cpu_backend, name, argument, alter, message, RuntimeError)


@pytest.mark.parametrize(("name", "argument", "alter", "message"), OF_LISTS, ids=[m for *_, m in OF_LISTS])
def test_lists(cpu_backend: Backend, name: str, argument: str, alter: Change, message: str) -> None:
    refuse(cpu_backend, name, argument, alter, message, RuntimeError)


@pytest.mark.parametrize("argument", ["weight", "center"])
@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_weights(cpu_backend: Backend, argument: str, value: float) -> None:
    def alter(t: Tensor) -> Tensor:
        return change(t, value, 1, 1, 0)

    refuse(cpu_backend, "evict_merge_", argument, alter, f"{argument} must be finite and >= 0", ValueError)


def test_shared_pages_are_not_written_to(cpu_backend: Backend) -> None:
    """Two rows on the same pages: what would change needs pages of its own, what stays does not."""
    cache = KVCase(((40,), (40,)), D=8).cache()
    cache.block_table[1] = cache.block_table[0]
    index = torch.full((2, 1, 40), -1, dtype=INT)
    index[0, 0, :20], index[1, 0] = torch.arange(20) * 2, torch.arange(40)
    count = torch.tensor([[20], [40]], dtype=INT)
    with pytest.raises(RuntimeError, match="block_table must name pages that nobody else uses, got page"):
        cpu_backend.run("kv_compact_", *cache.parts, index, count)
    free = sorted(set(range(cache.k_pages.shape[0])) - set(cache.block_table[0, 0].tolist()))
    out_table = cache.block_table.clone()
    out_table[0, 0, :2] = torch.tensor(free[:2], dtype=INT)
    before = cache.clone()
    with cpu_backend.active():
        cpu_backend.call("kv_compact_", *cache.parts, index, count, out_table=out_table)
    for pages, old in ((cache.k_pages, before.k_pages), (cache.v_pages, before.v_pages)):
        kept = [page for page in range(len(pages)) if page not in free[:2]]
        torch.testing.assert_close(pages[kept], old[kept], equal_nan=True, rtol=0, atol=0)
        row = old[cache.block_table[0, 0, :3].long(), 0].flatten(0, 1)[:40:2]
        assert torch.equal(pages[free[:2], 0].flatten(0, 1)[:20], row)
    out_table[0, 0, 1] = free[0]
    with pytest.raises(
        RuntimeError, match=r"out_table must name pages that nobody else uses, got page \d+ of another"
    ):
        cpu_backend.run("kv_compact_", *before.parts, index, count, out_table=out_table)
