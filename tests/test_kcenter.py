"""``kcenter_greedy`` on every back end: exact where arithmetic is exact, by yardstick elsewhere."""

import itertools
from dataclasses import replace

import pytest
import torch
from backends import Backend
from cases import FIRSTS, KCENTER_CASES, KCENTER_EXACT, METRICS, OBJECTIVES, Inputs, KCenterCase, lattice
from hypothesis import given
from hypothesis import strategies as st
from tokencomp import reference
from yardstick import assert_agrees

INF = float("inf")
by_name = {"ids": lambda case: case.name}


def case_of(**changes: object) -> KCenterCase:
    return replace(KCenterCase(B=2, N=61, C=19, k=17), **changes)


def gauss(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("case", KCENTER_EXACT, **by_name)
def test_equals_reference_bit_for_bit(backend: Backend, case: KCenterCase) -> None:
    call = case.inputs()
    index, value = backend.kcenter(call.x, call.k, **call.options)
    want_index, want_value = reference.kcenter_greedy(call.x, call.k, **call.options, dtype=torch.float32)
    assert torch.equal(index, want_index)
    assert torch.equal(value, want_value)


@pytest.mark.parametrize("case", KCENTER_CASES, **by_name)
def test_agrees_with_float64(backend: Backend, case: KCenterCase) -> None:
    call = case.inputs()
    assert_agrees(call, *backend.kcenter(call.x, call.k, **call.options))


@given(st.data())
def test_lattice_shapes(data: st.DataObject) -> None:
    """Shapes, ties and raggedness nobody thought of, on data where the answer is exact (CPU and emulator)."""
    from backends import make_backend

    metric = data.draw(st.sampled_from(METRICS))
    channels = data.draw(st.sampled_from((1, 4, 16, 64)))
    batch, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, n))
    options: dict[str, object] = {"metric": metric, "objective": data.draw(st.sampled_from(OBJECTIVES))}
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = lattice((batch, n, channels), metric, g)
    options["first"] = data.draw(st.sampled_from(FIRSTS[:2]))  # a mean is exact only for powers of two
    if data.draw(st.booleans()):
        options["lengths"] = torch.randint(0, n + 1, (batch,), generator=g)
    if data.draw(st.booleans()):
        options["weight"] = torch.randint(0, 4, (batch, n), generator=g).float() / 2
        options["first"] = "index0"
    want = reference.kcenter_greedy(x, k, **options, dtype=torch.float32)
    for name in ("cpu", "emu"):
        got = make_backend(name).kcenter(x, k, **options)
        assert torch.equal(got[0], want[0]), name
        assert torch.equal(got[1], want[1]), name


# --- properties -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("metric", METRICS)
def test_permuting_tokens_permutes_picks(backend: Backend, objective: str, metric: str) -> None:
    x, k = gauss(2, 53, 21), 20
    order = torch.randperm(53, generator=torch.Generator().manual_seed(3))
    index, _ = backend.kcenter(x, k, objective=objective, metric=metric)
    permuted, _ = backend.kcenter(x[:, order], k, objective=objective, metric=metric)
    assert torch.equal(order[permuted.long()], index.long())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cosine_ignores_norms(backend: Backend, objective: str) -> None:
    x = gauss(2, 40, 33)
    scale = 2.0 ** torch.randint(-8, 9, (2, 40, 1), generator=torch.Generator().manual_seed(5))
    plain, scaled = (backend.kcenter(t, 15, objective=objective) for t in (x, x * scale))
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[1], scaled[1])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("metric", METRICS)
def test_fewer_picks_are_a_prefix(backend: Backend, objective: str, metric: str) -> None:
    """Few picks and many take different paths through the kernels. Those of the CPU round alike."""
    options = {"objective": objective, "metric": metric}
    x = gauss(2, 96, 24)
    index, value = backend.kcenter(x, 96, **options)
    for k in (1, 2, 5, 40):
        fewer = backend.kcenter(x, k, **options)
        assert torch.equal(fewer[0], index[:, :k])
        assert backend.name != "cpu" or torch.equal(fewer[1], value[:, :k])
        assert_agrees(Inputs(x, k, options), *fewer)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("first", FIRSTS)
def test_all_tokens_is_a_permutation(backend: Backend, objective: str, metric: str, first: str) -> None:
    index, value = backend.kcenter(gauss(3, 45, 10), 45, objective=objective, metric=metric, first=first)
    assert torch.equal(index.sort(dim=1).values, torch.arange(45, dtype=torch.int32).expand(3, 45))
    assert not value.isnan().any()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("first", FIRSTS)
