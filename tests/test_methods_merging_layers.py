"""What every merging method must keep as a step between attention and MLP, whatever it decides to merge."""

from dataclasses import replace
from typing import Any, get_args

import hypothesis
import pytest
import torch
from hypothesis import given
from merging import LAYER_CASES, needs_cls, permuted, random_view
from tokencomp import ops, token_map
from tokencomp.methods import (
    ALGM,
    MCTF,
    DiffRate,
    LayerMethod,
    LayerView,
    LocalMerge,
    PiToMe,
    Reduced,
    ToFu,
    ToMe,
    attention,
    matching,
)
from tokencomp.methods.pitome import Flavour
from torch import Tensor

NAMES = list(LAYER_CASES)
PREFIXES = (0, 1, 2, 5)
SIZED = [name for name in NAMES if not name.startswith(("tofu", "diffrate")) and name != "pitome tokens"]


def reduce(name: str, view: LayerView) -> Reduced:
    """The step of one case; an own map that leaves all tokens where the method leaves the layer alone."""
    out = LAYER_CASES[name].reduce(view)
    if out is None:
        return Reduced(view.x, view.size, token_map.identity(*view.x.shape[:2]))
    return out


@pytest.fixture(params=[(name, p) for name in NAMES for p in PREFIXES if p or not needs_cls(name)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_follows_the_protocol(name: str) -> None:
    method = LAYER_CASES[name]
    assert isinstance(method, LayerMethod)
    assert isinstance(method.proportional, bool)
    state: dict[str, Any] = {}
    view = random_view(1)
    method.begin(view.x, 1, view.grid, state)
    assert state == {}


@pytest.mark.parametrize("masked", [False, True])
def test_map_and_shapes(case: tuple[str, int], masked: bool) -> None:
    name, prefix = case
    view = random_view(prefix, masked=masked, dtype=torch.bfloat16)
    before = view.x.clone()
    out = reduce(name, view)
    tokens = out.x.shape[1]
    assert masked or tokens < view.tokens
    assert out.x.dtype == torch.bfloat16
    assert torch.equal(view.x, before)
    assert out.token_map.dtype == torch.int32
    assert out.token_map.shape == (3, view.tokens)
    for rows in out.token_map.tolist():
        assert {row for row in rows if row >= 0} == set(range(tokens)), "every row stands for a token"
    if out.size is not None:
        assert out.size.shape == (3, tokens)
        assert out.size.dtype == torch.float32
        assert bool((out.size > 0).all()), "its logarithm is the attention bias"
    assert bool(out.x.isfinite().all())


@pytest.mark.parametrize("masked", [False, True])
def test_prefix_stays(case: tuple[str, int], masked: bool) -> None:
    """Nothing is merged into prefix tokens, they are in front, and their values are the same bits."""
    name, prefix = case
    view = random_view(prefix, masked=masked)
    out = reduce(name, view)
    assert out.token_map[:, :prefix].tolist() == [list(range(prefix))] * 3
    assert not bool(((out.token_map[:, prefix:] >= 0) & (out.token_map[:, prefix:] < prefix)).any())
    assert torch.equal(out.x[:, :prefix], view.x[:, :prefix])
    if out.size is not None:
        assert bool((out.size[:, :prefix] == 1).all())


def test_padding_is_never_merged(case: tuple[str, int]) -> None:
    """A row with padding holds nothing else; valid tokens are dropped by pruning methods only."""
    name, prefix = case
    view = random_view(prefix, batch=4, masked=True)
    out = reduce(name, view)
    assert view.mask is not None
    for item in range(4):
        kept = [
            (row, bool(ok)) for row, ok in zip(out.token_map[item].tolist(), view.mask[item], strict=True)
        ]
        padding = [row for row, ok in kept if row >= 0 and not ok]
        valid = {row for row, ok in kept if row >= 0 and ok}
        assert len(set(padding)) == len(padding)
        assert not valid & set(padding)
        if not name.startswith("diffrate"):
            assert all(row >= 0 for row, ok in kept if ok)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_a_convolution(name: str) -> None:
    """``[B, C, rows, columns]`` flattened: channels are not contiguous, nor are the keys of a head."""
    view = random_view(1)
    strided = replace(
        view,
        x=view.x.mT.contiguous().mT,
        q=view.q.transpose(1, 2).contiguous().transpose(1, 2),
        k=view.k.mT.contiguous().mT,
    )
    out, other = reduce(name, view), reduce(name, strided)
    assert not strided.x.is_contiguous()
    assert torch.equal(out.token_map, other.token_map)
    torch.testing.assert_close(out.x, other.x)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["tome", "pitome plain", "diffrate", "mctf", "algm global counts"])
def test_compiles_without_graph_breaks(name: str, masked: bool) -> None:
    """ALGM without counts alone learns the number of tokens from the data."""
    view = random_view(1, masked=masked)

    def step(x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        out = LAYER_CASES[name].reduce(replace(view, x=x, k=k))
        return out.x, out.token_map

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(view.x, view.k), step(view.x, view.k), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("tome", "pitome", "tofu"))])
def test_one_operator_does_what_the_plan_says(name: str) -> None:
    """``reduce`` matches, maps and merges in one call; ``plan`` shows what is merged."""
    method = LAYER_CASES[name]
    view = replace(random_view(1), size=torch.rand(3, random_view(1).tokens) + 0.5)
    metric = view.features(getattr(method, "metric", "keys"))
    plan = method.plan(metric, prefix=view.prefix, layer=view.layer, layers=view.layers)
    out = method.reduce(view)
    assert torch.equal(out.token_map, plan.token_map)
    if isinstance(method, ToFu):
        assert torch.equal(out.x, method.apply(view.x, plan, layer=view.layer, layers=view.layers))
    elif getattr(method, "weighted", True):
        y, size = matching.merge(view.x, plan, size=view.size)
        assert torch.equal(out.x, y)
        assert torch.equal(out.size, size)
    else:
        assert torch.equal(out.x, plan.merge(view.x))
        assert out.size is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "tofu mlerp"])
