"""Every bad input of the topk family: the error names operator, argument, got and expected."""

import re
from typing import Any

import pytest
import torch
from backends import Backend, cuda_missing, make_backend
from tokencomp import ops

X = torch.rand(2, 5, generator=torch.Generator().manual_seed(2))
BOOL, MANY = torch.ones(2, 5, dtype=torch.bool), (1 << 24) + 1
Bad = tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]


def select(*args: Any, message: str, error: type[Exception] = RuntimeError, **options: Any) -> Bad:
    return "topk_select", args, options, error, message


def topp(*args: Any, message: str, error: type[Exception] = RuntimeError, **options: Any) -> Bad:
    return "topp_select", args, options, error, message


def budget(*args: Any, message: str, error: type[Exception] = RuntimeError, **options: Any) -> Bad:
    return "topk_budget", args, options, error, message


REFUSED: list[Bad] = [
    select(X[0], 1, message="score must have shape [R, S], got [5]"),
    select(X[None], 1, message="score must have shape [R, S], got [1, 2, 5]"),
    select(X.double(), 1, message="score must be float32, float16 or bfloat16, got Double"),
    select(X.int(), 1, message="score must be float32, float16 or bfloat16, got Int"),
    select(X.T, 1, message="score must be contiguous in its last dimension, got stride 5"),
    select(X, -1, message="k must be in [0, 16777216], got -1"),
    select(X, MANY, message=f"k must be in [0, 16777216], got {MANY}"),
    select(X, 1, head=-1, message="head must be in [0, 16777216], got -1"),
    select(X, 1, tail=-2, message="tail must be in [0, 16777216], got -2"),
    select(X, 1, keep=BOOL[0], message="keep must have shape [2, 5], got [5]"),
    select(X, 1, keep=BOOL.int(), message="keep must be Bool, got Int"),
    select(X, 1, k_per_row=torch.tensor([1]), message="k_per_row must have shape [2], got [1]"),
    select(X, 1, k_per_row=torch.ones(2), message="k_per_row must be Int, got Float"),
    select(
        X, 3, k_per_row=torch.tensor([1, 4]), error=ValueError, message="k_per_row must be in [0, k=3], got 4"
    ),
    select(
        X,
        3,
        k_per_row=torch.tensor([-1, 2]),
        error=ValueError,
        message="k_per_row must be in [0, k=3], got -1",
    ),
    select(
        X, 3, k_per_row=torch.tensor([0, 2**32]), error=ValueError, message="k_per_row must be in [0, k=3]"
    ),
    select(X, 1, lengths=torch.tensor([5]), message="lengths must have shape [2], got [1]"),
    select(X, 1, lengths=torch.ones(2), message="lengths must be Int, got Float"),
    select(
        X,
        1,
        lengths=torch.tensor([0, 6]),
        error=ValueError,
        message="lengths must be in [0, S=5], got 6 at [1]",
    ),
    select(
        X, 1, lengths=torch.tensor([-1, 5]), error=ValueError, message="lengths must be in [0, S=5], got -1"
    ),
    topp(X[0], 0.5, 1, message="score must have shape [R, S], got [5]"),
    topp(X.double(), 0.5, 1, message="score must be float32, float16 or bfloat16, got Double"),
    topp(X, -0.1, 1, message="p must be in [0, 1], got -0.1"),
    topp(X, 1.5, 1, message="p must be in [0, 1], got 1.5"),
    topp(X, float("nan"), 1, message="p must be in [0, 1], got nan"),
    topp(X, 0.5, -1, message="max_k must be in [0, 16777216], got -1"),
    topp(X, 0.5, 3, min_k=4, message="min_k must be in [0, max_k=3], got 4"),
    topp(X, 0.5, 3, min_k=-1, message="min_k must be in [0, max_k=3], got -1"),
    topp(X, 0.5, 3, head=-1, message="head must be in [0, 16777216], got -1"),
    topp(
        X,
        0.5,
        3,
        lengths=torch.tensor([0, 6]),
        error=ValueError,
        message="lengths must be in [0, S=5], got 6",
    ),
    budget(X, 1, message="score must have shape [B, H, S], got [2, 5]"),
    budget(X[None].double(), 1, message="score must be float32, float16 or bfloat16, got Double"),
    budget(X[None].mT, 1, message="score must be contiguous in its last dimension, got stride 5"),
    budget(X[None], -1, message="k must be in [0, 1073741824], got -1"),
    budget(X[None], 5, floor=3, message="floor must be in [0, k / H=2], got 3"),
    budget(X[None], 5, floor=-1, message="floor must be in [0, k / H=2], got -1"),
    budget(X[None], 5, floor=1 << 62, message="floor must be in [0, k / H=2], got 4611686018427387904"),
    budget(X[None], 5, lengths=torch.tensor([5, 5]), message="lengths must have shape [1, 2], got [2]"),
    budget(
        X[None], 5, lengths=torch.tensor([[5, 6]]), error=ValueError, message="in [0, S=5], got 6 at [0, 1]"
    ),
]


@pytest.mark.parametrize("bad", REFUSED, ids=lambda bad: f"{bad[0]}-{bad[4][:40]}")
def test_refused(cpu_backend: Backend, bad: Bad) -> None:
    op, args, options, error, message = bad
    with pytest.raises(error, match=re.escape(message)) as caught:
        cpu_backend.run(op, *args, **options)
    assert f"{op}: " in str(caught.value)


@pytest.mark.cuda
@pytest.mark.parametrize("bad", REFUSED, ids=lambda bad: f"{bad[0]}-{bad[4][:40]}")
def test_refused_on_cuda(bad: Bad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENCOMP_CHECKED", "1")
    op, args, options, error, message = bad
    with pytest.raises(error, match=re.escape(message)):
        make_backend("cuda").run(op, *args, **options)


@pytest.mark.cuda
@pytest.mark.parametrize("argument", ["lengths", "k_per_row", "keep"])
def test_mixed_devices(argument: str) -> None:
    if cuda_missing():
        pytest.skip(cuda_missing())
    value = BOOL if argument == "keep" else torch.tensor([1, 1])
    with pytest.raises(RuntimeError, match=f"topk_select: {argument} must be on the device of score"):
        ops.topk_select(X.cuda(), 1, **{argument: value})


@pytest.mark.cuda
def test_values_are_not_read_on_cuda_unless_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENCOMP_CHECKED", raising=False)
    _, count = make_backend("cuda").run("topk_select", X, 4, lengths=torch.tensor([9, -1]))
    assert count.tolist() == [4, 0]


def test_errors_do_not_poison_the_next_call(cpu_backend: Backend) -> None:
    with pytest.raises(RuntimeError):
        cpu_backend.run("topk_select", X, -1)
    assert cpu_backend.run("topk_select", X, 5)[0].tolist() == [[0, 1, 2, 3, 4]] * 2
