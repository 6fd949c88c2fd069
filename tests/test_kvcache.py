"""The paged KV cache against the reference: what moves is moved bit for bit, all else is left alone."""

import random

import pytest
import torch
from backends import Backend
from cases_kvcache import KV_CASES, Cache, KVCase, pad_lists
from kvcache_yardstick import assert_same, check_append, check_compact, check_gather, run_in_place
from tokencomp import native, reference
from tokencomp.ops.kvcache import hole_order

case_of = pytest.mark.parametrize("case", KV_CASES, ids=lambda c: c.name)


@case_of
def test_append(backend: Backend, case: KVCase) -> None:
    check_append(backend, case)


@case_of
@pytest.mark.parametrize("order", ["stable", "holefill"])
def test_compact(backend: Backend, case: KVCase, order: str) -> None:
    check_compact(backend, case, order)


@case_of
def test_gather(backend: Backend, case: KVCase) -> None:
    index, count = case.kept()
    size, K = int(case.cache().lengths.max()), index.shape[2]
    for options in ({"size": size}, {"size": size + 5}, {"size": size // 2}):
        check_gather(backend, case, **options)
    check_gather(backend, case, size=K, index=index)
    check_gather(backend, case, size=K + 3, index=index.flip(2))
    check_gather(backend, case, size=4, index=index, count=count)


MOVES = [  # length, evicted, moves (to, from): the three lists of KV-Compress
    (10, (1, 4, 5, 8), {1: 9, 4: 7, 5: 6}),
    (8, (0, 1, 2, 3), {0: 7, 1: 6, 2: 5, 3: 4}),
    (8, (2, 5, 6, 7), {2: 4}),
]


@pytest.mark.parametrize(("length", "evicted", "moves"), MOVES)
def test_holes_are_filled_from_the_tail(
    backend: Backend, length: int, evicted: tuple[int, ...], moves: dict[int, int]
) -> None:
    kept = [slot for slot in range(length) if slot not in evicted]
    index, count = pad_lists([torch.tensor(kept)], 1, 1)
    expected = [moves.get(slot, slot) for slot in range(len(kept))]
    for order in (reference.hole_order(index, count), hole_order(index, count)):
        assert order[0, 0, : len(kept)].tolist() == expected
    cache = KVCase(((length,),), D=8).cache()
    after = run_in_place(backend, "kv_compact_", cache, index, count, order="holefill")
    before = reference.kv_gather(*cache.parts, size=length)
    got = reference.kv_gather(after.k_pages, after.v_pages, cache.block_table, count, size=len(kept))
    for x, y in zip(got, before, strict=True):
        assert torch.equal(x[0, 0], y[0, 0, expected])


@case_of
def test_order_of_holes(case: KVCase) -> None:
    got, want = hole_order(*case.kept()), reference.hole_order(*case.kept())
    assert got.dtype == torch.int32
    assert torch.equal(got, want)


def test_strided_pages_and_expanded_tables(backend: Backend) -> None:
    """A pool cut out of another engine's buffer, one table for all heads, keys that are a view."""
    buffer = torch.zeros(9, 2, 16, 3, 40)
    k_pages, v_pages = buffer[:, 0].transpose(1, 2)[..., 4:36], buffer[:, 1].transpose(1, 2)[..., 4:36]
    table = torch.tensor([[7, 2, -1], [5, 1, 3]], dtype=torch.int32)[:, None].expand(2, 3, 3)
    lengths = torch.tensor([[0, 5, 13], [30, 16, 1]], dtype=torch.int32)
    x = torch.randn(2, 12, 3, 70).transpose(1, 2)[..., 5:37]
    cache, want = Cache(k_pages, v_pages, table, lengths), Cache(k_pages, v_pages, table, lengths).clone()
    reference.kv_append_(want.k_pages, want.v_pages, x, x + 1, table, lengths)
    assert_same(run_in_place(backend, "kv_append_", cache, x, x + 1), want)


def test_a_cache_lives_as_its_model_does(cpu_backend: Backend) -> None:
    """Rows begin, grow, fork, shrink and end in one pool; each holds what a list of tokens holds."""
    g, P, D = random.Random(3), 16, 8
    pool = native.PagePool(60)
    pages = torch.full((60, 1, P, D), float("nan")), torch.full((60, 1, P, D), float("nan"))
    rows: list[tuple[list[int], torch.Tensor]] = []  # pages, tokens

    def table_of(listed: list[int]) -> torch.Tensor:
        return torch.tensor(listed + [-1] * (8 - len(listed)), dtype=torch.int32).view(1, 1, 8)

    def private(listed: list[int], tokens: torch.Tensor, kept: torch.Tensor) -> list[int]:
        """The pages of the kept tokens, in place, or in new pages where one is shared."""
        index, count = pad_lists([kept], 1, 1)
        shared = bool((pool.refcount(listed) > 1).any())
        places = -(-len(kept) // P)
        target = pool.allocate(places).tolist() if shared else listed[:places]
        length = torch.tensor([[len(tokens)]], dtype=torch.int32)
        out_table = table_of(target) if shared else None
        cpu_backend.call("kv_compact_", *pages, table_of(listed), length, index, count, out_table=out_table)
        pool.free(listed if shared else listed[places:])
        return target

    with cpu_backend.active():
        for step in range(400):
            i = g.randrange(len(rows)) if rows else 0
            what = g.random()
            if not rows or (what < 0.15 and len(rows) < 7):
                rows.append(([], torch.zeros(0, D)))
            elif what < 0.25 and len(rows) < 7:
                pool.retain(rows[i][0])
                rows.append(rows[i])
            elif what < 0.35:
                pool.free(rows.pop(i)[0])
            elif what < 0.55:
                listed, tokens = rows[i]
                kept = (torch.rand(len(tokens)) < 0.7).nonzero()[:, 0]
                rows[i] = private(listed, tokens, kept), tokens[kept]
            else:
                listed, tokens = rows[i]
                if len(tokens) > 70:
                    continue
                new = torch.full((g.randint(1, 40), D), float(step))
                listed = private(listed, tokens, torch.arange(len(tokens)))
                need = -(-(len(tokens) + len(new)) // P) - len(listed)
                listed = listed + pool.allocate(max(need, 0)).tolist()
                length = torch.tensor([[len(tokens)]], dtype=torch.int32)
                x = new[None, None]
                cpu_backend.call("kv_append_", *pages, x, -x, table_of(listed), length)
                rows[i] = listed, torch.cat((tokens, new))
            for listed, tokens in rows:
                length = torch.tensor([[len(tokens)]], dtype=torch.int32)
                k, v = cpu_backend.call("kv_gather", *pages, table_of(listed), length, size=len(tokens))
                assert torch.equal(k[0, 0], tokens)
                assert torch.equal(v[0, 0], -tokens)
            used = {page for listed, _ in rows for page in listed}
            assert pool.in_use == len(used)
