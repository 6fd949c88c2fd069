"""Scores from received attention and from observation windows: worked examples, dense float64, bad input."""

from typing import Any

import pytest
import torch
from recipe_attention import close, dense_attention, dense_logits, grouped, kept, random_sides, sides_of
from tokencomp import ops, recipes, scores
from torch import Tensor
from torch.nn import functional

A2SF_ROWS = [[1], [0.7, 0.3], [0.5, 0.1, 0.4], [0.1, 0.1, 0.5, 0.3], [0.05, 0.05, 0.3, 0.4, 0.2]]
ZIP_ROWS = [[1], [0.6, 0.4], [0.5, 0.3, 0.2], [0.4, 0.1, 0.2, 0.3]]
HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2)])
INF = float("inf")


# --- worked examples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "want", "chosen"),
    [
        ({}, [2.35, 0.55, 1.2, 0.7, 0.2], [0, 2, 4]),
        ({"gamma": 0.5}, [0.375, 0.1625, 0.65, 0.55, 0.2], [2, 3, 4]),
        ({"corrected": True}, [0.47, 0.1375, 0.4, 0.35, 0.2], [0, 2, 4]),
    ],
)
def test_h2o_a2sf_and_count_correction(options: dict[str, Any], want: list[float], chosen: list[int]) -> None:
    q, k = sides_of(A2SF_ROWS)
    score = recipes.accumulated_attention(q, k, scale=1, **options)
    close(score, want)
    assert kept(recipes.select_per_head(score, 3, tail=1)[0]) == chosen


def test_a2sf_in_a_chunk_and_in_a_step() -> None:
    q, k = sides_of(A2SF_ROWS)
    before = recipes.accumulated_attention(q[:, :, :4], k[:, :, :4], gamma=0.5, scale=1)
    close(before, [0.65, 0.225, 0.7, 0.3])
    after = recipes.accumulate_chunk(before, q[:, :, 4:], k, gamma=0.5, scale=1)
    close(after, [0.375, 0.1625, 0.65, 0.55, 0.2])
    step = functional.pad(before, (0, 1))
    ops.decay_score_(step, torch.tensor([[A2SF_ROWS[4]]]), gamma=0.5)
    close(step, after.double())


def test_snapkv() -> None:
    k = torch.tensor([2, 0.3, 1, 3, 0.2, 1.4, 0.5, 0]).view(1, 1, 8, 1)
    q = torch.tensor([1, 0.5]).view(1, 1, 2, 1)
    raw = [0.368440, 0.110468, 0.177630, 0.812900, 0.103453, 0.236066]
    average = [0.159636, 0.218846, 0.366999, 0.364661, 0.384140, 0.113173]
    largest = [0.368440, 0.368440, 0.812900, 0.812900, 0.812900, 0.236066]
    close(recipes.window_score(q, k, kernel=1), [*raw, -INF, -INF])
    for pool, want, chosen in (("avg", average, [2, 4, 6, 7]), ("max", largest, [2, 3, 6, 7])):
        score = recipes.window_score(q, k, kernel=3, pool=pool)
        close(score, [*want, -INF, -INF])
        assert kept(recipes.select_per_head(score, 4, tail=2)[0]) == chosen


def test_tova() -> None:
    rows = torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.25], [0.3, 0.1, 0.1, 0.4, 0.1]])
    score = recipes.tova_score(rows.log()[None], torch.eye(5)[None, None], scale=1)
    close(score, [0.2, 0.25, 0.15, 0.225, 0.175])
    assert kept(recipes.select_per_head(score, 3)[0]) == [0, 1, 3]


@pytest.mark.parametrize(
    ("probes", "norm", "want"),
    [
        ([1, 1, 1, 1], "none", [2.5, 0.8, 0.4, 0.3]),
        ([1, 1, 1, 1], "rows_all", [0.625, 0.8 / 3, 0.2, 0.3]),
        ([0, 1, 0, 1], "none", [1, 0.5, 0.2, 0.3]),
        ([0, 1, 0, 1], "rows_all", [0.25, 0.5 / 3, 0.1, 0.3]),
        ([0, 1, 0, 1], "rows_probe", [0.5, 0.25, 0.2, 0.3]),
    ],
)
def test_zipcache(probes: list[int], norm: Any, want: list[float]) -> None:
    q, k = sides_of(ZIP_ROWS)
    close(recipes.probe_saliency(q, k, row_weight=torch.tensor(probes).float(), norm=norm, scale=1), want)


def test_zipvl_counts_by_mass_and_picks_by_mean() -> None:
    q, k = sides_of(ZIP_ROWS)
    mass, mean = (
        recipes.probe_saliency(q, k, row_weight=torch.ones(4), norm=norm, scale=1)[:, 0]
        for norm in ("none", "rows_probe")
    )
    index, count = recipes.zipvl_select(mass, mean, 0.8)
    assert kept(index) == [0, 3]
    assert count.tolist() == [2]


