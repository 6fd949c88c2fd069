"""The score operators on every back end against float64, and the identities they must keep."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend, make_backend
from cases_score import SCORE_CASES, Call, ScoreCase
from hypothesis import given
from hypothesis import strategies as st
from tokencomp import reference
from torch import Tensor
from yardstick import assert_scores

INF = float("inf")
by_name = {"ids": lambda case: case.name}
BASE = ScoreCase(B=2, Hq=6, Hkv=2, T=41, S=83, D=24)


def exact_and_torch(name: str, *arguments: Any, **options: Any) -> list[Tensor]:
    function = getattr(reference, name)
    return [function(*arguments, **options, dtype=dtype) for dtype in (torch.float64, torch.float32)]


def column(backend: Backend, c: Call, **more: Any) -> Tensor:
    return backend.run("column_score", c.q, c.k, c.lse, **{**c.sight, **c.rows, **more})


@pytest.mark.parametrize("case", SCORE_CASES, **by_name)
def test_column_score(backend: Backend, case: ScoreCase) -> None:
    c = case.call()
    assert_scores(column(backend, c), *exact_and_torch("column_score", c.q, c.k, c.lse, **c.sight, **c.rows))


@pytest.mark.parametrize("case", SCORE_CASES, **by_name)
def test_attention_lse(backend: Backend, case: ScoreCase) -> None:
    c = case.call()
    got = backend.run("attention_lse", c.q, c.k, **c.sight)
    assert_scores(got, *exact_and_torch("attention_lse", c.q, c.k, **c.sight))


@pytest.mark.parametrize("case", [c for c in SCORE_CASES if c.reduce == "sum"][::2], **by_name)
def test_diagonal_score(backend: Backend, case: ScoreCase) -> None:
    c = case.call()
    rows = {key: v for key, v in c.rows.items() if key != "rows"}
    got = backend.run("diagonal_score", c.q, c.k, c.lse, **c.sight, **rows)
    assert_scores(got, *exact_and_torch("diagonal_score", c.q, c.k, c.lse, **c.sight, **rows))


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("case", [c for c in SCORE_CASES if c.T and not c.bad][::2], **by_name)
def test_qk_scores(backend: Backend, case: ScoreCase, pages: bool) -> None:
    c = case.call()
    options = {key: v for key, v in c.sight.items() if key not in ("causal", "window", "q_position")}
    if pages:
        if case.D > 128 and backend.name != "cpu":
            pytest.skip("k_min on CUDA: D up to 128")
        options["k_min"] = torch.empty_strided(c.k.shape, c.k.stride(), dtype=c.k.dtype).copy_(c.k - 0.5)
    got = backend.run("qk_scores", c.q[:, :, 0], c.k, **options)
    exact, torch32 = exact_and_torch("qk_scores", c.q[:, :, 0], c.k, **options)
    assert_scores(got[0], exact[0], torch32[0], what="scores")
    assert_scores(got[1], exact[1], torch32[1], what="lse", signed=True)


# --- identities -------------------------------------------------------------------------------------------

WEIGHED = [replace(BASE, weight=w, dtype=d) for w in ("", "decay", "head") for d in ("float32", "bfloat16")]
WEIGHED += [replace(BASE, causal=False), replace(BASE, window=7), replace(BASE, softcap=2.0)]
WEIGHED += [replace(BASE, bias=b) for b in ("batch", "head")] + [replace(BASE, position="shared", T=83)]
WEIGHED += [replace(BASE, lengths=(83, 83), starts=(0, 40)), replace(BASE, Hq=8, Hkv=8, D=128)]


@pytest.mark.parametrize("case", WEIGHED, **by_name)
def test_scores_of_a_head_sum_to_the_weights(backend: Backend, case: ScoreCase) -> None:
    """Every row of the attention matrix sums to 1: a check that needs no reference."""
    c = case.call()
    lse = backend.run("attention_lse", c.q, c.k, **c.sight)
    got = backend.run("column_score", c.q, c.k, lse, **c.sight, **c.rows).double().sum(-1)
    weight = c.rows.get("row_weight", torch.ones(case.T)).double()
    weight = weight[:, None] if weight.dim() == 2 else weight
    total = torch.where(lse.isfinite(), weight, 0.0).sum(-1)
    torch.testing.assert_close(got, total.expand_as(got), rtol=1e-5, atol=0)
    diagonal = backend.run("diagonal_score", c.q, c.k, lse, **c.sight, row_weight=c.rows.get("row_weight"))
    if case.causal:
        torch.testing.assert_close(diagonal.double().sum(-1), got, rtol=1e-5, atol=0)


def test_forgetting_in_chunks_and_steps(backend: Backend) -> None:
    """A2SF: the whole prompt at once, in two chunks, and chunk by decode steps give the same scores."""
    c, gamma, first = BASE.call(), 0.9, 25
    weight = gamma ** torch.arange(BASE.T - 1, -1, -1.0)
    options = {"scale": c.sight["scale"], "heads": "kv_sum"}
    whole = backend.run("column_score", c.q, c.k, c.lse, row_weight=weight, **options)
    head = backend.run(
        "column_score",
        c.q[:, :, :first],
        c.k,
        c.lse[:, :, :first],
        row_weight=weight[-first:],
        q_position=torch.arange(first) + BASE.S - BASE.T,
        **options,
    )
    tail = backend.run(
        "column_score", c.q[:, :, first:], c.k, c.lse[:, :, first:], row_weight=weight[first:], **options
    )
    torch.testing.assert_close(head * gamma ** (BASE.T - first) + tail, whole, rtol=2e-6, atol=1e-7)
    if backend.device == "cpu":
        score = head.clone()
        for t in range(first, BASE.T):
            seen = torch.full((BASE.B,), BASE.S - BASE.T + t + 1)
            logits, lse = backend.run("qk_scores", c.q[:, :, t], c.k, lengths=seen)
            backend.run("decay_score_", score, logits, lse, gamma=gamma)
        torch.testing.assert_close(score, whole, rtol=5e-6, atol=1e-7)


def test_a_subset_of_rows_is_weights_on_all(backend: Backend) -> None:
    c = BASE.call()
    rows = torch.tensor([40, 3, 17, 22])
    weight = torch.zeros(BASE.T)
    weight[rows] = 1
    scale = c.sight["scale"]
    subset = backend.run(
        "column_score", c.q[:, :, rows], c.k, c.lse[:, :, rows], q_position=rows + 42, scale=scale
    )
    full = backend.run("column_score", c.q, c.k, c.lse, row_weight=weight, scale=scale)
    torch.testing.assert_close(subset, full, rtol=1e-6, atol=0)


def test_left_padding_equals_slicing(backend: Backend) -> None:
    c = replace(BASE, T=83, starts=(0, 30)).call()
    c.k[1, :, :30], c.q[1, :, :30] = float("nan"), float("nan")
    got = column(backend, c)
    own = backend.run("column_score", c.q[1:, :, 30:], c.k[1:, :, 30:], c.lse[1:, :, 30:])
    torch.testing.assert_close(got[1:, :, 30:], own, rtol=1e-6, atol=0)
    assert (got[1, :, :30] == 0).all()


def test_rows_without_a_key_are_nothing(backend: Backend) -> None:
    c = replace(BASE, T=90, S=83, bias="batch").call()  # the first rows sit before the first key
    c.sight["key_bias"][1] = -INF
    lse = backend.run("attention_lse", c.q, c.k, **c.sight)
    assert (lse[1] == -INF).all()
    assert (lse[0, :, :7] == -INF).all()
    got = backend.run("column_score", c.q, c.k, lse, **c.sight)
    assert (got[1] == 0).all()
    assert got[0].isfinite().all()
    torch.testing.assert_close(got[0].sum(-1), torch.full((6,), 83.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["column_score", "attention_lse", "diagonal_score"])
@pytest.mark.parametrize("shape", [(1, 8, 2, 333, 700), (1, 4, 4, 1, 5000), (3, 2, 1, 40, 40)], ids=str)
def test_bit_identical_for_any_threads(name: str, shape: tuple[int, ...]) -> None:
    cpu, before = make_backend("cpu"), torch.get_num_threads()
    c = ScoreCase(*shape, 64, "bfloat16").call()
    arguments = (c.q, c.k) if name == "attention_lse" else (c.q, c.k, c.lse)
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(cpu.run(name, *arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results[1:])


@given(st.data())
def test_shapes_and_options_nobody_thought_of(data: st.DataObject) -> None:
    """CPU and emulator against float64."""
    group, hkv = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    batch, rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 140))
    keys, dim = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 70))
    causal = data.draw(st.booleans())
    case = ScoreCase(
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
        weight=data.draw(st.sampled_from(("", "decay", "sparse", "head"))),
        position=data.draw(st.sampled_from(("", "shared", "batch"))),
        lengths=tuple(data.draw(st.integers(0, keys)) for _ in range(batch)),
        reduce=data.draw(st.sampled_from(("sum", "max"))),
        heads=data.draw(st.sampled_from(("none", "kv_sum", "kv_max", "mean"))),
    )
    c = case.call()
    want = exact_and_torch("column_score", c.q, c.k, c.lse, **c.sight, **c.rows)
    lse = exact_and_torch("attention_lse", c.q, c.k, **c.sight)
    for name in ("cpu", "emu"):
        backend = make_backend(name)
        assert_scores(column(backend, c), *want, what=name)
        assert_scores(backend.run("attention_lse", c.q, c.k, **c.sight), *lse, what=f"{name} lse")


# --- worked examples --------------------------------------------------------------------------------------


def test_worked_example_of_forgetting(backend: Backend) -> None:
    """Four queries with logits [0], [1, 0], [0, 1, 2], [2, 0, 1, 0]: plain, forgetting, and maxima."""
    logits = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 2, 0], [2, 0, 1, 0]])
    q, k = logits[None, None].contiguous(), torch.eye(4)[None, None]
    lse = backend.run("attention_lse", q, k, scale=1.0)
    expected = [math.log(sum(math.exp(z) for z in row[: i + 1])) for i, row in enumerate(logits.tolist())]
    torch.testing.assert_close(lse[0, 0], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    weight = torch.tensor([0.125, 0.25, 0.5, 1.0])
    for options, want in (
        ({}, (2.4314, 0.5963, 0.8898, 0.0826)),
        ({"row_weight": weight}, (0.9631, 0.2722, 0.5571, 0.0826)),
        ({"row_weight": weight, "rows": "max"}, (0.6103, 0.1224, 0.3326, 0.0826)),
    ):
        got = backend.run("column_score", q, k, lse, scale=1.0, **options)
        torch.testing.assert_close(got[0, 0], torch.tensor(want), rtol=0, atol=6e-5)


def rows_of_probabilities(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Queries and keys whose causal attention (scale 1) is the given rows."""
    n = len(rows)
    q = torch.tensor([row + [1.0] * (n - len(row)) for row in rows]).log()
    return q[None, None], torch.eye(n)[None, None]