def test_gradients_reach_the_tokens(name: str) -> None:
    """Through averages and copies; what is merged where, sizes and attention are constants."""
    view = random_view(1)
    leaves = [t.clone().requires_grad_() for t in (view.x, view.q, view.k)]
    out = reduce(name, replace(view, x=leaves[0], q=leaves[1], k=leaves[2]))
    assert out.size is None or not out.size.requires_grad
    weight = torch.randn_like(out.x)
    (out.x * weight).sum().backward()
    grad = leaves[0].grad
    assert grad is not None
    step = 1e-2 * torch.randn_like(view.x)
    moved = apply_again(name, view, out, view.x + step) - apply_again(name, view, out, view.x)
    torch.testing.assert_close((grad * step).sum(), (moved * weight).sum(), atol=1e-4, rtol=1e-3)
    assert leaves[1].grad is None
    assert leaves[2].grad is None


def apply_again(name: str, view: LayerView, out: Reduced, x: Tensor) -> Tensor:
    """Other tokens by the map and weights of ``out``; all methods are linear in them."""
    weight = torch.ones(x.shape[:2])
    if name.startswith("mctf"):
        weight = attention.of(view).columns().mean(1)
    if name == "tofu drop":
        weight[:, 1::2] += 1
        return ops.merge_tokens(x, out.token_map, out.x.shape[1], weight=weight, mode="drop")[0]
    return ops.merge_tokens(x, out.token_map, out.x.shape[1], weight=weight)[0]


def test_unread_tokens_keep_their_values() -> None:
    """Weights of 0, which MCTF's would be for padding, make an average of nothing."""
    view = random_view(1, masked=True)
    for name in NAMES:
        if not name.startswith("tofu"):
            out = reduce(name, view)
            alone = (out.token_map[:, :, None] == out.token_map[:, None, :]).sum(dim=2) == 1
            alone &= out.token_map >= 0
            back = token_map.unmerge(out.x, out.token_map)
            torch.testing.assert_close(back[alone], view.x[alone])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("algm")])
