"""The merge operators on every back end: exact where arithmetic is exact, by yardstick elsewhere."""

import math
from typing import Any

import pytest
import torch
from backends import Backend, make_backend
from cases_merge import ENERGY_CASES, KINDS, MATCH_CASES, MATCH_EXACT, Call, EnergyCase, MatchCase
from cases_merge_map import MAP_CASES, MERGE_CASES, MODES, ORDERS, MapCase, MergeCase
from hypothesis import given
from hypothesis import strategies as st
from merge_yardstick import assert_energies, assert_matches, assert_merged, run_reference
from tokencomp import reference, token_map
from torch import Tensor

by_name = {"ids": lambda case: case.name}


@pytest.mark.parametrize("case", MATCH_CASES, **by_name)
def test_match_agrees_with_float64(backend: Backend, case: MatchCase) -> None:
    call = case.inputs()
    assert_matches(call, *backend.run("cosine_match", *call.arguments, **call.options))


@pytest.mark.parametrize("case", MATCH_EXACT, **by_name)
def test_match_equals_reference_bit_for_bit(backend: Backend, case: MatchCase) -> None:
    call = case.inputs()
    value, index = backend.run("cosine_match", *call.arguments, **call.options)
    want_value, want_index = run_reference("cosine_match", call, dtype=torch.float32)
    assert torch.equal(value, want_value)
    assert torch.equal(index, want_index)


@pytest.mark.parametrize("case", ENERGY_CASES, **by_name)
def test_energy_agrees_with_float64(backend: Backend, case: EnergyCase) -> None:
    call = case.inputs()
    assert_energies(call, backend.run("energy_score", *call.arguments, **call.options))


@pytest.mark.parametrize("case", MAP_CASES, **by_name)
def test_map_equals_reference(backend: Backend, case: MapCase) -> None:
    call = case.inputs()
    got = backend.run("bipartite_map", *call.arguments, **call.options)
    assert got.dtype == torch.int32
    assert torch.equal(got, run_reference("bipartite_map", call))


@pytest.mark.parametrize("case", MERGE_CASES, **by_name)
def test_merge_agrees_with_float64(backend: Backend, case: MergeCase) -> None:
    call = case.inputs()
    y, size = backend.run("merge_tokens", *call.arguments, **call.options)
    assert_merged(call, y, size)
    if case.mode in ("amax", "drop"):
        want, _ = run_reference("merge_tokens", call)
        assert torch.equal(y.nan_to_num(nan=7.0), want.to(y.dtype).nan_to_num(nan=7.0))


# --- shapes, ties and masks nobody thought of --------------------------------------------------------------


@given(st.data())
def test_match_lattices(data: st.DataObject) -> None:
    case = MatchCase(
        B=data.draw(st.integers(1, 3)),
        Na=data.draw(st.integers(1, 80)),
        Nb=data.draw(st.integers(1, 80)),
        C=data.draw(st.sampled_from((1, 4, 16, 64))),
        dtype=data.draw(st.sampled_from(("float32", "float16", "bfloat16"))),
        Ka=data.draw(st.integers(0, 40)),
        Kb=data.draw(st.integers(0, 90)),
        weighted=data.draw(st.booleans()),
        band=data.draw(st.integers(-1, 30)),
        protect=(data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))),
        masked=data.draw(st.booleans()),
        min_similarity=data.draw(st.sampled_from((float("-inf"), 0.0, 0.5))),
        top=data.draw(st.sampled_from((1, 1, 2, 32))),
        data="lattice",
    )
    call = case.inputs()
    want = run_reference("cosine_match", call, dtype=torch.float32)
    for name in ("cpu", "emu"):
        got = make_backend(name).run("cosine_match", *call.arguments, **call.options)
        assert torch.equal(got[0], want[0]), name
        assert torch.equal(got[1], want[1]), name


@given(st.data())
def test_maps_and_merges(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 90))
    case = MapCase(
        B=data.draw(st.integers(1, 3)),
        N=n,
        r=data.draw(st.integers(0, n)),
        prefix=data.draw(st.integers(0, 6)),
        order=data.draw(st.sampled_from(ORDERS)),
        ties=data.draw(st.booleans()),
        holes=data.draw(st.sampled_from((0.0, 0.3))),
    )
    call = case.inputs()
    want = run_reference("bipartite_map", call)
    out_tokens = token_map.merged_count(n, case.r, prefix=case.prefix)
    x = torch.randn(case.B, n, data.draw(st.integers(1, 40)))
    options = {"mode": data.draw(st.sampled_from(MODES)), "size": torch.rand(case.B, n) + 0.5}
    for name in ("cpu", "emu"):
        backend = make_backend(name)
        assert torch.equal(backend.run("bipartite_map", *call.arguments, **call.options), want), name
        assert_merged(
            Call((x, want, out_tokens), options),
            *backend.run("merge_tokens", x, want, out_tokens, **options),
        )


