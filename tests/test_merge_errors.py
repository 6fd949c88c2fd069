"""Every bad input of the merge operators: the error names operator, argument, got and expected."""

import re
from typing import Any

import pytest
import torch
from backends import Backend, make_backend
from tokencomp import ops
from torch import Tensor

NAN, INF = float("nan"), float("inf")
X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2))
VALUE, INDEX = torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.int32)
MAP = torch.zeros(2, 6, dtype=torch.int32)
INTS = torch.zeros(2, 3, dtype=torch.int32)


def list_of(*tokens: int) -> Tensor:
    return torch.tensor([tokens, tokens])


MATCH: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((X[0], X), {}, "a must have shape [B, N, C], got [6, 4]"),
    ((X, X[0]), {}, "b must have shape [B, N, C], got [6, 4]"),
    ((X.double(), X.double()), {}, "a must be float32, float16 or bfloat16, got Double"),
    ((X, X.half()), {}, "b must have the dtype of a, Float, got Half"),
    ((X, X[:, :, :3]), {}, "b must have shape [2, Nb, 4], got [2, 6, 3]"),
    ((X, X[:1]), {}, "b must have shape [2, Nb, 4], got [1, 6, 4]"),
    ((X[:, :, :0], X[:, :, :0]), {}, "a must have between 1 and"),
    ((X.transpose(1, 2), X), {}, "a must be contiguous in its last dimension, got stride 4"),
    ((X, X), {"a2": X}, "a2 and b2 must be given together"),
    ((X, X), {"a2": X[:, :5], "b2": X}, "a2 must have shape [2, 6, C2], got [2, 5, 4]"),
    ((X, X), {"a2": X, "b2": X[:, :, :2]}, "b2 must have the 4 channels of a2, got 2"),
    ((X, X), {"a2": X.half(), "b2": X.half()}, "a2 must have the dtype of a, Float, got Half"),
    ((X, X), {"alpha": 0.5}, "alpha must be 1 without a2 and b2, got 0.5"),
    ((X, X), {"a2": X, "b2": X, "alpha": INF}, "alpha must be finite, got inf"),
    ((X, X), {"top": 0}, "top must be in [1, 32], got 0"),
    ((X, X), {"top": 33}, "top must be in [1, 32], got 33"),
    ((X, X), {"min_similarity": NAN}, "min_similarity must be a number, got NaN"),
    ((X, X), {"protect_a": -1}, "protect_a must not be negative, got -1"),
    ((X, X), {"protect_b": -2}, "protect_b must not be negative, got -2"),
    ((X, X), {"a_index": INTS[0]}, "a_index must have shape [B=2, R], got [3]"),
    ((X, X), {"b_index": INTS[:1]}, "b_index must have shape [B=2, R], got [1, 3]"),
    ((X, X), {"a_index": VALUE}, "a_index must be Int, got Float"),
    ((X, X), {"a_weight": VALUE}, "a_weight must have shape [2, 6], got [2, 3]"),
    ((X, X), {"b_index": INTS, "b_weight": torch.rand(2, 6)}, "b_weight must have shape [2, 3], got [2, 6]"),
    ((X, X), {"mask_a": torch.ones(2, 6)}, "mask_a must be Bool, got Float"),
    ((X, X), {"mask_b": torch.ones(2, 5).bool()}, "mask_b must have shape [2, 6], got [2, 5]"),
]
ENERGY: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((X[0], 0.5), {}, "x must have shape [B, N, C], got [6, 4]"),
    ((X.int(), 0.5), {}, "x must be float32, float16 or bfloat16, got Int"),
    ((X, 0.5), {"kind": "relu"}, "kind must be one of 'elu', 'paper', 'gauss', got 'relu'"),
    ((X, NAN), {}, "margin must be finite, got nan"),
    ((X, 1.0), {"kind": "gauss"}, "margin must be below 1 for kind 'gauss', got 1"),
    ((X, 0.5), {"alpha": INF}, "alpha must be finite, got inf"),
    ((X, 0.5), {"prefix": -1}, "prefix must not be negative, got -1"),
    ((X, 0.5), {"mask": torch.ones(2, 5).bool()}, "mask must have shape [2, 6], got [2, 5]"),
]
MAPS: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((VALUE[0], INDEX, 1, 6), {}, "value must have shape [B, Ra], got [3]"),
    ((VALUE, INDEX[:, :2], 1, 6), {}, "index must have shape [2, 3], got [2, 2]"),
    ((VALUE.double(), INDEX, 1, 6), {}, "value must be Float, got Double"),
    ((VALUE, INDEX.float(), 1, 6), {}, "index must be Int, got Float"),
    ((VALUE, INDEX, -1, 6), {}, "r must not be negative, got -1"),
    ((VALUE, INDEX, 1, -6), {}, "tokens must be in [0, "),
    ((VALUE, INDEX, 1, 9), {}, "value must have shape [B, 5] without a_tokens, got [2, 3]"),
    ((VALUE, INDEX, 1, 6), {"prefix": -1}, "prefix must not be negative, got -1"),
    (
        (VALUE, INDEX, 1, 6),
        {"order": "random"},
        "order must be one of 'tome', 'index', 'similarity', 'position', got",
    ),
    ((VALUE, INDEX, 1, 6), {"a_tokens": list_of(0, 2, 4)}, "a_tokens and b_tokens must be given together"),
    ((VALUE, INDEX, 1, 6), {"rest_tokens": list_of(1)}, "rest_tokens must come with a_tokens and b_tokens"),
    (
        (VALUE, INDEX, 1, 6),
        {"a_tokens": list_of(0, 2), "b_tokens": list_of(1)},
        "a_tokens must have shape [2, 3], got [2, 2]",
    ),
    (
        (VALUE, INDEX, 1, 3),
        {"a_tokens": list_of(0, 1, 2), "b_tokens": torch.zeros(2, 1, dtype=torch.int32)},
        "a_tokens, b_tokens and rest_tokens",
    ),
]
MERGE: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((X[0], MAP, 1), {}, "x must have shape [B, N, C], got [6, 4]"),
    ((X.double(), MAP, 1), {}, "x must be float32, float16 or bfloat16, got Double"),
    ((X, MAP[:, :5], 1), {}, "token_map must have shape [2, 6], got [2, 5]"),
    ((X, MAP.float(), 1), {}, "token_map must be Int, got Float"),
    ((X, MAP - 1, -1), {}, "out_tokens must be in [0, "),
    ((X, MAP, 1), {"mode": "max"}, "mode must be one of 'mean', 'sum', 'amax', 'drop', 'mlerp', got 'max'"),
    ((X, MAP, 1), {"size": torch.ones(2, 6, 1)}, "size must have shape [2, 6], got [2, 6, 1]"),
    ((X, MAP, 1), {"weight": torch.ones(6)}, "weight must have shape [2, 6], got [6]"),
]
STEP: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((X[0], X, 1), {}, "x must have shape [B, N, C], got [6, 4]"),
    ((X, X[:, :5], 1), {}, "metric must have shape [B=2, N=6, D], got [2, 5, 4]"),
    ((X, X.double(), 1), {}, "metric must be float32, float16 or bfloat16, got Double"),
    ((X, X, -1), {}, "r must not be negative, got -1"),
    ((X, X, 1), {"prefix": -1}, "prefix must not be negative, got -1"),
    ((X, X, 1), {"order": "random"}, "order must be one of"),
    ((X, X, 1), {"mode": "max"}, "mode must be one of"),
    ((X, X, 1), {"size": torch.ones(6)}, "size must have shape [2, 6], got [6]"),
    ((X, X, 1), {"b_tokens": list_of(0, 2)}, "a_tokens and b_tokens must be given together"),
    ((X, X, 1), {"rest_tokens": list_of(0, 2)}, "rest_tokens must come with a_tokens and b_tokens"),
    ((X, X, 1), {"a_tokens": list_of(0)[0], "b_tokens": list_of(1)}, "a_tokens must have shape [B=2, R]"),
]
REFUSED = [
    (name, *case)
    for name, cases in (
        ("cosine_match", MATCH),
        ("energy_score", ENERGY),
        ("bipartite_map", MAPS),
        ("merge_tokens", MERGE),
        ("bipartite_merge", STEP),
    )
    for case in cases
]


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"), REFUSED, ids=lambda p: p if isinstance(p, str) else ""
)
def test_refused(
    cpu_backend: Backend, name: str, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(
        (RuntimeError, ValueError), match=re.escape(f"{name}: ") + "(?s:.*)" + re.escape(message)
    ):
        cpu_backend.run(name, *arguments, **options)


LISTS = {"a_tokens": list_of(0, 2, 4), "b_tokens": list_of(1, 3)}
VALUES = [
    ("cosine_match", (X, X), {"a_index": list_of(0, 6)}, "a_index must be in [-1, N=6), got 6 at [0, 1]"),
    ("cosine_match", (X, X), {"b_index": list_of(-2, 5)}, "b_index must be in [-1, N=6), got -2 at [0, 0]"),
    ("bipartite_map", (VALUE, INDEX + 3, 1, 6), {}, "index must be in [-1, Rb=3), got 3 at [0, 0]"),
    (
        "bipartite_map",
        (VALUE, INDEX, 1, 6),
        LISTS | {"a_tokens": list_of(0, 2, 6)},
        "a_tokens must be in [0, tokens=6), got 6",
    ),
    (
        "bipartite_map",
        (VALUE, INDEX, 1, 6),
        LISTS | {"b_tokens": list_of(1, -1)},
        "b_tokens must be in [0, tokens=6), got -1",
    ),
    (
        "bipartite_map",
        (VALUE, INDEX, 1, 6),
        LISTS | {"b_tokens": list_of(1, 4)},
        "must not repeat a token, got 4 twice in item 0",
    ),
    (
        "bipartite_map",
        (VALUE, INDEX, 1, 6),
        LISTS | {"rest_tokens": list_of(2)},
        "must not repeat a token, got 2 twice",
    ),
    (
        "bipartite_merge",
        (X, X, 1),
        {"a_tokens": list_of(0, 6), "b_tokens": list_of(1, 3)},
        "a_tokens must be in [0, tokens=6), got 6",
    ),
    (
        "bipartite_merge",
        (X, X, 1),
        {"a_tokens": list_of(0, 2), "b_tokens": list_of(1, 2)},
        "must not repeat a token, got 2 twice in item 0",
    ),
    ("merge_tokens", (X, MAP + 3, 3), {}, "token_map must be in [-1, out_tokens=3), got 3 at [0, 0]"),
    ("merge_tokens", (X, MAP - 2, 3), {}, "token_map must be in [-1, out_tokens=3), got -2 at [0, 0]"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"), VALUES, ids=lambda p: p if isinstance(p, str) else ""
)
def test_refused_values(name: str, arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_backend("cpu").run(name, *arguments, **options)


def test_r_is_capped(cpu_backend: Backend) -> None:
    """As upstream caps it: half of what is not protected; all of A where lists are given."""
    for prefix, most in ((0, 3), (1, 2), (2, 2), (5, 0), (9, 0)):
        got = cpu_backend.run("bipartite_map", VALUE, INDEX, 100, 6, prefix=prefix)
        want = cpu_backend.run("bipartite_map", VALUE, INDEX, most, 6, prefix=prefix)
        assert torch.equal(got, want)
        assert int(got.max()) + 1 == 6 - most
    got = cpu_backend.run("bipartite_map", VALUE, INDEX, 100, 6, prefix=0, **LISTS)
    assert int(got.max()) + 1 == 3


@pytest.mark.parametrize("seed", range(8))
def test_kernels_survive_bad_values(cpu_backend: Backend, seed: int) -> None:
    """Below the wrapper's checks: indices out of range are holes, lists that repeat write nothing outside."""
    g = torch.Generator().manual_seed(seed)

    def wild(*shape: int) -> Tensor:
        return torch.randint(-9, 15, shape, generator=g, dtype=torch.int32)

    value, index = cpu_backend.run_kernel("cosine_match", X, X, a_index=wild(2, 5), b_index=wild(2, 7))
    assert bool(((index >= -1) & (index < 7)).all())
    assert bool((value[index < 0] == -INF).all())
    lists = {"a_tokens": wild(2, 3), "b_tokens": wild(2, 2), "rest_tokens": wild(2, 1)}
    got = cpu_backend.run_kernel("bipartite_map", VALUE, wild(2, 3), 2, 6, **lists)
    assert bool(((got >= -4) & (got < 6)).all())
    y, size, _ = cpu_backend.run_kernel("bipartite_merge", X, X, 2, **lists)
    assert bool(y.isfinite().all())
    y, size = cpu_backend.run_kernel("merge_tokens", X, wild(2, 6), 4)
    assert bool(y.isfinite().all())
    assert bool(size.isfinite().all())


def test_gradients_that_are_not_there(cpu_backend: Backend) -> None:
    x = X.clone().requires_grad_()
    wrong_mode = "merge_tokens: mode must be one of 'mean', 'sum', 'drop' .*got '{}'"
    for mode in ("amax", "mlerp"):
        with cpu_backend.active(), pytest.raises(RuntimeError, match=wrong_mode.format(mode)):
            ops.merge_tokens(x, MAP, 1, mode=mode)
    for name in ("size", "weight"):
        constant = f"merge_tokens: {name} must not require a gradient"
        with cpu_backend.active(), pytest.raises(RuntimeError, match=constant):
            ops.merge_tokens(X, MAP, 1, **{name: torch.ones(2, 6, requires_grad=True)})
