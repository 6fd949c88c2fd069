"""500 cases of the fuzz test, and what it must find."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import fuzz
import fuzz_models
import pytest
import torch
from fuzz_draw import Call
from torch import Tensor

X = torch.randn(3, 4)
CASES = list(fuzz.order_of(500, 0, ""))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    with fuzz.environment():
        yield


@pytest.mark.parametrize("part", sorted(fuzz.PARTS))
def test_random_calls(part: str) -> None:
    seeds = [seed for name, seed in CASES if name == part]
    done = Counter(fuzz.run_case(part, seed) for seed in seeds)
    assert done.total() == len(seeds) > 0


def test_there_are_500_cases_of_both_kinds() -> None:
    assert len(CASES) == 500
    assert {part for part, _ in CASES} == set(fuzz.PARTS)
    done = Counter(fuzz.run_case("topk_select", seed) for seed in range(40))
    assert min(done["returned"], done["refused"]) > 4


def hurt(x: Tensor) -> Tensor:
    x[0, 0] = 9
    return x + 1


def hidden(x: Tensor) -> Tensor:
    raise RuntimeError("no idea")


def crashed(x: Tensor) -> Tensor:
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("function", "wrong", "message"),
    [
        (hurt, "", "changed x"),
        (hidden, "x", "unnamed: no idea"),
        (hidden, "", "refused: no idea"),
        (crashed, "x", "IndexError: list index out of range"),
        (lambda x: x.view(-1), "", "output 0 is an input"),
        (lambda x: x * torch.nan, "", "output 0 has NaN"),
        (lambda x: torch.rand_like(x), "", "another result"),
        (lambda x: torch.empty(5, dtype=torch.int32), "", "0 not written"),
    ],
)
def test_what_is_found(function: Callable[..., Any], wrong: str, message: str) -> None:
    call = Call("f", {"x": X.clone()}, wrong=wrong, finite=not wrong)
    with pytest.raises(AssertionError, match=message):
        fuzz.judge(call, function)
    right: Call = Call("f", {"x": X.clone()})
    assert fuzz.judge(right, lambda x: x + 1) == "returned"


def test_a_changed_model_is_found() -> None:
    def change() -> None:
        with fuzz_models.unharmed("encoder", "", False, []) as model:
            next(model.parameters()).add_(1)

    with torch.no_grad(), pytest.raises(AssertionError, match="weights changed"):
        change()
    fuzz_models.models.cache_clear()