# --- worked examples: six tokens on a circle, x = 1..6 ------------------------------------------------------

ANGLES = torch.tensor([0, 10, 80, 90, 12, 85]) * math.pi / 180
METRIC = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=-1)[None]
X = torch.arange(1, 7).float()[None, :, None]


def tome(
    backend: Backend, x: Tensor, metric: Tensor, r: int, prefix: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    protect = {"protect_a": (prefix + 1) // 2, "protect_b": prefix // 2}
    value, index = backend.run("cosine_match", metric[:, 0::2], metric[:, 1::2], **protect)
    mapped = backend.run("bipartite_map", value, index, r, x.shape[1], prefix=prefix)
    count = token_map.merged_count(x.shape[1], r, prefix=prefix)
    return mapped, *backend.run("merge_tokens", x, mapped, count, **options)


def listed(t: Tensor) -> list[float]:
    return t.flatten().tolist()


def test_example_tome_match(backend: Backend) -> None:
    value, index = backend.run("cosine_match", METRIC[:, 0::2], METRIC[:, 1::2])
    torch.testing.assert_close(value, torch.tensor([[0.9848, 0.9962, 0.9994]]), rtol=0, atol=5e-5)
    assert index.tolist() == [[0, 2, 0]]


@pytest.mark.parametrize(
    ("r", "prefix", "x", "size", "mapped", "back"),
    [
        (1, 0, [3, 1, 3.5, 4, 6], [1, 1, 2, 1, 1], [1, 2, 0, 3, 2, 4], [1, 3.5, 3, 4, 3.5, 6]),
        (1, 1, [1, 3, 3.5, 4, 6], [1, 1, 2, 1, 1], [0, 2, 1, 3, 2, 4], [1, 3.5, 3, 4, 3.5, 6]),
        (2, 0, [1, 3.5, 4, 4.5], [1, 2, 1, 2], [0, 1, 3, 2, 1, 3], [1, 3.5, 4.5, 4, 3.5, 4.5]),
        (2, 1, [1, 3.5, 4, 4.5], [1, 2, 1, 2], [0, 1, 3, 2, 1, 3], [1, 3.5, 4.5, 4, 3.5, 4.5]),
    ],
)
def test_example_tome(
    backend: Backend,
    r: int,
    prefix: int,
    x: list[float],
    size: list[float],
    mapped: list[int],
    back: list[float],
) -> None:
    got_map, y, got_size = tome(backend, X, METRIC, r, prefix)
    assert listed(got_map) == mapped
    assert listed(y) == x
    assert listed(got_size) == size
    assert listed(token_map.unmerge(y, got_map)) == back


def test_example_tome_two_steps(backend: Backend) -> None:
    first, y, size = tome(backend, X, METRIC, 1, 0)
    metric, _ = backend.run("merge_tokens", METRIC, first, 5)
    second, y, size = tome(backend, y, metric, 1, 0, size=size)
    assert listed(y) == [3, 3.5, 1, 5]
    assert listed(size) == [1, 2, 1, 2]
    composed = token_map.compose(first, second)
    assert listed(composed) == [2, 1, 0, 3, 1, 3]
    assert listed(token_map.group_sizes(composed, 4)) == [1, 2, 1, 2]
    assert token_map.source_matrix(composed, 4).sum(-1).tolist() == [[1, 2, 1, 2]]


def pitome(
    backend: Backend, order: Tensor, a: Tensor, b: Tensor, rest: Tensor | None, r: int, kind: str
) -> list[list[float]]:
    value, index = backend.run("cosine_match", METRIC, METRIC, a_index=a, b_index=b)
    mapped = backend.run(
        "bipartite_map", value, index, r, 6, prefix=0, order=kind, a_tokens=a, b_tokens=b, rest_tokens=rest
    )
    return [listed(t) for t in backend.run("merge_tokens", X, mapped, 6 - r)]


def test_example_pitome(backend: Backend) -> None:
    energy = backend.run("energy_score", METRIC, 0.5)
    want = torch.tensor([[0.0755, 0.1409, 0.1564, 0.0926, 0.1531, 0.1254]])
    torch.testing.assert_close(energy, want, rtol=0, atol=1e-4)
    order = energy.argsort(descending=True)
    assert order.tolist() == [[2, 4, 1, 5, 3, 0]]
    two = pitome(backend, order, order[:, :4:2], order[:, 1:4:2], order[:, 4:], 2, "tome")
    assert two == [[4, 1, 3.5, 4.5], [1, 1, 2, 2]]
    one = pitome(backend, order, order[:, :2:2], order[:, 1:2:2], order[:, 2:], 1, "tome")
    assert one == [[2, 6, 4, 1, 4], [1, 1, 1, 1, 2]]
    bsm = pitome(backend, order, order[:, 0::2], order[:, 1::2], None, 2, "similarity")
    assert bsm == [[4, 3.5, 4.5, 1], [1, 2, 2, 1]]


def test_example_pitome_text(backend: Backend) -> None:
    energy = backend.run("energy_score", METRIC, 0.5, kind="gauss")
    want = torch.tensor([[0.4758, 0.5331, 0.5496, 0.4887, 0.5464, 0.5172]])
    torch.testing.assert_close(energy, want, rtol=0, atol=1e-4)
    order = energy.argsort(descending=True)
    y, _ = pitome(backend, order, order[:, :2], order[:, 2:4], order[:, 4:], 2, "tome")
    assert y == [4, 1, 3.5, 4.5]


def test_example_paper_energy_jumps_at_the_margin(backend: Backend) -> None:
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    energy = backend.run("energy_score", x, 0.5, kind="paper", alpha=2.0)
    far = 2 * (math.exp(-0.5) - 1)
    torch.testing.assert_close(energy, torch.tensor([[(2 + far) / 3, (2 + far) / 3, (1 + 2 * far) / 3]]))


def test_example_mlerp(backend: Backend) -> None:
    """ToFu: the mean of (3, 4) and (1, 0) stretched to length 5."""
    x = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    y, size = backend.run("merge_tokens", x, torch.tensor([[0, 0]]), 1, mode="mlerp")
    torch.testing.assert_close(y, torch.full((1, 1, 2), 5 / math.sqrt(2)))
    assert size.tolist() == [[2]]


def test_example_d2o_max_cosine(backend: Backend) -> None:
    """Kept keys e1, e2; evicted (.8, .6) and (.6, .8): best cosines .8 and .8; and the zero class above."""
    kept, gone = torch.eye(2)[None], torch.tensor([[[0.8, 0.6], [0.6, 0.8]]])
    value, index = backend.run("cosine_match", gone, kept)
    torch.testing.assert_close(value, torch.tensor([[0.8, 0.8]]))
    assert index.tolist() == [[0, 1]]
    value, index = backend.run("cosine_match", gone, kept, min_similarity=0.9)
    torch.testing.assert_close(value, torch.tensor([[0.8, 0.8]]))
    assert index.tolist() == [[-1, -1]]
    mapped = backend.run(
        "bipartite_map",
        value,
        index,
        2,
        4,
        prefix=0,
        a_tokens=torch.tensor([[2, 3]]),
        b_tokens=torch.tensor([[0, 1]]),
    )
    assert mapped.tolist() == [[0, 1, -1, -1]]  # the zero class is dropped


def test_example_distillation_token(backend: Backend) -> None:
    """ToMe with both tokens: [CLS, DIST, the rest of A, the rest of B]."""
    value = torch.tensor([[-math.inf, 0.1, 0.9, 0.2]])
    index = torch.tensor([[-1, 3, 1, 2]])
    mapped = backend.run("bipartite_map", value, index, 1, 8, distill=True)
    assert mapped.tolist() == [[0, 1, 2, 4, 4, 5, 3, 6]]


def test_half_cosine_by_second_features(backend: Backend) -> None:
    """(1 + cos) / 2, as MCTF ranks, is a two-feature match with constant second features."""
    g = torch.Generator().manual_seed(1)
    a, b, weight = (
        torch.randn(2, 20, 9, generator=g),
        torch.randn(2, 30, 9, generator=g),
        torch.rand(2, 30, generator=g),
    )
    ones = [torch.ones(2, n, 1) for n in (20, 30)]
    value, index = backend.run("cosine_match", a, b, a2=ones[0], b2=ones[1], alpha=0.5, b_weight=weight)
    half = (1 + torch.cosine_similarity(a[:, :, None], b[:, None], dim=-1)) / 2 * weight[:, None]
    torch.testing.assert_close(value, half.amax(-1))
    assert torch.equal(index.long(), half.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_energy_by_definition(kind: str) -> None:
    def f(cosine: float, margin: float, alpha: float) -> float:
        if kind == "gauss":
            sigma = 1 - margin
            return math.exp(-((1 - cosine) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        if cosine >= margin:
            return cosine if kind == "paper" else cosine - margin
        return alpha * (math.exp(cosine - margin) - 1)

    x = torch.randn(1, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cosines = torch.cosine_similarity(x[0, :, None], x[0, None], dim=-1).tolist()
    want = [sum(f(c, 0.2, 0.7) for c in row) / 9 for row in cosines]
    got = reference.energy_score(x, 0.2, alpha=0.7, kind=kind)
    assert got[0].tolist() == pytest.approx(want, abs=1e-12)
