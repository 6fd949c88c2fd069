"""LazyEviction, R-KV, EMS and CRITIC: worked examples, dense float64, bad input."""

from typing import Any

import pytest
import torch
from recipe_attention import close, dense_logits, grouped, kept, random_sides, sides_of
from tokencomp import ops, recipes
from torch import Tensor
from torch.nn import functional

INF = float("inf")
HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2)])
CRITIC_ROWS = [[1], [0.5, 0.5], [0.2, 0.3, 0.5], [0.1, 0.2, 0.3, 0.4]]


# --- LazyEviction -----------------------------------------------------------------------------------------


def test_lazyeviction_trace() -> None:
    rows = [[0.5, 0, 0.5], [0, 0.3, 0.3, 0.4], [0.4, 0, 0, 0.3, 0.3], [0, 0, 0, 0.5, 0.2, 0.3]]
    last = interval = torch.zeros(1, 1, 2, dtype=torch.int32)
    for step, row in enumerate(rows, 1):
        probability = torch.tensor([[row]])
        last, interval = recipes.recurrence_clocks(last, interval, probability, None, step=step, alpha=0.1)
    assert last.flatten().tolist() == [3, 2, 2, 4, 4, 4]
    assert interval.flatten().tolist() == [2, 2, 1, 1, 1, 1]
    score = recipes.recurrence_importance(last, interval, 4)
    close(score[..., :4], [0.902735, 0.776290, 1.094854, 1.537883])
    assert kept(recipes.select_per_head(score, 4, tail=2)[0]) == [2, 3, 4, 5]


@pytest.mark.parametrize("form", ["code", "paper"])
def test_recurrence_importance(form: Any) -> None:
    g = torch.Generator().manual_seed(0)
    last = torch.randint(8000, 9000, (2, 3, 37), generator=g, dtype=torch.int32)
    interval = torch.randint(0, 40, (2, 3, 37), generator=g, dtype=torch.int32)
    age, span = (9001 - last).double(), interval.double()
    if form == "code":
        recent = 2 / (1 + torch.exp(1 + age / (span + 1e-5)))
    else:
        recent = 2 / (1 + torch.exp(age / span))
    want = recent + torch.where(span == 0, 0.0, 2 / (1 + torch.exp(span - 1)))
    got = recipes.recurrence_importance(last, interval, 9001, form=form)
    close(got, want)
    assert (interval == 0).any()
    assert (got[interval == 0] == 0).all()  # never active: exactly 0, ties go to the lower index


def test_recurrence_of_the_current_step_in_the_paper_form() -> None:
    now = torch.tensor([[[5, 5]]])
    close(recipes.recurrence_importance(now, torch.tensor([[[0, 1]]]), 5, form="paper"), [1.0, 2.0])


def test_clocks_of_kv_heads_take_the_strongest_of_the_group() -> None:
    q, k = random_sides(2, 8, 2, 1, 19)
    logits, lse = ops.qk_scores(q[:, :, 0], k)
    last = torch.full((2, 2, 17), 3, dtype=torch.int32)
    interval = torch.full((2, 2, 17), 2, dtype=torch.int32)
    got = recipes.recurrence_clocks(last, interval, logits, lse, step=9, alpha=0.05)
    active = grouped(dense_logits(q, k)[:, :, 0].softmax(-1), 2).amax(2) >= 0.05
    before = functional.pad(last, (0, 2), value=8)
    span = functional.pad(interval, (0, 2))
    assert torch.equal(got[0], torch.where(active, 9, before).int())
    assert torch.equal(got[1], torch.where(active, torch.maximum(span, 9 - before), span).int())
    assert (last == 3).all()  # the given states are left alone
    assert 0 < active.sum() < active.numel()


# --- R-KV -------------------------------------------------------------------------------------------------

RKV_K = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [0.96, 0.28], [0.6, 0.8], [0, 1]])[None, None]
RKV_Q = torch.tensor([[1.0, 0], [0.5, 0.5]])[None, None]


