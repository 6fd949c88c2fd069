"""What must hold of matches, maps and merges whatever the numbers are."""

import pytest
import torch
from backends import Backend, make_backend
from cases_merge import MatchCase
from cases_merge_map import MODES, ORDERS
from merge_yardstick import assert_energies, assert_matches, assert_merged
from tokencomp import ops, reference, token_map
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gauss(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


def mapped(
    backend: Backend, metric: Tensor, r: int, prefix: int = 1, order: str = "tome"
) -> tuple[Tensor, int]:
    protect = {"protect_a": (prefix + 1) // 2, "protect_b": prefix // 2}
    value, index = backend.run("cosine_match", metric[:, 0::2], metric[:, 1::2], **protect)
    got = backend.run("bipartite_map", value, index, r, metric.shape[1], prefix=prefix, order=order)
    return got, token_map.merged_count(metric.shape[1], r, prefix=prefix)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_map_is_surjective_and_keeps_the_prefix(backend: Backend, order: str, prefix: int) -> None:
    got, count = mapped(backend, gauss(3, 50, 16), 12, prefix, order)
    assert torch.equal(got[:, :prefix], token_map.identity(3, prefix))
    sizes = token_map.group_sizes(got, count)
    assert bool((sizes >= 1).all())
    assert sizes.sum(1).tolist() == [50] * 3
    assert sizes[:, :prefix].eq(1).all()
    if order == "position":
        first = token_map.source_matrix(got, count).float().argmax(-1)
        alone = sizes == 1
        for b in range(3):
            assert bool((first[b][alone[b]].diff() > 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_sum_to_the_tokens(backend: Backend, dtype: torch.dtype) -> None:
    x = gauss(2, 65, 24).to(dtype)
    size = torch.ones(2, 65)
    whole = token_map.identity(2, 65)
    for r in (20, 15, 9):
        got, count = mapped(backend, x, r)
        x, size = backend.run("merge_tokens", x, got, count, size=size)
        whole = token_map.compose(whole, got)
        assert size.sum(1).tolist() == [65, 65]
        assert torch.equal(size, token_map.group_sizes(whole, count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["mean", "amax", "drop"])
def test_constants_survive(backend: Backend, mode: str, dtype: torch.dtype) -> None:
    x = gauss(2, 1, 33).to(dtype).expand(2, 40, 33).contiguous()
    got, count = mapped(backend, gauss(2, 40, 8), 15)
    y, _ = backend.run("merge_tokens", x, got, count, mode=mode, size=torch.ones(2, 40))
    torch.testing.assert_close(
        token_map.unmerge(y, got), x, rtol=2e-7 if dtype == torch.float32 else 0, atol=0
    )


@pytest.mark.parametrize("mode", MODES)
def test_no_merge_is_the_identity(backend: Backend, mode: str) -> None:
    x = gauss(2, 30, 17)
    got, count = mapped(backend, x, 0, order="position")
    y, size = backend.run("merge_tokens", x, got, count, mode=mode)
    assert count == 30
    assert torch.equal(y, x)
    assert bool((size == 1).all())


def test_duplicates_merge_without_loss(backend: Backend) -> None:
    """CLS and eight pairs of equal neighbours: each pair becomes one token of size 2."""
    pairs = gauss(1, 8, 32).repeat_interleave(2, dim=1)
    x = torch.cat([gauss(1, 17, 32)[:, 16:], pairs], dim=1)
    got, count = mapped(backend, x, 8)
    y, size = backend.run("merge_tokens", x, got, count)
    assert size.tolist() == [[1] + [2] * 8]
    torch.testing.assert_close(token_map.unmerge(y, got), x)


def test_composition_is_one_merge(backend: Backend) -> None:
    """Two weighted merges equal one by the composed map."""
    x = gauss(2, 41, 19)
    first, count = mapped(backend, x, 12)
    y, size = backend.run("merge_tokens", x, first, count)
    second, last = mapped(backend, y, 9)
    twice, size = backend.run("merge_tokens", y, second, last, size=size)
    once, whole = backend.run("merge_tokens", x, token_map.compose(first, second), last)
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-5)
    assert torch.equal(size, whole)


def test_dropped_tokens_stay_dropped() -> None:
    first, then = torch.tensor([[0, -1, 1, 2]]), torch.tensor([[-1, 0, 0]])
    assert token_map.compose(first, then).tolist() == [[-1, -1, 0, 0]]
    y = torch.tensor([[[5.0]]])
    assert token_map.unmerge(y, token_map.compose(first, then)).flatten().tolist() == [0, 0, 5, 5]
    assert token_map.group_sizes(first, 3, torch.tensor([[1.0, 9.0, 2.0, 3.0]])).tolist() == [[1, 2, 3]]


def test_batch_equals_items(backend: Backend) -> None:
    """Items of a batch, in any order, get the bits they get alone; so do splits of the columns (B = 1)."""
    a, b, x = gauss(5, 67, 24), gauss(5, 70, 24), gauss(5, 67, 9)
    value, index = backend.run("cosine_match", a, b)
    energy = backend.run("energy_score", a, 0.3)
    order = [3, 0, 4, 1, 2]
    shuffled = backend.run("cosine_match", a[order], b[order])
    assert torch.equal(shuffled[0], value[order])
    assert torch.equal(shuffled[1], index[order])
    for k in range(5):
        alone = backend.run("cosine_match", a[k : k + 1], b[k : k + 1])
        assert torch.equal(alone[0], value[k : k + 1])
        assert torch.equal(alone[1], index[k : k + 1])
        torch.testing.assert_close(
            backend.run("energy_score", a[k : k + 1], 0.3), energy[k : k + 1], rtol=1e-6, atol=1e-6
        )
    merged_map, count = mapped(backend, x, 20)
    y, _ = backend.run("merge_tokens", x, merged_map, count)
    alone, _ = backend.run("merge_tokens", x[2:3], merged_map[2:3], count)
    assert torch.equal(alone, y[2:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_identical_for_any_threads(dtype: torch.dtype) -> None:
    cpu, before = make_backend("cpu"), torch.get_num_threads()
    a, b, x = gauss(1, 700, 64).to(dtype), gauss(1, 650, 64).to(dtype), gauss(3, 901, 300).to(dtype)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got, count = mapped(cpu, x, 300)
            size = torch.rand(3, 901, generator=torch.Generator().manual_seed(1))
            run = [*cpu.run("cosine_match", a, b), *cpu.run("cosine_match", a, b, top=5)]
            run += [
                cpu.run("energy_score", a, 0.5),
                got,
                *cpu.run("merge_tokens", x, got, count, size=size),
            ]
            results.append(run)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(t, want) for t, want in zip(other, results[0], strict=True))


def test_inputs_are_left_alone(backend: Backend) -> None:
    call = MatchCase(2, 40, 30, 8, weighted=True, masked=True, Ka=20, C2=3, alpha=0.5).inputs()
    tensors = [*call.arguments, *(v for v in call.options.values() if isinstance(v, Tensor))]
    copies = [t.clone() for t in tensors]
    backend.run("cosine_match", *call.arguments, **call.options)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
@pytest.mark.parametrize("mode", ["mean", "sum", "drop"])
def test_gradients(cpu_backend: Backend, mode: str) -> None:
    """Against the derivative of the float64 reference, and by differences: the operator is linear."""
    g = torch.Generator().manual_seed(4)
    x = gauss(2, 13, 5).requires_grad_()
    got = torch.randint(-1, 6, (2, 13), generator=g, dtype=torch.int32)
    options = {
        "mode": mode,
        "size": torch.rand(2, 13, generator=g) + 0.5,
        "weight": torch.rand(2, 13, generator=g),
    }
    upstream = gauss(2, 6, 5)
    with cpu_backend.active():
        y, size = ops.merge_tokens(x, got, 6, **options)
        (y * upstream).sum().backward()
        assert not size.requires_grad
        assert torch.autograd.gradcheck(
            lambda t: ops.merge_tokens(t, got, 6, **options)[0], x, eps=0.5, atol=1e-4, rtol=1e-4
        )
    exact = x.detach().double().requires_grad_()
    want, _ = reference.merge_tokens(exact, got, 6, **options)
    (want * upstream.double()).sum().backward()
    torch.testing.assert_close(x.grad, exact.grad.float())


def test_judges_find_mistakes() -> None:
    """What the yardstick must refuse: each result is right but for one entry."""
    from cases_merge import Call

    call = Call((gauss(2, 20, 9), gauss(2, 15, 9)), {"top": 2, "min_similarity": 0.3})
    options = {**call.options, "dtype": torch.float32}
    value, index = reference.cosine_match(*call.arguments, **options)
    assert_matches(call, value, index)
    for change in ("value", "index", "hole", "swap", "repeat"):
        v, i = value.clone(), index.clone()
        if change == "value":
            v[1, 4, 0] += 1e-4
        elif change == "index":
            i[0, 3, 0] = (i[0, 3, 0] + 1) % 15
        elif change == "hole":
            i[0, 0] = torch.where(i[0, 0] < 0, 3, -1)
        elif change == "swap":
            v[0, 2], i[0, 2] = v[0, 2].flip(0), i[0, 2].flip(0)
        else:
            i[1, :, 1], v[1, :, 1] = i[1, :, 0], v[1, :, 0]
        with pytest.raises(AssertionError):
            assert_matches(call, v, i)
    energies = Call((gauss(1, 20, 9), 0.5), {})
    energy = reference.energy_score(*energies.arguments, dtype=torch.float32)
    assert_energies(energies, energy)
    with pytest.raises(AssertionError):
        assert_energies(energies, energy * (1 + 1e-4))
    merge = Call((gauss(1, 20, 9), torch.arange(20, dtype=torch.int32)[None] // 2, 10), {})
    y, size = reference.merge_tokens(*merge.arguments, dtype=torch.float32)
    assert_merged(merge, y, size)
    with pytest.raises(AssertionError):
        assert_merged(merge, y + 1e-5, size)
    with pytest.raises(AssertionError):
        assert_merged(merge, y, size + 1)
