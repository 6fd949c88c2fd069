"""Methods between decoder layers: the papers' worked examples, budgets, batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from decoder_views import DECODER_METHODS, alone, attention_of, causal, random_view, view_of
from tokencomp import methods
from tokencomp.methods import decoder
from tokencomp.methods.aim_merge import AIMMerge
from tokencomp.methods.core_matching import core_neurons, elbow
from tokencomp.methods.decoder import Transition
from tokencomp.methods.density import density_peaks
from tokencomp.methods.must_drop import merged_windows, window_similarity
from tokencomp.methods.sparse_vlm import raters
from tokencomp.methods.trans_prune import transition_value
from tokencomp.methods.visual import VisualView
from torch import Tensor
from visual_views import GivenEncoder
from visual_views import random_view as random_visual


def kept(method: Any, view: Any) -> list[int]:
    """Columns of the visual tokens of one sequence that go on."""
    found = method.prune(view)
    assert found is not None
    return (found.keep & view.visual)[0].nonzero()[:, 0].tolist()


# Text 0, visual tokens 1 to 4, text 5 and 6; the last row pays 3, 1, 4, 2 most, in this order.
LAST = causal(7, r6=(0.1, 0.2, 0.05, 0.4, 0.1, 0.1, 0.05))


def test_fastv_and_vscan() -> None:
    view = view_of([1, 2, 3, 4], 7, LAST)
    assert kept(methods.FastV(), view) == [1, 3]
    assert kept(methods.FastV(keep=3), view) == [1, 3, 4]
    assert kept(methods.VScanStage2(keep=0.25), view) == [3]
    assert [methods.VScanStage2().acts_after(n) for n in (32, 28, 3)] == [(16,), (14,), (1,)]
    assert methods.FastV().acts_after(32) == (1,)
    ties = view_of([1, 2, 3, 4], 7, causal(7))
    assert kept(methods.FastV(), ties) == [1, 2]


def test_heads_and_groups_are_averaged() -> None:
    """Two heads: 1 is best in one, 3 in the other and second in the first."""
    one = causal(7, r6=(0.1, 0.4, 0.05, 0.35, 0.05, 0.03, 0.02))
    two = causal(7, r6=(0.1, 0.05, 0.05, 0.35, 0.40, 0.03, 0.02))
    assert kept(methods.FastV(keep=1), view_of([1, 2, 3, 4], 7, torch.stack([one, two]))) == [3]


def test_pyramid_drop_asks_the_next_layer() -> None:
    method = methods.PyramidDrop()
    assert method.acts_after(32) == (7, 15, 23)
    first = view_of([1, 2, 3, 4], 7, causal(7), layer=7, following=LAST)
    assert kept(method, first) == [1, 3]
    later = replace(first, layer=15)
    assert kept(method, later) == [3]
    counts = methods.PyramidDrop(keep=(3, 2, 1), layers=(1, 2, 9))
    assert kept(counts, replace(first, layer=1)) == [1, 3]


def test_todre_stage_2() -> None:
    """S = {0}, V = {1, 2}, T = {3, 4}: text spends 10 % on V, V nothing on T."""
    rows = causal(5, r3=(0.5, 0.05, 0.05, 0.4), r4=(0.4, 0.04, 0.06, 0.3, 0.2))
    view = view_of([1, 2], 5, rows)
    to_visual, to_text = methods.ToDREStage2.masses(view)
    assert to_visual.item() == pytest.approx(0.10)
    assert to_text.item() == 0
    assert kept(methods.ToDREStage2(tau=0.11), view) == []
    assert kept(methods.ToDREStage2(tau=0.09), view) == [1, 2]
    assert [methods.ToDREStage2().acts_after(n)[0] for n in (32, 40, 28, 4)] == [28, 35, 24, 2]
    assert methods.ToDREStage2(free=True, layer=2).frees(8) == (0, 1, 2)
    silent = view_of([3, 4], 5, rows)  # no text behind the image: nothing is decided
    assert kept(methods.ToDREStage2(tau=1.0), silent) == [3, 4]


def test_todre_stage_2_sees_text_between_images() -> None:
    rows = causal(5, r3=(0.1, 0.1, 0.7, 0.1), r4=(0.96, 0.01, 0.01, 0.01, 0.01))
    view = view_of([1, 3], 5, rows)  # text 2 and 4 behind image 1; image 3 reads text 2
    to_visual, to_text = methods.ToDREStage2.masses(view)
    assert to_text.item() == pytest.approx(0.7 / 2)
    assert to_visual.item() == pytest.approx((1 / 3 + 0.02) / 2)
    assert kept(methods.ToDREStage2(tau=0.3), view) == [1, 3]
    assert kept(methods.ToDREStage2(tau=0.4), view) == []


def test_must_drop_between_layers() -> None:
    """Head means of two words: 2 and 3 of tokens 1 to 4 are passed over; one of them is a key token."""
    rows = causal(
        7,
        r5=(0.729, 0.10, 0.02, 0.001, 0.05, 0.1),
        r6=(0.648, 0.20, 0.01, 0.002, 0.04, 0.05, 0.05),
    )
    view = view_of([1, 2, 3, 4], 7, rows)
    method = methods.MustDrop(share=0.1, peak=0.03)
    assert kept(method, view) == [1, 4]
    key = torch.zeros(1, 7, dtype=torch.bool).index_fill(1, torch.tensor([0, 3]), True)
    assert kept(method, replace(view, key=key)) == [1, 3, 4]
    assert kept(methods.MustDrop(share=0.1, peak=0.015), view) == [1, 2, 4]
    assert method.frees(32) == tuple(range(2, 15))
    assert methods.MustDrop(free=False).frees(32) == ()


def test_must_drop_windows() -> None:
    """The official example without CLS: similarities 1, 1/3, 0.9, -1/3; two windows merge."""
    token = {
        0: (1, 0), 1: (1, 0), 4: (1, 0), 5: (1, 0), 2: (1, 0), 3: (1, 0), 6: (0, 1), 7: (0, 1),
        8: (1, 0), 9: (1, 0), 12: (1, 0), 13: (0.8, 0.6), 10: (1, 0), 11: (0, 1), 14: (-1, 0), 15: (0, -1),
    }  # fmt: skip
    x = torch.tensor([token[i] for i in range(16)], dtype=torch.float32)[None]
    member = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    similarity = window_similarity(x, member)[0]
    assert similarity.tolist() == pytest.approx([1, 1 / 3, 0.9, -1 / 3], abs=1e-6)
    group = merged_windows(x, (4, 4), 2, 0.8)
    assert group[0].tolist() == [5, 5, 2, 3, 5, 5, 6, 7, 13, 13, 10, 11, 13, 13, 14, 15]
    encoder = GivenEncoder(3, cls_of={2: torch.linspace(0.2, 0.01, 16)[None]}, keys_of={1: x[:, None]})
    method = methods.MustDrop(window=2, key=0.2, inside=False)
    found = method.choose(VisualView(x, encoder, grid=(4, 4)))
    assert found.index.tolist() == [[2, 3, 5, 6, 7, 10, 11, 13, 14, 15]]
    assert found.x is not None
    assert found.key is not None
    assert found.x[0, [2, 7]].flatten().tolist() == pytest.approx([1, 0, 0.95, 0.15])
    assert found.index[found.key].tolist() == [2, 5]  # 5 has the mean of its window
    odd = merged_windows(x[:, :15], (3, 5), 2, -1)[0]
    assert odd.tolist() == [6, 6, 8, 8, 4, 6, 6, 8, 8, 9, 10, 11, 12, 13, 14]
    with pytest.raises(ValueError, match="windows need tokens on a grid"):
        method.choose(VisualView(x, encoder))


def test_aim_importance() -> None:
    """The official formula on one head, and the root of the mean square over two."""
    one = torch.tensor([[0, -9, -9], [0.1, 0, -9], [0, 0.2, 0.1]])
    two = torch.tensor([[0, -9, -9], [0, 0.1, -9], [0, 0, 0.1]])
    attention = attention_of(torch.stack([one, two]).exp())
    alive = torch.ones(1, 3, dtype=torch.bool)
    first = replace(attention, q=attention.q[:, :1], k=attention.k[:, :1])
    found = first.stationary(alive, temperature=0.1, iterations=5)[0]
    assert found.tolist() == pytest.approx([0.994393, 0.005315, 0.000293], abs=2e-6)
    both = attention.stationary(alive, temperature=0.1, iterations=5)[0]
    assert both.tolist() == pytest.approx([0.921794, 0.096153, 0.014961], abs=2e-6)
    spread = first.stationary(alive, temperature=0.1, iterations=5, damping=1.0)[0]
    assert spread.tolist() == pytest.approx([1 / 3] * 3)
    padded = first.stationary(torch.tensor([[False, True, True]]), temperature=0.1, iterations=5)[0]
    assert padded[0] == 0
    assert padded.sum().item() == pytest.approx(1)


def test_aim_schedule() -> None:
    method = methods.AIM()
    assert method.acts_after(28) == tuple(range(14, 22))
    assert [method.share(layer) for layer in (14, 15, 20, 21, 25)] == [0.875, 0.75, 0.125, 0, 0]
    assert methods.AIM(start=13).share(19) == 0.125
    view = view_of([1, 2, 3, 4], 7, LAST, layer=15)
    assert len(kept(method, view)) == 3
    assert kept(method, replace(view, layer=21)) == []


EIGHT = torch.tensor([[1, 0], [0, 1], [0.9, 0.1], [1, 0.1], [0.2, 1], [0.1, 0.9], [0, 1], [1, 0]])


def test_aim_merge() -> None:
    """The official examples; rows in raster order of the odd tokens."""
    plan = AIMMerge.round(EIGHT[None, :4], 1)
    assert plan.merge(EIGHT[None, :4])[0].flatten().tolist() == pytest.approx([1, 0, 0, 1, 0.95, 0.1])
    plan = AIMMerge.round(EIGHT[None], 4)
    expected = [[0, 1], [0.95, 0.1], [0.15, 0.95], [1, 0]]
    torch.testing.assert_close(plan.merge(EIGHT[None])[0], torch.tensor(expected), atol=1e-6, rtol=0)
    view = VisualView(EIGHT[None], GivenEncoder())
    found = AIMMerge(keep=0.75).choose(view)
    assert found.index.tolist() == [[1, 2, 3, 4, 5, 7]]
    assert found.x is not None
    rows = [[0, 1], [0.9, 0.1], [1, 0.1], [0.2, 1], [0.1, 0.9], [1, 0]]
    torch.testing.assert_close(found.x[0], torch.tensor(rows), atol=1e-6, rtol=0)
    quarter = AIMMerge(keep=0.25).choose(VisualView(torch.arange(32.0).view(1, 16, 2), GivenEncoder()))
    assert quarter.index.tolist() == [[3, 7, 11, 15]]
    keyed = AIMMerge(keep=4, metric="keys").choose(random_visual())
    assert keyed.index.shape == (3, 4)
    assert bool((keyed.index.diff(dim=1) > 0).all())


X = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
Y = torch.tensor([[[2.0, 0], [1, 0], [1, 1.2]]])


def test_trans_prune_transition() -> None:
    real = torch.ones(1, 3, dtype=torch.bool)
    found = transition_value(Transition(X, Y), real)[0]
    assert found.tolist() == pytest.approx([0.423514, 0.575615, 0.234856], abs=2e-6)
    turned = transition_value(Transition(X, -Y), real, "abs")[0]
    assert turned.tolist() == pytest.approx(found.tolist(), abs=1e-6)
    weight = torch.tensor([2, 1, 1.9958934]).softmax(0) * torch.tensor([2, 1, 1.104536])
    assert transition_value(Transition(X, -Y), real)[0].tolist() == pytest.approx(weight.tolist(), abs=1e-5)
    less = transition_value(Transition(X, Y), torch.tensor([[True, False, True]]))[0]
    assert less[1] == 0


def test_trans_prune_score() -> None:
    """TTV (.8, .4, .6, .2) and the question's (.05, .2, .1, .15): (.5, .6, .5, .4); ties: the lower token."""
    rows = causal(6, r5=(0.3, 0.05, 0.2, 0.1, 0.15, 0.2))
    still = Transition(torch.ones(1, 6, 2), torch.zeros(1, 6, 2))
    view = view_of([1, 2, 3, 4], 6, rows, layer=6, following=rows, transition=(still, still))
    method = methods.TransPrune(keep=(0.5, 0.25, 0.25))
    view.scratch["change"] = torch.tensor([[0.9, 0.8, 0.4, 0.6, 0.2, 0.7]])
    assert kept(method, view) == [1, 2]
    assert method.acts_after(32) == tuple(range(6, 12))
    assert method.prune(replace(view, layer=7)) is None
    changed = Transition(X.repeat(1, 2, 1), Y.repeat(1, 2, 1))
    fresh = replace(view, scratch={}, transition=(changed, still))
    assert kept(methods.TransPrune(keep=(1, 1, 1), alpha=1.0), fresh) == [1]
    assert kept(methods.TransPrune(keep=(1, 1, 1), alpha=0.0), replace(fresh, scratch={})) == [2]