@pytest.mark.parametrize("tile", [1, 4, 1024])
def test_rkv(tile: int) -> None:
    redundancy = recipes.key_redundancy(RKV_K, tile=tile)
    close(redundancy, [0.163413, 0.211089, 0.172365, 0.189732, 0.147862, 0.115540])
    importance = recipes.past_importance(RKV_Q, RKV_K, kernel=1)
    close(importance, [0.267913, 0.266043, 0.191872, 0.274172, -INF, -INF])
    joint = recipes.rkv_score(RKV_Q, RKV_K, kernel=1)
    close(joint, [-0.120280, -0.163376, -0.135941, -0.143342, -INF, -INF])
    assert kept(recipes.select_per_head(joint, 4, tail=2)[0]) == [0, 2, 4, 5]
    even = recipes.rkv_score(RKV_Q, RKV_K, kernel=1, trade_off=0.5)
    assert kept(recipes.select_per_head(even, 4, tail=2)[0]) == [0, 3, 4, 5]


def test_rkv_takes_the_maximum_of_logits() -> None:
    q = torch.tensor([[1.0, 0], [0, 1]]).view(1, 2, 1, 2)
    k = RKV_K[:, :, :5]  # the last one is the window
    close(recipes.past_importance(q, k, kernel=1), [0.260401, 0.226060, 0.260401, 0.253139, -INF])


def dense_redundancy(k: Tensor, threshold: float) -> Tensor:
    """The definition, with the matrix: diagonal and last hit of each row set to 0."""
    unit = k.double() / (k.double().norm(dim=-1, keepdim=True) + 1e-8)
    cosine = unit @ unit.transpose(-1, -2)
    keys = k.shape[-2]
    cosine[..., torch.arange(keys), torch.arange(keys)] = 0
    last = torch.where(cosine > threshold, torch.arange(keys), 0).amax(-1, keepdim=True)
    return cosine.scatter(-1, last, 0.0).mean(-2).softmax(-1)


