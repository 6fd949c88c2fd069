"""Prefill attention on every back end against float64, and the identities it must keep."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from backends import Backend, make_backend
from cases_prefill import PREFILL_CASES, PrefillCase, lists_of
from cases_score import ScoreCase
from hypothesis import given
from hypothesis import strategies as st
from prefill_yardstick import assert_attention, check_case
from tokencomp import ops, reference
from torch import Tensor

INF = float("inf")
BASE = ScoreCase(B=2, Hq=4, Hkv=2, T=150, S=277, D=16)


def run(backend: Backend, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = backend.run("flash_prefill", *arguments, **options)
    return out


@pytest.mark.parametrize("case", PREFILL_CASES, ids=lambda case: case.name)
def test_flash_prefill(backend: Backend, case: PrefillCase) -> None:
    check_case(partial(run, backend), case)


# --- identities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False])
def test_all_blocks_equal_dense(backend: Backend, dtype: str, causal: bool) -> None:
    arguments, options = PrefillCase(replace(BASE, dtype=dtype, causal=causal)).call()
    dense = run(backend, *arguments, **options)
    for block_q in (64, 128):
        blocks = torch.ones(2, 1, -(-BASE.T // block_q), -(-BASE.S // 128), dtype=torch.bool)
        indptr, indices = lists_of(blocks)
        lists = {"indptr": indptr, "indices": indices, "block_q": block_q, "block_k": 128}
        got = run(backend, *arguments, **options, **lists)
        torch.testing.assert_close(got[1], dense[1], rtol=2e-6, atol=2e-6)
        atol = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
        torch.testing.assert_close(got[0], dense[0], rtol=0, atol=atol)


def test_columns_equal_blocks_of_the_same_keys(backend: Backend) -> None:
    """All keys as columns, or as blocks: the same attention."""
    arguments, options = PrefillCase(BASE).call()
    none = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    indptr, indices = lists_of(none)
    column_ptr, columns = lists_of(torch.ones(2, 1, 3, BASE.S, dtype=torch.bool))
    lists = {"indptr": indptr, "indices": indices, "column_ptr": column_ptr, "columns": columns}
    got, dense = run(backend, *arguments, **options, **lists), run(backend, *arguments, **options)
    torch.testing.assert_close(got[0], dense[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(got[1], dense[1], rtol=2e-6, atol=2e-6)


def test_lse_is_that_of_the_score_family(backend: Backend) -> None:
    for case in (BASE, replace(BASE, softcap=2.0), replace(BASE, bias="head"), replace(BASE, window=20)):
        arguments, options = PrefillCase(case).call()
        _, lse = run(backend, *arguments, **options)
        want = backend.run("attention_lse", *arguments[:2], **options)
        torch.testing.assert_close(lse, want, rtol=2e-6, atol=2e-6)


def test_values_of_one_give_one(backend: Backend) -> None:
    """The weights of a row sum to 1, or to nothing where it sees no key: a check without a reference."""
    (q, k, v), options = PrefillCase(replace(BASE, position="batch", lengths=(277, 90))).call()
    out, lse = run(backend, q, k, torch.ones_like(v), **options)
    want = lse.isfinite().float()[..., None].expand_as(out)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    assert 0 < want.mean() < 1


def test_chunks_equal_the_whole(backend: Backend) -> None:
    """Chunked prefill: each chunk of queries against the keys so far."""
    (q, k, v), options = PrefillCase(replace(BASE, T=200, S=200)).call()
    whole = run(backend, q, k, v, **options)
    for first, last in ((0, 64), (64, 150), (150, 200)):
        got = run(backend, q[:, :, first:last], k[:, :, :last], v[:, :, :last], **options)
        torch.testing.assert_close(got[0], whole[0][:, :, first:last], rtol=0, atol=2e-6)
        torch.testing.assert_close(got[1], whole[1][:, :, first:last], rtol=2e-6, atol=2e-6)


def test_padding_may_hold_anything(backend: Backend) -> None:
    case = replace(BASE, lengths=(277, 160), starts=(100, 3))
    (q, k, v), options = PrefillCase(case).call()
    options["q_position"] = options["lengths"][:, None] - BASE.T + torch.arange(BASE.T)
    clean = run(backend, q, k, v, **options)
    for b, (start, length) in enumerate(((100, 277), (3, 160))):
        for t in (k, v):
            t[b, :, :start], t[b, :, length:] = float("nan"), INF
    got = run(backend, q, k, v, **options)
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[1], clean[1])


def test_lists_may_lack_the_diagonal(backend: Backend) -> None:
    """The first query block lists only a block of the future: nothing to see."""
    (q, k, v), options = PrefillCase(replace(BASE, T=128, S=128)).call()
    blocks = torch.tensor([[False, True], [True, False]]).expand(2, 4, 2, 2)
    indptr, indices = lists_of(blocks)
    out, lse = run(backend, q, k, v, **options, indptr=indptr, indices=indices)
    assert (out[:, :, :64] == 0).all()
    assert (lse[:, :, :64] == -INF).all()
    assert lse[:, :, 64:].isfinite().all()
    sinks = torch.arange(4.0)
    out, lse = run(backend, q, k, v, **options, indptr=indptr, indices=indices, sinks=sinks)
    assert (out[:, :, :64] == 0).all()
    assert torch.equal(lse[:, :, :64], sinks[:, None].expand(2, 4, 64))


def test_worked_example(backend: Backend) -> None:
    """Causal rows (1), (.6, .4), (.1, .2, .7) with values 1, 10, 100."""
    rows = [[1.0, 1, 1], [0.6, 0.4, 1], [0.1, 0.2, 0.7]]
    q, k = torch.tensor(rows).log()[None, None], torch.eye(3)[None, None]
    v = torch.tensor([1.0, 10, 100])[None, None, :, None]
    out, lse = run(backend, q, k, v, scale=1.0)
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([1.0, 4.6, 72.1]), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, torch.zeros(1, 1, 3), rtol=0, atol=1e-6)
    out, lse = run(backend, q, k, v, scale=1.0, sinks=torch.zeros(1))  # the sink takes half
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([0.5, 2.3, 36.05]), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, torch.full((1, 1, 3), math.log(2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bit_identical_for_any_threads(dtype: str, lists: bool) -> None:
    before = torch.get_num_threads()
    case = PrefillCase(
        replace(BASE, dtype=dtype), lists="random" if lists else "", columns="q" if lists else ""
    )
    arguments, options = case.call()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(ops.flash_prefill(*arguments, **options))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_outputs_alias_nothing(backend: Backend) -> None:
    (q, k, v), options = PrefillCase(replace(BASE, T=5, S=5)).call()
    first = run(backend, q, k, v, **options)
    kept = [t.clone() for t in (*first, q, k, v)]
    run(backend, q * 2, k, v, **options)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*first, q, k, v), strict=True))


@given(st.data())
def test_shapes_and_options_nobody_thought_of(data: st.DataObject) -> None:
    """CPU and emulator against float64."""
    group, hkv = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    batch, rows = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 150))
    keys, dim = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 70))
    causal = data.draw(st.booleans())
    base = ScoreCase(
        batch,
        group * hkv,
        hkv,
        rows,
        keys,
        dim,
        data.draw(st.sampled_from(("float32", "float16", "bfloat16"))),
        causal=causal,
        window=data.draw(st.sampled_from((None, 1, 17))) if causal else None,
        bias=data.draw(st.sampled_from(("", "batch", "head", "masked"))),
        position=data.draw(st.sampled_from(("", "shared", "batch"))),
        lengths=tuple(data.draw(st.integers(0, keys)) for _ in range(batch)),
    )
    case = PrefillCase(
        base,
        data.draw(st.sampled_from((None, 1, 50))),
        data.draw(st.sampled_from(("", "all", "random"))),
        data.draw(st.sampled_from(("q", "kv", "one"))),
        data.draw(st.sampled_from(("", "q", "kv"))),
        data.draw(st.sampled_from((64, 128))),
        data.draw(st.sampled_from((64, 128))),
        data.draw(st.booleans()),
    )
    arguments, options = case.call()
    for name in ("cpu", "emu"):
        assert_attention(run(make_backend(name), *arguments, **options), arguments, options)


def test_reference_agrees_with_torch() -> None:
    """The oracle itself against torch's own attention in float64."""
    (q, k, v), _ = PrefillCase(replace(BASE, T=90, S=90)).call()
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(reference.flash_prefill(q, k, v)[0], want, rtol=1e-12, atol=1e-12)
