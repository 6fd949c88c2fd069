"""``topk_select``, ``topp_select`` and ``topk_budget`` on every back end: always the reference's integers."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from backends import Backend, make_backend
from cases_topk import DATA, NAN, TOPK_CASES, TOPK_OPS, TopkCase, scores
from hypothesis import given
from hypothesis import strategies as st
from tokencomp import reference
from torch import Tensor

INF = float("inf")


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(got: Any, want: Any) -> bool:
    got, want = ((t,) if isinstance(t, Tensor) else t for t in (got, want))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


def expected(op: str, *args: Any, **options: Any) -> Any:
    return getattr(reference, op)(*args, **options)


def rows(result: tuple[Tensor, Tensor]) -> list[list[int]]:
    """The kept tokens of each row, after a look at the form of the output."""
    index, count = result
    assert index.dtype == count.dtype == torch.int32
    kept = [row[:n].tolist() for row, n in zip(index, count.tolist(), strict=True)]
    assert all(sorted(set(row)) == row for row in kept)
    assert all((row[n:] == -1).all() for row, n in zip(index, count.tolist(), strict=True))
    return kept


@pytest.mark.parametrize("case", TOPK_CASES, ids=lambda case: case.name)
def test_equals_reference(backend: Backend, case: TopkCase) -> None:
    args, options = case.arguments()
    assert same(backend.run(case.op, *args, **options), expected(case.op, *args, **options))


@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Shapes, ties, masks and protections nobody thought of (CPU and emulator)."""
    draw = data.draw
    r, slots = draw(st.integers(1, 4)), draw(st.integers(0, 150))
    g = generator(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    score = scores(draw(st.sampled_from(DATA)), (r, slots), g).to(dtype)
    k = draw(st.integers(0, slots + 3))
    guards: dict[str, Any] = {name: draw(st.sampled_from((0, 1, 5, slots))) for name in ("head", "tail")}
    if draw(st.booleans()):
        guards["lengths"] = torch.randint(0, slots + 1, (r,), generator=g).int()
    masks: dict[str, Any] = {}
    if draw(st.booleans()):
        masks["keep"] = torch.rand(r, slots, generator=g) < draw(st.sampled_from((0.02, 0.5, 1.0)))
    if draw(st.booleans()):
        masks["k_per_row"] = torch.randint(0, k + 1, (r,), generator=g).int()
    share, least = draw(st.floats(0, 1)), draw(st.integers(0, k))
    floor = draw(st.integers(0, k // r))
    for name in ("cpu", "emu"):
        run = make_backend(name).run
        options = guards | masks
        assert same(run("topk_select", score, k, **options), expected("topk_select", score, k, **options))
        call = ("topp_select", score, share, k)
        assert same(run(*call, min_k=least, **guards), expected(*call, min_k=least, **guards))
        call = ("topk_budget", score[None], k)
        assert same(run(*call, floor=floor), expected(*call, floor=floor))


# --- what the words of the specification say ----------------------------------------------------------------


def test_the_best_ascending(backend: Backend) -> None:
    score = torch.tensor([[0.1, 5.0, -1.0, 3.0, 4.0]])
    assert rows(backend.run("topk_select", score, 3)) == [[1, 3, 4]]
    assert backend.run("topk_select", score, 7)[0].tolist() == [[0, 1, 2, 3, 4, -1, -1]]


def test_ties_go_to_the_lower_index(backend: Backend) -> None:
    assert rows(backend.run("topk_select", torch.ones(1, 9), 4)) == [[0, 1, 2, 3]]
    score = torch.tensor([[1.0, 2, 1, 2, 1, 2]])
    assert rows(backend.run("topk_select", score, 4)) == [[0, 1, 3, 5]]
    assert rows(backend.run("topp_select", score, 0.5, 6)) == [
        [0, 1, 3, 5][1:]
    ]  # 6 of 9 reach a half, 4 do not
    assert backend.run("topk_budget", torch.ones(1, 3, 4), 6).tolist() == [[4, 2, 0]]


def test_zeros_of_both_signs_are_equal(backend: Backend) -> None:
    score = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1e-45]])
    assert rows(backend.run("topk_select", score, 3)) == [[0, 1, 2]]