@pytest.mark.parametrize("prefix", [1, 2])
def test_padding_has_no_influence(name: str, prefix: int) -> None:
    """What padding holds does not matter, not even to the last bit."""
    view = random_view(prefix, masked=True)
    assert view.mask is not None
    noise = torch.where(view.mask[:, :, None], view.x, 100 * torch.randn_like(view.x))
    keys = torch.where(view.mask[:, None, :, None], view.k, 100 * torch.randn_like(view.k))
    out, other = reduce(name, view), reduce(name, replace(view, x=noise, k=keys))
    valid = torch.where(view.mask, out.token_map, -1)
    assert torch.equal(valid, torch.where(view.mask, other.token_map, -1))
    before, after = (token_map.unmerge(y, valid) for y in (out.x, other.x))
    assert torch.equal(before, after)


def test_mask_of_valid_tokens_changes_nothing(case: tuple[str, int]) -> None:
    """The way without a mask and the way with one agree: same map, same order of rows."""
    name, prefix = case
    view = random_view(prefix)
    out, other = (
        reduce(name, view),
        reduce(name, replace(view, mask=torch.ones(3, view.tokens, dtype=torch.bool))),
    )
    assert torch.equal(out.token_map, other.token_map)
    torch.testing.assert_close(out.x, other.x)


def test_items_do_not_see_each_other(case: tuple[str, int]) -> None:
    name, prefix = case
    view, order = random_view(prefix, batch=4), torch.tensor([2, 0, 3, 1])
    out, other = reduce(name, view), reduce(name, permuted(view, order))
    assert torch.equal(out.token_map[order], other.token_map)
    torch.testing.assert_close(out.x[order], other.x)
    if out.size is not None and other.size is not None:
        torch.testing.assert_close(out.size[order], other.size)


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_sizes_count_tokens(name: str, prefix: int) -> None:
    """Sizes given are added up; averages are weighted by them (MCTF: and by attention)."""
    size = torch.randint(1, 6, (3, prefix + 30)).float()
    view = replace(random_view(prefix), size=size)
    out = reduce(name, view)
    assert out.size is not None
    torch.testing.assert_close(out.size, token_map.group_sizes(out.token_map, out.x.shape[1], size))
    assert out.size.sum(1).tolist() == size.sum(1).tolist()
    if not name.startswith("mctf"):
        torch.testing.assert_close((out.x * out.size[..., None]).sum(1), (view.x * size[..., None]).sum(1))


# Not among them: DiffRate and PiToMe's text flavour, which never merge tokens of one rank.
LOSSLESS = [
    ToMe(r=8),
    PiToMe(keep=0.5),
    PiToMe(keep=0.5, flavour="bsm"),
    PiToMe(keep=0.5, metric="tokens", weighted=False, proportional=False),
    ToFu(r=8),
    ToFu(r=8, early=0.0),
    MCTF(r=8),
    LocalMerge(r=8, band=1),
]


@pytest.mark.parametrize("method", LOSSLESS, ids=str)
def test_equal_neighbours_merge_without_loss(method: Any) -> None:
    """CLS and 8 pairs of equal tokens, half of the 16 to merge: each goes into its twin."""
    twin = torch.tensor([0, *(t for pair in range(8) for t in (1 + 2 * pair,) * 2)])
    out = method.reduce(repeated(random_view(1, grid=(4, 4)), twin))
    assert out.token_map.shape[1] - out.x.shape[1] == 8
    groups = [[rows.index(row) for row in rows] for rows in out.token_map.tolist()]
    assert groups == [twin.tolist()] * 3


def test_equal_windows_merge_without_loss() -> None:
    """4 x 4 patches in 2 x 2 blocks of equal ones become one token each."""
    block = torch.tensor([0, 1, 1, 3, 3, 1, 1, 3, 3, 9, 9, 11, 11, 9, 9, 11, 11])
    out = ALGM(local_layer=1).reduce(repeated(random_view(1, grid=(4, 4)), block))
    assert out is not None
    groups = [[rows.index(row) for row in rows] for rows in out.token_map.tolist()]
    assert groups == [block.tolist()] * 3


def repeated(view: LayerView, of: Tensor) -> LayerView:
    """Token i made a copy of token ``of[i]``."""
    return replace(view, x=view.x[:, of], q=view.q[:, :, of], k=view.k[:, :, of])


