"""Recipes that look at a whole text or at pages of it: A2SF under teacher forcing, ACT, SpecPC's picks,
OpenVINO's pages. Worked examples, loops in float64, bad input.
"""

import math
from typing import Any

import pytest
import torch
from recipe_attention import close, dense_attention, kept, random_sides
from tokencomp import ops, recipes
from torch import Tensor
from torch.nn import functional


def triangle(rows: list[list[float]]) -> Tensor:
    """``[1, 1, T, T]``."""
    padded = [functional.pad(torch.tensor(row).float(), (0, len(rows) - len(row))) for row in rows]
    return torch.stack(padded)[None, None]


# --- A2SF under teacher forcing ---------------------------------------------------------------------------

FORCED_ROWS = [[1], [0.6, 0.4], [0.5, 0.2, 0.3], [0.4, 0.1, 0.3, 0.2], [0.1, 0.1, 0.5, 0.1, 0.2]]


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_forgetting_mask(gamma: float) -> None:
    mask = recipes.forgetting_mask(triangle(FORCED_ROWS), 1, 2, gamma=gamma)
    want = torch.ones(5, 5).tril().bool()
    want[4, 1] = False
    assert torch.equal(mask[0, 0], want)


def forced_by_loops(rows: list[list[float]], select: int, recent: int, prefix: int, gamma: float) -> Tensor:
    """One head, key by key."""
    tokens, dead = len(rows), set[int]()
    score, seen = [0.0] * tokens, torch.zeros(tokens, tokens, dtype=torch.bool)
    for q in range(tokens):
        alive = [j for j in range(q + 1) if j not in dead]
        seen[q, alive] = True
        full = q < prefix + select + recent
        mass = 1.0 if full else math.fsum(rows[q][j] for j in alive)
        for j in range(tokens):
            score[j] = gamma * score[j] + (rows[q][j] / mass if j in alive else 0.0)
        candidates = [j for j in alive if prefix <= j <= q - recent]
        if not full and candidates:
            dead.add(min(candidates, key=lambda j: (score[j], -j)))
    return seen


@pytest.mark.parametrize(
    ("select", "recent", "prefix", "gamma"), [(4, 3, 0, 0.9), (4, 3, 2, 1.0), (0, 5, 1, 0.3), (5, 1, 0, 0.0)]
)
def test_forgetting_mask_against_loops(select: int, recent: int, prefix: int, gamma: float) -> None:
    attention = dense_attention(*random_sides(2, 2, 1, 23, 23)).float()
    got = recipes.forgetting_mask(attention, select, recent, prefix=prefix, gamma=gamma)
    for b in range(2):
        for h in range(2):
            want = forced_by_loops(attention[b, h].tolist(), select, recent, prefix, gamma)
            assert torch.equal(got[b, h], want)
    assert (got.sum(-1)[..., -1] == select + recent + prefix + 1).all()


def test_forgetting_mask_evicts_the_later_of_equals() -> None:
    even = torch.ones(8, 8).tril()
    mask = recipes.forgetting_mask((even / even.sum(1, keepdim=True))[None, None], 2, 1, gamma=0.0)
    assert mask[0, 0, -1].nonzero().flatten().tolist() == [0, 1, 6, 7]


# --- ACT --------------------------------------------------------------------------------------------------

ACT_ROWS = [[1], [0.6, 0.4], [0.5, 0.3, 0.2], [0.4, 0.4, 0.1, 0.1]]


def test_act() -> None:
    attention = triangle(ACT_ROWS)
    mean = attention.sum(2) / torch.arange(4, 0, -1)
    close(mean, [0.625, 0.366667, 0.15, 0.1])
    sink = recipes.attention_sinks(mean, 0.25)
    assert kept(sink.nonzero()[:, 2]) == [1]
    want = triangle([[1], [0.84, 0.16], [0.628571, 0.12, 0.251429], [0.56, 0.16, 0.14, 0.14]])
    close(recipes.redistribute_sinks(attention, sink, 0.4), want.double())


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_act_by_merging_two_outputs(beta: float) -> None:
    q, k = random_sides(2, 3, 3, 19, 19)
    _, v = random_sides(2, 3, 3, 1, 19, 7, seed=1)
    sink = torch.rand(2, 3, 19, generator=torch.Generator().manual_seed(2)) < 0.2
    sink[1, 2], sink[:, :, 0] = False, False
    sink[0, 0, 0] = True  # row 0 of this head sees nothing but a sink
    attention = dense_attention(q, k)
    moved = recipes.redistribute_sinks(attention.float(), sink, beta)
    close(moved.sum(-1), torch.ones(2, 3, 19).double())
    parts: list[Tensor] = []
    for part in (sink, ~sink):
        own = torch.where(part[:, :, None], attention, 0.0)
        mass = own.sum(-1)
        output = torch.where(mass[..., None] > 0, own @ v.double() / mass[..., None], torch.nan)
        parts += [output, mass.log()]
    close(recipes.merge_sink_outputs(*parts, beta), moved.double() @ v.double(), 5e-6)


