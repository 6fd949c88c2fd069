"""``bipartite_merge``: bit for bit the three operators it stands for, on every back end."""

from typing import Any

import pytest
import torch
from backends import Backend, make_backend
from cases_merge import Call
from cases_merge_map import STEP_CASES, StepCase
from merge_yardstick import assert_merged
from tokencomp import ops, reference
from torch import Tensor

by_name = {"ids": lambda case: case.name}


def three_steps(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    (x, metric, r), options = call.arguments, dict(call.options)
    prefix, order = min(options.pop("prefix"), x.shape[1]), options.pop("order")
    lists = {k: options.pop(k, None) for k in ("a_tokens", "b_tokens", "rest_tokens")}
    if lists["a_tokens"] is None:
        halves = metric[:, 0::2], metric[:, 1::2]
        match = backend.run("cosine_match", *halves, protect_a=(prefix + 1) // 2, protect_b=prefix // 2)
    else:
        by_list = {"a_index": lists["a_tokens"], "b_index": lists["b_tokens"]}
        match = backend.run("cosine_match", metric, metric, **by_list)
    mapped = backend.run("bipartite_map", *match, r, x.shape[1], prefix=prefix, order=order, **lists)
    most = (x.shape[1] - prefix) // 2 if lists["a_tokens"] is None else lists["a_tokens"].shape[1]
    return *backend.run("merge_tokens", x, mapped, x.shape[1] - min(r, most), **options), mapped


@pytest.mark.parametrize("case", STEP_CASES, **by_name)
def test_equals_the_three_operators(backend: Backend, case: StepCase) -> None:
    call = case.inputs()
    got = backend.run("bipartite_merge", *call.arguments, **call.options)
    for part, want in zip(got, three_steps(backend, call), strict=True):
        assert part.dtype == want.dtype
        assert torch.equal(part, want)


@pytest.mark.parametrize("case", [c for c in STEP_CASES if c.data == "lattice"], **by_name)
def test_equals_reference(backend: Backend, case: StepCase) -> None:
    """On a lattice cosines are exact, so that the map has one right answer."""
    call = case.inputs()
    y, size, token_map = backend.run("bipartite_merge", *call.arguments, **call.options)
    want = reference.bipartite_merge(*call.arguments, **call.options)
    assert torch.equal(token_map, want[2])
    options = {key: call.options[key] for key in ("mode", "size", "weight")}
    assert_merged(Call((call.arguments[0], token_map, y.shape[1]), options), y, size)


@pytest.mark.parametrize("case", STEP_CASES[-2:], **by_name)
def test_bit_identical_for_any_threads(case: StepCase) -> None:
    call, before = case.inputs(), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            results.append(make_backend("cpu").run("bipartite_merge", *call.arguments, **call.options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("mode", ["mean", "sum", "drop"])
def test_gradient_is_that_of_the_merge(cpu_backend: Backend, mode: str) -> None:
    call = StepCase(2, 13, 5, 4, 4, mode=mode).inputs()
    x, metric, r = call.arguments
    x.requires_grad_()
    metric.requires_grad_()
    again = x.detach().clone().requires_grad_()
    upstream = torch.randn(2, 9, 5)
    with cpu_backend.active():
        y, size, token_map = ops.bipartite_merge(x, metric, r, **call.options)
        (y * upstream).sum().backward()
        options = {key: call.options[key] for key in ("mode", "size", "weight")}
        want, _ = ops.merge_tokens(again, token_map, 9, **options)
        (want * upstream).sum().backward()
    assert not size.requires_grad
    assert metric.grad is None
    assert torch.equal(x.grad, again.grad)


def test_gradients_that_are_not_there(cpu_backend: Backend) -> None:
    x = torch.randn(2, 6, 4, requires_grad=True)
    wrong = "bipartite_merge: mode must be one of 'mean', 'sum', 'drop' .*got 'amax'"
    with cpu_backend.active(), pytest.raises(RuntimeError, match=wrong):
        ops.bipartite_merge(x, x.detach(), 1, mode="amax")


def step(x: Tensor, size: Tensor, r: int) -> tuple[Tensor, ...]:
    y, merged, token_map = ops.bipartite_merge(x * 2, x, r, size=size)
    return y + 1, merged, token_map


def test_compiles_without_graph_breaks(backend: Backend) -> None:
    compiled: Any = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, r in ((20, 5), (33, 99)):
        x, size = torch.randn(2, n, 8).to(backend.device), torch.ones(2, n).to(backend.device)
        with backend.active():
            assert all(map(torch.equal, compiled(x, size, r), step(x, size, r)))
