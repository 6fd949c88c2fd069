"""Methods that quantize the KV cache: worked examples of the papers and their code, their plain loops."""

from typing import Any

import pytest
import torch
from backends import Backend
from kv_methods import random_qkv, view_of
from quant_methods import NOTHING, PAGE, run
from recipe_attention import sides_of
from tokencomp import ops, recipes, scores
from tokencomp.methods import (
    KIVI,
    QAQ,
    KVTuner,
    MiKV,
    QServe,
    Sensitivity,
    Uniform,
    ZipCache,
    ZipVL,
    quantizing,
)
from tokencomp.methods.kv import ChannelMaps, PageSpec
from tokencomp.methods.kvtuner import best_table, pair_errors
from tokencomp.reference.kv_policy import Trace, run_policy
from tokencomp.reference.kv_tiers import through
from torch import Tensor

ROWS = [[1], [0.6, 0.4], [0.5, 0.3, 0.2], [0.4, 0.1, 0.2, 0.3]]


def run_rows(method: Any, rows: list[list[float]], **options: Any) -> Trace:
    """One head whose attention is the triangle ``rows``; values are random."""
    q, k = sides_of(rows)
    v = torch.randn(1, 1, len(rows), 8, generator=torch.Generator().manual_seed(0))
    return run_policy(method, q, k, v, scale=1, **{"chunks": [len(rows)]} | options)


def low(trace: Trace, kind: int = 1) -> list[int]:
    """Positions in a page type, of one row."""
    pairs = zip(trace.held[-1][0][0], trace.kinds[-1][0][0], strict=True)
    return sorted(p for p, k in pairs if k == kind)


# --- MiKV -------------------------------------------------------------------------------------------------


def test_mikv_balancer(cpu_backend: Backend) -> None:
    """The method freezes what the recipe's example has: b = [2, 1/4, 1, 1], the logit 19.667 for 19."""
    q = torch.tensor([[8.0, 1, 1, -2], [0, 0, 0, 2]])[None, None]
    k = torch.tensor([[1.0, 16, -1, 2], [2, 0, 1, 0]])[None, None]
    method = MiKV(0.0, group=4, **NOTHING)
    view = view_of([[2]], keys=k, q=q)
    with cpu_backend.active():
        quantizing.remember_query_range(view)
        maps = method.maps(view)
    assert maps is not None
    assert maps.k_scale is not None
    assert maps.k_scale.tolist() == [[[2, 0.25, 1, 1]]]
    assert maps.v_scale is None
    key = through(k[0, 0, :1], "int2", "token", 4, maps.k_scale[0, 0], None)
    torch.testing.assert_close(key, torch.tensor([[7 / 6, 16, -1, 7 / 3]]), atol=2e-3, rtol=2e-3)
    assert float(key[0] @ q[0, 0, 0]) == pytest.approx(19.667, abs=1e-2)


def test_mikv_balancer_is_that_of_the_whole_prompt_and_then_frozen() -> None:
    q, k, v = random_qkv(1, 4, 2, 80, 8)
    q[:, :, 70:] *= 100  # in decode: too late
    seen: list[Any] = []

    class Watch(MiKV):
        def maps(self, view: Any) -> ChannelMaps | None:
            seen.append(super().maps(view))
            return seen[-1]  # type: ignore[no-any-return]

    for chunks in ([64], [30, 34]):
        run(Watch(0.2, every=4, **NOTHING), q, k, v, chunks=chunks, hold=True)
    want = recipes.channel_balancer(q[:, :, :64].abs().amax(2), k[:, :, :64].abs().amax(2))
    assert len(seen) == 2
    assert all(torch.equal(maps.k_scale, want) for maps in seen)


def test_mikv_selection(cpu_backend: Backend) -> None:
    """Half of six tokens: one the newest, two by score."""
    score = torch.tensor([[[0.9, 0.1, 0.5, 0.3, 0.05, 0.2]]])
    method = MiKV(0.5, balance=False, **NOTHING)
    view = view_of([[6]], state={"score": score})
    with cpu_backend.active():
        keep = method.evict(view)
    assert keep is not None
    assert keep.kind is not None
    assert keep.kind.tolist() == [[[0, 1, 0, 1, 1, 0]]]
    assert (keep.count.tolist(), keep.ragged, keep.maps) == ([[6]], False, None)


