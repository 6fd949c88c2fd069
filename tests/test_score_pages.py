"""``qk_scores`` over paged keys on every back end: against float64, against the same keys laid out densely,
and what it refuses.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend, make_backend
from cases_prefill_pages import PAGED_CASES, PagedCase
from cases_score_pages import PAGES_CASES, PagesCase
from test_score_emulated import library  # noqa: F401  a fixture
from tokencomp import reference
from yardstick import assert_scores

NAN, INF = float("nan"), float("inf")
BASE = PagesCase(B=2, Hq=4, Hkv=2, D=64, P=16, pages=12, holes=True)
by_name = {"ids": lambda case: case.name}


def exact_and_torch(case: PagesCase) -> list[tuple[torch.Tensor, torch.Tensor]]:
    q, pool, options = case.call()
    return [reference.qk_scores(q, pool, **options, dtype=d) for d in (torch.float64, torch.float32)]


@pytest.mark.parametrize("case", PAGES_CASES, **by_name)
def test_qk_scores_of_pages(backend: Backend, case: PagesCase) -> None:
    if case.minima and case.D > 128 and backend.name != "cpu":
        pytest.skip("k_min on CUDA: D up to 128")
    q, pool, options = case.call()
    got = backend.run("qk_scores", q, pool, **options)
    exact, torch32 = exact_and_torch(case)
    assert_scores(got[0], exact[0], torch32[0], what="scores")
    assert_scores(got[1], exact[1], torch32[1], what="lse", signed=True)


@pytest.mark.parametrize("case", PAGES_CASES[::3], **by_name)
def test_pages_give_the_bits_of_dense_keys(backend: Backend, case: PagesCase) -> None:
    q, pool, options = case.call()
    got = backend.run("qk_scores", q, pool, **options)
    table = options.pop("block_table")
    keys, held = reference.gather_pages(pool, table)
    if "k_min" in options:
        options["k_min"] = reference.gather_pages(options["k_min"], table)[0]
    bias = options.pop("key_bias", torch.zeros(held.shape))
    want = backend.run("qk_scores", q, keys, key_bias=torch.where(held, bias, -INF), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_pages_lie_changes_no_bit(backend: Backend, dtype: str) -> None:
    q, pool, options = replace(BASE, dtype=dtype).call()
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(1))
    table = options["block_table"]
    moved = torch.where(table < 0, table, order.argsort()[table.long()].int())
    want = backend.run("qk_scores", q, pool, **options)
    got = backend.run("qk_scores", q, pool[order], **{**options, "block_table": moved})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_no_sequence_owns_is_never_used(backend: Backend) -> None:
    """Pages of others and slots behind a length may hold anything, also NaN; table entries there, too."""
    q, pool, options = BASE.call()
    want = backend.run("qk_scores", q, pool, **options)
    table, lengths = options["block_table"].clone(), options["lengths"]
    behind = torch.arange(BASE.pages) * BASE.P >= lengths[..., None]
    used = torch.zeros(len(pool), dtype=torch.bool)
    used[table[~behind & (table >= 0)].long()] = True
    pool = torch.where(used[:, None, None, None], pool, NAN)
    table[behind] = 0x7FFFFFFF
    got = backend.run("qk_scores", q, pool, **{**options, "block_table": table})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_wild_entry_is_a_hole_below_the_wrapper(backend: Backend) -> None:
    q, pool, options = BASE.call()
    table = options["block_table"]
    wild = torch.tensor([len(pool), 0x0FFFFFFF, 0x10000000, -2, -(2**31)], dtype=torch.int32)
    replaced = torch.where(table < 0, wild[torch.arange(table.numel()).view(table.shape) % 5], table)
    got = backend.run_kernel("qk_scores", q, pool, **{**options, "block_table": replaced})
    want = backend.run("qk_scores", q, pool, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_lengths_of_heads_of_dense_keys(backend: Backend) -> None:
    q, k = torch.randn(2, 4, 16), torch.randn(2, 2, 30, 16)
    lengths = torch.tensor([[30, 7], [0, 12]])
    got, lse = backend.run("qk_scores", q, k, lengths=lengths)
    exact, torch32 = (
        reference.qk_scores(q, k, lengths=lengths, dtype=d) for d in (torch.float64, torch.float32)
    )
    assert_scores(got, exact[0], torch32[0])
    assert_scores(lse, exact[1], torch32[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_bit_identical_for_any_threads(threads: int) -> None:
    q, pool, options = replace(BASE, pages=300).call()
    want, before = make_backend("cpu").run("qk_scores", q, pool, **options), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = make_backend("cpu").run("qk_scores", q, pool, **options)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- quantized pages ---------------------------------------------------------------------------------------

QUANTIZED = [case for case in PAGED_CASES if case.formats and not case.lists]


def quantized_call(case: PagedCase, backend: Backend) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    (q, k, _), options = case.call("linear" if backend.name == "cpu" else "mma16")
    names = ("block_table", "lengths", "key_bias", "softcap", "quantized")
    return q[:, :, -1].contiguous(), k, {name: options[name] for name in names if name in options}


@pytest.mark.parametrize("case", QUANTIZED, **by_name)
def test_qk_scores_of_quantized_pages(backend: Backend, case: PagedCase) -> None:
    q, pool, options = quantized_call(case, backend)
    got = backend.run("qk_scores", q, pool, **options)
    exact, torch32 = (
        reference.qk_scores(q, pool, **options, dtype=d) for d in (torch.float64, torch.float32)
    )
    assert_scores(got[0], exact[0], torch32[0], what="scores")
    assert_scores(got[1], exact[1], torch32[1], what="lse", signed=True)


@pytest.mark.parametrize("case", QUANTIZED[::3], **by_name)
def test_quantized_pages_give_the_bits_of_their_numbers(backend: Backend, case: PagedCase) -> None:
    q, pool, options = quantized_call(case, backend)
    got = backend.run("qk_scores", q, pool, **options)
    keys, held = reference.gather_pages(pool, options.pop("block_table"), options.pop("quantized"))
    bias = options.pop("key_bias", torch.zeros(held.shape))
    want = backend.run("qk_scores", q, keys, key_bias=torch.where(held, bias, -INF), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_minima_and_quantized_pages_exclude_each_other(cpu_backend: Backend) -> None:
    q, pool, options = quantized_call(QUANTIZED[0], cpu_backend)
    with pytest.raises(
        RuntimeError, match="qk_scores: k_min must be None beside quantized pools, got a tensor"
    ):
        cpu_backend.run("qk_scores", q, pool, **options, k_min=pool.clone())


def _table(*shape: int, entry: int = 0) -> dict[str, Any]:
    return {"block_table": torch.full(shape, entry, dtype=torch.int32)}


def _pool(*shape: int) -> dict[str, Any]:
    return {"k": torch.zeros(shape)}


RUN, VAL = RuntimeError, ValueError
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"block_table": torch.zeros(2, 2)}, RUN, "block_table must be Int, got Float"),
    (_table(2, 2), RUN, "block_table must have shape [B=2, Hkv, pages], got [2, 2]"),
    (_table(1, 2, 3), RUN, "block_table must have shape [B=2, Hkv, pages], got [1, 2, 3]"),
    (_table(2, 3, 3), RUN, "Hq must be a multiple of Hkv=3, got 4"),
    (
        {"block_table": _table(2, 2, 6)["block_table"][..., ::2]},
        RUN,
        "block_table must be contiguous in its last",
    ),
    (_pool(51, 3, 16, 64), RUN, "k must have shape [pages, 1 or Hkv=2, P, D=64]"),
    (_pool(51, 1, 16, 32), RUN, "k must have shape [pages, 1 or Hkv=2, P, D=64]"),
    (_pool(51, 1, 0, 64), RUN, "page size P must be a power of two, got 0"),
    (_pool(51, 1, 12, 64), RUN, "page size P must be a power of two, got 12"),
    (_pool(51, 16, 64), RUN, "k must have shape [pages, Hkv, P, D], got [51, 16, 64]"),
    ({"k_min": torch.zeros(5, 1, 16, 64)}, RUN, "k_min must have the shape of k"),
    ({"lengths": torch.zeros(2, 3).int()}, RUN, "lengths must have shape [2, 2], got [2, 3]"),
    ({"lengths": torch.full((2, 2), 193)}, VAL, "lengths must be in [0, S=192], got 193"),
    (_table(2, 2, 12, entry=51), VAL, "block_table must be in [-1, pages=51), got 51"),
    (_table(2, 2, 12, entry=-2), VAL, "block_table must be in [-1, pages=51), got -2"),
    (_table(2, 2, 12, entry=1 << 28), VAL, "block_table must be in [-1, pages=51), got 268435456"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[bad[2] for bad in REFUSED])
def test_refused(cpu_backend: Backend, change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, pool, options = replace(BASE, lengths="").call()
    arguments = {"k": pool, **options, **change}
    with pytest.raises(error, match=re.escape(message)) as caught:
        cpu_backend.run("qk_scores", q, **arguments)
    assert "qk_scores: " in str(caught.value)


RACED = [
    replace(BASE, dtype="bfloat16"),
    replace(BASE, P=8, pages=30, shared=True, layout="sliced", minima=True),
]


@pytest.mark.parametrize("case", RACED, **by_name)
def test_under_the_checker(library: Any, case: PagesCase) -> None:  # noqa: F811
    (q, pool), options = case.arguments()
    got = library.qk_scores(q, pool, **options)
    exact, torch32 = exact_and_torch(case)
    assert_scores(got[0], exact[0], torch32[0])
    assert_scores(got[1], exact[1], torch32[1])


RACED_QUANTIZED = [QUANTIZED[1], QUANTIZED[2], QUANTIZED[3], QUANTIZED[-6]]


@pytest.mark.parametrize("case", RACED_QUANTIZED, **by_name)
def test_quantized_pages_under_the_checker(library: Any, case: PagedCase) -> None:  # noqa: F811
    (q, k, _), options = case.call("mma16")
    names = ("block_table", "lengths", "quantized")
    exact, torch32 = (
        reference.qk_scores(q[:, :, -1], k, **{name: options[name] for name in names}, dtype=d)
        for d in (torch.float64, torch.float32)
    )
    options = options["quantized"].arguments() | {name: options[name] for name in names[:2]}
    got = library.qk_scores(q[:, :, -1].contiguous(), k, scale=case.D**-0.5, **options)
    assert_scores(got[0], exact[0], torch32[0])
    assert_scores(got[1], exact[1], torch32[1])
