"""The judges are judged: the specification against a second one, and injected mistakes that must be found."""

import math
from dataclasses import replace

import pytest
import torch
from cases import METRICS, OBJECTIVES, Inputs, KCenterCase
from cases_score import ScoreCase
from tokencomp import reference
from torch import Tensor
from yardstick import assert_agrees, assert_scores

CASE = KCenterCase(B=2, N=30, C=11, k=8)


def answer(case: KCenterCase) -> tuple[Inputs, Tensor, Tensor]:
    call = case.inputs()
    index, value = reference.kcenter_greedy(call.x, call.k, **call.options, dtype=torch.float32)
    return call, index, value


def by_definition(
    x: list[list[float]], k: int, objective: str, metric: str, weight: list[float]
) -> list[int]:
    """The docstring of the operator, word by word, in plain Python, from token 0."""

    def dot(a: list[float], b: list[float]) -> float:
        return sum(p * q for p, q in zip(a, b, strict=True))

    def distance(a: list[float], b: list[float]) -> float:
        if metric == "cosine":
            return 1 - dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))
        return math.dist(a, b) if metric == "l2" else -dot(a, b)

    combine = min if objective == "max_min" else sum
    picks = [0]
    while len(picks) < k:
        left = [i for i in range(len(x)) if i not in picks]
        picks.append(max(left, key=lambda i: weight[i] * combine(distance(x[i], x[c]) for c in picks)))
    return picks


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_reference_follows_the_definition(objective: str, metric: str, weighted: bool) -> None:
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(4))
    weight = torch.rand(20, generator=torch.Generator().manual_seed(5)) if weighted else torch.ones(20)
    index, value = reference.kcenter_greedy(
        x[None],
        20,
        objective=objective,
        metric=metric,
        first="index0",
        weight=weight[None] if weighted else None,
    )
    assert index[0].tolist() == by_definition(x.tolist(), 20, objective, metric, weight.tolist())
    c = x.double()
    if metric == "cosine":
        c = c / c.norm(dim=-1, keepdim=True)
    between = torch.cdist(c, c) if metric == "l2" else (1 if metric == "cosine" else 0) - c @ c.T
    for j in range(1, 20):
        pick, before = int(index[0, j]), index[0, :j].long()
        distance = between[pick, before]
        expected = weight[pick].double() * (distance.min() if objective == "max_min" else distance.sum())
        assert value[0, j].item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("seeds", [0, 2])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_right_answer_passes(objective: str, metric: str, seeds: int) -> None:
    assert_agrees(*answer(replace(CASE, objective=objective, metric=metric, seeds=seeds)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_injected_mistakes_are_found(objective: str, metric: str) -> None:
    call, index, value = answer(replace(CASE, objective=objective, metric=metric))
    swapped, repeated, hole, outside = (index.clone() for _ in range(4))
    swapped[0, [3, 4]] = index[0, [4, 3]]
    repeated[1, 5] = index[1, 2]
    hole[1, 7] = -1
    outside[0, 0] = 30
    for wrong in (swapped, repeated, hole, outside):
        with pytest.raises(AssertionError, match="wrong picks"):
            assert_agrees(call, wrong, value)
    drifted, finite = value.clone(), value.clone()
    drifted[1, 6] *= 1 + 1e-4
    finite[0, 0] = 1.0
    for wrong in (drifted, finite):
        with pytest.raises(AssertionError, match=r"wrong values|infinities differ"):
            assert_agrees(call, index, wrong)
    with pytest.raises(AssertionError):
        assert_agrees(call, index, value.masked_fill(value == value[0, 3], float("nan")))


def test_an_ignored_seed_is_found() -> None:
    call, index, value = answer(replace(CASE, seeds=2))
    other = call.options["seed"].flip(1)
    with pytest.raises(AssertionError, match="wrong picks"):
        assert_agrees(Inputs(call.x, call.k, {**call.options, "seed": other}), index, value)


def test_a_tie_by_definition_goes_to_the_lowest_index() -> None:
    call, index, value = answer(replace(CASE, first="index0", bad_rows=(0, 29), k=30))
    assert index[0, 0] == 1
    assert index[0, 28:].tolist() == [0, 29]
    index[0, 28:] = torch.tensor([29, 0])
    with pytest.raises(AssertionError, match="wrong picks"):
        assert_agrees(call, index, value)


def test_padding_that_wins_is_found() -> None:
    call, index, value = answer(replace(CASE, lengths=(20, 30)))
    index[0, 4] = 25
    with pytest.raises(AssertionError, match="wrong picks"):
        assert_agrees(call, index, value)


@pytest.mark.parametrize("what", ["weights", "mask", "position", "group", "value", "nan"])
def test_wrong_scores_are_found(what: str) -> None:
    c = ScoreCase(2, 4, 2, 30, 50, 16, weight="decay").call()
    options = {**c.sight, **c.rows}
    exact, torch32 = (
        reference.column_score(c.q, c.k, c.lse, **options, dtype=d) for d in (torch.float64, torch.float32)
    )
    assert_scores(torch32, exact, torch32)
    wrong = torch32.clone()
    if what == "weights":
        wrong = reference.column_score(c.q, c.k, c.lse, **c.sight, dtype=torch.float32)
    elif what == "mask":
        wrong = reference.column_score(c.q, c.k, c.lse, **{**options, "window": 20}, dtype=torch.float32)
    elif what == "position":
        position = torch.arange(30) + 19
        wrong = reference.column_score(c.q, c.k, c.lse, **options, q_position=position, dtype=torch.float32)
    elif what == "group":
        wrong = wrong[:, [0, 2, 1, 3]]
    elif what == "value":
        wrong[1, 3, 7] *= 1 + 2e-5
    else:
        wrong[0, 0, 49] = float("nan")
    with pytest.raises(AssertionError, match="relative error"):
        assert_scores(wrong, exact, torch32)