def test_mikv_scores_what_h2o_does_and_demotes_after_attending() -> None:
    """One token a step, the victim's last step still in full: the plain loop."""
    q, k, v = random_qkv(1, 2, 1, 40, 8)
    method = MiKV(0.5, newest=0.5, balance=False, group=8, every=1, **NOTHING)
    trace = run(method, q, k, v, chunks=[12], page=1)
    keys, high = k.double()[0, 0].clone(), set(range(12))
    score = torch.zeros(40, dtype=torch.float64)
    for t in range(40):
        logits = q.double()[0, :, t] @ keys[: t + 1].mT * 8**-0.5
        score[: t + 1] += logits.softmax(-1).sum(0)
        high.add(t)
        if t < 11:
            continue
        most = (t + 1) // 2
        newest = range(t + 1 - most // 2, t + 1)
        while len(high) > most:
            victim = min(high - set(newest), key=lambda j: (float(score[j]), -j))
            high.remove(victim)
            keys[victim] = through(k[0, 0, victim][None], "int2", "token", 8, None, None)[0].double()
        assert {p for p, kind in zip(*_first(trace, t - 11), strict=True) if kind == 0} == high


def _first(trace: Trace, forward: int) -> tuple[list[int], list[int]]:
    return trace.held[forward][0][0], trace.kinds[forward][0][0]


# --- ZipCache and ZipVL -----------------------------------------------------------------------------------


def probes(wanted: list[int]) -> int:
    """A seed that draws these rows of four, the last one always among them."""
    want = [float(i in wanted) for i in range(4)]
    draws = (scores.probe_weights(4, recent=0.25, random=0.25, seed=seed).tolist() for seed in range(99))
    return next(seed for seed, drawn in enumerate(draws) if drawn == want)


def scored(method: Any, trace: Trace) -> Tensor:
    """The scores of one row, by position."""
    score = method.score(view_of([[4]], state=trace.state))[0, 0, :4]
    return score[torch.tensor(trace.held[-1][0][0]).argsort()]


@pytest.mark.parametrize(
    ("norm", "saliency", "lowest"),
    [
        ("none", [1, 0.5, 0.2, 0.3], [2, 3]),
        ("rows_all", [0.25, 1 / 6, 0.1, 0.3], [1, 2]),
        ("rows_probe", [0.5, 0.25, 0.2, 0.3], [1, 2]),
    ],
)
def test_zipcache_saliency(cpu_backend: Backend, norm: Any, saliency: list[float], lowest: list[int]) -> None:
    """Probes are rows 1 and 3 of the example; half of the tokens are low."""
    method = ZipCache(ratio=0.5, norm=norm, probes=0.25, drawn=0.25, seed=probes([1, 3]), **NOTHING)
    with cpu_backend.active():
        trace = run_rows(method, ROWS)
        torch.testing.assert_close(scored(method, trace), torch.tensor(saliency), atol=1e-6, rtol=1e-5)
    assert low(trace, 2) == lowest
    assert low(trace, 1) == sorted({0, 1, 2, 3} - set(lowest))


@pytest.mark.parametrize(
    ("norm", "saliency"), [("none", [2.5, 0.8, 0.4, 0.3]), ("rows_all", [0.625, 0.8 / 3, 0.2, 0.3])]
)
def test_zipcache_with_all_rows_for_probes(norm: Any, saliency: list[float]) -> None:
    method = ZipCache(ratio=0.5, norm=norm, probes=1.0, drawn=0.0, **NOTHING)
    for chunks in ([4], [2, 2]):
        got = scored(method, run_rows(method, ROWS, chunks=chunks, hold=True))
        torch.testing.assert_close(got, torch.tensor(saliency), atol=1e-6, rtol=1e-5)


X = torch.tensor([[0, 1, 2, -8], [3, -1, 0, 8], [1.5, 2, -2, 4], [-3, 0.5, 1, -4]])


def test_zipcache_grids() -> None:
    """The official compress functions' reconstructions of the example, 4 bits for tokens 0 and 3."""
    for tokens, tier in (([0, 3], "int4"), ([1, 2], "int2")):
        key = through(X[tokens], tier, "channel", -1, None, None)  # type: ignore[arg-type]
        torch.testing.assert_close(key, X[tokens], atol=4e-3, rtol=1e-3)
    scale = recipes.separable_scale(X.abs().amax(0)[None, None])[0, 0]
    high = through(X[[0, 3]], "int4", "token", -1, scale, None)
    low = through(X[[1, 2]], "int2", "token", -1, scale, None)
    want = torch.tensor([[0, 1.2, 2, -8], [-3, 0.5401, 1, -3.9791]])
    step = 0.28284 * 2**0.5
    assert float(high[0, 1]) in (pytest.approx(1.2, abs=5e-3), pytest.approx(1.2 - step, abs=5e-3))
    want[0, 1] = high[0, 1]  # half-way between two codes: a grid in float16 rounds down
    torch.testing.assert_close(high, want, atol=5e-3, rtol=1e-3)
    want = torch.tensor([[2.8577, -1, 0.6667, 8], [0.8165, 2, -2, 4]])
    torch.testing.assert_close(low, want, atol=5e-3, rtol=1e-3)


def test_zipcache_values_are_separable_by_channel() -> None:
    """Whatever becomes of the tiers, the scale is that of all tokens held when a row first quantizes."""
    q, k, v = random_qkv(1, 2, 1, 64, 8)
    method = ZipCache(every=4, **NOTHING)
    maps = method.maps(view_of([[64]], keys=k, values=v))
    assert maps is not None
    want = recipes.separable_scale(ops.channel_stats(v).absmax)
    assert maps.v_scale is not None
    assert torch.equal(maps.v_scale, want)
    assert maps.k_scale is None
    trace = run(method, q, k, v, chunks=[64])
    slots = [i for i, kind in enumerate(trace.kinds[0][0][0]) if kind == 2][:PAGE]
    tokens = [trace.held[0][0][0][i] for i in slots]
    assert trace.values is not None
    back = through(v[0, 0, tokens], "int2", "token", -1, want[0, 0], None)
    assert torch.equal(trace.values[0, 0, slots], back)


@pytest.mark.parametrize(
    ("rows", "tau", "important"),
    [
        (ROWS, 0.8, [0, 3]),
        ([[1], [0.6, 0.4], [0.1, 0.2, 0.7], [0.3, 0.1, 0.1, 0.5]], 0.6, [0, 3]),
        ([[1], [0.6, 0.4], [0.1, 0.2, 0.7], [0.3, 0.1, 0.1, 0.5]], 0.9, [0, 1, 2, 3]),
    ],
)
def test_zipvl(cpu_backend: Backend, rows: list[list[float]], tau: float, important: list[int]) -> None:
    """The count from raw sums, the tokens from normalised ones."""
    with cpu_backend.active():
        trace = run_rows(ZipVL(tau=tau, probes=1.0, drawn=0.0, **NOTHING), rows)
    assert low(trace, 1) == important
    assert low(trace, 2) == sorted({0, 1, 2, 3} - set(important))


def test_zipvl_layers_differ_and_heads_do_not() -> None:
    """A layer that attends to few tokens has few in the better tier; both heads the same ones."""
    _, k, v = random_qkv(1, 4, 2, 64, 16)
    sizes = []
    for sharp in (0.1, 3.0):
        q = sharp * random_qkv(1, 4, 2, 64, 16, seed=1)[0]
        trace = run(ZipVL(tau=0.9, **NOTHING), q, k, v, chunks=[64])
        one, two = (sorted(zip(trace.held[0][0][h], trace.kinds[0][0][h], strict=True)) for h in (0, 1))
        assert one == two
        sizes.append(sum(kind == 1 for _, kind in one))
    assert sizes[0] > sizes[1]


# --- KIVI, QServe, Uniform --------------------------------------------------------------------------------


def test_kivi(cpu_backend: Backend) -> None:
    """Codes of keys by channel [0, 1, 2, 3] and [0, 1, 3, 2]: 2.5 rounds to even."""
    k = torch.tensor([[0, 10, 0, 0], [1, 11, 0, 0], [2, 13, 0, 0], [3, 12.5, 0, 0]])
    spec = KIVI(2, **NOTHING).specs[0]
    assert spec == PageSpec("int2", "int2", "channel", "token", 32, 32)
    back = through(k, spec.k, spec.k_axis, spec.k_group, None, None)
    assert back[:, :2].tolist() == [[0, 10], [1, 11], [2, 13], [3, 12]]
    with cpu_backend.active():
        codes, params = ops.kv_quantize(k[None, None], 2, axis="channel", group=4)
        assert torch.equal(ops.kv_dequantize(codes, params, 2, axis="channel", group=4)[0, 0], back)
    assert params[0, 0, 0, :2].tolist() == [[1, 0], [1, 10]]


def test_kivi_window() -> None:
    """At least the window is exact, and less than a page more."""
    trace = run(KIVI(recent=12, sinks=0, edges=0, every=1))
    for forward, kinds in enumerate(trace.kinds):
        exact = sum(kind == 0 for kind in kinds[0][0])
        assert 12 <= exact < 12 + PAGE
        assert max(trace.held[forward][0][0]) == 63 + forward


def test_qserve_smooths_pairs_of_channels() -> None:
    k = torch.zeros(1, 1, 3, 6)
    k[0, 0, 1] = torch.tensor([4.0, -1, 0, 1, 9, 0])
    maps = QServe().maps(view_of([[3]], keys=k))
    assert maps is not None
    assert maps.k_scale is not None
    assert maps.k_scale[0, 0].tolist() == pytest.approx([1 / 2, 1 / 3, 1, 1 / 2, 1 / 3, 1])
    assert QServe(alpha=0.0).maps(view_of([[3]], keys=k)) is None


def spiked(tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Keys with the large means of four channels that make 4 bits by token collapse."""
    q, k, v = random_qkv(1, 4, 2, tokens, 64)
    k[..., [3, 17, 40, 61]] += torch.tensor([12.0, -9, 15, -7]) * 4
    return 0.3 * q, k, v


def error_of(method: Any, *sides: Tensor) -> float:
    trace = run_policy(method, *sides, chunks=[160], page=16)
    exact = run_policy(Uniform(recent=10**6), *sides, chunks=[160]).output[:, :, 160:]
    return float((trace.output[:, :, 160:] - exact).norm() / exact.norm())


def test_large_means_of_key_channels() -> None:
    """By channel, without the mean, balanced or rotated: all hold where plain grids by token do not."""
    sides, own = spiked(), {"recent": 16, "edges": 0}
    plain = error_of(Uniform(4, k_axis="token", **own), *sides)
    assert plain > 0.25
    assert error_of(Uniform(4, **own), *sides) < 0.2 * plain
    assert error_of(Uniform(4, k_axis="token", center=True, **own), *sides) < 0.2 * plain
    assert error_of(Uniform(4, k_axis="token", balance=True, **own), *sides) < 0.6 * plain
    assert error_of(Uniform(4, k_axis="token", rotate="keys", **own), *sides) < 0.8 * plain
    assert error_of(Uniform(8, **own), *sides) < 0.01


# --- tables and allocators --------------------------------------------------------------------------------


def test_kvtuner_table() -> None:
    table = ((8, 8), (4, 2), (4, 4))
    method = KVTuner(table)
    assert [(f.k, f.v) for f in method.formats] == [("int8", "int8"), ("int4", "int2"), ("int4", "int4")]
    for layer, kind in enumerate((1, 2, 3)):
        trace = run(KVTuner(table, every=4, sinks=0, recent=4), layer=layer, layers=3)
        assert set(trace.kinds[-1][0][0]) == {0, kind}
    with pytest.raises(ValueError, match="KVTuner: table must be of 1 or 2 layers, got 3"):
        run(method, layer=0, layers=2)


def test_best_table_is_the_best_of_all() -> None:
    """Against trying every table."""
    import itertools

    g = torch.Generator().manual_seed(0)
    pairs = ((8, 8), (4, 4), (4, 2), (2, 2))
    errors = [dict(zip(pairs, torch.rand(4, generator=g).tolist(), strict=True)) for _ in range(4)]
    for bits in (2.0, 3.25, 4.0, 5.5):
        tables = [t for t in itertools.product(pairs, repeat=4) if sum(map(sum, t)) <= bits * 8]
        want = min(tables, key=lambda t: sum(e[p] for e, p in zip(errors, t, strict=True)))
        assert best_table(errors, bits) == want
    with pytest.raises(ValueError, match=r"best_table: bits must be >= 2 with these pairs, got 1\.9"):
        best_table(errors, 1.9)


def test_sensitivity_measures_the_output() -> None:
    q, k, v = random_qkv(1, 4, 2, 64, 16)
    k[..., 3] *= 30  # keys matter more
    recorder = Sensitivity(pairs=((8, 8), (2, 8), (8, 2), (2, 2)), page=16, rows=9)
    trace = run_policy(recorder, q, k, v, chunks=[64], layer=2, layers=5)
    assert trace.evicted == []
    found = recorder.errors[2]
    assert found == pair_errors(q[:, :, -9:], k, v, recorder.pairs, scale=0.25, page=16)
    assert found[8, 8] < 0.02 < found[8, 2]
    assert found[2, 8] < found[2, 2]
    assert recorder.table(8) == ((8, 8),)
    with pytest.raises(ValueError, match="Sensitivity: table must be asked for after a prompt"):
        Sensitivity().table(4)


def test_qaq_gives_bits_where_they_are_needed(cpu_backend: Backend) -> None:
    """More for a key of large spread, more for a value that is attended to."""
    q, k, v = random_qkv(1, 1, 1, 48, 8)
    k[:, :, :24] *= 0.05
    q[:, :, -1] = 3 * k[:, :, 30]
    with cpu_backend.active():
        trace = run(QAQ(error=0.2, high=8, **NOTHING), q, k, v, chunks=[48], page=1)
    pairs = dict(zip(range(1, 8), [(8, 8), (8, 4), (4, 8), (4, 4), (4, 2), (2, 4), (2, 2)], strict=True))
    bits = {p: pairs[kind] for p, kind in zip(*_first(trace, 0), strict=True)}
    assert sum(bits[p][0] for p in range(24)) < sum(bits[p][0] for p in range(24, 48))
    mean = sum(b for _, b in bits.values()) / 48
    assert bits[30][1] >= mean