def test_radius_is_at_most_twice_the_optimum(backend: Backend, metric: str, first: str) -> None:
    """Gonzalez' bound, against all subsets; cosine picks by the chord, the metric that they follow."""
    for n, k in ((7, 2), (9, 3), (10, 4)):
        x = gauss(6, n, 3)
        index, _ = backend.kcenter(x, k, metric=metric, first=first)
        points = torch.nn.functional.normalize(x.double(), dim=-1) if metric == "cosine" else x.double()
        for b in range(6):
            distance = torch.cdist(points[b], points[b])
            best = min(float(distance[list(s)].amin(0).max()) for s in itertools.combinations(range(n), k))
            radius = float(distance[index[b].long()].amin(0).max())
            assert best <= radius * (1 + 1e-12)
            assert radius <= 2 * best


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("first", FIRSTS)
def test_value_is_the_covering_radius(backend: Backend, metric: str, first: str) -> None:
    """Without weights value[:, j] is the largest distance of any token left to the j picks before it."""
    x, k = gauss(2, 50, 16), 12
    index, value = backend.kcenter(x, k, metric=metric, first=first)
    exact = reference.replay(x, index, metric=metric, first=first)
    radius = exact.values.nan_to_num(nan=-INF).amax(-1)
    torch.testing.assert_close(value[:, 1:].double(), radius[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("first", FIRSTS)
def test_lengths_equal_slicing(backend: Backend, objective: str, first: str) -> None:
    x, lengths = gauss(4, 48, 20), [48, 31, 9, 1]
    x[2, 9:] = float("nan")  # padding is never looked at
    x[3, 1:] = 1e30
    options = {"objective": objective, "first": first}
    index, value = backend.kcenter(x, 20, **options, lengths=torch.tensor(lengths))
    for b, n in enumerate(lengths):
        k, item = min(n, 20), x[b : b + 1, :n]
        own = backend.kcenter(item, k, **options)
        assert torch.equal(index[b : b + 1, :k], own[0])
        assert backend.name != "cpu" or torch.equal(value[b : b + 1, :k], own[1])
        assert_agrees(Inputs(item, k, options), index[b : b + 1, :k], value[b : b + 1, :k])
        assert (index[b, n:] == -1).all()
        assert (value[b, n:] == -INF).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("metric", METRICS)
def test_batch_equals_items(backend: Backend, objective: str, metric: str) -> None:
    """One item and many may take different paths through the kernels. Those of the CPU round alike."""
    call = case_of(B=9, objective=objective, metric=metric, weighted=True).inputs()
    index, value = backend.kcenter(call.x, call.k, **call.options)
    for b in range(9):
        options = {**call.options, "weight": call.options["weight"][b : b + 1]}
        item = Inputs(call.x[b : b + 1], call.k, options)
        own = backend.kcenter(item.x, item.k, **options)
        assert torch.equal(index[b : b + 1], own[0])
        assert backend.name != "cpu" or torch.equal(value[b : b + 1], own[1])
        assert_agrees(item, *own)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "shape", [(1, 701, 33, 9), (1, 300, 17, 120), (5, 90, 40, 30), (2, 3000, 64, 400)], ids=str
)
def test_bit_identical_for_any_threads(objective: str, metric: str, shape: tuple[int, int, int, int]) -> None:
    from backends import make_backend

    cpu, (batch, n, channels, k) = make_backend("cpu"), shape
    x, before = gauss(batch, n, channels), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.kcenter(x, k, objective=objective, metric=metric))
    finally:
        torch.set_num_threads(before)
    for index, value in results[1:]:
        assert torch.equal(index, results[0][0])
        assert torch.equal(value, results[0][1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bit_identical_from_run_to_run(backend: Backend, objective: str) -> None:
    x = gauss(3, 130, 40)
    runs = [backend.kcenter(x, 30, objective=objective) for _ in range(3)]
    for index, value in runs[1:]:
        assert torch.equal(index, runs[0][0])
        assert torch.equal(value, runs[0][1])


def test_inputs_are_left_alone(backend: Backend) -> None:
    call = case_of(weighted=True, seeds=2, lengths=(61, 30)).inputs()
    copies = (
        call.x.clone(),
        {key: v.clone() for key, v in call.options.items() if isinstance(v, torch.Tensor)},
    )
    backend.kcenter(call.x, call.k, **call.options)
    assert torch.equal(call.x, copies[0])
    assert all(torch.equal(call.options[key], v) for key, v in copies[1].items())


# --- unusual tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("first", FIRSTS)
def test_non_finite_rows_come_last(backend: Backend, objective: str, first: str) -> None:
    x = gauss(1, 12, 8)
    x[0, 0, 3], x[0, 5, 0], x[0, 7] = float("nan"), INF, 3e38
    index, value = backend.kcenter(x, 12, objective=objective, first=first)
    clean = [i for i in range(12) if i not in (0, 5, 7)]
    without = backend.kcenter(x[:, clean], 9, objective=objective, first=first)
    assert torch.equal(index[0, :9], torch.tensor(clean, dtype=torch.int32)[without[0][0].long()])
    assert torch.equal(value[0, :9], without[1][0])
    assert index[0, 9:].tolist() == [0, 5, 7]
    assert (value[0, 9:] == -INF).all()


def test_zero_rows_are_similar_to_nothing(backend: Backend) -> None:
    x = torch.zeros(1, 4, 4)
    x[0, 1, 0] = x[0, 3, 0] = 1.0
    index, value = backend.kcenter(x, 4, first="index0")
    assert index.tolist() == [[0, 1, 2, 3]]  # distance 1 from everything; the last equals token 1
    assert value.tolist() == [[INF, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("size", [1e-18, 2e-19, 5e-20, 1e-20, 1e-30])
def test_tiny_rows_count_or_are_zero(backend: Backend, size: float) -> None:
    """A square sum below the normal range of float32 means a zero row; above it the direction counts."""
    x = size * torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]])
    index, value = backend.kcenter(x, 4, first="index0")
    counts = size * size >= torch.finfo(torch.float32).tiny
    assert index.tolist() == ([[0, 3, 2, 1]] if counts else [[0, 1, 2, 3]])
    want = torch.tensor([[2.0, 1.0, 0.2]]) if counts else torch.ones(1, 3)
    assert torch.allclose(value[:, 1:], want, rtol=0, atol=1e-5)


def test_duplicates_are_picked_once_and_last(backend: Backend) -> None:
    x = gauss(1, 6, 8).repeat(1, 3, 1)
    index, _ = backend.kcenter(x, 18, first="index0", metric="l2")
    assert sorted(index[0].tolist()) == list(range(18))
    assert sorted(index[0, :6].tolist()) == list(range(6))
    assert index[0, 6:].tolist() == list(range(6, 18))


def test_single_token_and_empty_batch(backend: Backend) -> None:
    index, value = backend.kcenter(torch.ones(2, 1, 3), 1)
    assert index.tolist() == [[0], [0]]
    assert value.tolist() == [[INF], [INF]]
    _, total = backend.kcenter(torch.ones(2, 1, 3), 1, objective="max_sum")
    assert total.tolist() == [[0.0], [0.0]]
    index, value = backend.kcenter(torch.ones(0, 5, 3), 4)
    assert index.shape == value.shape == (0, 4)
    assert index.dtype == torch.int32


def test_more_picks_than_tokens_leaves_holes(backend: Backend) -> None:
    index, value = backend.kcenter(gauss(3, 6, 4), 5, lengths=torch.tensor([6, 2, 0]))
    assert (index[0] >= 0).all()
    assert sorted(index[1, :2].tolist()) == [0, 1]
    assert (index[1, 2:] == -1).all()
    assert (index[2] == -1).all()
    assert (value[1, 2:] == -INF).all()
    assert (value[2] == -INF).all()


@pytest.mark.parametrize("seed", [[9, 4], [-1, 4], [4, 4], [7, 7], [2, 4]], ids=str)
def test_kernel_skips_seeds_it_cannot_take(backend: Backend, seed: list[int]) -> None:
    """Below the wrapper's checks a bad seed is a greedy pick instead, never an access outside the tokens."""
    x = gauss(1, 9, 5)
    x[0, 2] = float("nan")
    given_seed = torch.tensor([seed], dtype=torch.int32)
    lengths = torch.tensor([7], dtype=torch.int32)
    index, _ = backend.kernel(x, 4, seed=given_seed, lengths=lengths)
    want, _ = reference.kcenter_greedy(x, 4, seed=given_seed, lengths=lengths)
    assert torch.equal(index, want)


def test_kernel_clamps_lengths(backend: Backend) -> None:
    x = gauss(2, 9, 5)
    index, _ = backend.kernel(x, 3, lengths=torch.tensor([-4, 1000], dtype=torch.int32))
    assert (index[0] == -1).all()
    assert torch.equal(index[1], backend.kcenter(x[1:], 3)[0][0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8], ids=str)
def test_side_arrays_of_other_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    x, k = gauss(2, 9, 5), 4
    seed, lengths, weight = torch.tensor([[1], [3]]), torch.tensor([9, 6]), torch.arange(18).reshape(9, 2).T
    want = backend.kcenter(x, k, seed=seed.int(), lengths=lengths.int(), weight=weight.float().contiguous())
    got = backend.kcenter(x, k, seed=seed.to(dtype), lengths=lengths.to(dtype), weight=weight.double())
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
