"""Methods on the KV cache that look at keys alone or at nothing, and conventions of other libraries."""

import pytest
import torch
from kv_methods import random_qkv
from recipe_attention import dense_attention
from tokencomp import recipes, reference
from tokencomp.methods import H2O, TOVA, KeyDiff, KNorm, LagKV, RandomKV, SnapKV, StreamingLLM, StrideKV
from tokencomp.reference.kv_policy import run_policy
from torch import Tensor
from torch.nn import functional


def test_keys_alone() -> None:
    _, k, v = random_qkv(2, 2, 2, 40)
    q = torch.zeros(2, 2, 40, 8)
    unit = k.double() / k.double().norm(dim=-1, keepdim=True)
    mean = unit.mean(2, keepdim=True)
    similar = (unit * mean).sum(-1) / mean.norm(dim=-1)
    for method, score in ((KNorm(10), -k.double().norm(dim=-1)), (KeyDiff(10), -similar)):
        held = run_policy(method, q, k, v, chunks=[40]).held[0]
        assert held == score.topk(10).indices.sort(-1).values.tolist()


def test_stride_is_the_reference() -> None:
    q, k, v = random_qkv(1, 1, 1, 40)
    for n in (2, 7, 20, 39):
        assert (
            run_policy(StrideKV(n), q, k, v, chunks=[40]).held[0][0][0]
            == reference.stride_keep(40, n).tolist()
        )


def test_random_is_uniform_also_after_many_evictions() -> None:
    """Each of 40 tokens, old and new, survives in a quarter of the rows; rows and layers differ."""
    q = torch.zeros(64, 8, 40, 1)
    once = run_policy(RandomKV(10), q, q, q, chunks=[40]).held[0]
    often = run_policy(RandomKV(10, every=1), q, q, q, chunks=[12]).held[-1]
    for held in (once, often):
        rows = [tuple(row) for heads in held for row in heads]
        assert len(set(rows)) > 500
        share = torch.bincount(torch.tensor(rows).flatten(), minlength=40) / 512
        assert (share - 0.25).abs().max() < 0.08  # four standard deviations
    assert once == often  # priorities are of tokens, not of moments
    assert run_policy(RandomKV(10, seed=1), q, q, q, chunks=[40]).held[0] != once
    assert run_policy(RandomKV(10), q, q, q, chunks=[40], layer=1, layers=2).held[0] != once


def test_observed_attention_is_the_recipe() -> None:
    q, k, v = random_qkv(1, 4, 2, 40)
    held = run_policy(H2O(10, recent=2, corrected=True), q, k, v, chunks=[40]).held[0]
    score = recipes.accumulated_attention(q, k, corrected=True)
    want, _ = recipes.select_per_head(score, 10, tail=2)
    assert held == want.tolist()


# --- kvpress keeps int(N (1 - r)) of the largest scores, window or last token raised above all -------------


def press(score: Tensor, kept: int) -> list[list[list[int]]]:
    """The kept sets of scores ``[B, Hkv, N]``, ascending."""
    held: list[list[list[int]]] = score.topk(kept).indices.sort(-1).values.tolist()
    return held


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.61])
def test_the_conventions_of_kvpress(ratio: float) -> None:
    """With the knobs named in the docstrings the same sets are kept as by its scores in float64."""
    q, k, v = random_qkv(2, 8, 2, 200)
    n = int(200 * (1 - ratio))
    attention = dense_attention(q, k)

    window = attention[:, :, -64:].mean(2)[..., :-64]
    pooled = functional.avg_pool1d(window, 5, stride=1, padding=2).unflatten(1, (2, 4)).mean(2)
    snap = functional.pad(pooled, (0, 64), value=float(pooled.max()) + 1)
    tova = attention[:, :, -1].mean(1, keepdim=True)
    tova[..., -1] = tova.max() + 1
    seen = attention.sum(2) / torch.arange(200, 0, -1)
    kd = k.double()
    anchor = functional.normalize(kd, dim=-1).mean(2, keepdim=True)
    ends = torch.arange(200.0).expand(2, 2, -1).clone()
    ends[..., :4] = 1000

    cases = [
        (SnapKV(n, window=64, kernel=5, pool="avg"), snap),
        (TOVA(n, recent=1), tova.expand(-1, 2, -1)),
        (H2O(n, recent=0, corrected=True), seen.unflatten(1, (2, 4)).mean(2)),
        (StreamingLLM(n, sinks=4), ends),
        (KNorm(n), -kd.norm(dim=-1)),
        (KeyDiff(n), -functional.cosine_similarity(kd, anchor, dim=-1)),
    ]
    for method, score in cases:
        if n < 64 + 1 and isinstance(method, SnapKV):
            continue
        assert run_policy(method, q, k, v, chunks=[200]).held[0] == press(score, n), method


# --- LagKV -------------------------------------------------------------------------------------------------


def lag_by_loops(k: Tensor, v: Tensor, lag: int, sinks: int) -> list[float]:
    """The scores ``across`` of one row ``[N, D]``, token by token."""
    n = k.shape[0]
    lags = (n - sinks) // lag
    if lags < 2:
        return [1.0 if i < sinks else i / n for i in range(n)]
    score = [1.0] * n
    for part in range(lags - 1):
        own = range(sinks + part * lag, sinks + (part + 1) * lag)
        both = []
        for x in (k, v):
            following = x[own.stop : own.stop + lag]
            low, span = following.min(0).values, following.max(0).values - following.min(0).values
            both.append(torch.stack([((x[i] - low) / span).std() for i in own]).softmax(0))
        for place, i in enumerate(own):
            score[i] = float(both[0][place] + both[1][place]) / 2
    return score


@pytest.mark.parametrize("tokens", [40, 30, 19, 9, 3])
def test_lagkv_against_loops(tokens: int) -> None:
    """Rows of their own lengths beside each other; 3 and 9 tokens have fewer than two lags."""
    _, k, v = random_qkv(1, 2, 2, 40)
    valid = torch.arange(40)[None] < tokens
    q = torch.zeros(1, 2, 40, k.shape[3])
    score = torch.tensor([lag_by_loops(k[0, h, :tokens], v[0, h, :tokens], 8, 3) for h in range(2)])
    kept = 3 if tokens == 3 else 7
    held = run_policy(LagKV(7, lag=8, sinks=3, across=True), q, k, v, chunks=[40], valid=valid).held[0][0]
    want = torch.argsort(-score, dim=1, stable=True)[:, :kept].sort(-1).values
    assert held == want.tolist()


def test_lagkv_by_rank_keeps_the_same_number_of_each_lag() -> None:
    _, k, v = random_qkv(1, 1, 1, 2 + 5 * 16)
    method = LagKV(2 + 16 + 4 * 4, lag=16, sinks=2)
    held = run_policy(method, torch.zeros_like(k), k, v, chunks=[82]).held[0][0][0]
    assert [sum(2 + 16 * i <= slot < 18 + 16 * i for slot in held) for i in range(5)] == [4, 4, 4, 4, 16]
    constant = torch.ones(1, 1, 82, 4)
    assert len(run_policy(method, constant, constant, constant, chunks=[82]).held[0][0][0]) == 34