@pytest.mark.parametrize(
    ("keys", "dim", "threshold"), [(41, 3, 0.5), (67, 5, 0.8), (50, 16, 0.5), (1, 4, 0.5)]
)
def test_key_redundancy(keys: int, dim: int, threshold: float) -> None:
    _, k = random_sides(2, 3, 3, 1, keys, dim)
    k[:, 1, keys // 2] = 0  # a key without direction: its diagonal is 0 too
    got = recipes.key_redundancy(k, threshold=threshold, tile=16)
    close(got, dense_redundancy(k, threshold))
    close(recipes.key_redundancy(k, threshold=threshold), dense_redundancy(k, threshold))


@HEADS
def test_past_importance(heads: int, kv_heads: int) -> None:
    q, k = random_sides(2, heads, kv_heads, 5, 37)
    logits = grouped(dense_logits(q, k), kv_heads).amax(2)[..., :32]
    want = functional.max_pool1d(logits.softmax(-1).mean(2), 7, padding=3, stride=1)
    got = recipes.past_importance(q, k)
    close(got, functional.pad(want, (0, 5), value=-INF), 5e-6)


def test_rkv_of_ragged_caches() -> None:
    q, k = random_sides(3, 4, 2, 4, 31)
    k[1, :, 20:] = float("nan")
    lengths = torch.tensor([31, 20, 3])
    got = recipes.rkv_score(q, k, lengths=lengths)
    close(got[1, :, :20], recipes.rkv_score(q[1:2], k[1:2, :, :20])[0].double())
    assert (got[1, :, 16:] == -INF).all()
    assert (got[2] == -INF).all()  # shorter than the window
    redundancy = recipes.key_redundancy(k, lengths=lengths)
    close(redundancy.sum(-1), torch.ones(3, 2))
    assert (redundancy[1, :, 20:] == 0).all()


# --- EMS --------------------------------------------------------------------------------------------------


def test_ems() -> None:
    glob = torch.tensor([[[4, 1, 0.6, 0.5, 0.3, 0.2]]])
    local = torch.tensor([[[0.2, 0.1, 0.5, 0.1, 0.05, 0.6]]])
    score = recipes.global_local_score(glob, local)
    close(score, [0.939394, 0.234848, 0.5, 0.117424, 0.070455, 0.6])
    centers, merged = recipes.merge_groups(score, 3, 2)
    assert kept(centers) == [0, 2, 5]
    assert kept(merged) == [1, 3]


def test_global_local_score_scales_by_rows() -> None:
    """Rows sum to 1, so that the factor is the window's share of the rows."""
    q, k = random_sides(2, 4, 2, 29, 29)
    glob = recipes.accumulated_attention(q, k)
    lse = ops.attention_lse(q[:, :, -6:], k)
    local = ops.column_score(q[:, :, -6:], k, lse, heads="kv_sum")
    want = torch.maximum(glob.double() * 6 / 29, local.double())
    close(recipes.global_local_score(glob, local), want, 5e-6)
    garbage = functional.pad(glob, (0, 2), value=7.0)
    got = recipes.global_local_score(garbage, garbage, lengths=torch.tensor([29, 29]))
    assert (got[..., 29:] == 0).all()
    close(got[..., :29], glob.double())


def test_merge_groups_of_short_rows() -> None:
    score = torch.tensor([[[1.0, 5, 3, 4, 2]], [[1.0, 5, 3, 4, 2]]])
    centers, merged = recipes.merge_groups(score, 2, 2, lengths=torch.tensor([5, 3]))
    assert centers.tolist() == [[[1, 3]], [[1, 2]]]
    assert merged.tolist() == [[[2, 4]], [[0, -1]]]


EMS_K = torch.tensor([[2, 0], [0, 1], [1, 0], [0.8, 0.6], [0, 2], [0, 1]])[None, None]
EMS_V = torch.tensor([[1, 0], [0, 1], [0.8, 0.6], [1, 0], [0, -1], [0, 1]])[None, None]


def index_of(*tokens: int) -> Tensor:
    return torch.tensor([[tokens]], dtype=torch.int32)


def test_ems_assignment() -> None:
    centers, merged = index_of(0, 2, 5), index_of(1, 3)
    assert recipes.merge_assign(EMS_K, EMS_V, centers, merged).tolist() == [[[2, 0]]]
    assert recipes.merge_assign(EMS_K, EMS_V, centers, merged, tau=0.9).tolist() == [[[2, -1]]]
    assert recipes.merge_assign(EMS_K, EMS_V, centers, index_of(4, -1)).tolist() == [[[-1, -1]]]
    assert recipes.merge_assign(EMS_K, EMS_V, index_of(-1, 0), index_of(3)).tolist() == [[[1]]]
    assert recipes.merge_assign(EMS_K, EMS_V, centers[..., :0], merged).tolist() == [[[-1, -1]]]
    opposite = torch.stack([EMS_K[0, 0, 0], -EMS_K[0, 0, 0]])[None, None]  # both cosines are -1
    pair = (opposite, opposite, index_of(0), index_of(1))
    assert recipes.merge_assign(*pair).tolist() == [[[-1]]]
    assert recipes.merge_assign(*pair, raw=True).tolist() == [[[0]]]


def test_ems_merging() -> None:
    """Token 1 goes into center 5, which it equals, and 3 into center 0."""
    score = torch.tensor([[[0.939394, 0.234848, 0.5, 0.117424, 0.070455, 0.6]]])
    groups = index_of(0, 2, 5), index_of(1, 3)
    assign = recipes.merge_assign(EMS_K, EMS_V, *groups)
    k, v, s = recipes.merge_into_centers(EMS_K, EMS_V, score, *groups, assign)
    w = score.double().flatten()
    norm = (2 * w[0] + w[3]) / (w[0] + w[3])
    turned = (w[0] * torch.tensor([1.0, 0]) + w[3] * torch.tensor([0.8, 0.6])) / (w[0] + w[3])
    close(k, torch.stack([norm * turned, torch.tensor([1.0, 0]), torch.tensor([0.0, 1])])[None, None])
    close(k[0, 0, 0], [1.846914, 0.125926])
    close(v, [[[[1, 0], [0.8, 0.6], [0, 1]]]])
    close(s, [[[w[0] + w[3], w[2], w[1] + w[5]]]])
    dropped = recipes.merge_assign(EMS_K, EMS_V, *groups, tau=0.9)
    k, v, s = recipes.merge_into_centers(EMS_K, EMS_V, score, *groups, dropped, keys=False)
    close(k, EMS_K[:, :, [0, 2, 5]].double())
    close(s, [[[w[0], w[2], w[1] + w[5]]]])


def test_merge_into_centers_against_loops() -> None:
    _, k = random_sides(2, 3, 3, 1, 30, 3)
    _, v = random_sides(2, 3, 3, 1, 30, 5, seed=1)
    score = v.square().sum(-1)
    centers, merged = recipes.merge_groups(score, 7, 9)
    centers[0, 0, 6] = -1
    assign = recipes.merge_assign(k, v[..., :3], centers, merged, tau=0.1)
    got = recipes.merge_into_centers(k, v, score, centers, merged, assign)
    for b, h, c in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(7)).tolist():
        members = [int(centers[b, h, c])] + [int(i) for i in merged[b, h][assign[b, h] == c]]
        if members[0] < 0:
            assert all((t[b, h, c] == 0).all() for t in got)
            continue
        w = score[b, h, members].double()[:, None]
        keys, values = k[b, h, members].double(), v[b, h, members].double()
        norms = keys.norm(dim=1, keepdim=True)
        mean = (w * norms).sum(0) * (w * keys / norms).sum(0) / w.sum() ** 2
        for ours, want in zip(got, (mean, (w * values).sum(0) / w.sum(), w.sum()), strict=True):
            close(ours[b, h, c], want, 5e-6)
    assert (assign >= 0).sum() > 10


