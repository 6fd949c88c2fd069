"""PyramidKV, AdaKV and PrefixKV budgets, KVCrush signatures: worked examples, plain loops, bad input."""

from typing import Any

import pytest
import torch
from recipe_attention import close, kept
from tokencomp import ops, recipes
from torch import Tensor

# --- budgets ----------------------------------------------------------------------------------------------


def test_pyramid_budget() -> None:
    got = recipes.pyramid_budget(128, 8, 32, 4000)
    assert got == tuple(range(234, 10, -7))
    assert sum(got) / 32 == 125.5
    assert recipes.pyramid_budget(128, 8, 32, 100) == (92,) * 32  # all there is
    assert recipes.pyramid_budget(128, 8, 32, 239) == (120,) * 32
    short = recipes.pyramid_budget(128, 8, 4, 240)  # most = 232 = all there is, least mirrors it
    assert short == (232, 158, 84, 10)
    assert recipes.pyramid_budget(128, 8, 1, 4000) == (120,)


ADA = torch.tensor([[[0.4, 0.3, 0.1, 0.05, 0.05], [0.3, 0.02, 0.02, 0.01, 0.01]]])


@pytest.mark.parametrize(("alpha", "want"), [(0, [3, 1]), (0.2, [2, 1]), (0.5, [2, 2])])
def test_adakv_code(alpha: float, want: list[int]) -> None:
    assert recipes.adakv_budget(ADA, 2, alpha=alpha, form="code").tolist() == [want]