def test_sinks_are_what_is_above_the_threshold_but_the_first() -> None:
    q, k = sides_of(A2SF_ROWS)  # means .47 .1375 .4 .35 .2
    mean = recipes.accumulated_attention(q, k, corrected=True, heads="none", scale=1)
    assert recipes.attention_sinks(mean, 0.3).tolist() == [[[False, False, True, True, False]]]
    assert recipes.attention_sinks(mean, 0.15).tolist() == [[[False, False, True, True, True]]]


def test_cls_rows() -> None:
    rows = torch.tensor([[0.2, 0.1, 0.4, 0.2, 0.1], [0.2, 0.3, 0.1, 0.2, 0.2]])
    q = torch.zeros(1, 2, 5, 5)
    q[0, :, 0] = rows.log()
    score = recipes.cls_attention(q, torch.eye(5)[None, None].expand(1, 2, 5, 5), scale=1)
    close(score, [[0.2, 0.25, 0.2, 0.15]])
    score = torch.tensor([[0.2, 0.25, 0.2, 0.15]])  # the tie of 0 and 2 is exact in the example
    assert kept(ops.topk_select(score, 2)[0]) == [0, 1]


def test_speckv() -> None:
    q = torch.tensor([[1.0, 0], [0, 1]])[None, None]
    k = torch.tensor([[2.0, 0], [0, 1], [0, 0], [1, 1], [0, 2], [1, 0]])[None, None]
    options: dict[str, Any] = {"rows": "max", "heads": "kv_max"}
    largest = [0.449960, 0.181576, 0.109393, 0.221861, -INF, -INF]
    close(recipes.window_score(q, k, kernel=1, **options), largest)
    pooled = recipes.window_score(q, k, kernel=3, pool="avg", **options)
    close(pooled, [0.210512, 0.246977, 0.170944, 0.110418, -INF, -INF])
    assert kept(recipes.select_per_head(pooled, 4, tail=2)[0]) == [0, 1, 4, 5]


# --- against dense float64 --------------------------------------------------------------------------------


@HEADS
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_accumulated_attention(heads: int, kv_heads: int, gamma: float) -> None:
    q, k = random_sides(2, heads, kv_heads, 37, 37)
    weight = gamma ** torch.arange(36, -1, -1).double()
    columns = (dense_attention(q, k) * weight[:, None]).sum(2)
    want = grouped(columns, kv_heads).sum(2)
    close(recipes.accumulated_attention(q, k, gamma=gamma), want, 5e-6)
    seen = weight.flip(0).cumsum(0).flip(0)
    corrected = recipes.accumulated_attention(q, k, gamma=gamma, corrected=True, heads="mean")
    close(corrected, columns.mean(1, keepdim=True) / seen, 5e-6)


@pytest.mark.parametrize("corrected", [False, True])
def test_accumulated_attention_of_ragged_prompts(corrected: bool) -> None:
    q, k = random_sides(2, 4, 2, 23, 23)
    q[1, :, 17:], k[1, :, 17:] = float("nan"), float("nan")
    options: dict[str, Any] = {"gamma": 0.8, "corrected": corrected}
    got = recipes.accumulated_attention(q, k, lengths=torch.tensor([23, 17]), **options)
    close(got[0], recipes.accumulated_attention(q[:1], k[:1], **options)[0].double())
    close(got[1, :, :17], recipes.accumulated_attention(q[1:, :, :17], k[1:, :, :17], **options)[0].double())
    assert (got[1, :, 17:] == 0).all()


def test_chunks_add_up_to_the_prompt() -> None:
    q, k = random_sides(2, 4, 2, 23, 23)
    score = recipes.accumulated_attention(q[:, :, :10], k[:, :, :10], gamma=0.9)
    for begin, end in ((10, 17), (17, 23)):
        score = recipes.accumulate_chunk(score, q[:, :, begin:end], k[:, :, :end], gamma=0.9)
    close(score, recipes.accumulated_attention(q, k, gamma=0.9).double(), 5e-6)


@HEADS
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_window_score(heads: int, kv_heads: int, pool: Any) -> None:
    q, k = random_sides(2, heads, kv_heads, 5, 41)
    columns = grouped(dense_attention(q, k).sum(2), kv_heads).mean(2)[..., :36]
    if pool == "avg":
        want = functional.avg_pool1d(columns, 7, padding=3, stride=1)  # zeros outside are counted
    else:
        want = functional.max_pool1d(columns, 7, padding=3, stride=1)
    want = functional.pad(want, (0, 5), value=-INF)
    close(recipes.window_score(q, k, kernel=7, pool=pool), want, 5e-6)


