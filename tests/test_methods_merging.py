"""Merging methods: worked examples of the papers, published schedules, and oracles by plain loops."""

import math
from typing import Any

import pytest
import torch
from backends import Backend
from merging import bipartite, plane, six
from tokencomp import ops, token_map
from tokencomp.methods import ALGM, MCTF, DiffRate, LocalMerge, PiToMe, ToFu, ToMe, ToMeSD, schedule
from tokencomp.methods.algm import window_similarity
from tokencomp.methods.matching import Plan
from tokencomp.methods.pitome import PRESETS, Flavour
from torch import Tensor

TWO_OF_SIX = 4 / 6  # share kept when two of six tokens go


def merged(plan: Plan, x: Tensor, size: Tensor | None = None) -> tuple[list[float], list[float]]:
    y, size = ops.merge_tokens(x, plan.token_map, plan.out_tokens, size=size)
    return y[0, :, 0].tolist(), size[0].tolist()


# method, prefix, merged values, sizes, token map
SIX_CASES: list[tuple[Any, int, list[float], list[float], list[int]]] = [
    (ToMe(r=1), 0, [3, 1, 3.5, 4, 6], [1, 1, 2, 1, 1], [1, 2, 0, 3, 2, 4]),
    (ToMe(r=1), 1, [1, 3, 3.5, 4, 6], [1, 1, 2, 1, 1], [0, 2, 1, 3, 2, 4]),
    (ToMe(r=2), 0, [1, 3.5, 4, 4.5], [1, 2, 1, 2], [0, 1, 3, 2, 1, 3]),
    (ToMe(r=2), 1, [1, 3.5, 4, 4.5], [1, 2, 1, 2], [0, 1, 3, 2, 1, 3]),
    (PiToMe(TWO_OF_SIX, 0.5, 0.0), 0, [4, 1, 3.5, 4.5], [1, 1, 2, 2], [1, 2, 3, 0, 2, 3]),
    # Two tokens must pair up, however dissimilar (cosine 0.37).
    (PiToMe(5 / 6, 0.5, 0.0), 0, [2, 6, 4, 1, 4], [1, 1, 1, 1, 2], [3, 0, 4, 2, 4, 1]),
    (PiToMe(TWO_OF_SIX, 0.5, 0.0, "bsm"), 0, [4, 3.5, 4.5, 1], [1, 2, 2, 1], [3, 1, 2, 0, 1, 2]),
    (PiToMe(TWO_OF_SIX, 0.5, 0.0, "text"), 0, [4, 1, 3.5, 4.5], [1, 1, 2, 2], [1, 2, 3, 0, 2, 3]),
    (PiToMe(TWO_OF_SIX, flavour="tome"), 0, [1, 3.5, 4, 4.5], [1, 2, 1, 2], [0, 1, 3, 2, 1, 3]),
    # Only the similarities .98 (0, 1), .9962 (2, 5) and .29 (4, 5) are inside the band.
    (LocalMerge(r=2, band=1), 0, [1.5, 4, 5, 4.5], [2, 1, 1, 2], [0, 0, 3, 1, 2, 3]),
]


@pytest.mark.parametrize(("method", "prefix", "values", "sizes", "expected"), SIX_CASES, ids=str)
def test_six_tokens(
    backend: Backend, method: Any, prefix: int, values: list[float], sizes: list[float], expected: list[int]
) -> None:
    metric, x = (t.to(backend.device) for t in six())
    with backend.active():
        plan = method.plan(metric, prefix=prefix)
        assert plan.token_map.tolist() == [expected]
        assert plan.out_tokens == len(values)
        got_values, got_sizes = merged(plan, x)
        assert got_values == pytest.approx(values)
        assert got_sizes == sizes
        unmerged = plan.unmerge(plan.merge(x))[0, :, 0].tolist()
    assert unmerged == pytest.approx([values[row] for row in expected])


def test_energies_of_six_tokens() -> None:
    metric, _ = six()
    elu = [0.0755, 0.1409, 0.1564, 0.0926, 0.1531, 0.1254]
    gauss = [0.4758, 0.5331, 0.5496, 0.4887, 0.5464, 0.5172]
    for flavour, expected in (("plain", elu), ("bsm", elu), ("text", gauss)):
        got = PiToMe(margin=0.5, slope=0.0, flavour=flavour).energies(metric, 0)
        # four printed digits, and float32 noise where one sits on the edge of rounding (0.15315)
        torch.testing.assert_close(got, torch.tensor([expected]), atol=5e-5 + 1e-6, rtol=0)