# --- SpecPC -----------------------------------------------------------------------------------------------

SPECPC = torch.tensor([[0.1, 0, 0.9, 0, 0, 0, 0.5, 0, 0, 0.2, 0, 0.3]])


@pytest.mark.parametrize("width", [3, 4])
def test_specpc_picks(width: int) -> None:
    pooled = recipes.pool_scores(SPECPC[:, None], width, kind="max")[:, 0]
    index, count = recipes.expand_select(pooled, 6, neighbours=width, window=2)
    assert kept(index) == [0, 1, 2, 3, 10, 11]
    assert count.tolist() == [6]


def expanded_by_loops(score: list[float], keep: int, neighbours: int, window: int) -> list[int]:
    n = len(score)
    offsets = sorted(range(-((neighbours - 1) // 2), neighbours // 2 + 1), key=lambda o: (abs(o), o))
    sequence = list(range(max(n - window, 0), n))
    for j in sorted(range(n), key=lambda j: (-score[j], j))[:keep]:
        sequence += [min(max(j + o, 0), n - 1) for o in offsets]
    return sorted(list(dict.fromkeys(sequence))[:keep])


@pytest.mark.parametrize(
    ("keep", "neighbours", "window"), [(9, 1, 0), (9, 4, 3), (20, 5, 20), (64, 2, 4), (0, 1, 0)]
)
def test_specpc_picks_against_loops(keep: int, neighbours: int, window: int) -> None:
    g = torch.Generator().manual_seed(4)
    score = torch.randint(0, 9, (5, 40), generator=g).float() / 8  # ties
    lengths = torch.tensor([40, 31, 17, 2, 0])
    index, count = recipes.expand_select(score, keep, neighbours=neighbours, window=window, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        want = expanded_by_loops(score[row, :n].tolist(), keep, neighbours, window)
        assert kept(index[row]) == want
        assert count[row] == len(want)


# --- OpenVINO ---------------------------------------------------------------------------------------------

PAGES = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.05, 0.6, 0.02, 0.03, 0.5, 0.04, 0.45, 0.01, 0.4, 0.35])


def test_counters() -> None:
    count = recipes.window_counts(11, 8)
    assert count.tolist() == [8, 8, 8, 8, 7, 6, 5, 4, 3, 2, 1]
    assert recipes.window_counts(3, 8).tolist() == [3, 2, 1]
    score = torch.zeros(1, 1, 3)
    counts = recipes.window_counts(3, 8)[None, None]
    score, counts = recipes.count_step(score, counts, torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]), kernel=2)
    close(score, [0.2, 0.3, 0.4, 0.4])
    assert counts.tolist() == [[[4, 3, 2, 1]]]
    score, counts = recipes.count_step(score, counts, torch.tensor([[[0.5, 0, 0, 0, 0.5]]]), kernel=2)
    close(score, [0.7, 0.3, 0.4, 0.9, 0.5])
    assert counts.tolist() == [[[5, 4, 3, 2, 1]]]


def test_pages_that_stay() -> None:
    score = PAGES[None, None]
    close(recipes.page_scores(score, 4), [2.0, 1.65, 0.59, 1.21])
    assert kept(recipes.page_keep(score, 4, 8, start=0, recent=0)[0]) == [0, 1]
    assert kept(recipes.page_keep(score, 4, 4, start=4, recent=4)[0]) == [0, 1, 3]
    assert kept(recipes.page_keep(score, 4, 4, start=0, recent=4)[0]) == [0, 3]
    count = torch.tensor([4] * 4 + [4] * 4 + [1] * 8)[None, None]  # means .5 .4125 .59 1.21
    assert kept(recipes.page_keep(score, 4, 8, count=count, start=0, recent=0)[0]) == [2, 3]
    index, pages = recipes.page_keep(score[..., :13], 4, 4, start=4, recent=4)
    assert kept(index) == [0, 1, 3]  # the last page has begun
    assert pages.tolist() == [[3]]
    assert kept(recipes.page_keep(torch.ones(1, 1, 12), 4, 4, start=0, recent=0)[0]) == [0]