def test_nan_is_kept_only_to_fill(backend: Backend) -> None:
    score = torch.tensor([[NAN, 1.0, -INF, NAN, -3e38]])
    assert [rows(backend.run("topk_select", score, k))[0] for k in (1, 2, 3, 4)] == [
        [1], [1, 4], [0, 1, 4], [0, 1, 2, 4],
    ]  # fmt: skip
    assert rows(backend.run("topk_select", torch.full((1, 5), NAN), 2)) == [[0, 1]]
    assert backend.run("topk_budget", torch.tensor([[[NAN, 1.0], [-INF, 2.0]]]), 3).tolist() == [[2, 1]]


def test_protected_tokens_count_inside_k(backend: Backend) -> None:
    score = torch.tensor([[9.0, 1, 8, 2, 7, 3, 6, 4, 5, 0]])
    assert rows(backend.run("topk_select", score, 5, head=2, tail=1)) == [[0, 1, 2, 4, 9]]
    keep = torch.zeros(1, 10, dtype=torch.bool)
    keep[0, [3, 9]] = True
    assert rows(backend.run("topk_select", score, 4, tail=1, keep=keep)) == [[0, 2, 3, 9]]


def test_the_tail_is_that_of_the_length(backend: Backend) -> None:
    score = torch.arange(10.0).flip(0).repeat(3, 1)
    kept = rows(backend.run("topk_select", score, 3, tail=2, lengths=torch.tensor([10, 6, 1])))
    assert kept == [[0, 8, 9], [0, 4, 5], [0]]


def test_more_protected_tokens_than_k(backend: Backend) -> None:
    """The best of the protected ones, and no other token however good."""
    score = torch.tensor([[1.0, 2, 99, 98, 3, 1]])
    assert rows(backend.run("topk_select", score, 3, head=2, tail=2)) == [[0, 1, 4]]
    assert rows(backend.run("topk_select", score, 0, head=2)) == [[]]
    assert rows(backend.run("topp_select", score, 1.0, 3, head=2, tail=2)) == [[0, 1, 4]]


def test_topp_counts_protected_mass(backend: Backend) -> None:
    score = torch.tensor([[0.5, 0.125, 0.25, 0.0625, 0.0625]])
    assert rows(backend.run("topp_select", score, 0.6, 5)) == [[0, 2]]
    assert rows(backend.run("topp_select", score, 0.6, 5, tail=1)) == [[0, 2, 4]]
    assert rows(backend.run("topp_select", score, 0.6, 5, head=1)) == [[0, 2]]
    assert rows(backend.run("topp_select", score, 0.5, 5, head=1)) == [[0]]


def test_topp_limits(backend: Backend) -> None:
    score = torch.tensor([[0.5, 0.25, 0.125, 0.125, 0.0, NAN, -3.0]])
    run = backend.run
    assert rows(run("topp_select", score, 0.0, 7)) == [[]]
    assert rows(run("topp_select", score, 0.0, 7, min_k=2)) == [[0, 1]]
    assert rows(run("topp_select", score, 1.0, 7)) == [[0, 1, 2, 3]]  # what has no mass adds nothing
    assert rows(run("topp_select", score, 1.0, 7, min_k=6)) == [[0, 1, 2, 3, 4, 5]]
    assert rows(run("topp_select", score, 1.0, 2)) == [[0, 1]]
    assert rows(run("topp_select", score, 0.75, 7)) == [[0, 1]]  # reached exactly
    assert rows(run("topp_select", score, 0.75000001, 7)) == [[0, 1, 2]]
    assert rows(run("topp_select", torch.zeros(1, 4), 0.5, 4)) == [[]]
    assert rows(run("topp_select", torch.tensor([[1.0, INF, 1.0]]), 0.9, 3)) == [[1]]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("slots", [50, 3000])
