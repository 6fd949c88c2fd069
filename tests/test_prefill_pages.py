"""Prefill over pages on every back end: working, quantized and mixed ones against float64, and the bits they
share with dense keys.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from cases_prefill_pages import PAGED_CASES, PagedCase
from prefill_yardstick import assert_attention
from tokencomp import ops, reference
from tokencomp.ops.kvquant_pages import PageFormat, page_entry
from tokencomp.ops.page_pools import PagePools
from torch import Tensor

NAN, INF = float("nan"), float("inf")
BASE = PagedCase()
MIXED = PagedCase(places=9, formats=("int4", "fp8", "int3", "int2"), maps=True, dtype="bfloat16")


def page_layout(backend: Backend) -> str:
    return "linear" if backend.name == "cpu" else "mma16"


def run(backend: Backend, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = backend.run("flash_prefill", *arguments, **options)
    return out


@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name)
def test_flash_prefill_of_pages(backend: Backend, case: PagedCase) -> None:
    arguments, options = case.call(page_layout(backend))
    assert_attention(run(backend, *arguments, **options), arguments, options)


DENSE = [c for c in PAGED_CASES if c.lengths != "head" and c.places and c.B] + [
    replace(MIXED, lengths="batch", dtype=dtype, rows=rows)
    for dtype in ("float32", "float16", "bfloat16")
    for rows in ("", "counts")
]


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_pages_give_the_bits_of_dense_keys(
    backend: Backend, case: PagedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the dequantized keys and values, wherever the pages lie. Warpgroup products take dense keys."""
    monkeypatch.setenv("TOKENCOMP_PREFILL_PLAN", "mma")
    (q, k, v), options = case.call(page_layout(backend))
    got = run(backend, q, k, v, **options)
    table, quantized = options.pop("block_table"), options.pop("quantized", None)
    keys, held = reference.gather_pages(k, table, quantized)
    values, _ = reference.gather_pages(v, table, quantized, values=True)
    if case.rows == "" and case.causal:
        options["q_counts"] = torch.full((case.B,), case.T)
    if not bool(held.all()):
        bias = options.get("key_bias", torch.zeros(held.shape))
        options["key_bias"] = torch.where(held, bias if bias.dim() == 3 else bias[:, None], -INF)
    want = run(backend, q, keys, values, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_heads_of_different_lengths_are_heads_of_their_own(backend: Backend) -> None:
    """Each kv head with its own slots alone: all heads' newest rows are at the end of theirs."""
    (q, k, v), options = BASE.call()
    out, lse = run(backend, q, k, v, **options)
    table, lengths = options["block_table"], options["lengths"]
    assert len(lengths.unique()) > 1
    for h in range(2):
        own = {"block_table": table[:, h : h + 1], "lengths": lengths[:, h : h + 1]}
        got = run(backend, q[:, 2 * h : 2 * h + 2], k, v, **options | own)
        assert torch.equal(got[0], out[:, 2 * h : 2 * h + 2])
        assert torch.equal(got[1], lse[:, 2 * h : 2 * h + 2])


@pytest.mark.parametrize("left", [False, True])
def test_rows_that_are_padding(backend: Backend, left: bool) -> None:
    """A ragged batch gives what its sequences give alone, and nothing where there is no row."""
    (q, k, v), options = BASE.call()
    counts = torch.tensor([17, 41])
    options |= {"q_counts": counts} | ({"q_starts": 41 - counts} if left else {})
    out, lse = run(backend, q, k, v, **options)
    for b, count in enumerate(counts.tolist()):
        own = slice(41 - count, 41) if left else slice(0, count)
        alone = {name: options[name][b : b + 1] for name in ("block_table", "lengths")}
        want = run(backend, q[b : b + 1, :, own], k, v, **alone)
        torch.testing.assert_close(out[b : b + 1, :, own], want[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(lse[b : b + 1, :, own], want[1], rtol=2e-6, atol=2e-6)
        padding = torch.ones(41, dtype=torch.bool)
        padding[own] = False
        assert (out[b, :, padding] == 0).all()
        assert (lse[b, :, padding] == -INF).all()


def test_dense_rows_at_the_end_of_their_sequences(backend: Backend) -> None:
    """``q_counts`` without pages: positions from the lengths."""
    q, k, v = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 90, 8), torch.randn(2, 2, 90, 8)
    lengths, counts = torch.tensor([90, 33]), torch.tensor([7, 20])
    got = run(backend, q, k, v, lengths=lengths, q_counts=counts)
    position = (lengths - counts)[:, None] + torch.arange(20)
    want = run(backend, q, k, v, lengths=lengths, q_position=position.where(position < lengths[:, None], -1))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_no_sequence_owns_is_never_used(backend: Backend, dtype: str) -> None:
    """Pages of others and slots behind a length may hold anything, also NaN; table entries there, too."""
    (q, k, v), options = replace(BASE, dtype=dtype).call()
    want = run(backend, q, k, v, **options)
    table, lengths = options["block_table"].clone(), options["lengths"]
    slot = torch.arange(BASE.S).view(BASE.places, BASE.P)
    mine = torch.zeros(len(k), BASE.P, dtype=torch.bool)
    for b in range(2):
        for h in range(2):
            mine[table[b, h].long()] = slot < lengths[b, h]
    k, v = (torch.where(mine[:, None, :, None], t, NAN) for t in (k, v))
    table[torch.arange(BASE.places) * BASE.P >= lengths[..., None]] = 0x7FFFFFFF
    got = run(backend, q, k, v, **{**options, "block_table": table})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_wild_entry_is_a_hole_below_the_wrapper(backend: Backend) -> None:
    (q, k, v), options = replace(BASE, holes=True).call()
    table = options["block_table"]
    wild = torch.tensor([len(k), 0x0FFFFFFF, page_entry(1, 0), -2, -(2**31)], dtype=torch.int32)
    replaced = torch.where(table < 0, wild[torch.arange(table.numel()).view(table.shape) % 5], table)
    got = backend.run_kernel(
        "flash_prefill", q, k, v, scale=BASE.D**-0.5, **{**options, "block_table": replaced}
    )
    want = run(backend, q, k, v, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("case", [BASE, MIXED], ids=lambda case: case.name)
def test_bit_identical_for_any_threads(case: PagedCase) -> None:
    before = torch.get_num_threads()
    arguments, options = case.call()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.flash_prefill(*arguments, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_many_heads_are_packed_a_few_at_a_time() -> None:
    """More keys than are packed at a time: the same bits as sequence by sequence."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(6, 1, 120, 64, generator=g)
    k, v = (torch.randn(6, 1, 30_000, 64, generator=g) for _ in range(2))
    out, lse = ops.flash_prefill(q, k, v)
    for b in range(6):
        own = slice(b, b + 1)
        alone = ops.flash_prefill(q[own], k[own], v[own])
        assert all(torch.equal(x[own], y) for x, y in zip((out, lse), alone, strict=True))


FORMAT = PageFormat("int4", "int4", 16, 64)
POOL = torch.zeros(3, FORMAT.page_bytes, dtype=torch.uint8)


def _pools(pool: Tensor = POOL, page: PageFormat = FORMAT, **maps: Tensor) -> dict[str, Any]:
    return {"quantized": PagePools((pool,), (page,), **maps)}


def _table(*shape: int, entry: int = 0) -> dict[str, Any]:
    return {"block_table": torch.full(shape, entry, dtype=torch.int32)}


RUN, VAL = RuntimeError, ValueError
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"block_table": torch.zeros(2, 2, 7)}, RUN, "block_table must be Int, got Float"),
    (_table(2, 2), RUN, "block_table must have shape [B=2, Hkv, pages], got [2, 2]"),
    (_table(2, 3, 7), RUN, "Hq must be a multiple of Hkv=3, got 4"),
    (
        {"v": torch.zeros(5, 1, 16, 64)},
        RUN,
        "v must have as many pages, heads and slots as k, [31, 1, 16, 64], got [5",
    ),
    ({"k": torch.zeros(31, 3, 16, 64)}, RUN, "k must have shape [pages, 1 or Hkv=2, P, D=64]"),
    (
        {"k": torch.zeros(31, 1, 12, 64), "v": torch.zeros(31, 1, 12, 64), "lengths": None},
        RUN,
        "page size P must be a power of two",
    ),
    ({"lengths": torch.zeros(2, 3).int()}, RUN, "lengths must have shape [2, 2], got [2, 3]"),
    ({"lengths": torch.full((2, 2), 113)}, VAL, "lengths must be in [0, S=112], got 113"),
    (_table(2, 2, 7, entry=31), VAL, "block_table must be in [-1, pages=31), got 31"),
    (_table(2, 2, 7, entry=page_entry(1, 0)), VAL, "block_table must be in [-1, pages=31), got 268435456"),
    (
        _pools() | _table(2, 2, 7, entry=page_entry(1, 3)),
        VAL,
        "block_table must be -1 or name a page of the 2 pools, got page 3 of type 1 at [0, 0, 0]",
    ),
    (_pools() | _table(2, 2, 7, entry=page_entry(2, 0)), VAL, "got page 0 of type 2 at [0, 0, 0]"),
    (_pools() | _table(2, 2, 7, entry=-2), VAL, "block_table must be -1 or name a page of the 2 pools"),
    (
        _pools()
        | {
            "block_table": None,
            "lengths": None,
            "k": torch.zeros(2, 2, 9, 64),
            "v": torch.zeros(2, 2, 9, 64),
        },
        RUN,
        "pools must be None unless block_table is given, got 1",
    ),
    (
        _pools() | {"k": torch.zeros(31, 1, 8, 64), "v": torch.zeros(31, 1, 8, 64), "lengths": None},
        RUN,
        "page size P must be 16, 32 or 64 beside quantized pools, got 8",
    ),
    (
        _pools() | {"v": torch.zeros(31, 1, 16, 32)},
        RUN,
        "v_pages must have D=64 channels beside quantized pools, got 32",
    ),
    (_pools(POOL.int()), RUN, "pools must be contiguous uint8 of shape [pages, page bytes], got Int"),
    (_pools(k_scale=torch.ones(2, 2, 3)), RUN, "k_scale must have shape [2, 2, 64], got [2, 2, 3]"),
    ({"q_counts": torch.tensor([5, 42])}, VAL, "q_counts must be in [0, T=41], got 42"),
    ({"q_starts": torch.tensor([-1, 4])}, VAL, "q_starts must be in [0, T=41], got -1"),
    ({"q_counts": torch.tensor([5])}, RUN, "q_counts must have shape [2], got [1]"),
    (
        {"q_counts": torch.tensor([5, 4]), "q_position": torch.zeros(2, 41).int()},
        RUN,
        "q_starts and q_counts must be None where q_position is given, got a tensor",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[bad[2] for bad in REFUSED])
def test_refused(cpu_backend: Backend, change: dict[str, Any], error: type[Exception], message: str) -> None:
    (q, k, v), options = BASE.call()
    if "quantized" in change:
        pools = change["quantized"]
        page = replace(pools.formats[0], layout=page_layout(cpu_backend))
        change = change | {"quantized": replace(pools, formats=(page,))}
    with pytest.raises(error, match=re.escape(message)) as caught:
        cpu_backend.run("flash_prefill", q, **{"k": k, "v": v, **options, **change})
    assert "flash_prefill: " in str(caught.value)


def test_layout_of_the_other_back_end_is_refused(cpu_backend: Backend) -> None:
    other = "mma16" if cpu_backend.name == "cpu" else "linear"
    (q, k, v), options = MIXED.call(other)
    with pytest.raises(
        RuntimeError, match="flash_prefill: layout of pools must be '.*' on C.*, got '" + other
    ):
        run(cpu_backend, q, k, v, **options)