def test_core_matching() -> None:
    counts = torch.tensor([2, 10, 9, 1, 8, 2, 1, 0])
    assert elbow(counts) == (3, 2.0)
    assert (counts > 2).nonzero()[:, 0].tolist() == [1, 2, 4]
    h = torch.tensor(
        [[0.5, -0.1, 0.2, 0], [0.4, 0.3, -0.2, 0.1], [-0.1, -0.2, 0.6, 0.2], [0.9, -0.3, 0.1, -0.5]]
    )
    assert ((h > 0) & (h[-1] > 0)).sum(1).tolist() == [2, 1, 1, 2]
    a = torch.tensor([[0.9, 0.1, 0.5, -0.2, 0.3], [0.2, 0.8, 0.6, 0.1, -0.3], [0.7, -0.1, 0.4, 0.3, 0.2]])
    assert core_neurons(a, 0.5, 0.4).nonzero()[:, 0].tolist() == [0, 2]
    view = view_of([0, 1, 2], 4, activation=h[None])
    assert kept(methods.CoreMatching(reference=1), view) == [0, 1, 2]  # counts 2, 1, 1: the elbow is a 1
    assert kept(methods.CoreMatching(reference=1, strict=True), view) == [0]
    core = methods.CoreMatching(mode="core", rho=0.5, beta=0.25)
    assert core_neurons(h[3:], 0.5, 0.25).nonzero()[:, 0].tolist() == [0]
    assert kept(core, view) == [0, 1]