def test_topp_share_in_float64(backend: Backend, p: float, slots: int) -> None:
    """Against sums in float64, without the specification's integers: enough mass, not a token too many."""
    score = scores("softmax", (4, slots), generator())
    for row, kept in zip(score.double(), rows(backend.run("topp_select", score, p, slots)), strict=True):
        total, mass = row.sum().item(), row[kept]
        noise = slots * 2.0**-38 * row.max().item() + 1e-12
        assert mass.sum().item() >= p * total - noise
        assert (mass.sum() - mass.min()).item() < p * total + noise
        others = torch.ones(slots, dtype=torch.bool)
        others[kept] = False
        assert mass.min() >= row[others].max()


# --- examples worked by hand from the methods ---------------------------------------------------------------


def test_snapkv_example(backend: Backend) -> None:
    """Window 2, capacity 4: pooled scores of six tokens, then two that are always kept."""
    average = torch.tensor([[0.159636, 0.218846, 0.366999, 0.364661, 0.384140, 0.113173, 0, 0]])
    largest = torch.tensor([[0.368440, 0.368440, 0.812900, 0.812900, 0.812900, 0.236066, 0, 0]])
    assert rows(backend.run("topk_select", average, 4, tail=2)) == [[2, 4, 6, 7]]
    assert rows(backend.run("topk_select", largest, 4, tail=2)) == [[2, 3, 6, 7]]


def test_tova_example(backend: Backend) -> None:
    heads = torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.25], [0.3, 0.1, 0.1, 0.4, 0.1]])
    assert rows(backend.run("topk_select", heads.mean(0, keepdim=True), 3)) == [[0, 1, 3]]


def test_adakv_example(backend: Backend) -> None:
    score = torch.tensor([[[0.4, 0.3, 0.1, 0.05, 0.05], [0.3, 0.02, 0.02, 0.01, 0.01]]])
    raw = backend.run("topk_budget", score, 4)
    assert raw.tolist() == [[3, 1]]
    mixed = {alpha: (raw * (1 - alpha) + int(2 * alpha)).round().int() for alpha in (0, 0.2, 0.5)}
    assert {alpha: caps.tolist() for alpha, caps in mixed.items()} == {
        0: [[3, 1]],
        0.2: [[2, 1]],
        0.5: [[2, 2]],
    }
    assert rows(backend.run("topk_select", score[0], 3, k_per_row=raw[0])) == [[0, 1, 2], [0]]


@pytest.mark.parametrize("data", ["gauss", "few"])
@pytest.mark.parametrize("floor", [0, 3, 12])
def test_budgets_are_one_selection(backend: Backend, data: str, floor: int) -> None:
    """Rows selected with their budgets are the item's selection: exact total, floors, nothing better left."""
    score = scores(data, (2, 5, 61), generator())
    score[0, 1] -= 2  # a poor head
    budget = backend.run("topk_budget", score, 60, floor=floor)
    assert budget.sum(1).tolist() == [60, 60]
    assert int(budget.min()) >= floor
    kept = rows(backend.run("topk_select", score.flatten(0, 1), 61, k_per_row=budget.flatten()))
    for b in range(2):
        rest = [
            score[b, h, [i for i in range(61) if i not in kept[5 * b + h]]].max().item() for h in range(5)
        ]
        loose = [score[b, h, kept[5 * b + h]].min().item() for h in range(5) if budget[b, h] > floor]
        assert max(rest) <= min(loose, default=INF)
    if floor == 0:
        flat = rows(backend.run("topk_select", score.flatten(1), 60))
        assert flat == [[61 * h + i for h in range(5) for i in kept[5 * b + h]] for b in range(2)]


