"""Methods on visual tokens: worked examples of papers and codes, budgets, several crops, bad knobs."""

from typing import Any

import pytest
import torch
from tokencomp import methods
from tokencomp.methods import cdpruner, globalcom2, hiprune, quota, scope, vispruner, vscan, zoo_prune
from tokencomp.methods.visual import VisualKeep, VisualMethod, VisualView, merged_into
from tokencomp.visual_attention import SeenEncoder
from torch import Tensor
from visual_views import SIX, VISUAL_METHODS, GivenEncoder, random_view, six


def view_of(score: dict[str, dict[int, Tensor]], tokens: int, **options: Any) -> VisualView:
    encoder = GivenEncoder(**score, **options.pop("encoder", {}))  # type: ignore[arg-type]
    return VisualView(torch.arange(tokens * 2.0).view(1, tokens, 2), encoder, **options)


# --- examples --------------------------------------------------------------------------------------------


def test_fastervlm_takes_the_lower_of_equals() -> None:
    view = view_of({"cls_of": {0: torch.tensor([[0.20, 0.25, 0.20, 0.15]])}}, 4)
    assert methods.FasterVLM(keep=2).choose(view).index.tolist() == [[0, 1]]


def test_vtc_cls_sums_layers_but_the_last() -> None:
    rows = {0: torch.tensor([[0.5, 0.3, 0.2]]), 1: torch.tensor([[0.1, 0.6, 0.3]])}
    view = view_of({"cls_of": rows}, 3, encoder={"layers": 3})
    assert methods.VTCCLS(keep=2).looks_at(24) == tuple(range(16, 23))
    assert methods.VTCCLS(keep=2).choose(view).index.tolist() == [[0, 1]]
    assert methods.VTCCLS(keep=1, combine="min").choose(view).index.tolist() == [[1]]
    assert methods.VTCCLS(keep=1, combine="max").choose(view).index.tolist() == [[1]]


def test_fopru_ranks_tokens_or_rows() -> None:
    score = torch.tensor([[1.0, 1, 1, 5, 0, 0, 2, 2, 2]])
    view = view_of({"columns_of": {0: score}}, 9, grid=(3, 3))
    assert methods.FoPru(keep=1 / 3).choose(view).index.tolist() == [[3, 6, 7]]
    assert methods.FoPru(keep=1 / 3, strategy="row").choose(view).index.tolist() == [[6, 7, 8]]


def test_hiprune_anchors_neighbours_and_registers() -> None:
    middle = torch.zeros(1, 16)
    middle[0, 3], middle[0, 9] = 0.9, 0.8
    deep = torch.linspace(0.16, 0.01, 16)[None]
    kept = hiprune.select(middle, deep, (4, 4), 12, 0.8)
    assert kept.tolist() == [sorted([0, 2, 3, 4, 5, 7, 8, 9, 10, 13, 1, 6])]
    assert methods.HiPrune().looks_at(24) == (8, 22)


def test_globalcom2_budgets_of_tiles() -> None:
    over = torch.arange(16.0).view(4, 4)
    shares = globalcom2.tile_shares(over, (2, 2), 0.25, 10.0)
    assert shares == pytest.approx([0.19054, 0.19426, 0.26197, 0.35324], abs=1e-5)
    spread = globalcom2.spread_over_tiles(over, (2, 2))
    assert spread[0, :8].tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.0, 1.25, 1.75, 2.25])


def test_globalcom2_tokens_of_tiles() -> None:
    over = torch.arange(16.0)[None]
    tiles = torch.zeros(4, 16)
    tiles[:, 5] = 100.0  # each tile's own best
    encoder = GivenEncoder(logits_of={1: torch.cat([over, tiles])})
    view = VisualView(torch.randn(5, 16, 3), encoder, (4, 4), images=[5], overview=True, tiles=[(2, 2)])
    kept = methods.GlobalCom2(keep=0.25).choose(view).index
    assert kept[0].tolist()[:4] == [12, 13, 14, 15]
    assert [(row >= 0).sum().item() for row in kept] == [4, 3, 3, 4, 5]
    assert all(5 in row.tolist() for row in kept[1:])


