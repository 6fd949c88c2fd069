"""What all methods share: the registry, token budgets, and the shape of a selection."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp._typed import check_fields, says

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Knob:
    """One field of a method's dataclass."""

    name: str
    default: Any
    help: str


@dataclass(frozen=True)
class Method:
    """A registered method: its class and what there is to say about it in one line each."""

    name: str
    cls: type
    paper: str  # arXiv id, empty for a baseline
    stage: str  # where in the model it acts
    summary: str
    knobs: tuple[Knob, ...]


_registry: dict[str, Method] = {}


def register(name: str, *, paper: str, stage: str) -> Callable[[C], C]:
    """Class decorator for a frozen dataclass: list it as ``name``.

    Its summary is the first line of its docstring; every field says in ``metadata["help"]`` what it does.
    """

    def add(cls: C) -> C:
        if name in _registry:
            raise ValueError(f"register: method name must be new, got {name!r}")
        knobs = tuple(Knob(f.name, f.default, f.metadata["help"]) for f in dataclasses.fields(cls))
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        _registry[name] = Method(name, cls, paper, stage, summary, knobs)
        _check_knobs(cls)
        return cls

    return add


def _check_knobs(cls: Any) -> None:
    """Let a knob of a wrong type, and a seed that no generator takes, be refused by name when a method is
    made and not in the middle of a forward.
    """
    init = cls.__init__

    @wraps(init)
    def checked(self: Any, *arguments: Any, **knobs: Any) -> None:
        if torch.compiler.is_compiling():  # annotations cannot be looked at in a traced function
            init(self, *arguments, **knobs)
            return
        try:
            init(self, *arguments, **knobs)
        except Exception as error:
            fields = [field.name for field in dataclasses.fields(cls)]
            unknown = sorted(set(knobs) - set(fields))
            if unknown:
                known = ", ".join(fields)
                raise TypeError(f"{cls.__name__}: knobs are {known}, got {unknown[0]!r}") from error
            if not says(error, cls):
                check_fields(self, cls)  # the fields are set before their values are checked
            raise
        check_fields(self, cls)
        seed = getattr(self, "seed", 0)
        if not -(2**31) <= seed < 2**31:
            raise ValueError(f"{cls.__name__}: seed must be in [-2^31, 2^31), got {seed}")

    cls.__init__ = checked


def check_iterations(method: str, iterations: int) -> None:
    """Raise ValueError unless a forward can take so many steps."""
    if not 0 <= iterations <= 10_000:
        raise ValueError(f"{method}: iterations must be in [0, 10000], got {iterations!r}")


def get(name: str) -> Method:
    """The method registered as ``name``. Raises KeyError with the known names."""
    if name not in _registry:
        like = get_close_matches(name.lower().replace("-", "_"), _registry, n=1, cutoff=0.6)
        hint = f" (did you mean {like[0]!r}?)" if like else ""
        raise KeyError(f"methods: got name {name!r}{hint}, expected one of {', '.join(sorted(_registry))}")
    return _registry[name]


def all_methods() -> list[Method]:
    """Every registered method, by name."""
    return [_registry[name] for name in sorted(_registry)]


def check_keep(method: str, keep: float) -> None:
    """Raise ValueError unless ``keep`` is a ratio in (0, 1] or a count >= 1 (an int)."""
    ok = keep >= 1 if isinstance(keep, int) else 0.0 < keep <= 1.0
    if not ok or isinstance(keep, bool):
        raise ValueError(f"{method}: keep must be a ratio in (0, 1] or a count >= 1, got {keep!r}")


def budget(keep: float, n: int) -> int:
    """Tokens kept of ``n``, in [1, n]: ``round(keep * n)`` (floats, half to even) of a ratio, or an int."""
    wanted = keep if isinstance(keep, int) else round(keep * n)
    return min(max(int(wanted), 1), n)


def budgets(keep: float, x: Tensor, lengths: Tensor | None) -> list[int]:
    """The budget of every item of ``x`` ``[B, N, C]``. Waits for ``lengths`` where they are on a GPU."""
    if lengths is None:
        return [budget(keep, x.shape[1])] * x.shape[0]
    return [budget(keep, n) if n > 0 else 0 for n in lengths.tolist()]


def first_picks(picks: Tensor, counts: list[int]) -> Tensor:
    """``picks`` ``[B, K]`` with only the first ``counts[b]`` of item b left, -1 beyond."""
    if all(count == picks.shape[1] for count in counts):
        return picks
    limit = torch.tensor(counts, device=picks.device)[:, None]
    return torch.where(torch.arange(picks.shape[1], device=picks.device) < limit, picks, -1)


def ascending(picks: Tensor, *, holes: bool = True) -> Tensor:
    """``picks`` ``[B, K]`` in ascending order of token, the order tokens are fed on in; ``holes``: some may
    be -1, which come last.
    """
    if not holes:
        return picks.sort(dim=1).values
    last = torch.iinfo(picks.dtype).max
    ordered = torch.where(picks < 0, last, picks).sort(dim=1).values
    return torch.where(ordered == last, -1, ordered)


def best_token(score: Tensor, lengths: Tensor | None) -> Tensor:
    """``[B, 1]`` int32, the token of largest ``score`` ``[B, N]`` below each length, 0 where that is 0; ties:
    lowest index, NaN: -inf.
    """
    index, _ = ops.topk_select(score.contiguous(), 1, lengths=lengths)
    return index if lengths is None else index.clamp(min=0)
