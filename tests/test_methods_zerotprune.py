"""Zero-TPrune: the published numbers, the definitions, and the traps."""

import pytest
import torch
from method_cases import random_view, run, view_of
from tokencomp import ragged
from tokencomp.methods import ZeroTPrune, attention, pruning, zerotprune

A = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1], [0.3, 0.3, 0.3, 0.1]])
HEADS = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.26, 0.24, 0.25, 0.25]]])


@pytest.mark.parametrize(
    ("init", "votes", "s"),
    [
        ("uniform", 1, [0.25, 0.425, 0.225, 0.1]),
        ("uniform", 2, [0.2175, 0.4725, 0.21, 0.1]),
        ("uniform", 50, [0.2014, 0.4886, 0.21, 0.1]),
        ("cls", 0, [0.4, 0.2, 0.2, 0.2]),
        ("cls", 1, [0.28, 0.40, 0.22, 0.10]),
    ],
)
def test_page_rank_of_the_worked_example(init: zerotprune.Init, votes: int, s: list[float]) -> None:
    """Tokens vote for those they attend to: A^T s, not A s."""
    graph = attention.of(view_of(A, torch.randn(4, 3)))
    ours = graph.pagerank(zerotprune.start(graph, init), votes)
    torch.testing.assert_close(ours, torch.tensor([[s]]), atol=5e-5, rtol=0)
    rank = ZeroTPrune(init=init).importance(graph, votes, 1)
    assert rank.argsort(dim=1).tolist() == torch.tensor([s]).argsort(dim=1).tolist()


@pytest.mark.parametrize("damping", [0.0, 0.15])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("init", ["cls", "uniform"])
def test_mass_is_conserved(init: zerotprune.Init, masked: bool, damping: float) -> None:
    mask = torch.rand(3, 37) < 0.7 if masked else None
    graph = attention.of(random_view(mask=mask))
    start = zerotprune.start(graph, init)
    torch.testing.assert_close(start.sum(-1), torch.ones(3, 1))
    for votes in (1, 2, 40):
        s = graph.pagerank(start, votes, damping)
        torch.testing.assert_close(s.sum(-1), torch.ones(3, 3), rtol=1e-5, atol=0)
        assert mask is None or (s.masked_select(~mask[:, None]) == 0).all()


def test_cls_start_weighs_cls_by_the_root_of_the_valid_tokens() -> None:
    mask = torch.arange(37).expand(3, 37) < 16
    start = zerotprune.start(attention.of(random_view(mask=mask)), "cls")[:, 0]
    torch.testing.assert_close(start[:, 0] / start[:, 1], torch.full((3,), 4.0))