def test_visionzip_contextual_tokens_take_in_the_mean_of_their_members() -> None:
    key = torch.tensor([[[1.0, 0], [0, 1], [1, 0.1], [0.1, 1], [0, 1.1], [1, 0]]])[:, None]
    view = view_of(
        {"cls_of": {0: torch.tensor([[9.0, 1, 1, 1, 1, 1]])}, "keys_of": {0: key.expand(-1, 2, -1, -1)}}, 6
    )
    keep = methods.VisionZip(keep=3, contextual=2 / 3).choose(view)
    # token 0 is dominant; of 1..5 the targets are 1 and 3 (step 2); 4 is like 1, 2 and 5 are like 3
    assert keep.index.tolist() == [[0, 1, 3]]
    x = view.x[0]
    assert keep.x is not None
    assert torch.equal(keep.x[0], torch.stack([x[0], x[1] + x[4], x[3] + (x[2] + x[5]) / 2]))


def test_sensitivity_to_all_directions_is_the_norm_of_the_derivative() -> None:
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 8)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        found = zoo_prune.exact_sensitivity(projector, x)
    derivative = torch.func.vmap(torch.func.vmap(torch.func.jacrev(projector)))(x)
    torch.testing.assert_close(found, derivative.flatten(2).norm(dim=2) / 6**0.5)
    with torch.no_grad():
        projector[2].weight.mul_(2)
    torch.testing.assert_close(zoo_prune.exact_sensitivity(projector, x), 2 * found)
    view = random_view()
    view.encoder.feature, view.encoder.projector = torch.randn(3, 36, 6), projector.float()
    exact = methods.ZOOPrune(directions=None).sensitivity(view)
    sampled = methods.ZOOPrune(directions=4000).sensitivity(view)
    assert torch.corrcoef(torch.stack([exact.flatten(), sampled.flatten()]))[0, 1] > 0.98
    view.encoder.projector = torch.nn.Sequential(torch.nn.LayerNorm(6), projector)
    with pytest.raises(
        ValueError, match=r"directions=None needs .* one of \['LayerNorm', 'Linear', 'GELU', 'Lin"
    ):
        methods.ZOOPrune(directions=None).sensitivity(view)


def test_projects_in_the_dtype_of_the_features_and_past_hooks() -> None:
    """Steps of 0.01 are lost in bfloat16."""
    projector = torch.nn.Sequential(
        torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 8)
    ).bfloat16()
    calls: list[int] = []
    projector.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 5, 6)
    found = SeenEncoder(1, 0, projector, {}, None).project(x)
    assert not calls
    assert projector[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(found, projector.float()(x))


def test_greedy_examples_on_six_tokens() -> None:
    weight = torch.tensor([[3.0, 1, 2, 5, 4, 0.5]])
    assert zoo_prune.weighted_picks(SIX, weight, 4).tolist() == [[3, 0, 4, 2]]
    relevance = torch.tensor([[1.0, 0.2, 0.5, 0.9, 0.8, 0.3]])
    assert cdpruner.dpp_picks(SIX, relevance, 2).tolist() == [[0, 3]]
    saliency = torch.tensor([[0.3, 0.1, 0.1, 0.2, 0.2, 0.1]])
    assert scope.coverage_picks(SIX, saliency, 4).tolist() == [[0, 4, 5, 3]]
    assert methods.DivPrune(keep=4).picks(SIX).tolist() == [[5, 2, 4, 3]]
    assert methods.DivPrune(keep=4).choose(six()).index.tolist() == [[2, 3, 4, 5]]
    view = six(encoder={"cls_of": {1: torch.tensor([[0.1, 0.9, 0, 0, 0, 0]])}})
    assert methods.ToDRE(keep=4).choose(view).index.tolist() == [[0, 1, 3, 5]]


def test_dpp_is_that_of_the_kernel_matrix() -> None:
    x, weight = torch.randn(2, 20, 5, dtype=torch.float64), torch.rand(2, 20, dtype=torch.float64)
    unit = torch.nn.functional.normalize(x, dim=-1)
    kernel = weight[..., None] * (unit @ unit.mT) * weight[:, None]
    picks = cdpruner.dpp_picks(x.float(), weight.float(), 5)
    for b in range(2):
        kept: list[int] = []
        for _ in range(5):
            rest = [j for j in range(20) if j not in kept]
            gains = [torch.linalg.slogdet(kernel[b][[*kept, j]][:, [*kept, j]])[1] for j in rest]
            kept.append(rest[int(torch.stack(gains).argmax())])
        assert picks[b].tolist() == kept


def test_vscan_merges_into_the_most_similar() -> None:
    index = torch.tensor([[0, 3, 5]], dtype=torch.int32)
    rows = vscan.into_nearest(SIX, index)[0]
    expected = torch.tensor([[1.2920, 0.2566], [-0.3214, 1.8830], [-0.4698, -0.1710]])
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=0)


