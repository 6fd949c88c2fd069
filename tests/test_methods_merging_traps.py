"""Where the papers' codes go wrong, one test a trap; and encoders of layers, run from end to end."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from merging import BLOCK_CASES, plane, random_view
from tokencomp import ops, token_map
from tokencomp.methods import (
    ALGM,
    MCTF,
    DiffRate,
    LayerView,
    LocalMerge,
    PiToMe,
    ToFu,
    ToMe,
    ToMeSD,
    matching,
)
from torch import Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_are_similar_to_nothing(dtype: torch.dtype) -> None:
    """Divided by its norm a zero row is NaN, and NaN sorts first: it would be the first to go."""
    metric = torch.randn(1, 16, 8)
    metric[0, 3] = metric[0, 2] * 1.1  # the pair that should go
    metric[0, 4] = 0
    for method in (ToMe(r=1), ToFu(r=1), LocalMerge(r=1), PiToMe(keep=0.9, flavour="tome")):
        plan = method.plan(metric.to(dtype), prefix=0)
        assert plan.token_map[0, 2] == plan.token_map[0, 3]
        assert plan.token_map[0].tolist().count(int(plan.token_map[0, 4])) == 1
    everything_zero = ToMe(r=4).plan(torch.zeros(1, 16, 8, dtype=dtype))
    assert set(everything_zero.token_map[0].tolist()) == set(range(12))


@pytest.mark.parametrize("tokens", [16, 17, 34, 200])
def test_ties_go_to_the_lowest_index(tokens: int) -> None:
    """Sorting equal values is the identity for 16 of them only; the order of merges would depend on more."""
    metric = torch.ones(1, tokens, 4)
    r = tokens // 4
    for method in (ToMe(r=r), LocalMerge(r=r)):
        target = targets(method.plan(metric, prefix=0))
        band = getattr(method, "band", tokens)
        gone = {2 * i: 2 * max(i - band, 0) + 1 for i in range(r)}
        assert target == [gone.get(token, token) for token in range(tokens)]
    # All energies are equal: the first 2 r tokens pair up.
    plan = PiToMe(keep=1 - (r + 0.5) / tokens, margin=0.5, slope=0.0).plan(metric, prefix=0)
    assert targets(plan) == [1 if token < 2 * r and token % 2 == 0 else token for token in range(tokens)]
    plan, _ = DiffRate(prune=(tokens - 1,), merge=(tokens - 1 - r,)).plan(metric, torch.ones(1, tokens))
    rows = plan.token_map[0].tolist()
    assert rows[: tokens - 1 - r] == list(range(tokens - 1 - r))
    assert rows[tokens - 1 - r :] == [1] * r + [-1]


def targets(plan: matching.Plan) -> list[int]:
    """For each token the last token of its row: of halves and pairs the odd one, the target."""
    rows = plan.token_map[0].tolist()
    last = {row: token for token, row in enumerate(rows) if token % 2 == 1 or rows.count(row) == 1}
    return [last[row] for row in rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarities_are_float32_in_any_dtype(dtype: torch.dtype) -> None:
    """In bf16 only some 90 of 289 row maxima are distinct; here products are as of float32 copies."""
    metric = torch.randn(2, 577, 64).to(dtype)
    match, exact = matching.halves(metric, 1), matching.halves(metric.float(), 1)
    torch.testing.assert_close(match.value, exact.value, atol=2e-6, rtol=0)
    assert len(match.value[0].unique()) > 280
    assert torch.equal(ToMe(r=16).plan(metric).token_map, ToMe(r=16).plan(metric.float()).token_map)


def test_registers_are_protected() -> None:
    """DINOv2 with 4 registers: CLS in front would be all that the official code keeps."""
    metric = torch.randn(1, 5 + 16, 8)
    metric[:, 5:10] = metric[:, :5]  # each prefix token has a twin among the patches
    for method in (ToMe(r=8), ToFu(r=8), LocalMerge(r=8), PiToMe(keep=0.5), PiToMe(keep=0.5, flavour="bsm")):
        plan = method.plan(metric, prefix=5)
        assert plan.out_tokens == 13
        assert plan.token_map[0, :5].tolist() == [0, 1, 2, 3, 4]
        assert int(plan.token_map[0, 5:].min()) == 5


def test_unmerge_with_a_distillation_token() -> None:
    """The official unmerge forgets that CLS and DIST were put in front."""
    metric = torch.randn(2, 198, 16)
    plan = ToMe(r=16).plan(metric, prefix=2)
    y = plan.merge(metric)
    assert torch.equal(y[:, :2], metric[:, :2])
    back = plan.unmerge(y)
    size = token_map.group_sizes(plan.token_map, plan.out_tokens)
    alone = size.gather(1, plan.token_map.long()) == 1
    assert int(alone.sum()) >= 2 * (198 - 32)
    assert torch.equal(back[alone], metric[alone])


def test_too_many_are_capped() -> None:
    """r = 16 in 12 layers of 197 tokens: 37 -> 21 -> 11 at the end, and never a prefix token."""
    tokens, counts = 197, []
    for layer in range(12):
        metric = torch.randn(1, tokens, 8)
        plan = ToMe(r=16).plan(metric, layer=layer, layers=12)
        assert plan.token_map[0, 0] == 0
        assert plan.token_map[0, 1:].min() == 1
        counts.append(tokens := plan.out_tokens)
    assert counts[-4:] == [53, 37, 21, 11]
    method = MCTF(r=1000)
    assert method.plan(torch.randn(1, 12, 4), torch.ones(1, 12), prefix=5).out_tokens == 9
    assert PiToMe(keep=0.01).plan(torch.randn(1, 12, 4), prefix=1).out_tokens == 7


def test_sums_do_not_overflow_or_lose_sizes() -> None:
    """In fp16, 3000 tokens of value 40 sum to infinity, and sizes above 2048 skip numbers."""
    view = random_view(0, batch=1, grid=(1, 4))
    x = torch.full((1, 4, 2), 40.0, dtype=torch.float16)
    out = ToMe(r=[0, 2]).reduce(replace(view, x=x, size=torch.tensor([[3000.0, 2049, 1, 1]])))
    assert out is not None
    assert out.size is not None
    assert torch.equal(out.x, x[:, :2])
    assert out.size.sum() == 5051


def test_margin_one_divides_by_zero_in_the_text_flavour() -> None:
    with pytest.raises(ValueError, match="PiToMe: margin must stay below 1 with text"):
        PiToMe(flavour="text", margin=1.0)
    with pytest.raises(ValueError, match="PiToMe: margin must stay below 1 with text"):
        PiToMe(early="text", margin=0.5, slope=-0.5)
    assert PiToMe(margin=1.0).plan(torch.randn(1, 9, 4)).out_tokens == 9


def test_diffrate_sizes_stay_positive() -> None:
    """A source of cosine -1 would take its size away, and log size be NaN in the next attention."""
    x = plane(0, 90, 270)
    method = DiffRate(prune=(), merge=(2,))
    plan, share = method.plan(x, torch.tensor([[0.0, 0.5, 0.4]]))
    _, size = method.apply(x, plan, share, torch.tensor([[1.0, 1, 5]]))
    assert plan.token_map.tolist() == [[0, 1, 1]]
    assert size.tolist() == [[1, 1]]


def test_diffrate_counts_that_do_not_fall() -> None:
    """Published tables have layers whose count is above what the layer before left."""
    method = DiffRate(prune=(9, 12, 8), merge=(7, 8, 10))
    assert method.counts(1, 7, 1) == (7, 7)
    assert method.counts(2, 7, 1) == (7, 7)
    assert method.counts(3, 7, 1) == (7, 7)
    assert DiffRate(prune=(1,), merge=(1,)).counts(0, 9, 5) == (6, 6)


def test_diffrate_needs_cls() -> None:
    with pytest.raises(ValueError, match="DiffRate: prefix must be >= 1, a CLS token, got 0"):
        DiffRate().reduce(random_view(0))


def test_mean_of_opposites_has_no_direction() -> None:
    """MLERP divides by the norm of the mean."""
    method = ToFu(r=1)
    plan = method.plan(plane(0, 120, 240, 241))
    x = torch.tensor([[[9.0, 9], [8, 8], [3, 4], [-3, -4]]])
    assert method.apply(x, plan, layer=11, layers=12)[0, 2].tolist() == [0, 0]


def test_nothing_outside_the_band_wins() -> None:
    """Padding a band with zeros beats real similarities below 0."""
    metric = plane(*(180 * (token % 2) + token for token in range(10)))  # even and odd tokens are opposite
    match = matching.halves(metric, 0, band=1)
    assert bool((match.value < -0.9).all())
    assert bool(((match.column - torch.arange(5)).abs() <= 1).all())
    plan = LocalMerge(r=5, band=1).plan(metric)
    assert plan.out_tokens == 5
    assert bool((plan.token_map >= 0).all())
    for tokens in range(2, 12):
        for prefix in range(3):
            plan = LocalMerge(r=99, band=1).plan(torch.randn(1, tokens, 4), prefix=prefix)
            assert bool((plan.token_map >= 0).all()), "every even token has a partner"
    with pytest.raises(ValueError, match="LocalMerge: band must be >= 1, got 0"):
        LocalMerge(band=0)


def test_local_merge_keeps_the_order() -> None:
    """Rows are in the order of the tokens that stay: a causal mask or a scan stays what it was."""
    plan = LocalMerge(r=20, band=2).plan(torch.randn(3, 64, 8), prefix=3)
    for rows in plan.token_map.tolist():
        stays = [t for t, row in enumerate(rows) if t < 3 or t % 2 == 1 or rows.count(row) == 1]
        assert [rows[t] for t in stays] == list(range(plan.out_tokens))
        assert all(abs(t - rows_target(rows, t)) <= 2 * 2 + 1 for t in range(64))


def rows_target(rows: list[int], token: int) -> int:
    members = [t for t, row in enumerate(rows) if row == rows[token]]
    return token if len(members) == 1 else next(t for t in members if t % 2 == 1)


def test_algm_merges_the_fewest_of_the_batch() -> None:
    """A row with 2 windows above the threshold beside one with 1: one each, and it is the most similar."""
    uniform, mixed = [0.0] * 4, [0.0, 90, 180, 270]
    near = [0.0, 8, 0, 8]
    items = [uniform + mixed + near, mixed + uniform + mixed]
    windows = torch.cat([plane(*item) for item in items])  # [2, 12, 2], window by window
    order = torch.tensor([0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11])
    x = windows[:, order]  # on a grid of 2 rows and 6 columns
    plan = ALGM().plan_local(x, (2, 6), prefix=0)
    assert plan.out_tokens == 9
    by_window = plan.token_map[:, order.argsort()].tolist()
    assert by_window[0][:4] == [0] * 4
    assert by_window[1][4:8] == [0] * 4
    assert ALGM().plan_local(x[:1], (2, 6), prefix=0).out_tokens == 6
    assert ALGM().plan_local(torch.randn(0, 12, 2), (2, 6), prefix=0).out_tokens == 12
    odd = ALGM(threshold=-1.0).plan_local(torch.randn(2, 1 + 15, 4), (3, 5))
    assert odd.out_tokens == 16 - 3 * 2, "the last row and column are in no window"


def test_algm_leaves_windows_with_padding() -> None:
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 7] = False  # the last of the second of two windows
    plan = ALGM(threshold=-1.0).plan_local(torch.randn(1, 8, 4), (2, 4), prefix=0, mask=mask)
    assert plan.token_map.tolist() == [[0, 0, 1, 2, 0, 0, 3, 4]]


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_algm_limit_uses_the_unbiased_deviation(prefix: int) -> None:
    """Few values, where the two deviations differ; the prefix is not among them."""
    counts = set()
    for seed in range(24):
        x = torch.randn(2, 9 + prefix, 3, generator=torch.Generator().manual_seed(seed))
        unit = torch.nn.functional.normalize(x, dim=-1)
        first_odd = prefix + 1 - prefix % 2
        best = (unit[:, prefix + prefix % 2 :: 2] @ unit[:, first_odd::2].mT).amax(dim=2)
        limit = best.mean(dim=1).mean() + best.std(dim=1).mean() / 2
        r = int((best >= limit).sum(dim=1).min())
        assert ALGM(global_layer=1).plan_global(x, prefix=prefix).out_tokens == 9 + prefix - r
        counts.add(r)
    assert len(counts) > 1


def test_algm_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="ALGM: grid must be given"):
        ALGM(local_layer=1).reduce(replace(random_view(), grid=None))
    with pytest.raises(
        ValueError, match=r"ALGM: layers must be 0 <= local_layer < global_layer, got \(4, 4\)"
    ):
        ALGM(local_layer=4)
    with pytest.raises(ValueError, match=r"ALGM: threshold must be in \[-1, 1\], got 88"):
        ALGM(threshold=88)


def test_tomesd_draws_one_target_a_cell() -> None:
    """The same for the whole batch, odd batches too; from the same seed the same."""
    method = ToMeSD(ratio=0.5, cell=(2, 3))
    drawn = [method.targets(6, 7, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    cells = [(int(t) // 7 // 2, int(t) % 7 // 3) for t in drawn[0]]
    assert cells == [(row, column) for row in range(3) for column in range(2)]
    x = torch.randn(3, 42, 8)
    plan = method.plan(x, 6, 7, generator=torch.Generator().manual_seed(1))
    assert plan.out_tokens == 21
    targets = plan.token_map[:, drawn[0]]
    assert torch.equal(targets.sort(dim=1).values, torch.arange(15, 21, dtype=torch.int32).expand(3, -1))


@pytest.mark.parametrize(("method", "rows", "columns", "left"), BLOCK_CASES, ids=str)
def test_tomesd_counts(method: ToMeSD, rows: int, columns: int, left: int) -> None:
    plan = method.plan(torch.randn(2, rows * columns, 4), rows, columns)
    assert plan.out_tokens == left
    assert all(set(row) == set(range(left)) for row in plan.token_map.tolist())


def test_tomesd_takes_feature_maps() -> None:
    """Tokens of a diffusion model are views of ``[B, C, rows, columns]``."""
    image = torch.randn(2, 8, 4, 4)
    x = image.flatten(2).mT
    plan, other = ToMeSD().plan(x, 4, 4), ToMeSD().plan(x.contiguous(), 4, 4)
    assert torch.equal(plan.token_map, other.token_map)
    assert torch.equal(plan.unmerge(plan.merge(x)), other.unmerge(other.merge(x.contiguous())))


def test_tomesd_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"ToMeSD: number of tokens must be 4 \* 5, got 16"):
        ToMeSD().plan(torch.randn(1, 16, 4), 4, 5)
    with pytest.raises(ValueError, match=r"ToMeSD: ratio must be in \[0, 1\), got 1.0"):
        ToMeSD(ratio=1.0)
    with pytest.raises(ValueError, match="ToMeSD: cell must be rows and columns >= 1"):
        ToMeSD(cell=(0, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PiToMe(keep=0.0), r"PiToMe: keep must be in \(0, 1\], got 0.0"),
        (lambda: PiToMe(flavour="tofu"), "PiToMe: flavour must be one of .*, got 'tofu'"),  # type: ignore[arg-type]
        (lambda: PiToMe(early="x"), "PiToMe: early must be one of .*, got 'x'"),  # type: ignore[arg-type]
        (lambda: PiToMe(weighted=False), "PiToMe: proportional needs weighted=True"),
        (lambda: ToFu(early=1.5), r"ToFu: early must be in \[0, 1\], got 1.5"),
        (lambda: MCTF(t_sim=0.0), "MCTF: t_sim must be > 0"),
        (lambda: MCTF(t_info=float("nan")), "MCTF: t_sim must be > 0"),
    ],
)
def test_bad_knobs(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def block(x: Tensor, weight: list[Tensor], layer: int, view: Any, method: Any) -> tuple[Tensor, Any]:
    """One pre-norm encoder block of a random net, with ``method`` between attention and MLP."""
    heads, size, source = view
    w_qkv, w_out, w_in, w_mlp = weight
    batch, n, channels = x.shape
    norm = torch.nn.functional.layer_norm(x, (channels,))
    q, k, v = (norm @ w_qkv).view(batch, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scale = q.shape[-1] ** -0.5
    bias = None
    if size is not None and getattr(method, "proportional", False):
        bias = size.log()[:, None, None].to(x.dtype)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    x = x + mixed.transpose(1, 2).reshape(batch, n, channels) @ w_out
    seen = LayerView(layer, len(weight), x, q, k, scale, size, source)
    out = None if method is None else method.reduce(seen)
    if out is not None:
        x, size, source = out.x, out.size, token_map.compose(source, out.token_map)
    x = x + torch.nn.functional.layer_norm(x, (channels,)) @ w_in @ w_mlp
    return x, (heads, size, source)


@pytest.mark.parametrize("proportional", [True, False])
def test_proportional_attention_is_exact_on_duplicates(proportional: bool) -> None:
    """CLS and 8 pairs of equal tokens, all merged in the first of 4 random blocks: CLS ends up the same."""
    channels, heads = 32, 4
    torch.manual_seed(3)
    shapes = [(channels, 3 * channels), (channels, channels), (channels, 64), (64, channels)]
    weights = [[torch.randn(*shape) / shape[0] ** 0.5 for shape in shapes] for _ in range(4)]
    x = torch.randn(2, 17, channels)
    x[:, 2::2] = x[:, 1::2]
    method = ToMe(r=[8], proportional=proportional)
    state = (heads, None, token_map.identity(2, 17))
    plain, merged, seen, whole = x, x, state, state
    for layer in range(4):
        plain, whole = block(plain, weights[layer], layer, whole, None)
        merged, seen = block(merged, weights[layer], layer, seen, method)
    assert merged.shape[1] == 9
    error = float((merged[:, 0] - plain[:, 0]).abs().max())
    assert error < 1e-5 if proportional else error > 1e-2
    if proportional:
        torch.testing.assert_close(token_map.unmerge(merged, seen[2]), plain, atol=1e-5, rtol=1e-5)


def test_results_do_not_alias_the_tokens() -> None:
    view = random_view(1)
    for method in (ToMe(r=7), PiToMe(), ToFu(), MCTF(), LocalMerge(), DiffRate(prune=(), merge=(9, 9))):
        out = method.reduce(view)
        assert out is not None
        assert out.x.untyped_storage().data_ptr() != view.x.untyped_storage().data_ptr()
    assert torch.equal(ops.merge_tokens(view.x, *ToMe(r=0).plan(view.x))[0], view.x)
