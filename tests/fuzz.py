"""The public API on random arguments: ``python tests/fuzz.py [cases] [first seed] [part]``.

A case is a part and a seed, so that a crash is repeated by its name alone: ``python tests/fuzz.py
--case paged_decode:17``. Whatever the arguments, a call returns or raises ValueError, TypeError or
RuntimeError with a text that names the function; it changes only what it says it changes, outputs are memory
of their own and, of right calls, without NaN. A crash or a case longer than ``LIMIT`` seconds ends the
process with the stacks of all threads; the file named by TOKENCOMP_FUZZ_LOG then holds the case.
"""

import contextlib
import faulthandler
import os
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import fuzz_models
import fuzz_pages
import fuzz_tokens
import torch
from fuzz_draw import OUT_OF_MEMORY, Call, Draw, spoil
from tokencomp import ops
from tokencomp.ops import _check
from torch import Tensor

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")  # see sanitize_cpu.sh
LIMIT = 600 if SANITIZED else 60
MEMORY = 12 << 30
KINDS = (ValueError, TypeError, RuntimeError)  # NotImplementedError is the last of them

OPERATORS: dict[str, Callable[[Draw], Call]] = {
    name: getattr(fuzz_pages if hasattr(fuzz_pages, name) else fuzz_tokens, name)
    for name in (*ops.__all__, "flash_prefill_pages")
}
PARTS: dict[str, Callable[[int], str]] = {}


def operator(name: str) -> Callable[[int], str]:
    def run(seed: int) -> str:
        draw = Draw(seed)
        call = OPERATORS[name](draw)
        call = spoil(call, draw) if draw.maybe(0.6) else call
        with unchecked() if draw.maybe(0.3) else contextlib.nullcontext():
            return judge(call, getattr(ops, call.name))

    return run


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Values are not looked at, as inside torch.compile."""
    with mock.patch.object(_check, "_readable", return_value=False):
        yield


def judge(call: Call, function: Callable[..., Any]) -> str:
    """``returned`` or ``refused``. Raises AssertionError."""
    about = f"{call.name} ({call.wrong or 'right'})"
    before = {name: _storage(t).clone() for name, t in call.tensors().items() if not t.is_meta}
    try:
        result = function(**call.arguments)
    except KINDS as error:
        text = str(error)
        assert call.wrong, f"{about}: refused: {text}"
        named = any(name in text for name in (call.name, *call.also, *OUT_OF_MEMORY))
        assert named, f"{about}: unnamed: {text}"
        _unchanged(call, before, (), about)
        return "refused"
    except Exception as error:
        raise AssertionError(f"{about}: {type(error).__name__}: {error}") from error
    _unchanged(call, before, call.changed, about)
    outputs = [t for t in _tensors(result) if not t.is_meta]
    owned = {t.untyped_storage().data_ptr() for t in call.tensors().values() if t.numel()}
    for i, t in enumerate(outputs):
        assert not t.numel() or t.untyped_storage().data_ptr() not in owned, (
            f"{about}: output {i} is an input"
        )
        if call.finite:
            assert not t.is_floating_point() or not t.isnan().any(), f"{about}: output {i} has NaN"
            assert t.dtype != torch.int32 or not (t == torch.iinfo(t.dtype).max).any(), (
                f"{about}: {i} not written"
            )
    if call.finite and not call.changed:
        again = _tensors(function(**call.arguments))
        same = all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
        assert same, f"{about}: another result"
    return "returned"


def _unchanged(call: Call, before: dict[str, Tensor], changed: tuple[str, ...], about: str) -> None:
    """Storages are as they were, but for the elements of the tensors named."""
    for name, t in call.tensors().items():
        if t.is_meta:
            continue
        now = _storage(t)
        if name in changed:
            now = now.clone()
            old = before[name].view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())
            now.view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset()).copy_(old)
        assert torch.equal(now, before[name]), f"{about}: changed {name}"


def _storage(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach()]
    return [t for part in result for t in _tensors(part)] if isinstance(result, tuple | list) else []


PARTS |= {name: operator(name) for name in OPERATORS}
PARTS |= {name: lambda seed, make=make: make(seed, judge) for name, make in fuzz_models.PARTS.items()}


def run_case(part: str, seed: int) -> str:
    torch.manual_seed(seed)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        return PARTS[part](seed)
    finally:
        faulthandler.cancel_dump_traceback_later()


def order_of(cases: int, first: int, only: str) -> Iterator[tuple[str, int]]:
    """Operators in turn; one case in twelve of the other parts, which take a hundred times as long."""
    models = [name for name in PARTS if name not in OPERATORS]
    for i in range(first, first + cases):
        names = models if models and i % 12 == 11 else list(OPERATORS)
        yield (only or names[(i // 12 if names is models else i - i // 12) % len(names)]), i


def main(cases: int = 500, first: int = 0, only: str = "") -> int:
    faulthandler.enable()
    torch.set_num_threads(2)
    done: Counter[str] = Counter()
    failed: list[str] = []
    log = open(os.environ.get("TOKENCOMP_FUZZ_LOG", os.devnull), "w")  # noqa: SIM115
    for part, seed in order_of(cases, first, only):
        log.seek(0)
        log.write(f"{part}:{seed}\n")
        log.flush()
        try:
            with environment():
                done[run_case(part, seed)] += 1
        except AssertionError as error:
            failed.append(f"{part}:{seed} {error}")
            print(failed[-1], flush=True)
        except Exception:
            failed.append(f"{part}:{seed} {traceback.format_exc()}")
            print(failed[-1], flush=True)
    counts = ", ".join(f"{n} {what}" for what, n in sorted(done.items()))
    print(f"{cases} cases: {counts}, {len(failed)} failed")
    return int(bool(failed))


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Memory that nobody wrote is NaN or the largest integer, and no more than ``MEMORY`` can be had, so that
    a size that slipped through fails instead of filling the machine.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if not SANITIZED:  # which needs terabytes of addresses, and has a limit of its own
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        torch.use_deterministic_algorithms(deterministic)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        name, number = sys.argv[2].split(":")
        sys.exit(main(1, int(number), name))
    sys.exit(main(*map(int, sys.argv[1:3]), *sys.argv[3:4]))