def test_head_filter_and_root_mean_square_of_the_worked_example() -> None:
    assert zerotprune.heard_heads(HEADS, 0.01, 0.7).tolist() == [[True, False]]
    scaled = HEADS * 4
    assert scaled.var(-1, correction=0)[0].tolist() == [pytest.approx(0.2), pytest.approx(0.0008)]
    both = zerotprune.rms_over_heads(HEADS, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(both, torch.tensor([[0.3373, 0.2717, 0.2264, 0.1904]]), atol=5e-5, rtol=0)
    first = zerotprune.rms_over_heads(HEADS, torch.tensor([[True, False]]))
    torch.testing.assert_close(first, HEADS[:, 0])


def test_head_filter_is_not_on_the_raw_scale() -> None:
    """197 probabilities have a variance of at most 0.00505: on them the filter would refuse every head."""
    s = torch.stack([torch.rand(197), torch.rand(197) ** 40, torch.ones(197) + 1e-4 * torch.rand(197)])
    s = (s / s.sum(-1, keepdim=True))[None]
    one_hot = torch.zeros(197)
    one_hot[3] = 1
    assert one_hot.var(correction=0) < 0.01
    assert (s.var(-1, correction=0) < 0.01).all()
    assert zerotprune.heard_heads(s, 0.01, 0.7).tolist() == [[True, False, False]]


def test_head_filter_hears_all_where_none_passes_item_by_item() -> None:
    flat, good = torch.full((2, 4), 0.25), HEADS[0, [0, 0]]
    assert zerotprune.heard_heads(torch.stack([flat, good]), 0.01, 0.7).tolist() == [[True] * 2] * 2
    mixed = torch.stack([torch.stack([flat[0], good[0]]), flat])
    assert zerotprune.heard_heads(mixed, 0.01, 0.7).tolist() == [[False, True], [True, True]]


def test_head_filter_ignores_padding() -> None:
    padded = torch.cat([HEADS, torch.zeros(1, 2, 5)], dim=2)
    mask = torch.arange(9)[None] < 4
    assert zerotprune.heard_heads(padded, 0.01, 0.7, mask).tolist() == [[True, False]]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("image", [8, 9])
def test_similarity_stage_by_its_definition(prefix: int, image: int) -> None:
    metric, score = torch.randn(2, prefix + image, 6), torch.rand(2, prefix + image)
    for r in range(image // 2 + 1):
        ours = zerotprune.different(metric, score, r, prefix)
        assert ours.shape == (2, prefix + image - r)
        for b in range(2):
            tokens = range(prefix, prefix + image)
            ranked = sorted(tokens, key=lambda t: -float(score[b, t]))
            high, low = ranked[: image - image // 2], ranked[image - image // 2 :]
            unit = torch.nn.functional.normalize(metric[b].double(), dim=-1)
            nearest = {t: float((unit[high] @ unit[t]).max()) for t in low}
            lost = set(sorted(low, key=lambda t: -nearest[t])[:r])
            assert ours[b].tolist() == [t for t in range(prefix + image) if t not in lost]


def test_similarity_stage_checks_r() -> None:
    with pytest.raises(
        ValueError, match=r"different: r must be in \[0, 4\], half of the image tokens, got 5"
    ):
        zerotprune.different(torch.randn(1, 9, 2), torch.rand(1, 9), 5, 0)


def test_similarity_stage_drops_padding_first_and_matches_none() -> None:
    metric = torch.eye(6)[None].clone()
    metric[0, 4] = metric[0, 1]  # the padding at 4 is identical to an important token
    mask = torch.tensor([[True, True, True, True, False, True]])
    score = torch.tensor([[9.0, 8, 7, 1, 99, 2]])
    assert zerotprune.different(metric, score, 1, 0, mask).tolist() == [[0, 1, 2, 3, 5]]
    metric[0, 3] = metric[0, 4] = torch.tensor([0, 0, 0, 1.0, 1, 0])
    metric[0, 5] = metric[0, 0] + metric[0, 3]  # nearer to a real token than 3 is
    assert zerotprune.different(metric, score, 2, 0, mask).tolist() == [[0, 1, 2, 3]]


def test_both_stages_together() -> None:
    """20 of 36 go: 5 as similar, the rest by PageRank among the survivors."""
    method, view = ZeroTPrune(keep=16, layers=(1,), similar=0.25, iterations=7), random_view()
    graph = attention.of(view)
    survivors = zerotprune.different(view.metric(), method.importance(graph, 1, 1), 5, 1)
    score = method.importance(graph.subset(survivors), 7, 1)
    kept = ragged.gather_rows(survivors, pruning.top(score, 16, prefix=1))
    out = run(method, view)
    assert torch.equal(out.token_map, ragged.position_map(kept, 37))
    assert torch.equal(out.x, ragged.gather_rows(view.x, kept))
    assert out.size is None


def test_votes_by_layer() -> None:
    """The paper's ranges by default; a tuple knows the layer."""
    votes = [ZeroTPrune().votes(layer, 12) for layer in range(12)]
    assert votes == [40] * 3 + [8] * 6 + [1] * 3
    assert [ZeroTPrune(iterations=(5, 4)).votes(layer, 12) for layer in (0, 1, 2)] == [5, 4, 1]
    assert ZeroTPrune(iterations=9).votes(11, 12) == 9


def test_without_prefix_the_start_is_even() -> None:
    first = run(ZeroTPrune(keep=9, layers=None, similar=0, init="cls", iterations=1), random_view(prefix=0))
    even = run(
        ZeroTPrune(keep=9, layers=None, similar=0, init="uniform", iterations=1), random_view(prefix=0)
    )
    assert torch.equal(first.token_map, even.token_map)