def test_adakv_exact_keeps_the_total() -> None:
    assert recipes.adakv_budget(ADA, 2, alpha=0.2).tolist() == [[3, 1]]  # the floor is 0
    assert recipes.adakv_budget(ADA, 2, alpha=1).tolist() == [[2, 2]]
    score = torch.rand(3, 5, 41, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([41, 30, 7])
    got = recipes.adakv_budget(score, 11, alpha=0.3, lengths=lengths)
    assert got.sum(1).tolist() == [55, 55, 35]
    assert got.min() >= 3
    assert (got[2] == 7).all()


def plain_adakv(score: Tensor, base: int, alpha: float, normalize: bool) -> list[int]:
    """One item, heads sorted and flattened as written."""
    score = score.double()
    if normalize:
        best = score.sort(dim=1, descending=True).values[:, :base].sum(1, keepdim=True)
        score = score * best / score.sum(1, keepdim=True)
    heads, keys = score.shape
    order = score.flatten().argsort(descending=True, stable=True)[: heads * base]
    raw = torch.bincount(order // keys, minlength=heads).tolist()
    return [round(r * (1 - alpha) + int(alpha * base)) for r in raw]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
def test_adakv_against_loops(alpha: float, normalize: bool) -> None:
    score = (
        torch.rand(2, 3, 37, generator=torch.Generator().manual_seed(1)) ** torch.tensor([1, 2, 6])[:, None]
    )
    got = recipes.adakv_budget(score, 9, alpha=alpha, normalize=normalize, form="code")
    assert got.tolist() == [plain_adakv(s, 9, alpha, normalize) for s in score]


def test_adakv_normalized_ignores_padding() -> None:
    score = torch.rand(1, 2, 20, generator=torch.Generator().manual_seed(2))
    padded = torch.nn.functional.pad(score, (0, 5), value=9.0)
    got = recipes.adakv_budget(padded, 4, normalize=True, lengths=torch.tensor([20]))
    assert torch.equal(got, recipes.adakv_budget(score, 4, normalize=True))


@pytest.mark.parametrize(
    ("ratio", "raw", "scaled"),
    [
        (0.5, (32, 21, 8), (31, 20, 7)),
        (0.3, (29, 9, 0), (27, 8, 0)),
        (0.7, (34, 30, 23), (32, 28, 22)),
    ],
)
def test_prefix_budget(ratio: float, raw: tuple[int, ...], scaled: tuple[int, ...]) -> None:
    score = torch.stack([(-a * torch.arange(40.0)).softmax(0) for a in (0.5, 0.1, 0.02)])
    assert recipes.prefix_budget(score, ratio, protect=5, rescale=False) == raw
    assert recipes.prefix_budget(score, ratio, protect=5) == scaled


def test_prefix_budget_at_its_ends() -> None:
    score = torch.rand(4, 33, generator=torch.Generator().manual_seed(3))
    everything = recipes.prefix_budget(score, 1, protect=3)
    assert max(everything) <= 30
    nothing = recipes.prefix_budget(score, 0, protect=3)
    assert sum(nothing) == 0
    assert recipes.prefix_budget(score[:, :0], 0.5) == (0, 0, 0, 0)
    assert recipes.prefix_budget(torch.zeros(2, 8), 0.0, tolerance=1) == (0, 0)


# --- KVCrush ----------------------------------------------------------------------------------------------

CRUSH = [0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.05, 0.6, 0.02, 0.03, 0.5, 0.04, 0.45, 0.01, 0.4, 0.35]


def bits(*words: str) -> Tensor:
    return torch.tensor([[[c == "1" for c in word] for word in words]])


def mask(*marked: int, of: int = 4) -> Tensor:
    return torch.tensor([[i in marked for i in range(of)]])


def test_kvcrush_signatures_and_scores() -> None:
    score = torch.tensor([[CRUSH]])
    close(recipes.page_scores(score, 4), [2.0, 1.65, 0.59, 1.21])
    assert torch.equal(recipes.page_signatures(score, 4), bits("1010", "0101", "0010", "1011"))


@pytest.mark.parametrize(
    ("anchor", "distance", "marked", "count", "want"),
    [
        ("alternating", [4, 0, 3, 3], (2, 3), 1, [2]),
        ("mean", [1, 3, 0, 2], (2, 3), 1, [2]),
        ("alternating", [4, 0, 3, 3], (1, 2, 3), 2, [1, 2]),
        ("mean", [1, 3, 0, 2], (1, 2, 3), 2, [2, 3]),
        ("zeros", [2, 2, 1, 3], (1, 2, 3), 2, [1, 2]),
    ],
)
def test_kvcrush(
    anchor: Any, distance: list[int], marked: tuple[int, ...], count: int, want: list[int]
) -> None:
    signature = recipes.page_signatures(torch.tensor([[CRUSH]]), 4)
    got = recipes.hamming_distance(signature, recipes.anchor_bits(signature, anchor))
    assert got.tolist() == [distance]
    index, taken = recipes.bucket_picks(got, mask(*marked), count)
    assert index.tolist() == [want]
    assert taken.tolist() == [count]


def test_kvcrush_golden_vectors() -> None:
    words = bits("1010", "0101", "1100")
    assert recipes.hamming_distance(words, bits("1010")[:, 0]).tolist() == [[0, 4, 2]]
    same = bits("1010", "1010", "1010")
    assert recipes.hamming_distance(same, recipes.anchor_bits(same, "alternating")).tolist() == [[4, 4, 4]]
    five = bits("1010", "1100", "1110", "0010", "0000")
    assert torch.equal(recipes.anchor_bits(five, "mean"), bits("1010")[:, 0])
    assert torch.equal(recipes.anchor_bits(five, "inverse_mean"), bits("0101")[:, 0])
    ramp = torch.tensor([[0, 1, 2, 3]])
    assert kept(recipes.bucket_picks(ramp, mask(0, 1, 2, 3), 2)[0]) == [0, 2]
    assert kept(recipes.bucket_picks(ramp, mask(1, 3), 2)[0]) == [1, 3]


def plain_picks(distance: list[int], candidate: list[bool], count: int, spacing: str) -> list[int]:
    ranked = sorted((d, i) for i, (d, c) in enumerate(zip(distance, candidate, strict=True)) if c)
    picks = min(count, len(ranked))
    if spacing == "step":
        places = [i * (len(ranked) // picks) for i in range(picks)]
    else:
        places = [i * (len(ranked) - 1) // max(1, picks - 1) for i in range(picks)]
    return sorted(ranked[p][1] for p in places)


@pytest.mark.parametrize("spacing", ["step", "linspace"])
@pytest.mark.parametrize("count", [0, 1, 4, 29, 40])
def test_bucket_picks_against_loops(spacing: Any, count: int) -> None:
    g = torch.Generator().manual_seed(count)
    distance = torch.randint(0, 6, (5, 29), generator=g, dtype=torch.int32)
    candidate = torch.rand(5, 29, generator=g) < torch.tensor([[0.0], [0.1], [0.5], [0.9], [1.0]])
    index, taken = recipes.bucket_picks(distance, candidate, count, spacing=spacing)
    assert index.dtype == taken.dtype == torch.int32
    assert index.shape == (5, count)
    for row in range(5):
        want = plain_picks(distance[row].tolist(), candidate[row].tolist(), count, spacing)
        assert index[row].tolist() == want + [-1] * (count - len(want))
        assert int(taken[row]) == len(want)


def test_token_signatures_are_the_heads_top_halves() -> None:
    score = torch.rand(2, 5, 31, generator=torch.Generator().manual_seed(4))
    got = recipes.token_signatures(score)
    assert got.shape == (2, 31, 5)
    for b in range(2):
        for h in range(5):
            want = score[b, h].argsort(descending=True)[:15].sort().values
            assert torch.equal(got[b, :, h].nonzero().flatten(), want)


def test_page_signatures_put_tokens_before_heads() -> None:
    score = torch.tensor([[[4.0, 3, 2, 1], [1, 2, 3, 4]]])
    assert torch.equal(recipes.page_signatures(score, 2), bits("1010", "0101"))


def test_random_anchor_is_seeded() -> None:
    words = bits(*["10" * 32] * 3)
    first, again, other = (recipes.anchor_bits(words, "random", seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 < first.sum() < 64
    assert recipes.anchor_bits(words, "ones").all()


def test_representatives_join_the_important() -> None:
    """The token form as a whole: important ones by score, representatives among the rest."""
    score = torch.rand(2, 4, 40, generator=torch.Generator().manual_seed(5))
    important, _ = ops.topk_select(score.mean(1), 10)
    rest = torch.ones(2, 40, dtype=torch.bool).scatter(1, important.long(), False)
    signature = recipes.token_signatures(score)
    distance = recipes.hamming_distance(signature, recipes.anchor_bits(signature, "mean"))
    index, taken = recipes.bucket_picks(distance, rest, 6)
    assert taken.tolist() == [6, 6]
    assert rest.gather(1, index.long()).all()


# --- bad input --------------------------------------------------------------------------------------------

S, B = torch.ones(1, 2, 6), bits("10", "01")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipes.pyramid_budget(4, 8, 2, 9), "pyramid_budget: capacity must be >= window=8, got 4"),
        (lambda: recipes.pyramid_budget(8, 4, 0, 9), "pyramid_budget: layers must be >= 1, got 0"),
        (lambda: recipes.adakv_budget(S[0], 1), r"adakv_budget: score must have shape \[B, H, S\]"),
        (lambda: recipes.adakv_budget(S, -1), "adakv_budget: base must be >= 0, got -1"),
        (lambda: recipes.adakv_budget(S, 1, alpha=2), r"adakv_budget: alpha must be in \[0, 1\], got 2"),
        (lambda: recipes.adakv_budget(S, 1, form="x"), "form must be 'exact' or 'code', got 'x'"),  # type: ignore[arg-type]
        (lambda: recipes.prefix_budget(S, 0.5), r"prefix_budget: score must have shape \[n, N\]"),
        (lambda: recipes.prefix_budget(S[0], 2), r"prefix_budget: ratio must be in \[0, 1\], got 2"),
        (lambda: recipes.prefix_budget(-S[0], 0.5), "prefix_budget: score must be >= 0 and not NaN"),
        (lambda: recipes.page_scores(S, 4), "page_scores: page must be a divisor of S=6, got 4"),
        (lambda: recipes.token_signatures(S, share=2), r"share must be in \[0, 1\], got 2"),
        (lambda: recipes.anchor_bits(B, "x"), "anchor_bits: kind must be one of .* got 'x'"),  # type: ignore[arg-type]
        (lambda: recipes.hamming_distance(B, B[0]), r"anchor must be of shape \[1, 2\], got \[2, 2\]"),
        (lambda: recipes.bucket_picks(S[0], S[0], 1), r"candidate must be bool \[2, 6\], got torch.float32"),
        (
            lambda: recipes.bucket_picks(mask(1).int(), mask(1), -1),
            "bucket_picks: count must be >= 0, got -1",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
