"""Nearest kept slots and merging into them, against the reference and the worked example of EMS."""

from typing import Any

import pytest
import torch
from backends import Backend
from cases_kvcache import KV_CASES, Cache, KVCase, pad_lists
from kvcache_yardstick import check_assign, check_merge, run_in_place
from tokencomp import reference

INF = float("inf")
case_of = pytest.mark.parametrize("case", KV_CASES[::2], ids=lambda c: c.name)


@case_of
@pytest.mark.parametrize(
    "options", [{"similarity": "k"}, {"similarity": "kv"}, {"similarity": "kv", "clamp": False}]
)
def test_assign(backend: Backend, case: KVCase, options: dict[str, Any]) -> None:
    check_assign(backend, case, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_similarities_go_to_the_lower_rank(backend: Backend, dtype: str) -> None:
    case = KVCase(((90,),), D=16, dtype=dtype)
    cache, g = case.cache(), case.generator()
    for pages in (cache.k_pages, cache.v_pages):
        pages.copy_(torch.randint(0, 2, pages.shape, generator=g) * 2 - 1)
    index, count = pad_lists([torch.arange(0, 60)], 1, 1)
    member = torch.arange(60, 90, dtype=torch.int32).view(1, 1, 30)
    for similarity in ("k", "kv"):
        want = reference.evict_assign(*cache.parts, index, count, member, similarity=similarity)
        got = backend.run("evict_assign", *cache.parts, index, count, member, similarity=similarity)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1].double(), want[1], atol=1e-6, rtol=0)


def test_rows_without_direction(backend: Backend) -> None:
    """A zero vector is like nothing (cosine 0); one that is not finite takes no part."""
    cache = KVCase(((6,),), D=8).cache()
    table, page = cache.block_table, int(cache.block_table[0, 0, 0])
    cache.k_pages[page, 0, :6] = torch.eye(8)[[0, 1, 2, 0, 1, 2]]
    cache.v_pages[page, 0, :6] = 1.0
    cache.k_pages[page, 0, 0], cache.k_pages[page, 0, 5] = INF, 0.0
    index, count = pad_lists([torch.arange(3)], 1, 1)
    member = torch.tensor([[[3, 4, 5]]], dtype=torch.int32)
    target, value = backend.run(
        "evict_assign", cache.k_pages, cache.v_pages, table, cache.lengths, index, count, member
    )
    assert target.tolist() == [[[1, 1, 1]]]
    assert value.tolist() == [[[0.0, 1.0, 0.0]]]


@case_of
@pytest.mark.parametrize("options", [
    {"keys": "keep"}, {"keys": "mean", "by_norm": True}, {"keys": "direction"}, {"values": "sum"},
])  # fmt: skip
def test_merge(backend: Backend, case: KVCase, options: dict[str, Any]) -> None:
    check_merge(backend, case, **options)


def ems_cache(dtype: torch.dtype = torch.float32) -> Cache:
    k = torch.tensor([[2, 0], [0, 1], [1, 0], [0.8, 0.6], [0, 2], [0, 1]])
    v = torch.tensor([[1, 0], [0, 1], [0.8, 0.6], [1, 0], [0, -1], [0, 1]])
    pages = torch.zeros(2, 1, 16, 2, dtype=dtype), torch.zeros(2, 1, 16, 2, dtype=dtype)
    pages[0][1, 0, :6], pages[1][1, 0, :6] = k, v
    table = torch.tensor([[[1]]], dtype=torch.int32)
    return Cache(*pages, table, torch.tensor([[6]], dtype=torch.int32))