def test_vscan_takes_from_every_window() -> None:
    score = torch.arange(36.0)[None]
    local = vscan.window_best(score, (6, 6), 2, 2)
    assert local.nonzero()[:, 1].tolist() == [13, 14, 16, 17, 31, 32, 34, 35]


def test_slime_keeps_a_share_and_one_more() -> None:
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 1], [-1, 0]]])
    text = torch.tensor([[[1.0, 0], [1, 1], [7, 7]]])
    mask = torch.tensor([[True, True, False]])
    view = VisualView(x, GivenEncoder(), text=text, text_mask=mask)
    assert methods.SliME(p=0.5).choose(view).index.tolist() == [[0, 2]]
    assert methods.SliME(p=0.95).choose(view).index.tolist() == [[0, 1, 2]]


def test_tcc_keeps_as_many_as_are_not_redundant() -> None:
    angle = torch.tensor([0.0, 1, 2, 90]).deg2rad()
    key = torch.stack([angle.cos(), angle.sin()], 1)[None, None]
    cls = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    view = view_of({"cls_of": {0: cls, 1: cls}, "keys_of": {1: key}}, 4)
    keep = methods.TCC(similar=0.99, count=0.5, shallow=0, deep=1).choose(view)
    assert keep.index.tolist() == [[1]]
    assert keep.x is not None
    torch.testing.assert_close(keep.x[0, 0], view.x[0].mean(0))  # all others are most like it


def test_atp_grid_first_then_scores() -> None:
    view = view_of({"cls_of": {0: torch.arange(16.0)[None]}}, 16, grid=(4, 4))
    method = methods.ATP(methods.FasterVLM(), keep=6, rate=0.25)
    assert method.choose(view).index.tolist() == [[0, 2, 8, 10, 14, 15]]


def test_quota_shares_and_maps() -> None:
    score = torch.tensor([0.9, 0.5, 0.1])
    weight = quota.frame_weights(score, 1.0)
    assert weight.tolist() == pytest.approx([0.757009, 0.233645, 0.009346], abs=1e-6)
    shapes = {n: quota.map_shape(n, (32, 32)) for n in (0, 1, 2, 3, 5, 6, 8, 23, 75, 196, 1000)}
    assert shapes == {
        0: (0, 0), 1: (1, 1), 2: (2, 1), 3: (2, 1), 5: (2, 2), 6: (3, 2), 8: (3, 2), 23: (5, 4), 75: (9, 8),
        196: (14, 14), 1000: (32, 31),
    }  # fmt: skip
    capped = quota.frame_weights(torch.tensor([3.0, 1.0, 1.0]), 0.5)
    assert capped.tolist() == pytest.approx([0.5, 0.25, 0.25])


def test_quota_pools_and_drops_frames() -> None:
    view = random_view(crops=3, side=6, images=[3])
    method = methods.QuoTA(lambda view: torch.tensor([0.0, 1.0, 1.0]), keep=1 / 3)
    keep = method.choose(view)
    assert [(row >= 0).sum().item() for row in keep.index] == [0, 16, 16]
    assert keep.x is not None
    full = methods.QuoTA(lambda view: torch.ones(3), keep=1.0).choose(view)
    assert torch.equal(full.index, torch.arange(36, dtype=torch.int32).expand(3, -1))
    assert full.x is not None
    torch.testing.assert_close(full.x, view.x)


