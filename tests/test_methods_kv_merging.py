"""Eviction with merging: EMS, D2O and CaM against their formulas in float64."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from backends import Backend
from kv_methods import Given, random_qkv, view_of
from recipe_attention import close
from tokencomp.methods import D2O, EMS, AdaKV, CaM, KVView, SnapKV
from tokencomp.methods.kv import Keep, MergeSpec
from tokencomp.reference.kv_policy import merge_row, run_policy
from torch import Tensor
from torch.nn.functional import cosine_similarity

EMS_SCORE = [0.939394, 0.234848, 0.5, 0.117424, 0.070455, 0.6]
EMS_K = torch.tensor([[2, 0], [0, 1], [1, 0], [0.8, 0.6], [0, 2], [0, 1.0]])[None, None]
EMS_V = torch.tensor([[1, 0], [0, 1], [0.8, 0.6], [1, 0], [0, -1], [0, 1.0]])[None, None]


@dataclass(frozen=True)
class Unprotected(EMS):
    """EMS on given scores, without a window: the example has none."""

    scores: Any = None

    def __post_init__(self) -> None:
        """No check: the window is not used."""

    def protected(self, slots: int) -> tuple[int, int]:
        return 0, 0

    def score(self, view: KVView) -> Tensor:
        return torch.tensor([[EMS_SCORE]])


def spec(keep: Keep | None) -> tuple[Keep, MergeSpec]:
    assert keep is not None
    assert keep.merge is not None
    return keep, keep.merge


@pytest.mark.parametrize(
    ("options", "into"),
    [
        ({"ratio": 2 / 3}, {1: 5, 3: 0}),
        ({"ratio": 2 / 3, "tau": 0.9}, {1: 5, 3: None}),
        ({"ratio": 1.0}, {1: 5, 3: 0, 4: None}),
        ({"ratio": 0.4}, {1: 5}),
    ],
)
def test_ems(cpu_backend: Backend, options: dict[str, Any], into: dict[int, int | None]) -> None:
    """Centers 0, 2, 5; a slot of opposite value joins nothing, however similar its key."""
    view = view_of([[6]], keys=EMS_K, values=EMS_V)
    with cpu_backend.active():
        keep, merge = spec(Unprotected(3, **options).evict(view))
    index = keep.index[0, 0].tolist()
    assert index == [0, 2, 5]
    pairs = zip(merge.member[0, 0].tolist(), merge.target[0, 0].tolist(), strict=True)
    assert {m: None if t < 0 else index[t] for m, t in pairs if m >= 0} == into
    close(merge.center[0, 0], [EMS_SCORE[i] for i in index])
    close(merge.weight[0, 0][: len(into)], [EMS_SCORE[i] for i in into])


def test_ems_raw_similarity_takes_two_opposites_for_alike() -> None:
    """Key and value both opposite: raw cosines multiply to 1, clamped ones to 0."""
    k, v = -EMS_K.clone(), -EMS_V.clone()
    k[0, 0, [0, 2, 5]] *= -1
    v[0, 0, [0, 2, 5]] *= -1
    for raw, joins in ((False, False), (True, True)):
        _, merge = spec(Unprotected(3, raw=raw).evict(view_of([[6]], keys=k, values=v)))
        assert bool((merge.target >= 0).any()) == joins


def test_ems_merges_members_alone() -> None:
    """Values are weighted means; recent and sink slots are no centers; without a tau nothing is merged."""
    q, k, v = random_qkv(1, 2, 1, 40)
    v = v + 3  # all alike, so that many join
    k = k + 3
    for t in (k, v):
        t[:, :, 36:] = t[:, :, :36].mean(2, keepdim=True)  # nearest to all, if they were centers
    plain = run_policy(EMS(12, window=4, tau=float("inf")), q, k, v, chunks=[40])
    merged = run_policy(EMS(12, window=4, tau=0.5), q, k, v, chunks=[40])
    assert plain.held == merged.held
    assert plain.values is not None
    assert merged.values is not None
    held = plain.held[0][0][0]
    assert torch.equal(plain.values[0, 0, :12], v[0, 0, held])
    changed = (merged.values[0, 0, :12] != v[0, 0, held]).any(-1)
    assert changed[:8].any()
    assert not changed[8:].any()
    assert torch.equal(merged.keys, plain.keys)
    keys = run_policy(EMS(12, window=4, tau=0.5, merge_keys=True), q, k, v, chunks=[40]).keys
    assert not torch.equal(keys, plain.keys)


@pytest.mark.parametrize("keys", ["keep", "mean", "direction"])
@pytest.mark.parametrize("values", ["mean", "sum"])
def test_the_merge_itself(keys: Any, values: Any) -> None:
    """By hand: slot 0 takes 1 and 2 with weights 1 and 3, slot 3 takes nothing, 4 goes into nothing."""
    k = torch.tensor([[2.0, 0], [0, 2], [0, 4], [1, 1], [5, 5]], dtype=torch.float64)
    v = torch.arange(10.0, dtype=torch.float64).view(5, 2)
    merge = MergeSpec(
        member=torch.tensor([[[1, 2, 4, -1]]]),
        target=torch.tensor([[[0, 0, -1, 0]]]),
        weight=torch.tensor([[[1.0, 3, 9, 9]]]),
        center=torch.tensor([[[4.0, 1]]]),
        values=values,
        keys=keys,
    )
    new_k, new_v = k.clone(), v.clone()
    merge_row(new_k, new_v, torch.tensor([0, 3]), merge, 0, 0)
    want_v = (4 * v[0] + v[1] + 3 * v[2]) / 8 if values == "mean" else v[0] + v[1] + 3 * v[2]
    mean_k = (4 * k[0] + k[1] + 3 * k[2]) / 8
    direction = torch.tensor([4.0, 1 + 3], dtype=torch.float64) / 8 * (4 * 2 + 2 + 3 * 4) / 8
    want_k = {"keep": k[0], "mean": mean_k, "direction": direction}[keys]
    torch.testing.assert_close(new_v[0], want_v)
    torch.testing.assert_close(new_k[0], want_k)
    assert torch.equal(new_k[1:], k[1:])
    assert torch.equal(new_v[1:], v[1:])


def test_d2o(cpu_backend: Backend) -> None:
    """Nearest kept key by cosine, all of them targets; threshold the mean, then smoothed."""
    q, k, v = random_qkv(1, 2, 2, 30)
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(1, 2, 30, generator=g)
    method = D2O(Given(10, scores=scores), beta=0.7)
    view = view_of([[30, 30]], keys=k, values=v)
    with cpu_backend.active():
        keep, merge = spec(method.evict(view))
        before = view.scratch["threshold"].clone()
        again = method.evict(view)
    assert again is not None
    for h in range(2):
        kept = keep.index[0, h].long()
        gone = [j for j in range(30) if j not in kept.tolist()]
        assert merge.member[0, h].tolist() == gone
        similar = cosine_similarity(k[0, h, gone, None].double(), k[0, h, kept].double(), dim=-1)
        best, rank = similar.max(-1)
        close(before[0, h].float(), best.mean())
        joins = best >= best.mean()
        assert merge.target[0, h].tolist() == torch.where(joins, rank, -1).tolist()
        close(merge.weight[0, h][joins], best[joins].exp())
        close(view.scratch["threshold"][0, h], 0.7 * best.mean() + 0.3 * best.mean())
    close(merge.center, torch.full(keep.index.shape, torch.e))
    assert (q == q).all()


def test_d2o_threshold_is_smoothed() -> None:
    k = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8], [0.8, 0.6]])[None, None]
    scores = torch.tensor([[[3.0, 2, 1, 0]]])
    view = view_of([[4]], keys=k)
    view.scratch["threshold"] = torch.tensor([[0.0]])
    _, merge = spec(D2O(Given(2, scores=scores), beta=0.75).evict(view))
    close(view.scratch["threshold"], [[0.6]])  # three quarters of 0.8, one of 0
    assert merge.target.tolist() == [[[1, 0]]]


def test_cam_spreads_values_over_the_next_slots(cpu_backend: Backend) -> None:
    """Certain where the score is at least that of the targets, never where it is 0; at the end nowhere."""
    scores = torch.tensor([[[9.0, 1, 5, 0, 9, 5, 9, 9, 5]]])
    view = view_of([[9]])
    with cpu_backend.active():
        keep, merge = spec(CaM(Given(4, scores=scores), targets=2, against="mean", prompts=True).evict(view))
    assert keep.index.tolist() == [[[0, 4, 6, 7]]]
    assert merge.values == "sum"
    close(merge.weight[merge.member >= 0], [0.5] * int((merge.member >= 0).sum()))
    into: dict[int, list[int]] = {}
    for m, t in zip(merge.member[0, 0].tolist(), merge.target[0, 0].tolist(), strict=True):
        if m >= 0:
            into.setdefault(m, []).append(t)
    assert 3 not in into  # score 0
    assert 8 not in into  # no slot comes after it
    assert all(ranks in ([1, 2], [2, 3]) for ranks in into.values())
    equal = torch.ones(1, 1, 9)
    _, merge = spec(CaM(Given(4, scores=equal), targets=3, prompts=True).evict(view_of([[9]])))
    assert (merge.member < 0).all()  # ties keep 0..3, nothing comes after the others
    equal[..., 4:] = 2.0
    _, merge = spec(CaM(Given(5, scores=equal), targets=5, prompts=True).evict(view_of([[9]])))
    assert 0 < (merge.member >= 0).sum() <= 20  # probability one half


@pytest.mark.parametrize("against", ["max", "mean"])
@pytest.mark.parametrize(("targets", "ranks"), [(1, [1]), (2, [1, 2]), (9, [1, 2, 3])])
def test_cam_targets(against: Any, targets: int, ranks: list[int]) -> None:
    """What stays has less attention than what goes: all is spread, over as many slots as there are."""
    scores = torch.tensor([[[0.5, 1, 1, 1, 1, 0.5, 0.5, 0.5]]])
    given = Given(4, scores=scores, sinks=1, recent=3)
    keep, merge = spec(CaM(given, targets=targets, against=against, prompts=True).evict(view_of([[8]])))
    assert keep.index.tolist() == [[[0, 5, 6, 7]]]
    assert CaM(given).evict(view_of([[8]])).merge is None  # type: ignore[union-attr]
    there = merge.member >= 0
    assert merge.member[there].tolist() == [m for m in (1, 2, 3, 4) for _ in ranks]
    assert merge.target[there].tolist() == ranks * 4
    close(merge.weight[there], [1 / len(ranks)] * 4 * len(ranks))


@pytest.mark.parametrize(("against", "share"), [("mean", 0.3), ("max", 0.15)])
def test_cam_probability(against: Any, share: float) -> None:
    """The slot that stays next has score 1, the best one 2."""
    scores = torch.full((64, 8, 12), 1.0)
    scores[..., :6] = 0.3
    scores[..., 11] = 2.0
    view = view_of([[12] * 8] * 64)
    method = CaM(Given(6, scores=scores), targets=1, against=against, prompts=True)
    _, merge = spec(method.evict(view))
    assert abs(float((merge.member >= 0).float().mean()) - share) < 0.04
    _, again = spec(replace(method, seed=1).evict(view))
    assert not torch.equal(merge.member, again.member)


def test_cam_moves_values() -> None:
    q, k, v = random_qkv(1, 1, 1, 4)
    scores = torch.tensor([[[1.0, 0.5, 0, 1]]])
    trace = run_policy(
        CaM(Given(3, scores=scores, sinks=1), targets=8, seed=3, prompts=True), q, k, v, chunks=[4]
    )
    assert trace.held[0] == [[[0, 1, 3]]]
    assert trace.values is not None
    assert torch.equal(trace.values[0, 0, :3], v[0, 0, [0, 1, 3]])  # what had no attention is not spread


def test_merging_with_ragged_heads() -> None:
    """Every evicted slot of every head is a member once, whatever the heads keep."""
    q, k, v = random_qkv(2, 4, 2, 50)
    method = AdaKV(SnapKV(0.3, window=4), alpha=0.0)
    plain = run_policy(method, q, k, v, chunks=[50])
    merged = run_policy(D2O(method), q, k, v, chunks=[50])
    assert plain.held == merged.held
    assert len({len(row) for rows in plain.held[0] for row in rows}) > 1
    assert not torch.equal(plain.values, merged.values)  # type: ignore[arg-type]