def test_tome_twice(backend: Backend) -> None:
    """Two layers of r = 1, the second by the averaged metric: sizes weight, and maps compose."""
    metric, x = (t.to(backend.device) for t in six())
    with backend.active():
        first = ToMe(r=1).plan(metric, prefix=0)
        size = ops.merge_tokens(x, *first)[1]
        second = ToMe(r=1).plan(first.merge(metric), prefix=0)
        values, sizes = merged(second, first.merge(x), size)
    assert values == pytest.approx([3, 3.5, 1, 5])
    assert sizes == [1, 2, 1, 2]
    assert token_map.compose(first.token_map, second.token_map).tolist() == [[2, 1, 0, 3, 1, 3]]


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("r", [1, 16, 97])
def test_tome_like_plain_loops(r: int, prefix: int) -> None:
    """CLS only (1), CLS and a distillation token (2): rows as in the official order, CLS, DIST, even, odd."""
    metric = torch.randn(2, 197, 64)
    plan = ToMe(r=r).plan(metric, prefix=prefix)
    even, odd = list(range(prefix + prefix % 2, 197, 2)), list(range(prefix + 1 - prefix % 2, 197, 2))
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    for item in range(2):
        gone, into, stay = bipartite((unit[item, even] @ unit[item, odd].T).tolist(), r)
        rows = [*range(prefix), *(even[i] for i in (stay if prefix == 0 else sorted(stay))), *odd]
        expected = {token: row for row, token in enumerate(rows)}
        expected |= {even[i]: expected[odd[j]] for i, j in zip(gone, into, strict=True)}
        assert plan.token_map[item].tolist() == [expected[token] for token in range(197)]