PLANS = [
    *(ToMe(r=r) for r in (1, 4, 99)),
    *(LocalMerge(r=r, band=band) for r in (2, 99) for band in (1, 3)),
    *(PiToMe(keep=keep, flavour=f, margin=0.5) for keep in (0.5, 0.8) for f in get_args(Flavour)),
    *(MCTF(r=r, bidirectional=both) for r in (3, 99) for both in (False, True)),
]


@given(data=hypothesis.strategies.data())
@hypothesis.settings(max_examples=60)
def test_any_tokens_and_any_mask(data: hypothesis.strategies.DataObject) -> None:
    """Holes anywhere, many equal similarities: always the same number of rows, each of them used, none shared
    with padding or prefix, and no valid token lost, since there always is padding enough to give up.
    """
    draw = data.draw
    method = draw(hypothesis.strategies.sampled_from(PLANS))
    prefix = draw(hypothesis.strategies.integers(0, 3))
    n = prefix + draw(hypothesis.strategies.integers(0, 23))
    seed = draw(hypothesis.strategies.integers(0, 2**32))
    valid = draw(hypothesis.strategies.lists(hypothesis.strategies.booleans(), min_size=n, max_size=n))
    random = torch.Generator().manual_seed(seed)
    metric = torch.randint(-1, 2, (2, n, 3), generator=random).float()
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1] = torch.tensor(valid, dtype=torch.bool) | (torch.arange(n) < prefix)
    extra = (torch.randint(1, 3, (2, n), generator=random).float(),) if isinstance(method, MCTF) else ()
    whole = method.plan(metric, *extra, prefix=prefix)
    plan = method.plan(metric, *extra, prefix=prefix, mask=mask)
    assert plan.out_tokens == whole.out_tokens
    assert torch.equal(plan.token_map[0], whole.token_map[0])
    for item in range(2):
        rows = plan.token_map[item].tolist()
        assert rows[:prefix] == list(range(prefix))
        assert {row for row in rows if row >= 0} == set(range(plan.out_tokens))
        for token, row in enumerate(rows):
            if token < prefix or not mask[item, token]:
                assert row < 0 or rows.count(row) == 1
            assert row >= 0 or not mask[item, token]


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_known_by_number(name: str) -> None:
    """Calling a layer again, or out of turn, gives the same: nothing is counted or popped."""
    view = random_view(1)
    first = reduce(name, view)
    for layer in (3, 0, 2):
        if LAYER_CASES[name] != ALGM(local_layer=1, threshold=-0.5) or layer != 0:
            LAYER_CASES[name].reduce(replace(view, layer=layer))
    again = reduce(name, view)
    assert torch.equal(first.token_map, again.token_map)
    assert torch.equal(first.x, again.x)


IDLE = [
    ToMe(r=0),
    ToMe(r=[5, 0, 3]),
    PiToMe(keep=1.0),
    PiToMe.preset("blip"),
    PiToMe.preset("bert"),
    DiffRate(prune=(), merge=()),
    DiffRate(prune=(9, 31), merge=(9, 40)),
    ToFu(r=[3]),
    MCTF(r=0),
    ALGM(threshold=1.0),
    ALGM(local_layer=2, global_layer=3),
    LocalMerge(r=[1]),
]


@pytest.mark.parametrize("method", IDLE, ids=str)
def test_nothing_to_merge_leaves_the_layer_alone(method: Any) -> None:
    """None, not a copy: the layer must be bit-identical, its attention too."""
    view = random_view(1)
    stop = getattr(method, "stop", None)
    layer = 1 if stop is None else 3
    if isinstance(method, ALGM) and method.threshold == 1.0:
        layer = 0
    assert method.reduce(replace(view, layer=layer)) is None


def test_few_tokens_are_left_alone() -> None:
    """Prefix and at most one patch: nothing can merge."""
    for prefix in PREFIXES:
        for patches in (0, 1):
            view = random_view(prefix, grid=(1, patches))
            for name in NAMES:
                if prefix or not needs_cls(name):
                    out = reduce(name, view)
                    assert out.x.shape[1] == view.tokens