def test_vispruner_mirrors_the_list() -> None:
    # order 0..5 by attention; even places 0, 2, 4 against odd 1, 3, 5
    angle = torch.tensor([0.0, 5, 60, 120, 119, 200]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)[None]
    order = torch.arange(6)[None]
    assert vispruner.diverse_of(x, order, 5, 1).tolist() == [[0, 2, 1, 3, 5]]  # 4 is most like 3
    assert vispruner.diverse_of(x, order, 4, 8).tolist() == [[2, 1, 3, 5]]
    assert vispruner.diverse_of(x, order, 6, 8).tolist() == [list(range(6))]
    assert vispruner.diverse_of(x, order[:, :1], 1, 8).tolist() == [[0]]


def test_prumerge_places_the_merged_rest_at_the_last_dropped() -> None:
    view = random_view(crops=2, side=5)
    keep = methods.PruMerge(neighbours=0).choose(view)
    key, (query, own) = view.encoder.keys(3), view.encoder.cls_query(3)
    flat = torch.cat([own, key], 2).transpose(1, 2).flatten(2)
    score = ((query.flatten(1)[:, None] @ flat.mT)[:, 0] / flat.shape[2] ** 0.5).softmax(1)[:, 1:]
    assert keep.x is not None
    for b in range(2):
        index = keep.index[b][keep.index[b] >= 0].tolist()
        picks = sorted(p for p in methods.PruMerge().picks(score)[b].tolist() if p >= 0)
        dropped = [j for j in range(25) if j not in picks]
        assert index == sorted([*picks, dropped[-1]])
        rest = sum(score[b, j] * view.x[b, j] for j in dropped)
        torch.testing.assert_close(keep.x[b, index.index(dropped[-1])], rest)
        torch.testing.assert_close(keep.x[b, index.index(picks[0])], view.x[b, picks[0]])


def test_merged_into_counts_the_token_itself() -> None:
    x = torch.tensor([[[1.0], [3.0], [8.0]]])
    index = torch.tensor([[0, 2, -1]], dtype=torch.int32)
    y = merged_into(x, index, torch.tensor([[9, 0, 9]]), torch.tensor([[False, True, False]]))
    assert y[0, :2, 0].tolist() == [2.0, 8.0]


# --- what holds of all -----------------------------------------------------------------------------------


def names(method: Any) -> str:
    return type(method).__name__


def view_for(method: Any, **options: Any) -> VisualView:
    view = random_view(**options)
    view.text = torch.randn(len(view.counts), 3, 8, generator=torch.Generator().manual_seed(1))
    return view


@pytest.mark.parametrize("method", VISUAL_METHODS, ids=names)
@pytest.mark.parametrize("has_cls", [True, False])
def test_contract(method: Any, has_cls: bool) -> None:
    """Ascending distinct tokens of each crop, then -1; the same again; nothing written to."""
    assert isinstance(method, VisualMethod)
    view = view_for(method, has_cls=has_cls)
    before = view.x.clone()
    keep = method.choose(view)
    assert isinstance(keep, VisualKeep)
    assert keep.index.dtype == torch.int32
    assert keep.index.shape[0] == 3
    for row in keep.index.tolist():
        real = [token for token in row if token >= 0]
        assert real == sorted(set(real))
        assert all(token < 36 for token in real)
        assert row[len(real) :] == [-1] * (len(row) - len(real))
    if keep.x is not None:
        assert keep.x.shape == (*keep.index.shape, 8)
        assert keep.x.dtype == view.x.dtype
    again = method.choose(view_for(method, has_cls=has_cls))
    assert torch.equal(again.index, keep.index)
    assert torch.equal(view.x, before)