@pytest.mark.parametrize(
    ("r", "layers", "expected"),
    [
        (16, 3, [16, 16, 16]),
        ((16, -1), 12, [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
        ((16, 1), 12, [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32]),
        ((16, 0), 4, [16] * 4),
        ((13, 0.5), 4, [6, 10, 15, 20]),
        ((7, -1), 1, [7]),
        ([5, 3], 4, [5, 3, 0, 0]),
        ([5, 3, 2], 2, [5, 3]),
    ],
)
def test_schedule(r: Any, layers: int, expected: list[int]) -> None:
    """Truncated like ``int``: the decreasing schedule merges 187 tokens where the constant one merges 192."""
    assert schedule.per_layer(r, layers) == expected


@pytest.mark.parametrize("r", [-1, 1.5, True, (16,), (16, 2), (16, -1.5), (1.5, 0), [3, -1], "16", (1, "a")])
@pytest.mark.parametrize("method", [ToMe, ToFu, MCTF, LocalMerge])
def test_bad_rate(method: Any, r: Any) -> None:
    with pytest.raises(ValueError, match=rf"{method.__name__}: r must be a count >= 0, a pair .* got"):
        method(r=r)


@pytest.mark.parametrize(
    ("tokens", "keep", "r"),
    [(196, 0.9, 19), (196, 0.95, 9), (10, 0.7, 3), (196, 1.0, 0), (196, 0.25, 98), (1, 0.5, 0)],
)
def test_pitome_count(tokens: int, keep: float, r: int) -> None:
    """floor(T - T * keep) in double precision, at most half of them; the prefix does not count."""
    assert PiToMe(keep=keep).count(0, 12, tokens + 1, 1) == r
    assert PiToMe(keep=keep).count(0, 12, tokens, 0) == r


def test_pitome_counts_the_prefix_where_it_is_tome() -> None:
    assert PiToMe(keep=0.9, flavour="tome").count(0, 12, 110, 10) == 11
    assert PiToMe(keep=0.9, flavour="bsm").count(0, 12, 110, 10) == 10


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("flavour", ["plain", "bsm", "text"])
def test_pitome_like_plain_loops(flavour: Flavour, prefix: int) -> None:
    """Rows, also behind CLS: the others by energy or (bsm) similarity, then the targets by energy."""
    metric, keep = torch.randn(2, prefix + 40, 6), 0.8
    method = PiToMe(keep=keep, margin=0.6, slope=0.3, flavour=flavour)
    plan = method.plan(metric, prefix=prefix, layer=2, layers=6)  # m = 0.5
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)[:, prefix:]
    r = 8
    for item in range(2):
        g = unit[item] @ unit[item].T
        f = (-((1 - g) ** 2) / 0.5).exp() if flavour == "text" else torch.nn.functional.elu(g - 0.5)
        order = sorted(range(40), key=lambda t: -f[t].sum().item())
        a, b, rest = order[: 2 * r : 2], order[1 : 2 * r : 2], order[2 * r :]
        if flavour == "bsm":
            a, b, rest = order[0::2], order[1::2], []
        if flavour == "text":
            a, b = order[:r], order[r : 2 * r]
        gone, into, stay = bipartite(g[a][:, b].tolist(), r)
        rows = [*range(-prefix, 0), *rest, *(a[i] for i in stay), *b]
        expected = {token: row for row, token in enumerate(rows)}
        expected |= {a[i]: expected[b[j]] for i, j in zip(gone, into, strict=True)}
        assert plan.token_map[item].tolist() == [expected[token] for token in range(-prefix, 40)]


# preset: margins of layers 0 and 6 of 12, flavours of layers 0, 5, 6, 11, counts of 0, 2, 3, 11 of 101 tokens
PRESET_CASES: dict[str, tuple[tuple[float, float], list[str], list[int]]] = {
    "deit": ((0.75, 0.375), ["bsm", "bsm", "plain", "plain"], [10, 10, 10, 10]),
    "mae": ((0.75, 0.375), ["plain", "plain", "bsm", "bsm"], [10, 10, 10, 10]),
    "augreg": ((0.9, 0.45), ["plain"] * 4, [10, 10, 10, 10]),
    "clip": ((0.95, 0.475), ["plain"] * 4, [10, 10, 10, 10]),
    "clip_hf": ((0.9, 0.45), ["tome"] * 4, [10, 10, 10, 10]),
    "blip": ((0.9, 0.45), ["plain"] * 4, [10, 10, 10, 0]),
    "blip2": ((0.75, 0.55), ["plain"] * 4, [10, 10, 10, 10]),
    "bert": ((0.9, 0.775), ["text"] * 4, [10, 10, 0, 0]),
}


@pytest.mark.parametrize("name", PRESETS)
def test_pitome_preset(name: str) -> None:
    margins, flavours, counts = PRESET_CASES[name]
    method = PiToMe.preset(name)
    assert [method.margin_at(layer, 12) for layer in (0, 6)] == pytest.approx(margins)
    assert [method.flavour_at(layer, 12) for layer in (0, 5, 6, 11)] == flavours
    assert [method.count(layer, 12, 101, 1) for layer in (0, 2, 3, 11)] == counts
    assert method.proportional == (name == "blip2")
    assert method.weighted == (name not in ("clip_hf", "bert"))


def test_pitome_presets_of_deep_models() -> None:
    assert [PiToMe.preset("clip_hf").flavour_at(layer, 24) for layer in (12, 13)] == ["tome", "plain"]
    assert [PiToMe.preset("deit").flavour_at(layer, 13) for layer in (6, 7)] == ["bsm", "plain"]
    with pytest.raises(KeyError, match=r"PiToMe: preset must be one of .*'deit'.*, got 'vit'"):
        PiToMe.preset("vit")


def test_diffrate_size_counts_by_similarity(backend: Backend) -> None:
    """Source (0.8, 0.6) of size 1 goes into (1, 0): values are averaged plainly, sizes are 1 + 0.8 * 1."""
    x = torch.tensor([[[5.0, 5], [0.8, 0.6], [1, 0], [0, 0.1]]], device=backend.device)
    importance = torch.tensor([[0.0, 0.2, 0.5, 0.1]], device=backend.device)
    method = DiffRate(prune=(3,), merge=(2,))
    with backend.active():
        plan, share = method.plan(x, importance)
        assert plan.token_map.tolist() == [[0, 1, 1, -1]]
        y, size = method.apply(x, plan, share)
        torch.testing.assert_close(y.cpu(), torch.tensor([[[5.0, 5], [0.9, 0.3]]]))
        torch.testing.assert_close(size.cpu(), torch.tensor([[1.0, 1.8]]))
        _, size = method.apply(x, plan, share, torch.tensor([[1.0, 3, 2, 1]], device=backend.device))
    torch.testing.assert_close(size.cpu(), torch.tensor([[1.0, 2 + 0.8 * 3]]))


def test_diffrate_ranks_by_attention_of_cls(backend: Backend) -> None:
    """Rows by importance, ties to the lower index, NaN last; the prefix is in front whatever its own is."""
    x = torch.randn(1, 7, 4).to(backend.device)
    importance = torch.tensor([[0.0, 0.0, 0.2, float("nan"), 0.3, 0.2, 0.1]], device=backend.device)
    with backend.active():
        plan, share = DiffRate(prune=(6,), merge=()).plan(x, importance, prefix=2)
        masked, _ = DiffRate(prune=(5,), merge=(4,)).plan(
            x, importance, prefix=2, mask=torch.arange(7, device=x.device)[None] != 4
        )
    assert plan.token_map.tolist() == [[0, 1, 3, -1, 2, 4, 5]]
    assert share.tolist() == [[1.0] * 7]
    # Padding (4) is the least important, whatever its importance; NaN (3) comes before it.
    rows = masked.token_map[0].tolist()
    assert [rows[token] for token in (0, 1, 2, 5)] == [0, 1, 2, 3]
    assert rows[3] == rows[4] == -1
    assert rows[6] in (2, 3)


def test_diffrate_published_counts() -> None:
    method, kept = DiffRate.preset("deit_s_2.7g"), []
    tokens = 197
    for layer in range(12):
        tokens = method.counts(layer, tokens, 1)[1]
        kept.append(tokens)
    assert kept == [197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3]
    assert method.counts(2, 188, 1) == (182, 170)
    assert method == DiffRate()
    with pytest.raises(KeyError, match="DiffRate: preset must be one of"):
        DiffRate.preset("deit")
    with pytest.raises(ValueError, match=r"DiffRate: merge must hold counts >= 1, got \(3, 0\)"):
        DiffRate(merge=(3, 0))


def test_tofu_drops_early_and_rescales_late(backend: Backend) -> None:
    """(3, 4) and (1, 0): the target alone, then the mean (2, 2) at norm 5: (3.54, 3.54)."""
    metric = plane(0, 120, 240, 241).to(backend.device)
    x = torch.tensor([[[9.0, 9], [8, 8], [3, 4], [1, 0]]], device=backend.device)
    method = ToFu(r=1)
    with backend.active():
        plan = method.plan(metric)
        assert plan.token_map.tolist() == [[0, 1, 2, 2]]
        assert method.apply(x, plan, layer=6, layers=12)[0, 2].tolist() == [1, 0]
        late = method.apply(x, plan, layer=7, layers=12)[0]
    root = 5 / math.sqrt(2)
    torch.testing.assert_close(late.cpu(), torch.tensor([[9.0, 9], [8, 8], [root, root]]))
    assert [method.drops(layer, 12) for layer in (0, 6, 7, 11)] == [True, True, False, False]


def mctf_target(
    x: Tensor, received: Tensor, size: Tensor, method: MCTF, r: int, prefix: int
) -> tuple[dict[int, int], set[int]]:
    """Where each token of one item goes, and who stays, from the whole matrix of pair weights."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    a, s = ((1 / w.double()) / (1 / w.double()).max() for w in (received, size))
    weight = ((1 + unit @ unit.T) / 2) ** (1 / method.t_sim)
    weight = weight * (a[:, None] * a) ** (1 / method.t_info) * (s[:, None] * s) ** (1 / method.t_size)
    even, odd = ([t for t in range(prefix, len(x)) if t % 2 == half] for half in (0, 1))
    first = r // 2 if method.bidirectional else r
    gone, into, stay = bipartite(weight[even][:, odd].tolist(), first)
    target = {even[i]: odd[j] for i, j in zip(gone, into, strict=True)}
    left = [even[i] for i in sorted(stay)]
    gone, into, _ = bipartite(weight[odd][:, left].tolist(), r - first)
    back = {odd[i]: left[j] for i, j in zip(gone, into, strict=True)}
    target = {**{token: back.get(t, t) for token, t in target.items()}, **back}
    return target, set(range(len(x))) - set(target)


@pytest.mark.parametrize("method", [MCTF(r=9), MCTF(r=8, t_sim=2.0, bidirectional=False)], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_mctf_like_the_whole_matrix(method: MCTF, prefix: int) -> None:
    x, received, size = torch.randn(2, 31, 8), torch.rand(2, 31) + 0.01, torch.randint(1, 9, (2, 31)).float()
    plan = method.plan(x, received, size, prefix=prefix)
    for item in range(2):
        target, stay = mctf_target(x[item], received[item], size[item], method, int(method.r), prefix)
        rows = sorted(stay, key=lambda t: (t >= prefix, t >= prefix and t % 2, t))
        expected = {token: row for row, token in enumerate(rows)}
        expected |= {token: expected[into] for token, into in target.items()}
        assert plan.token_map[item].tolist() == [expected[token] for token in range(31)]


def test_algm_windows(backend: Backend) -> None:
    """4 x 4 patches behind CLS: windows of mean cosine 0.99 and 1 are merged, the two below are not."""
    degrees = [0, 10, 0, 90, 0, 10, 0, 90, 0, 52, 77, 77, 0, 52, 77, 77]
    x = torch.cat([plane(200), plane(*degrees)], dim=1).to(backend.device)
    method = ALGM()
    with backend.active():
        plan = method.plan_local(x, (4, 4))
        y = plan.merge(x)
    assert plan.token_map.tolist() == [[0, 2, 2, 3, 4, 2, 2, 5, 6, 7, 8, 1, 1, 9, 10, 1, 1]]
    assert plan.out_tokens == 11
    torch.testing.assert_close(y[:, :3].cpu(), torch.cat([plane(200, 77), plane(0, 10).mean(1, True)], 1))
    with pytest.raises(ValueError, match=r"ALGM: number of tokens must be .* = 1 \+ 4 \* 5, got 17"):
        method.plan_local(x, (4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_window_similarity_is_the_mean_of_pairs(dtype: torch.dtype) -> None:
    x, windows = torch.randn(2, 14, 16).to(dtype), torch.tensor([[0, 1, 5, 6], [2, 3, 7, 8], [9, 10, 12, 13]])
    x[1, 7] = 0
    unit = torch.nn.functional.normalize(x.double(), dim=-1)[:, windows]
    cosines = (unit @ unit.mT).flatten(2)[:, :, [1, 2, 3, 6, 7, 11]]
    torch.testing.assert_close(window_similarity(x, windows), cosines.mean(-1).float(), atol=1e-6, rtol=0)


def test_algm_pairs_above_mean_and_deviation(backend: Backend) -> None:
    """v = (.9848, .9962, .9994), mean .9935, unbiased deviation .0077: two pairs reach .9950 (layer 5)."""
    metric, x = (t.to(backend.device) for t in six())
    with backend.active():
        plan = ALGM().plan_global(metric, prefix=0)
        assert merged(plan, x)[0] == pytest.approx([1, 3.5, 4, 4.5])
        assert ALGM(global_layer=1).plan_global(metric, prefix=0).out_tokens == 5  # .9973


def test_algm_with_counts_merges_the_best_and_compiles() -> None:
    """One window of the two above, and one pair, although two reach the limits; counts are capped."""
    degrees = [0, 10, 0, 90, 0, 10, 0, 90, 0, 52, 77, 77, 0, 52, 77, 77]
    x = torch.cat([plane(200), plane(*degrees)], dim=1)
    plan = ALGM(counts=(1, 1)).plan_local(x, (4, 4))
    assert plan.token_map.tolist() == [[0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1, 1, 12, 13, 1, 1]]
    assert ALGM(counts=(99, 0)).plan_local(x, (4, 4)).out_tokens == 5
    assert ALGM(counts=(0, 1)).plan_global(six()[0], prefix=0).out_tokens == 5
    step = torch.compile(
        lambda t: ALGM(counts=(2, 1)).plan_local(t, (4, 4)).token_map, fullgraph=True, backend="eager"
    )
    assert torch.equal(step(x), ALGM().plan_local(x, (4, 4)).token_map)
    with pytest.raises(ValueError, match="ALGM: counts must be None where there is padding"):
        ALGM(counts=(1, 1)).plan_local(x, (4, 4), mask=torch.ones(1, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="ALGM: counts must be two numbers >= 0, got"):
        ALGM(counts=(1, -1))


def test_tomesd_grid(backend: Backend) -> None:
    """4 x 4: targets are the corners of 2 x 2 cells; what is left over at the edge stays a source."""
    method = ToMeSD()
    assert method.targets(4, 4).tolist() == [0, 2, 8, 10]
    assert method.targets(5, 3).tolist() == [0, 6]
    assert ToMeSD(cell=(1, 3)).targets(2, 7).tolist() == [0, 3, 7, 10]
    degrees = [0, 1, 90, 92, 3, 184, 275, 96, 180, 187, 270, 278, 20, 110, 200, 290]
    x = plane(*degrees).to(backend.device)
    with backend.active():
        plan = method.plan(x, 4, 4)
        y = plan.merge(x)
        back = plan.unmerge(y)
    assert plan.token_map.tolist() == [[4, 4, 5, 5, 4, 6, 7, 5, 6, 6, 7, 7, 0, 1, 2, 3]]
    torch.testing.assert_close(y[:, 4].cpu(), plane(0, 1, 3).mean(1))
    assert torch.equal(back, y[0, plan.token_map[0].long()][None])
