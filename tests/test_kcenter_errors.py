"""Every bad input of ``kcenter_greedy``: the error names operator, argument, got and expected."""

import re
from typing import Any

import pytest
import torch
from backends import Backend, cuda_missing, make_backend
from tokencomp import ops

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
NAN, INF = float("nan"), float("inf")

REFUSED: list[tuple[str, torch.Tensor, int, dict[str, Any], type[Exception], str]] = [
    ("k_zero", X, 0, {}, RuntimeError, "kcenter_greedy: k must be in [1, N=5], got 0"),
    ("k_negative", X, -3, {}, RuntimeError, "kcenter_greedy: k must be in [1, N=5], got -3"),
    ("k_above_n", X, 6, {}, RuntimeError, "kcenter_greedy: k must be in [1, N=5], got 6"),
    ("no_tokens", X[:, :0], 1, {}, RuntimeError, "kcenter_greedy: k must be in [1, N=0], got 1"),
    ("no_channels", X[:, :, :0], 1, {}, RuntimeError, "kcenter_greedy: C must be in [1, "),
    ("rank_2", X[0], 1, {}, RuntimeError, "kcenter_greedy: x must have shape [B, N, C], got [5, 4]"),
    ("rank_4", X[None], 1, {}, RuntimeError, "kcenter_greedy: x must have shape [B, N, C], got [1, 2, 5, 4]"),
    (
        "float64",
        X.double(),
        1,
        {},
        RuntimeError,
        "kcenter_greedy: x must be float32, float16 or bfloat16, got Double",
    ),
    (
        "int_tokens",
        X.int(),
        1,
        {},
        RuntimeError,
        "kcenter_greedy: x must be float32, float16 or bfloat16, got Int",
    ),
    (
        "strided_channels",
        X.transpose(1, 2),
        1,
        {},
        RuntimeError,
        "x must be contiguous in its last dimension, got stride 4",
    ),
    (
        "objective",
        X,
        1,
        {"objective": "min"},
        RuntimeError,
        "objective must be one of 'max_min', 'max_sum', got 'min'",
    ),
    ("metric", X, 1, {"metric": "L2"}, RuntimeError, "metric must be one of 'cosine', 'l2', 'dot', got 'L2'"),
    (
        "first",
        X,
        1,
        {"first": ""},
        RuntimeError,
        "first must be one of 'largest_nn', 'index0', 'centroid', got ''",
    ),
    (
        "seed_rank",
        X,
        1,
        {"seed": torch.tensor([0, 1])},
        RuntimeError,
        "seed must have shape [B=2, s], got [2]",
    ),
    (
        "seed_batch",
        X,
        1,
        {"seed": torch.tensor([[0]])},
        RuntimeError,
        "seed must have shape [2, 1], got [1, 1]",
    ),
    (
        "seed_many",
        X,
        1,
        {"seed": torch.tensor([[0, 1]] * 2)},
        RuntimeError,
        "seed must hold between 1 and k=1",
    ),
    ("seed_none", X, 1, {"seed": torch.zeros(2, 0).int()}, RuntimeError, "seed must hold between 1 and k=1"),
    ("seed_float", X, 1, {"seed": torch.zeros(2, 1)}, RuntimeError, "seed must be Int, got Float"),
    (
        "seed_high",
        X,
        1,
        {"seed": torch.tensor([[0], [5]])},
        ValueError,
        "seed must be in [0, N=5), got 5 in item 1",
    ),
    (
        "seed_low",
        X,
        1,
        {"seed": torch.tensor([[-1], [0]])},
        ValueError,
        "seed must be in [0, N=5), got -1 in item 0",
    ),
    (
        "seed_wraps",
        X,
        1,
        {"seed": torch.tensor([[2**32], [0]])},
        ValueError,
        "seed must be in [0, N=5), got 4294967296",
    ),
    (
        "seed_padding",
        X,
        1,
        {"seed": torch.tensor([[2], [2]]), "lengths": torch.tensor([3, 2])},
        ValueError,
        "kcenter_greedy: seed must be in [0, length=2), got 2 in item 1",
    ),
    (
        "seed_twice",
        X,
        2,
        {"seed": torch.tensor([[0, 1], [3, 3]])},
        ValueError,
        "must hold distinct tokens per item, got 3",
    ),
    (
        "weight_negative",
        X,
        1,
        {"weight": -torch.ones(2, 5)},
        ValueError,
        "weight must be finite and >= 0, got -1.0",
    ),
    (
        "weight_nan",
        X,
        1,
        {"weight": torch.full((2, 5), NAN)},
        ValueError,
        "weight must be finite and >= 0, got nan",
    ),
    (
        "weight_inf",
        X,
        1,
        {"weight": torch.full((2, 5), INF)},
        ValueError,
        "weight must be finite and >= 0, got inf",
    ),
    ("weight_shape", X, 1, {"weight": torch.ones(5)}, RuntimeError, "weight must have shape [2, 5], got [5]"),
    (
        "weight_bool",
        X,
        1,
        {"weight": torch.ones(2, 5).bool()},
        RuntimeError,
        "weight must be Float, got Bool",
    ),
    (
        "lengths_high",
        X,
        1,
        {"lengths": torch.tensor([5, 6])},
        ValueError,
        "lengths must be in [0, N=5], got 6",
    ),
    (
        "lengths_low",
        X,
        1,
        {"lengths": torch.tensor([-1, 5])},
        ValueError,
        "lengths must be in [0, N=5], got -1",
    ),
    (
        "lengths_shape",
        X,
        1,
        {"lengths": torch.tensor([5])},
        RuntimeError,
        "lengths must have shape [2], got [1]",
    ),
    ("lengths_float", X, 1, {"lengths": torch.ones(2)}, RuntimeError, "lengths must be Int, got Float"),
]