# --- properties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", TOPK_OPS)
def test_lengths_equal_slicing(backend: Backend, op: str) -> None:
    score, lengths = scores("softmax", (4, 90), generator()), [90, 41, 1, 0]
    padded = score.clone()
    for r, n in enumerate(lengths):
        padded[r, n:] = (NAN, INF, 1e30, 7.0)[r]  # never looked at
    if op == "topk_budget":
        together = backend.run(op, padded[None], 50, lengths=torch.tensor([lengths]))
        assert same(together, expected(op, padded[None], 50, lengths=torch.tensor([lengths])))
        assert together.sum() == 50
        return
    args = (0.8, 20) if op == "topp_select" else (20,)
    index, count = backend.run(op, padded, *args, head=2, tail=3, lengths=torch.tensor(lengths))
    for r, n in enumerate(lengths):
        own = backend.run(op, score[r : r + 1, :n], *args, head=2, tail=3)
        assert same((index[r : r + 1], count[r : r + 1]), own)


def test_fewer_are_among_more(backend: Backend) -> None:
    score = scores("few", (2, 300), generator())
    sets = [[set(row) for row in rows(backend.run("topk_select", score, k, tail=4))] for k in (4, 5, 50, 299)]
    for fewer, more in pairwise(sets):
        assert all(a < b for a, b in zip(fewer, more, strict=True))


@pytest.mark.parametrize("slots", [5000, 300007])
@pytest.mark.parametrize("data", ["gauss", "few", "softmax"])
def test_same_for_any_threads(slots: int, data: str) -> None:
    cpu, before, results = make_backend("cpu"), torch.get_num_threads(), []
    score = scores(data, (2, slots), generator())
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            one = (
                cpu.run("topk_select", score[:1], slots // 30, tail=9),
                cpu.run("topk_select", score, slots // 2),
            )
            sums = (cpu.run("topp_select", score[:1], 0.7, slots), cpu.run("topp_select", score, 0.7, slots))
            results.append([*one, *sums, cpu.run("topk_budget", score[None], slots, floor=3)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("op", TOPK_OPS)
def test_same_from_run_to_run_and_inputs_left_alone(backend: Backend, op: str) -> None:
    case = next(c for c in TOPK_CASES if c.op == op and c.lengths and c.work > 10_000)
    args, options = case.arguments()
    copies = [t.clone() for t in (*args, *options.values()) if isinstance(t, Tensor)]
    runs = [backend.run(op, *args, **options) for _ in range(3)]
    assert all(same(run, runs[0]) for run in runs[1:])
    left = [t for t in (*args, *options.values()) if isinstance(t, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(left, copies, strict=True))


def clamped_calls() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Tensor]]]:
    lengths = torch.tensor([-4, 1000], dtype=torch.int32)
    yield "topk_select", (3,), {"lengths": lengths, "k_per_row": torch.tensor([2, 9], dtype=torch.int32)}
    yield "topk_select", (3,), {"k_per_row": torch.tensor([-7, 2], dtype=torch.int32)}
    yield "topp_select", (0.5, 4), {"lengths": lengths}
    yield "topk_budget", (5,), {"lengths": lengths[None]}


@pytest.mark.parametrize("call", list(clamped_calls()), ids=lambda call: f"{call[0]}-{'-'.join(call[2])}")
def test_kernels_clamp(backend: Backend, call: tuple[str, tuple[Any, ...], dict[str, Tensor]]) -> None:
    """Below the wrapper's checks a bad value is the nearest good one, never an access outside the tensors."""
    op, args, options = call
    score = scores("gauss", (2, 9), generator())
    score = score[None] if op == "topk_budget" else score
    assert same(backend.run_kernel(op, score, *args, **options), expected(op, score, *args, **options))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8], ids=str)
def test_side_arrays_of_other_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    score, keep = scores("gauss", (2, 9), generator()), torch.zeros(9, 2, dtype=torch.bool)
    keep[3] = True
    options = {"lengths": torch.tensor([9, 5]), "k_per_row": torch.tensor([2, 4]), "keep": keep.T}
    want = expected("topk_select", score, 4, **options)
    options |= {name: options[name].to(dtype) for name in ("lengths", "k_per_row")}
    assert same(backend.run("topk_select", score, 4, **options), want)