def test_a_center_without_score_keeps_itself() -> None:
    zero = torch.zeros(1, 1, 6)
    got = recipes.merge_into_centers(EMS_K, EMS_V, zero, index_of(0, 2), index_of(1), index_of(-1))
    close(got[0], EMS_K[:, :, [0, 2]].double())
    close(got[1], EMS_V[:, :, [0, 2]].double())
    assert (got[2] == 0).all()


def test_merge_assign_against_loops() -> None:
    _, k = random_sides(2, 3, 3, 1, 30, 3)
    _, v = random_sides(2, 3, 3, 1, 30, 3, seed=1)
    centers, merged = recipes.merge_groups(v.square().sum(-1), 7, 9)
    got = recipes.merge_assign(k, v, centers, merged, tau=0.3)
    for b, h, m in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(9)).tolist():
        i, c = int(merged[b, h, m]), centers[b, h].long()
        r = torch.ones(7, dtype=torch.float64)
        for x in (k[b, h].double(), v[b, h].double()):
            r *= functional.cosine_similarity(x[i][None], x[c], dim=-1).clamp(min=0)
        want = int(r.argmax()) if r.max() >= 0.3 else -1
        assert int(got[b, h, m]) == want
    assert (got == -1).any()
    assert (got >= 0).any()


def test_low_precision_and_strides() -> None:
    """Half precision inputs give what their float32 copies give, for any strides."""
    q, k = (t.bfloat16() for t in random_sides(2, 4, 2, 5, 33, 16))
    apart = torch.empty(2, 33, 2, 16, dtype=torch.bfloat16).transpose(1, 2).copy_(k)
    for function in (recipes.rkv_score, recipes.window_score, recipes.past_importance):
        want = function(q.float(), k.float())
        close(function(q, apart), want.double(), 1e-5)


# --- CRITIC -----------------------------------------------------------------------------------------------


def test_critic() -> None:
    q, k = sides_of(CRITIC_ROWS)
    entropy = []
    for t in range(4):
        entropy.append(recipes.attention_entropy(*ops.qk_scores(q[:, :, t], k[:, :, : t + 1], scale=1)))
    entropies = torch.cat(entropy, -1)
    close(entropies, [0, 0.693147, 1.029653, 1.279854])
    close(recipes.minmax(entropies), [0, 0.541583, 0.804508, 1])
    received = recipes.accumulated_attention(q, k, scale=1)[:, 0]
    close(received, [1.8, 1, 0.8, 0.4])
    close(recipes.minmax(received), [1, 0.428571, 0.285714, 0])
    joint = torch.tensor([[0.5, 0.485077, 0.545111, 0.5]])
    got = recipes.critic_score(received, entropies, entropies, weights=(0.5, 0.5, 0))
    close(got, recipes.minmax(joint).double(), 3e-5)  # six printed digits over a range of 0.06
    assert recipes.critic_budget(10, 0.3, 4) == 7
    assert recipes.critic_budget(10, 0.9, 4) == 4
    assert recipes.critic_budget(4, 0.3, 4) == 3
    assert recipes.critic_budget(100, 0.9, 0) == 10