def test_core_matching_at_the_elbow() -> None:
    """Eight tokens whose counts are those of the worked example."""
    counts = [2, 10, 9, 1, 8, 2, 1, 0]
    active = torch.tensor([[1.0] * n + [-1.0] * (12 - n) for n in counts] + [[1.0] * 12])
    view = view_of(list(range(8)), 9, activation=active[None])
    assert kept(methods.CoreMatching(reference=1, strict=True), view) == [1, 2, 4]
    assert kept(methods.CoreMatching(reference=1), view) == [0, 1, 2, 4, 5]


def test_probe_and_rollout() -> None:
    rows = causal(6, r4=(0.1, 0.3, 0.2, 0.3, 0.1), r5=(0.1, 0.1, 0.6, 0.1, 0.05, 0.05))
    view = view_of([1, 2, 3], 6, layer=-1, following=rows)
    assert kept(methods.Probe(keep=1), view) == [2]
    seen: list[Tensor] = []

    def least(attention: Tensor) -> Tensor:
        seen.append(attention)
        return -attention

    assert kept(methods.Probe(keep=1, scorer=least), view) == [1]
    assert seen[0].tolist() == pytest.approx([0.2, 0.4, 0.2])
    with pytest.raises(ValueError, match=r"scorer must give one number for each of 3 tokens, got \[2\]"):
        methods.Probe(scorer=lambda a: a[:2]).prune(view)
    with pytest.raises(ValueError, match="no layer before the first one"):
        methods.FastV().prune(view)
    a = torch.tensor([[[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]])
    g = torch.zeros(1, 3, 3)
    g[0, 2] = torch.tensor([1.0, -1, 2])
    assert methods.relevance_rollout([a, a], [g, g])[2].tolist() == pytest.approx([0.6, 0, 4])
    with pytest.raises(ValueError, match="equally many layers, got 2 and 1"):
        methods.relevance_rollout([a, a], [g])
    with pytest.raises(ValueError, match="layer 1 must have two of"):
        methods.relevance_rollout([a, a], [g, g[:, :2]])


def test_sparse_vlm_raters_and_scores() -> None:
    """Two visual tokens; the second of three words matches both, the others neither."""
    x = torch.tensor([[5.0, 5], [1, 0], [0, 1], [-1, 0], [2, 2], [0, -1]])
    rows = causal(6, r3=(0.1, 0.8, 0.05, 0.05), r4=(0.1, 0.2, 0.6, 0.05, 0.05))
    view = view_of([1, 2], 6, rows, embeds=x, x=x, layer=2)
    assert raters(view.embeds, view)[0].nonzero()[:, 0].tolist() == [4]
    assert kept(methods.SparseVLM(keep=(1, 1, 1), recycle=0.0), view) == [2]
    silent = view_of([4, 5], 6, rows, embeds=x, layer=2)
    assert raters(silent.embeds, silent)[0].nonzero()[:, 0].tolist() == [5]


def test_sparse_vlm_rank() -> None:
    """Raters whose rows are multiples of each other have rank 1: half of the 3 tokens above it go."""
    rows = causal(7, r5=(0.2, 0.1, 0.2, 0.1, 0.1, 0.3), r6=(0.4, 0.05, 0.1, 0.05, 0.05, 0.3, 0.05))
    x = torch.zeros(7, 2)
    view = view_of([1, 2, 3, 4], 7, rows, embeds=x, layer=2)
    rating = view.text
    assert methods.SparseVLM(rate=1.0).counts(view, rating) == [1]
    assert methods.SparseVLM(rate=0.5).counts(view, rating) == [3]
    other = causal(7, r5=(0.2, 0.1, 0.2, 0.1, 0.1, 0.3), r6=(0.4, 0.1, 0.05, 0.05, 0.05, 0.3, 0.05))
    assert methods.SparseVLM(rate=1.0).counts(view_of([1, 2, 3, 4], 7, other), rating) == [2]


def test_sparse_vlm_recycles() -> None:
    """Of 5 deleted tokens the floor(0.8 * 5) + 1 = 5 best form one cluster, which stands at its center."""
    x = torch.tensor([[0.0, 0], [9, 9], [1, 0], [2, 0], [3, 0], [4, 0], [40, 0], [0, 0]])
    rows = causal(8, r7=(0.1, 0.5, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04))
    view = view_of([1, 2, 3, 4, 5, 6], 8, rows, x=x, layer=2)
    found = methods.SparseVLM(keep=(1, 1, 1), recycle=0.8).prune(view)
    assert found.x is not None
    stays = found.keep[0].nonzero()[:, 0].tolist()
    assert stays == [1, 2]  # all are equally dense with one neighbour, themselves: the lowest is the center
    assert found.x[0, 2].tolist() == [10.0, 0.0]
    assert found.x[0, 1].tolist() == [9.0, 9.0]


def test_density_peaks() -> None:
    """Two heaps: the middle of each is its peak."""
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.5]])
    center, target = density_peaks(x, 2, 3)
    assert sorted(center.tolist()) == [1, 4]
    ranks = target.tolist()
    assert ranks[:3] == [ranks[1]] * 3
    assert ranks[3:] == [ranks[4]] * 3
    one, all_in = density_peaks(x[:1], 3)
    assert one.tolist() == [0]
    assert all_in.tolist() == [0]