def test_worked_example_of_a2sf(backend: Backend) -> None:
    rows = [[1.0], [0.7, 0.3], [0.5, 0.1, 0.4], [0.1, 0.1, 0.5, 0.3], [0.05, 0.05, 0.3, 0.4, 0.2]]
    q, k = rows_of_probabilities(rows)
    lse = backend.run("attention_lse", q, k, scale=1.0)
    torch.testing.assert_close(lse, torch.zeros(1, 1, 5), rtol=0, atol=1e-6)
    plain = backend.run("column_score", q, k, lse, scale=1.0)
    torch.testing.assert_close(plain[0, 0], torch.tensor([2.35, 0.55, 1.2, 0.7, 0.2]), rtol=0, atol=1e-6)
    half = backend.run("column_score", q, k, lse, scale=1.0, row_weight=0.5 ** torch.arange(4, -1, -1.0))
    want = torch.tensor([0.375, 0.1625, 0.65, 0.55, 0.2])
    torch.testing.assert_close(half[0, 0], want, rtol=0, atol=1e-6)


def test_worked_example_of_quest(backend: Backend) -> None:
    q = torch.tensor([[[1.0, -2.0]]])
    pages = torch.tensor([[[1.0, 0], [2, 1]], [[0.0, -1], [-1, -2]]])  # two keys each
    high, low = pages.amax(1)[None, None], pages.amin(1)[None, None]
    scores, _ = backend.run("qk_scores", q, high, k_min=low, scale=1.0)
    assert scores[0, 0].tolist() == [2.0, 4.0]


# --- exponentials -----------------------------------------------------------------------------------------


def test_exponentials_keep_their_bounds(backend: Backend) -> None:
    """Queries of zero make every logit its key's bias, so that scores are exponentials of chosen numbers."""
    x = torch.cat([torch.linspace(-87, 0, 20001), torch.tensor([-88.0, -200, -INF])])
    q, k, lse = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, len(x), 4), torch.zeros(1, 1, 1)
    got = backend.run("column_score", q, k, lse, key_bias=x[None], causal=False)[0, 0].double()
    vote = backend.run("head_vote", x[None, None], lse[..., 0])[0, 0].double()
    exact = x.double().exp()
    assert (got[-3:] == 0).all()
    assert vote[-3:].tolist() == [0, 0, -INF]
    error = (got / exact - 1).abs()[:-3]
    assert bool((error <= 2.5e-7 + x.double().abs()[:-3] * 2**-23).all())  # and the rounding of x log2(e)
    assert float((vote / exact - 1).abs()[:-3].max()) <= 4e-7
