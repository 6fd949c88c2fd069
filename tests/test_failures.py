"""Threads, processes and interruptions: results stay the same, models come back as they were."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import decoders
import pytest
import tiny_models
import tokencomp
import torch
from tokencomp import methods, ops
from torch import Tensor

PACKAGE = str(Path(tokencomp.__file__).parent)
KINDS: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
    "encoder": (tiny_models.vit, (methods.ToMe(r=2),)),
    "decoder": (decoders.decoder, (methods.H2O(budget=12), methods.Quest(k=16))),
    "visual": (tiny_models.llava, (methods.ToDRE(keep=0.5), methods.KIVI())),
}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(kind: str) -> tuple[Any, tuple[Any, ...]]:
    make, chosen = KINDS[kind]
    return make(), chosen


def said(kind: str, model: Any, seed: int) -> Tensor:
    """What the model makes of an input."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "encoder":
        return model(pixel_values=torch.randn(2, 3, 32, 32, generator=generator)).logits  # type: ignore[no-any-return]
    if kind == "visual":
        return model(**tiny_models.prompt(1)).logits  # type: ignore[no-any-return]
    ids = torch.randint(1, 128, (2, 40), generator=generator)
    return decoders.steps(model, ids, None, [33, 1, 1, 1, 4])


# ---- threads ----------------------------------------------------------------------------------------------


def test_two_models_in_four_threads() -> None:
    kinds = ("encoder", "decoder")
    models = {kind: made(kind) for kind in kinds}
    handles = [tokencomp.compress(model, *chosen) for model, chosen in models.values()]
    want = {(kind, seed): said(kind, models[kind][0], seed) for kind in kinds for seed in range(6)}
    got: dict[tuple[str, int], Tensor] = {}
    begin = threading.Barrier(4)

    def work(kind: str, first: int) -> None:
        with torch.no_grad():
            begin.wait()
            for seed in range(first, first + 3):
                got[kind, seed] = said(kind, models[kind][0], seed)

    threads = [threading.Thread(target=work, args=(kind, first)) for kind in kinds for first in (0, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key
    for handle in handles:
        handle.remove()


# ---- processes --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_operators_after_a_fork_with_one_thread() -> None:
    """As in PyTorch, whose threads a child has lost: its DataLoader sets the same in its workers."""
    x = torch.randn(4, 300, 32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    want = ops.kcenter_greedy(x, 40)[0]
    torch.set_num_threads(threads)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(ops.kcenter_greedy(x, 40)[0], want) else 1)
    assert ended(child) == 0


def ended(child: int, seconds: float = 60) -> int:
    """The exit status of a process; -1 if it had to be stopped."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


# ---- interruptions ----------------------------------------------------------------------------------------


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that runs in the package."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __enter__(self) -> None:
        sys.settrace(self._call)

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def interrupted(at: int, action: Callable[[], Any]) -> bool:
    try:
        with Interrupt(at):
            action()
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_while_compressing(kind: str) -> None:
    """Wherever it happens, the model is as it was, and can be compressed again."""
    model, chosen = made(kind)
    said(kind, model, 0)  # transformers puts hooks of its own on a model when it first runs
    before = tiny_models.state(model), [type(module) for module in model.modules()]
    lines = Interrupt(-1)
    with lines:
        handle = tokencomp.compress(model, *chosen)
    handle.remove()
    total = -1 - lines.left
    assert total > 200
    ends = [total - n for n in range(60) if n % 3 == 0]
    for at in [*range(1, total, total // 25), *ends]:
        assert interrupted(at, lambda: tokencomp.compress(model, *chosen))
        state = tiny_models.state(model), [type(module) for module in model.modules()]
        assert state == before, f"line {at} of {total}"


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_in_a_forward(kind: str) -> None:
    """The next forward knows nothing of it; leaving the context gives the model back, weights untouched."""
    model, chosen = made(kind)
    plain, before = said(kind, model, 0), tiny_models.state(model)
    weights = [p.clone() for p in model.parameters()]
    with tokencomp.compress(model, *chosen):
        want = said(kind, model, 0)
        for at in (20, 90, 250):
            assert interrupted(at, lambda: said(kind, model, 1)), f"line {at}"
            assert torch.equal(said(kind, model, 0), want), f"line {at}"
    with pytest.raises(KeyboardInterrupt), tokencomp.compress(model, *chosen), Interrupt(90):
        said(kind, model, 0)
    assert tiny_models.state(model) == before
    assert torch.equal(said(kind, model, 0), plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