@pytest.mark.parametrize("method", VISUAL_METHODS, ids=names)
def test_an_image_does_not_see_the_others(method: Any) -> None:
    if isinstance(method, methods.RandomVisual | methods.QuoTA):
        pytest.skip("the draw of an item and the scores of this test go by its place")
    both = view_for(method, crops=3, images=[1, 1, 1])
    keep = method.choose(both)
    for crop in range(3):
        one = view_for(method, crops=3)
        alone = VisualView(
            one.x[crop : crop + 1], _narrow(one.encoder, crop), one.grid, text=both.text[crop : crop + 1]
        )  # type: ignore[index]
        index = method.choose(alone).index[0]
        assert [t for t in index.tolist() if t >= 0] == [t for t in keep.index[crop].tolist() if t >= 0]


def _narrow(encoder: Any, crop: int) -> GivenEncoder:
    def cut(values: dict[int, Any]) -> dict[int, Any]:
        return {
            layer: tuple(t[crop : crop + 1] for t in v) if isinstance(v, tuple) else v[crop : crop + 1]
            for layer, v in values.items()
        }

    parts = {
        name: cut(getattr(encoder, name))
        for name in ("cls_of", "logits_of", "columns_of", "keys_of", "query_of")
    }
    feature = encoder.feature[crop : crop + 1]
    return GivenEncoder(
        encoder.layers, encoder.has_cls, feature=feature, projector=encoder.projector, **parts
    )


def test_joint_methods_share_the_budget_of_an_image() -> None:
    view = random_view(crops=3, images=[2, 1])
    kept = methods.DivPrune(keep=0.25).choose(view).index
    assert ((kept >= 0).sum(1)[:2].sum(), (kept >= 0).sum(1)[2]) == (18, 9)
    over = random_view(crops=3, images=[3], overview=True)
    pivot = int(over.encoder.cls(3)[0].argmax())
    assert pivot in methods.ToDRE(keep=3).choose(over).index[0].tolist()


BAD: list[tuple[Any, str]] = [
    (lambda: methods.FasterVLM(keep=0.0), "FasterVLM: keep must be a ratio"),
    (lambda: methods.FasterVLM(layer=9).choose(random_view()), r"FasterVLM: layer must be in \[-4, 4\)"),
    (lambda: methods.VTCCLS(last=0), "VTCCLS: last must be >= 1"),
    (lambda: methods.VTCCLS(combine="mean"), "VTCCLS: combine must be"),  # type: ignore[arg-type]
    (lambda: methods.FoPru(strategy="x"), "FoPru: strategy must be"),  # type: ignore[arg-type]
    (lambda: methods.HiPrune(alpha=2.0), "HiPrune: alpha must be in"),
    (lambda: methods.HiPrune(middle=0), "HiPrune: middle must be a layer"),
    (lambda: methods.GlobalCom2(keep=3), "GlobalCom2: keep must be a ratio"),
    (lambda: methods.GlobalCom2(temperature=0.0), "GlobalCom2: temperature must be > 0"),
    (lambda: methods.VisionZip(contextual=2.0), "VisionZip: contextual must be in"),
    (lambda: methods.VisPruner(at_once=0), "VisPruner: at_once must be >= 1"),
    (lambda: methods.Scope(alpha=-1.0), "Scope: alpha must be >= 0"),
    (lambda: methods.VScan(windows=0), "VScan: windows must be >= 1"),
    (lambda: methods.SliME(p=0.0), "SliME: p must be in"),
    (lambda: methods.SliME().choose(random_view()), "SliME: the prompt must have text"),
    (lambda: methods.ZOOPrune(step=0.0), "ZOOPrune: directions must be >= 1 and step > 0"),
    (lambda: methods.TCC(2.0, 0.5, 0, 1), "TCC: similar must be in"),
    (lambda: methods.ATP(3), "ATP: method must have score"),
    (lambda: methods.QuoTA(lambda v: -torch.ones(3)).choose(random_view()), "one number >= 0 for each of 3"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_knobs(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "method", [m for m in VISUAL_METHODS if type(m).__name__ in ("FoPru", "HiPrune", "VScan", "ATP", "QuoTA")]
)
def test_grids_are_asked_for(method: Any) -> None:
    view = view_for(method)
    view.grid = None
    if isinstance(method, methods.FoPru):
        method = methods.FoPru(strategy="row")
    with pytest.raises(ValueError, match="grid"):
        method.choose(view)