def test_window_score_of_ragged_prompts() -> None:
    q, k = random_sides(3, 4, 2, 6, 29)
    k[1, :, 19:] = float("nan")
    lengths = torch.tensor([29, 19, 4])  # the last is shorter than the window
    got = recipes.window_score(q, k, kernel=5, lengths=lengths)
    close(got[1, :, :19], recipes.window_score(q[1:2], k[1:2, :, :19], kernel=5)[0].double())
    assert (got[1, :, 13:] == -INF).all()
    assert (got[2] == -INF).all()
    index, count = recipes.select_per_head(got, 8, tail=6, lengths=lengths)
    assert count.tolist() == [[8, 8], [8, 8], [4, 4]]
    assert kept(index[2, 0]) == [0, 1, 2, 3]


@HEADS
def test_tova_score(heads: int, kv_heads: int) -> None:
    q, k = random_sides(2, heads, kv_heads, 1, 31)
    close(recipes.tova_score(q[:, :, 0], k), dense_attention(q, k).mean(1), 5e-6)
    short = recipes.tova_score(q[:, :, 0], k, lengths=torch.tensor([31, 9]))
    close(short[1, :, :9], dense_attention(q[1:], k[1:, :, :9]).mean(1), 5e-6)
    assert (short[1, :, 9:] == -INF).all()


@HEADS
def test_probe_saliency_and_cls(heads: int, kv_heads: int) -> None:
    q, k = random_sides(2, heads, kv_heads, 33, 33)
    probes = scores.probe_weights(33, recent=0.1, random=0.2).double()
    columns = grouped((dense_attention(q, k) * probes[:, None]).sum(2), kv_heads).sum(2)
    seen = probes.flip(0).cumsum(0).flip(0)
    close(recipes.probe_saliency(q, k, row_weight=probes.float()), columns / seen, 5e-6)

    want = dense_logits(q, k).softmax(-1)[:, :, 0, 1:].mean(1)
    close(recipes.cls_attention(q, k), want, 5e-6)


def test_specpc_score() -> None:
    q, k = random_sides(1, 4, 2, 5, 27)
    weighted = dense_attention(q, k) * torch.linspace(0, 1, 5).double()[:, None]
    best = weighted.amax((1, 2))
    want = functional.max_pool1d(functional.pad(best, (1, 2)), 4, stride=1)  # 1 before, 2 after
    close(recipes.specpc_score(q, k, kernel=4), want, 5e-6)


def test_forward_pooling() -> None:
    score = torch.tensor([[[3.0, 1, 2, 0, 5]]])
    close(recipes.pool_scores(score, 2, kind="max", align="forward"), [3, 2, 2, 5, 5])
    close(recipes.pool_scores(score, 2, align="forward"), [2, 1.5, 1, 2.5, 2.5])
    got = recipes.pool_scores(score, 3, kind="max", lengths=torch.tensor([3]))
    close(got, [3, 3, 2, -INF, -INF])
    assert recipes.pool_scores(torch.ones(1, 1, 0), 3).shape == (1, 1, 0)


# --- bad input --------------------------------------------------------------------------------------------

Q, K = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
S = torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipes.accumulated_attention(Q[0], K), r"accumulated_attention: q must have shape \[B, Hq"),
        (lambda: recipes.accumulated_attention(Q, K, gamma=0), r"gamma must be in \(0, 1\], got 0"),
        (lambda: recipes.accumulate_chunk(S, Q, K), r"accumulate_chunk: score must be of shape \[1, 2, 0\]"),
        (lambda: recipes.tova_score(Q, K), r"tova_score: q must have shape \[B, Hq, D\], got \[1, 2, 3, 4\]"),
        (lambda: recipes.probe_saliency(Q, K, norm="x"), "probe_saliency: norm must be none"),  # type: ignore[arg-type]
        (lambda: recipes.zipvl_select(S[0], S[0, :1]), r"zipvl_select: normalised must be of shape \[2, 3\]"),
        (lambda: recipes.attention_sinks(S, -1), "attention_sinks: theta must be >= 0, got -1"),
        (lambda: recipes.cls_attention(Q[:, :, :0], K), "cls_attention: N must be >= 1, got 0"),
        (lambda: recipes.window_score(Q, K[:, :, :2]), r"window_score: w must be in \[1, S=2\], got 3"),
        (lambda: recipes.specpc_score(Q[:, :, :0], K), r"specpc_score: w must be in \[1, S=3\], got 0"),
        (lambda: recipes.pool_scores(S, 0), r"pool_scores: kernel must be in \[1, 4096\], got 0"),
        (lambda: recipes.pool_scores(S, 1, kind="min"), "kind must be 'avg' or 'max', got 'min'"),  # type: ignore[arg-type]
        (lambda: recipes.select_per_head(S[0], 1), r"select_per_head: score must have shape \[B, H, S\]"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_empty_batch() -> None:
    empty: Tensor = recipes.window_score(Q[:0], K[:0], kernel=1)
    assert empty.shape == (0, 2, 3)