def test_worked_example_of_ems(backend: Backend) -> None:
    """Centres {0, 2, 5}; slots 1 and 3 to be merged; slot 4 would be a match only through two negatives."""
    cache = ems_cache()
    index, count = pad_lists([torch.tensor([0, 2, 5])], 1, 1, spare=0)
    member = torch.tensor([[[1, 3]]], dtype=torch.int32)
    run = backend.run("evict_assign", *cache.parts, index, count, member, similarity="kv", min_similarity=0.6)
    assert run[0].tolist() == [[[2, 0]]]
    torch.testing.assert_close(run[1], torch.tensor([[[1.0, 0.8]]]))
    strict = backend.run(
        "evict_assign", *cache.parts, index, count, member, similarity="kv", min_similarity=0.9
    )
    assert strict[0].tolist() == [[[2, -1]]]
    matrix = reference.evict_similarity(*cache.parts, index, count, member, similarity="kv")
    torch.testing.assert_close(matrix[0, 0], torch.tensor([[0, 0, 1], [0.8, 0.64, 0]], dtype=torch.float64))
    fourth = torch.tensor([[[4]]], dtype=torch.int32)
    for clamp, similarity in ((True, 0.0), (False, 0.0)):  # centre 0: cosine of keys 0
        got = backend.run("evict_assign", *cache.parts, index, count, fourth, similarity="kv", clamp=clamp)
        assert (got[0].item(), got[1].item()) == (0, similarity)
    raw = reference.evict_similarity(*cache.parts, index, count, fourth, similarity="kv", clamp=False)
    torch.testing.assert_close(raw[0, 0, 0], torch.tensor([0, 0, -1], dtype=torch.float64))

    score = torch.tensor([0.939394, 0.234848, 0.5, 0.117424, 0.070455, 0.6])
    weight, center = score[member.long()], score[index.long()]
    got = run_in_place(
        backend, "evict_merge_", cache, index, count, member, run[0], weight, center, keys="direction"
    )
    k, v = got.k_pages[1, 0], got.v_pages[1, 0]
    a, w = 0.939394, 0.117424  # slot 3, of length 1, into slot 0, of length 2
    length, total = (2 * a + w) / (a + w), a + w
    torch.testing.assert_close(k[0], torch.tensor([(a + 0.8 * w) / total, 0.6 * w / total]) * length)
    torch.testing.assert_close(v[0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(k[5], torch.tensor([0.0, 1.0]))
    assert torch.equal(k[2], cache.k_pages[1, 0, 2])  # nobody came


def test_cam_adds_to_several_kept_slots(backend: Backend) -> None:
    """A value over m goes to the next m kept slots where the draw says so: a member listed m times."""
    cache = ems_cache()
    index, count = pad_lists([torch.tensor([2, 3, 5])], 1, 1, spare=0)
    member = torch.tensor([[[0, 0, 1, 1, 4]]], dtype=torch.int32)
    target = torch.tensor([[[0, 1, 0, 1, 2]]], dtype=torch.int32)
    weight = torch.tensor([[[0.5, 0.5, 0.0, 0.0, 1.0]]])
    center = torch.zeros(1, 1, 3)
    got = run_in_place(
        backend, "evict_merge_", cache, index, count, member, target, weight, center, values="sum"
    )
    torch.testing.assert_close(
        got.v_pages[1, 0, [2, 3, 5]], torch.tensor([[1.3, 0.6], [1.5, 0.0], [0.0, 0.0]])
    )
    assert torch.equal(got.k_pages, cache.k_pages)


def test_norm_weighted_values(backend: Backend) -> None:
    """kvpress: V' = (V_c + sum g V_i) / (1 + sum g), g = max(similarity, 0) |V_i| / (|V_i| + |V_c|)."""
    cache = ems_cache()
    index, count = pad_lists([torch.tensor([0, 5])], 1, 1, spare=0)
    member = torch.tensor([[[2, 3]]], dtype=torch.int32)
    target, value = backend.run("evict_assign", *cache.parts, index, count, member, min_similarity=0.0)
    assert target.tolist() == [[[0, 0]]]
    torch.testing.assert_close(value, torch.tensor([[[1.0, 0.8]]]))
    got = run_in_place(
        backend, "evict_merge_", cache, index, count, member, target, value, torch.ones(1, 1, 2), by_norm=True
    )
    g = torch.tensor([[0.5], [0.4]])  # all values have length 1
    x = torch.tensor([[0.8, 0.6], [1.0, 0.0]])
    torch.testing.assert_close(
        got.v_pages[1, 0, 0], (torch.tensor([1.0, 0.0]) + (g * x).sum(0)) / (1 + g.sum())
    )
    assert torch.equal(got.k_pages, cache.k_pages)
