"""GTP-ViT: its graph, its scores, its propagation, and the traps of its published code."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import random_view, run, small_view, view_of
from tokencomp.methods import GTP, attention, gtp, pruning
from tokencomp.methods.layers import LayerView
from tokencomp.token_map import compose


def test_worked_example() -> None:
    """2 x 2 grid, all adjacent: W = 1/3; dropping "4" with alpha = .3 gives 1.4, 2.4, 3.4 and sizes 1.1."""
    view = small_view()
    method = GTP(drop=1, graph="spatial", alpha=0.3)
    state: dict[str, Any] = {}
    method.begin(view.x, 1, (2, 2), state)
    links, weight = state["gtp"]
    assert [sorted(set(row) - {-1}) for row in links[0].tolist()] == [
        [1, 2, 3],
        [0, 2, 3],
        [0, 1, 3],
        [0, 1, 2],
    ]
    torch.testing.assert_close(weight[links >= 0], torch.full((12,), 1 / 3))
    out = method.reduce(replace(view, state=state))
    assert out is not None
    torch.testing.assert_close(out.x[0, :, 0], torch.tensor([9.0, 1.4, 2.4, 3.4]))
    torch.testing.assert_close(out.size, torch.tensor([[1.0, 1.1, 1.1, 1.1]]))
    later = replace(view, x=out.x, size=out.size, source=out.token_map)
    torch.testing.assert_close(later.key_bias()[0, 1], torch.tensor(0.0953), atol=1e-4, rtol=0)
    # W is restricted, not normalised again: the next token passes on a third as well.
    q, k = view.q[:, :, :4, :4], view.k[:, :, :4, :4]
    second = method.reduce(replace(later, q=q, k=k, state=state, layer=1))
    assert second is not None
    gone = int((second.token_map[0] < 0).nonzero())
    kept = [row for row in (1, 2, 3) if row != gone]
    torch.testing.assert_close(
        second.x[0, 1:, 0], out.x[0, kept, 0] + 0.1 * out.x[0, gone, 0], rtol=1e-6, atol=1e-6
    )


def dense_graph(x: torch.Tensor, rows: int, columns: int, m: int, kind: str) -> torch.Tensor:
    """The normalised adjacency matrix by its definition, float64."""
    n = rows * columns
    cell = torch.arange(n)
    row, column = cell // columns, cell % columns
    apart = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    grid = apart == 1
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    cosine = (unit @ unit.mT).masked_fill(torch.eye(n, dtype=torch.bool), -9)
    near = torch.zeros(n, n, dtype=torch.bool).scatter(1, cosine.topk(m).indices, True)
    g = {"mixed": grid | near, "spatial": grid, "semantic": near}[kind].double()
    d = g.sum(1)
    return g / (d[:, None] * d[None]).sqrt()


@pytest.mark.parametrize("kind", ["mixed", "spatial", "semantic"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_graph_is_that_of_the_definition(kind: Any, prefix: int) -> None:
    """M neighbours with and without CLS (the published code: M + 1 without), on a grid that is no square."""
    x = torch.randn(2, prefix + 28, 16)
    state: dict[str, Any] = {}
    GTP(graph=kind, neighbours=5).begin(x, prefix, (4, 7), state)
    links, weight = state["gtp"]
    for b in range(2):
        w = torch.zeros(28, 29, dtype=torch.float64)
        w.scatter_(1, torch.where(links[b] < 0, 28, links[b]).long(), weight[b].double())
        torch.testing.assert_close(w[:, :28], dense_graph(x[b, prefix:], 4, 7, 5, kind))
    if kind == "semantic":
        assert (links >= 0).sum(2).unique().tolist() == [5]


def test_duplicates_do_not_become_their_own_neighbours() -> None:
    x = torch.ones(1, 6, 3)
    links = gtp.semantic_links(x, 2)
    assert links.tolist() == [[[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]]
    assert gtp.semantic_links(x, 31).shape == (1, 6, 5)
    assert gtp.semantic_links(x[:, :1], 8).shape == (1, 1, 0)


def test_graph_of_one_token_has_no_edges_and_no_nan() -> None:
    state: dict[str, Any] = {}
    GTP().begin(torch.randn(2, 2, 4), 1, (1, 1), state)
    links, weight = state["gtp"]
    assert (links == -1).all()
    assert (weight == 0).all()


@pytest.mark.parametrize("grid", [None, (5, 7)])
def test_spatial_graph_needs_the_grid(grid: Any) -> None:
    with pytest.raises(ValueError, match=r"GTP: a mixed graph needs a grid of all image tokens, got"):
        GTP().begin(torch.randn(1, 37, 4), 1, grid, {})
    GTP(graph="semantic").begin(torch.randn(1, 37, 4), 1, grid, {})
    GTP(passing="none").begin(torch.randn(1, 37, 4), 1, grid, {})


def test_forgotten_begin_is_an_error() -> None:
    with pytest.raises(ValueError, match="GTP: begin must run before the first layer"):
        GTP().reduce(random_view())


def test_lone_tokens() -> None:
    """A kept token without dropped neighbours is bit-identical; a dropped one without kept ones vanishes."""
    links = torch.tensor([[[1], [0], [3], [2]]], dtype=torch.int32)
    weight = torch.ones(1, 4, 1)
    kept, lost = torch.tensor([[0, 1, 3]], dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32)
    source = torch.arange(4, dtype=torch.int32)[None]
    between = gtp.edges(links, weight, source, kept, lost)
    assert between.tolist() == [[[0.0], [0.0], [1.0]]]
    view = random_view(batch=1, image=4, prefix=0)
    out = gtp.propagate(view, kept, lost, between, 0.5)
    assert torch.equal(out.x[0, :2], view.x[0, :2])
    torch.testing.assert_close(out.x[0, 2], view.x[0, 3] + 0.5 * view.x[0, 2])
    both = gtp.edges(links, weight, source, kept[:, :2], torch.tensor([[2, 3]], dtype=torch.int32))
    assert (both == 0).all()


def dense_layer(
    x: torch.Tensor, s: torch.Tensor, w: torch.Tensor, score: torch.Tensor, drop: int, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer on image tokens by the definition."""
    order = score.argsort(descending=True, stable=True)
    keep, prop = order[:-drop].sort().values, order[-drop:]
    return (
        x[keep] + alpha * w[keep][:, prop] @ x[prop],
        s[keep] + alpha * w[keep][:, prop] @ s[prop],
        w[keep][:, keep],
    )


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_layers_after_each_other_match_the_dense_formulation(prefix: int) -> None:
    method, view, state = GTP(drop=6, alpha=0.3), random_view(prefix=prefix), {}
    method.begin(view.x, prefix, view.grid, state)
    dense = [
        (
            view.x[b, prefix:].double(),
            torch.ones(36).double(),
            dense_graph(view.x[b, prefix:], 6, 6, 8, "mixed"),
        )
        for b in range(3)
    ]
    for layer in range(4):
        view = replace(view, layer=layer, state=state)
        score = method.rank(view)
        out = method.reduce(view)
        assert out is not None
        assert out.size is not None
        for b in range(3):
            dense[b] = dense_layer(*dense[b], score[b, prefix:], 6, 0.3)
            torch.testing.assert_close(out.x[b, prefix:].double(), dense[b][0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(out.size[b, prefix:].double(), dense[b][1], rtol=1e-5, atol=1e-5)
        view = next_view(view, out)
    assert view.tokens == prefix + 12


def next_view(view: LayerView, out: Any) -> LayerView:
    fresh = random_view(image=out.x.shape[1] - view.prefix, prefix=view.prefix, seed=view.layer + 1)
    source = compose(view.source, out.token_map)
    return replace(fresh, x=out.x, size=out.size, source=source, grid=view.grid)


def test_after_a_merge_a_token_has_the_edges_of_its_first_member() -> None:
    """Tokens 1 and 2 of a path 0 - 1 - 2 - 3 are one now; dropping it feeds 0 only, by the edge 0 - 1."""
    links = torch.tensor([[[1, -1], [0, 2], [1, 3], [2, -1]]], dtype=torch.int32)
    weight = torch.tensor([[[0.1, 0], [0.1, 0.2], [0.2, 0.3], [0.3, 0]]])
    source = torch.tensor([[0, 1, 1, 2]], dtype=torch.int32)
    kept, lost = torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([[1]], dtype=torch.int32)
    torch.testing.assert_close(gtp.edges(links, weight, source, kept, lost), torch.tensor([[[0.1], [0.0]]]))


@pytest.mark.parametrize("score", gtp.SCORES[:-1])
def test_scores_are_those_of_the_matrix(score: Any) -> None:
    view = random_view(size=torch.rand(3, 37) + 1)
    a = attention.of(view, proportional=True).probabilities()
    exact = gtp.matrix_score(a, score)
    torch.testing.assert_close(GTP(score=score).rank(view), exact, rtol=1e-5, atol=1e-6)
    own, received = a.diagonal(dim1=2, dim2=3), a.sum(2)
    if score == "mixed_max":
        torch.testing.assert_close(exact, own.amax(1) * received.amax(1))
    if score == "sum_mean":
        torch.testing.assert_close(exact, own.mean(1) + received.mean(1))
    if score == "cosine":
        rows = torch.nn.functional.normalize(a.mean(1), dim=-1)
        torch.testing.assert_close(exact, -(rows @ rows.mT).sum(2), rtol=1e-5, atol=1e-5)


def test_maxima_are_taken_over_heads_apart() -> None:
    """One head gives token 1 its diagonal, the other its column: no head alone would keep it."""
    a = torch.tensor([[[0.1, 0.9], [0.8, 0.2]], [[0.9, 0.1], [0.5, 0.5]]])
    assert gtp.matrix_score(a[None], "mixed_max").tolist() == [
        [pytest.approx(0.9 * 1.4), pytest.approx(0.5 * 1.1)]
    ]


def test_cls_scores_need_cls() -> None:
    with pytest.raises(ValueError, match="GTP: score cls_mean needs a CLS token, got prefix 0"):
        GTP(score="cls_mean").rank(random_view(prefix=0))


def test_theta_is_a_rank_per_head_without_normalising() -> None:
    a = torch.arange(32.0).view(1, 2, 4, 4)
    kept = gtp.sparse(a, 0.25)  # rank 12 from below: the value 11 (27) is the threshold and stays
    assert torch.equal(kept[0, 0], a[0, 0].masked_fill(a[0, 0] < 11, 0))
    assert torch.equal(kept[0, 1], a[0, 1].masked_fill(a[0, 1] < 27, 0))
    assert torch.equal(gtp.sparse(a, 1.0), a)
    view = random_view()
    assert not torch.equal(GTP(theta=0.3).rank(view), GTP().rank(view))
    # Padding neither counts nor shifts the rank.
    mask = torch.tensor([[True, True, True, False]])
    small = gtp.sparse(a[:, :, :3, :3], 0.5)
    torch.testing.assert_close(gtp.sparse(a, 0.5, mask)[:, :, :3, :3], small)


def test_none_and_mean_keep_sizes_in_step() -> None:
    """The published code leaves sizes longer than tokens there; the mean counts for all it stands for."""
    view = random_view(size=torch.rand(3, 37) + 1)
    for passing in ("none", "mean"):
        out = run(GTP(drop=5, passing=passing, score="column_max"), view)
        assert out.size.shape == out.x.shape[:2]
    gone = out.token_map == out.x.shape[1] - 1
    for b in range(3):
        size = view.sizes()[b, gone[b]]
        mean = (view.x[b, gone[b]] * size[:, None]).sum(0) / size.sum()
        torch.testing.assert_close(out.x[b, -1], mean)
        torch.testing.assert_close(out.size[b, -1], size.sum())


def test_without_scales_no_sizes() -> None:
    assert run(GTP(proportional=False), random_view()).size is None
    assert run(GTP(proportional=True), random_view()).size is not None


def test_padding_passes_nothing_on() -> None:
    view = view_of(small_view().q[0, 0].exp(), small_view().x[0], grid=(2, 2))
    mask = torch.tensor([[True, True, True, True, False]])
    out = run(GTP(drop=1, graph="spatial", alpha=0.3), replace(view, mask=mask))
    assert torch.equal(out.x[0], view.x[0, :4])
    assert torch.equal(out.size, torch.ones(1, 4))


def test_kept_tokens_keep_their_order() -> None:
    view = random_view()
    out = run(GTP(drop=9), view)
    assert (out.token_map.masked_fill(out.token_map < 0, -1).cummax(1).values.diff() >= 0).all()
    kept = pruning.top(GTP().rank(view), 27, prefix=1)
    assert torch.equal((out.token_map >= 0).nonzero()[:, 1].view(3, 28).int(), kept)