@pytest.mark.parametrize("method", DECODER_METHODS, ids=str)
def test_batches(method: Any, backend: Backend) -> None:
    """Sequences of a batch, one without an image, decide as they would alone; text is never named."""
    with backend.active():
        view = random_view(layer=-1 if isinstance(method, methods.Probe) else 0)
        found = method.prune(view)
        again = method.prune(replace(view, scratch={}))
        assert torch.equal(found.keep, again.keep)
        assert not bool((found.keep & ~view.visual).any())
        assert bool((found.keep.sum(1)[:2] < view.visual.sum(1)[:2]).any()) or isinstance(
            method, methods.ToDREStage2
        )
        for row in range(3):
            single = method.prune(alone(view, row))
            assert torch.equal(single.keep[0], found.keep[row])
            if found.x is not None:
                torch.testing.assert_close(single.x[0], found.x[row])


def test_errors() -> None:
    for method in (methods.FastV, methods.VScanStage2, methods.Probe):
        for keep in (0.0, 1.5, 0):
            with pytest.raises(ValueError, match=rf"{method.__name__}: keep must be a ratio in \(0, 1\]"):
                method(keep=keep)
    for cls in (methods.PyramidDrop, methods.TransPrune, methods.SparseVLM):
        with pytest.raises(ValueError, match=rf"{cls.__name__}: keep must be a ratio in \(0, 1\]"):
            cls(keep=(0.5, 0.0, 0.1))
        with pytest.raises(ValueError, match=rf"{cls.__name__}: keep must be .* that never grow"):
            cls(keep=(0.5, 0.6, 0.1))
        with pytest.raises(ValueError, match=rf"{cls.__name__}: keep must have one entry for each"):
            cls(keep=(0.5, 0.4), layers=(9, 10, 11))
    out_of_range = (
        methods.FastV(layer=0), methods.PyramidDrop(layers=(8, 16, 32)), methods.ToDREStage2(layer=31),
        methods.VScanStage2(layer=-1), methods.SparseVLM(layers=(2, 15, 6)), methods.AIM(start=31),
        methods.MustDrop(layers=(2, 2)), methods.TransPrune(layers=(7, 9, 40)),
        methods.CoreMatching(layers=(31,)), methods.CoreMatching(layers=()), methods.MustDrop(layers=()),
    )  # fmt: skip
    for bad in out_of_range:
        with pytest.raises(ValueError, match=rf"{type(bad).__name__}: .* must be .*in \[\d, \d+[\])]"):
            bad.acts_after(32)
    with pytest.raises(ValueError, match=r"ToDRE: tau must be in \[0, 1\], got 2"):
        methods.ToDREStage2(tau=2)
    with pytest.raises(ValueError, match=r"TransPrune: since must be in \[0, 7\), got 7"):
        methods.TransPrune(since=7)
    with pytest.raises(ValueError, match="CoreMatching: mode must be token or core"):
        methods.CoreMatching(mode="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MustDrop: window must be >= 2, got 1"):
        methods.MustDrop(window=1)
    view = view_of([0, 1], 3, causal(3))
    for blind in (methods.TransPrune(), methods.CoreMatching()):
        with pytest.raises(ValueError, match="the view must have"):
            blind.prune(view)
    with pytest.raises(ValueError, match="there is no next layer to look at"):
        view.next()


def test_nan_scores_come_last() -> None:
    view = view_of([1, 2, 3, 4], 7, LAST)
    score = torch.tensor([[9.0, float("nan"), -torch.inf, 1, 2, 9, 9]])
    assert decoder.best(view, score, [2])[0].nonzero()[:, 0].tolist() == [3, 4]
    assert decoder.best(view, score, [3])[0].nonzero()[:, 0].tolist() == [1, 3, 4]
    assert not bool(decoder.best(view, score, [0]).any())