def test_diverse_pages() -> None:
    mass = torch.tensor([[0.05, 0.5, 0.03, 0.4, 0.02]])
    similarity = torch.tensor([[0.1, 0.9, -0.2, 0.8, 0.0]])
    assert kept(recipes.diverse_pages(mass, similarity, 3, share=0.85)[0]) == [1, 2, 3]
    assert kept(recipes.diverse_pages(mass, similarity, 4, share=0.85)[0]) == [1, 2, 3, 4]
    assert kept(recipes.diverse_pages(mass, similarity, 1, share=0.85)[0]) == [1]
    assert kept(recipes.diverse_pages(mass, similarity, 2, share=0.0)[0]) == [2, 4]


def test_page_similarity_is_the_mean_cosine() -> None:
    _, k = random_sides(2, 4, 2, 1, 24)
    unit = functional.normalize(k.double(), dim=-1)
    want = (unit @ unit.transpose(2, 3)).mean(-1).unflatten(2, (6, 4)).mean(-1)
    close(recipes.page_similarity(k, 4), want)


def test_counted_scores_of_a_prompt_are_those_of_its_last_rows() -> None:
    q, k = random_sides(1, 4, 2, 20, 20)
    attention = dense_attention(q, k).mean(1, keepdim=True)
    position = torch.arange(12, 20)
    lse = ops.attention_lse(q[:, :, 12:], k, q_position=position)
    score = ops.column_score(q[:, :, 12:], k, lse, q_position=position, heads="mean")
    close(score, attention[:, :, 12:].sum(2))
    assert torch.equal(recipes.window_counts(20, 8), (attention[0, 0, 12:] > 0).sum(0).int())


# --- bad input --------------------------------------------------------------------------------------------

A, S = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4)
B = torch.ones(1, 2, 3, dtype=torch.bool)
I = torch.ones(1, 2, 4, dtype=torch.int32)  # noqa: E741


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipes.forgetting_mask(A[..., :2], 1, 1), r"attention must be square, got \[1, 2, 3, 2\]"),
        (lambda: recipes.forgetting_mask(A, 1, 0), "forgetting_mask: recent must be >= 1, got 0"),
        (lambda: recipes.forgetting_mask(A, 1, 1, gamma=1.5), r"gamma must be in \[0, 1\], got 1.5"),
        (lambda: recipes.redistribute_sinks(A, B.int()), r"sink must be bool of shape \[1, 2, 3\], got"),
        (lambda: recipes.redistribute_sinks(A, B, 2), r"beta must be in \[0, 1\], got 2"),
        (
            lambda: recipes.merge_sink_outputs(A, B, A[:, :1], B),
            r"rest_output must be of shape \[1, 2, 3, 3\]",
        ),
        (lambda: recipes.merge_sink_outputs(A, S, A, B), r"sink_lse must be of shape \[1, 2, 3\], got"),
        (lambda: recipes.expand_select(S, 3, neighbours=1), r"expand_select: score must have shape \[B, n\]"),
        (lambda: recipes.expand_select(S[0], 3, neighbours=1, window=4), "keep must be >= window=4, got 3"),
        (lambda: recipes.expand_select(S[0], 3, neighbours=0), "neighbours must be >= 1, got 0"),
        (lambda: recipes.window_counts(3, 0), "window_counts: window must be >= 1, got 0"),
        (lambda: recipes.count_step(S, I, S[..., :3]), r"received must be of shape \[1, 2, '>= 4'\]"),
        (lambda: recipes.count_step(S, I[..., :3], S), r"count must be of shape \[1, 2, 4\]"),
        (lambda: recipes.page_keep(S, 2, 3, start=0), "budget must be a multiple of page=2, >= 0, got 3"),
        (lambda: recipes.page_keep(S, 0, 0), "page_keep: page must be >= 1, got 0"),
        (lambda: recipes.page_similarity(A, 2), "page must be a divisor of S=3, got 2"),
        (lambda: recipes.diverse_pages(S[0], S[0, :1], 1), r"similarity must be of shape \[2, 4\]"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