@pytest.mark.parametrize("bad", REFUSED, ids=lambda bad: bad[0])
def test_refused(cpu_backend: Backend, bad: tuple[Any, ...]) -> None:
    _, x, k, options, error, message = bad
    with pytest.raises(error, match=re.escape(message)) as caught:
        cpu_backend.kcenter(x, k, **options)
    assert "kcenter_greedy: " in str(caught.value)


@pytest.mark.cuda
@pytest.mark.parametrize("bad", REFUSED, ids=lambda bad: bad[0])
def test_refused_on_cuda(bad: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENCOMP_CHECKED", "1")
    _, x, k, options, error, message = bad
    with pytest.raises(error, match=re.escape(message)):
        make_backend("cuda").kcenter(x, k, **options)


@pytest.mark.cuda
@pytest.mark.parametrize("argument", ["seed", "weight", "lengths"])
def test_mixed_devices(argument: str) -> None:
    if cuda_missing():
        pytest.skip(cuda_missing())
    values = {"seed": torch.zeros(2, 1).int(), "weight": torch.ones(2, 5), "lengths": torch.tensor([5, 5])}
    with pytest.raises(RuntimeError, match=f"kcenter_greedy: {argument} must be on the device of x"):
        ops.kcenter_greedy(X.cuda(), 1, **{argument: values[argument]})


@pytest.mark.cuda
def test_values_are_not_read_on_cuda_unless_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENCOMP_CHECKED", raising=False)
    index, _ = make_backend("cuda").kcenter(X, 2, seed=torch.tensor([[9], [0]]))
    assert ((index >= 0) & (index < 5)).all()


def test_weight_zero_is_allowed(cpu_backend: Backend) -> None:
    weight = torch.tensor([[0.0, 1, 1, 1, 0]]).expand(2, 5)
    index, value = cpu_backend.kcenter(X, 5, weight=weight)
    assert (index[:, :3] > 0).all()
    assert (index[:, :3] < 4).all()
    assert (value[:, 3:] == 0).all()


def test_errors_do_not_poison_the_next_call(cpu_backend: Backend) -> None:
    with pytest.raises(RuntimeError):
        cpu_backend.kcenter(X, 99)
    assert cpu_backend.kcenter(X, 5)[0].sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 2