@HEADS
def test_entropy_and_gradients_in_closed_form(heads: int, kv_heads: int) -> None:
    q, k = random_sides(2, heads, kv_heads, 1, 23)
    v, previous = random_sides(2, kv_heads, heads, 23, 1, seed=1)
    previous = previous[:, :, 0]
    logits, lse = ops.qk_scores(q[:, :, 0], k)
    probability = dense_logits(q, k)[:, :, 0].softmax(-1)
    close(recipes.attention_entropy(logits, lse), -(probability * probability.log()).sum(-1), 5e-6)

    group = heads // kv_heads  # every query head with keys and values of its own
    keys = k.double().repeat_interleave(group, 1).requires_grad_()
    values = v.double().repeat_interleave(group, 1).requires_grad_()
    output = (q.double() @ keys.transpose(2, 3) / 12**0.5).softmax(-1) @ values
    loss = (output[:, :, 0] - previous.double()).square().mean(-1).sum()
    loss.backward()
    assert keys.grad is not None
    assert values.grad is not None
    by_key, by_value = recipes.output_gradients(q[:, :, 0], v, logits, lse, previous)
    close(by_key, keys.grad.abs().sum(-1), 5e-6)
    close(by_value, values.grad.abs().sum(-1), 5e-6)


def test_critic_of_masked_keys() -> None:
    q, k = random_sides(1, 4, 2, 1, 9)
    lengths = torch.tensor([6])
    logits, lse = ops.qk_scores(q[:, :, 0], k, lengths=lengths)
    own = ops.qk_scores(q[:, :, 0], k[:, :, :6])
    close(recipes.attention_entropy(logits, lse), recipes.attention_entropy(*own).double())
    x = torch.arange(9.0)[None]
    close(recipes.minmax(x, lengths=lengths), [0, 0.2, 0.4, 0.6, 0.8, 1, 0, 0, 0])


# --- bad input --------------------------------------------------------------------------------------------

I = torch.zeros(1, 2, 3, dtype=torch.int32)  # noqa: E741
Q, S = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3)
L = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: recipes.recurrence_clocks(I, I[..., :2], S, L, step=1, alpha=0),
            "interval must be of shape",
        ),
        (lambda: recipes.recurrence_clocks(I, I, S[..., :2], L, step=1, alpha=0), ">= S0=3, got 2"),
        (lambda: recipes.recurrence_clocks(I, I, S, L, step=0, alpha=0), "step must be >= 1, got 0"),
        (lambda: recipes.recurrence_importance(I, I, 1, form="x"), "form must be 'code' or 'paper', got 'x'"),  # type: ignore[arg-type]
        (lambda: recipes.past_importance(Q, Q[:, :, :2]), r"past_importance: w must be in \[1, S=2\], got 3"),
        (lambda: recipes.key_redundancy(Q, threshold=1), r"threshold must be in \[0, 1\), got 1"),
        (lambda: recipes.key_redundancy(Q, tile=0), "tile must be >= 1, got 0"),
        (lambda: recipes.rkv_score(Q, Q, trade_off=2), r"rkv_score: trade_off must be in \[0, 1\], got 2"),
        (
            lambda: recipes.global_local_score(S, S[:, :1]),
            r"local must be of shape \[1, 2, 3\], got \[1, 1, 3\]",
        ),
        (lambda: recipes.merge_groups(S, -1, 1), "merge_groups: centers must be >= 0, got -1"),
        (lambda: recipes.merge_assign(Q, Q[:, :1], I, I), r"v must be of shape \[1, 2, 3, Dv\], got"),
        (lambda: recipes.merge_assign(Q, Q, I[:, :1], I), r"centers must be of shape \[1, 2, '...'\]"),
        (
            lambda: recipes.merge_into_centers(Q, Q, S, I, I, I[..., :2]),
            r"assign must be of shape \[1, 2, 3\]",
        ),
        (lambda: recipes.attention_entropy(S, L[:, :1]), r"lse must be of shape \[1, 2\], got \[1, 1\]"),
        (lambda: recipes.output_gradients(S, Q, S, L, S[:, :1]), r"previous must be of shape \[1, 2, 4\]"),
        (lambda: recipes.critic_score(L, L, L[:, :1]), r"gradient must be of shape \[1, 2\], got \[1, 1\]"),
        (lambda: recipes.critic_score(L, L, L, weights=(1, 1, 0)), "weights must be >= 0 and adding up to 1"),
        (lambda: recipes.critic_budget(0, 0.5, 1), "critic_budget: tokens must be >= 1, got 0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
