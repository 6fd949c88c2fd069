"""Which caches fit beside the weights of a model, and how long a context each one allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokencomp import methods
from tokencomp.cache.pool import PAGE_CUDA
from tokencomp.planning.cache_bytes import Bytes, models_own, paged
from tokencomp.planning.shapes import Shape

LONGEST = 1 << 24  # tokens; more is not looked for
MLP = 3  # tensors as wide as the MLP that are there at a time: gate, up and their product


@dataclass(frozen=True)
class Choice:
    """A way to hold the cache; ``method`` None: as transformers does."""

    name: str
    method: Any = None
    call: str = ""  # ``method`` in Python


CHOICES = (
    Choice("the model's own"),
    Choice("int8", methods.Uniform(bits=8), "methods.Uniform(bits=8)"),
    Choice("int4", methods.Uniform(bits=4), "methods.Uniform(bits=4)"),
    Choice(
        "a fifth evicted, int4, int2",
        methods.Tiered(methods.KeyDiff(1.0)),
        "methods.Tiered(methods.KeyDiff(1.0))",
    ),
    Choice("int2", methods.Uniform(bits=2), "methods.Uniform(bits=2)"),
)
"""What is offered, best first: so they are ranked in docs/kv_quantization.md. Behind them, fewer tokens."""

SHARES = (0.5, 0.25, 0.1)
LEAST = 64  # slots; with fewer, SnapKV's window leaves too little to choose


@dataclass(frozen=True)
class Request:
    """What is asked."""

    shape: Shape
    context: int  # tokens of a sequence, those generated included
    memory: int  # bytes
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    new: int = 256  # of the context: tokens generated
    page: int = PAGE_CUDA
    reserve: int = 10**9  # bytes that stay free
    weights: int | None = None  # bytes; None: as the shape says
    chunk: int | None = None  # tokens of a forward of the prompt; None: all

    def __post_init__(self) -> None:
        for name in ("context", "memory", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: --{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.new < self.context:
            raise ValueError(f"plan: --new must be in [0, context={self.context}), got {self.new}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"plan: --chunk must be >= 1, got {self.chunk}")

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return self.shape.weight_bytes(self.dtype) if self.weights is None else self.weights

    @property
    def forward_bytes(self) -> int:
        """The least that the largest forward of the prompt needs for activations: those of one MLP."""
        prompt = self.context - self.new
        tokens = prompt if self.chunk is None else min(self.chunk, prompt)
        return MLP * self.shape.intermediate * tokens * self.batch * self.dtype.itemsize

    def bytes_of(self, method: Any) -> Bytes:
        """What the cache takes."""
        prompt = self.context - self.new
        if method is None:
            return models_own(self.shape, prompt, self.new, self.batch, self.dtype)
        return paged(
            self.shape, method, prompt, self.new, self.batch, self.dtype, page=self.page, chunk=self.chunk
        )

    def need(self, method: Any) -> int:
        """Bytes in all."""
        cache = self.bytes_of(method)
        return self.weight_bytes + self.reserve + max(cache.held + self.forward_bytes, cache.most)


@dataclass(frozen=True)
class Line:
    """One choice."""

    choice: Choice
    bytes: Bytes
    need: int  # bytes in all: weights, what stays free, and the larger of the prompt and of generating
    fits: bool
    longest: int  # context that would fit; 0: none


@dataclass(frozen=True)
class Plan:
    """All choices, best first."""

    request: Request
    lines: tuple[Line, ...]

    @property
    def best(self) -> Line | None:
        """The first that fits."""
        return next((line for line in self.lines if line.fits), None)

    @property
    def code(self) -> str:
        """The call for ``best``; empty where nothing fits, or the model needs no help."""
        best = self.best
        if best is None or not best.choice.call:
            return ""
        call = best.choice.call.replace("methods.", "tokencomp.methods.")
        return f"tokencomp.compress(model, {call}, page={self.request.page})"


def make(request: Request, budgets: Sequence[int] = ()) -> Plan:
    """Compare the model's own cache, ``CHOICES``, shares of the tokens, and ``budgets`` in slots a kv head.

    Without ``budgets`` the last line is the largest number of slots that fits, if less than the least share
    is what it takes.
    """
    prompt = request.context - request.new
    shares = [share for share in SHARES if share * prompt >= LEAST]
    choices = [*CHOICES, *(evicting(share) for share in shares), *(evicting(slots) for slots in budgets)]
    lines = [_line(request, choice) for choice in choices]
    if not budgets and not any(line.fits for line in lines):
        least, most = max(LEAST, request.page), int(SHARES[-1] * prompt)
        slots = _largest(lambda n: _fits(request, evicting(n).method), most, least)
        slots = slots // request.page * request.page
        if slots:
            lines.append(_line(request, evicting(slots)))
    return Plan(request, tuple(lines))


def evicting(budget: int | float) -> Choice:
    """SnapKV with so many slots a kv head, or that share of the prompt."""
    name = f"{budget:.0%} of the tokens" if isinstance(budget, float) else f"{budget} tokens"
    return Choice(name, methods.SnapKV(budget=budget), f"methods.SnapKV(budget={budget!r})")


def _line(request: Request, choice: Choice) -> Line:
    need = request.need(choice.method)
    longest = _largest(
        lambda n: n > request.new and _fits(replace(request, context=n), choice.method),
        LONGEST,
        request.new + 1,
    )
    return Line(choice, request.bytes_of(choice.method), need, need <= request.memory, longest)


def _fits(request: Request, method: Any) -> bool:
    try:
        return request.need(method) <= request.memory
    except ValueError:  # a budget that cannot hold what the method protects
        return False


def _largest(fits: Callable[[int], bool], most: int, least: int = 1) -> int:
    """The largest number up to ``most`` that fits, where all smaller ones do; 0: not even ``least``."""
    if least > most or not fits(least):
        return 0
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
