"""What can be evaluated: the protocol of a compressor, and the registry.

A compressor acts on a model while a context lasts and leaves it as it was. What it drops depends on the kind
of model: keys of the cache of a language model, patches of a vision transformer, visual tokens of a
vision-language model. ``register`` makes one known by name for one kind; methods of any origin plug in here.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

Kind = Literal["keys", "patches", "visual"]
KINDS: tuple[Kind, ...] = ("keys", "patches", "visual")
BASELINES = ("random", "stride")  # beside ``none``, always evaluated


@dataclass(frozen=True)
class Report:
    """What a compressor did to the latest prompt."""

    total: int  # tokens it could drop
    kept: tuple[float, ...]  # of them, one number a layer (mean over heads), or a single one for all
    index: Tensor | None = None  # [K] the kept ones of the first row, where all layers and heads keep them


class Handle(Protocol):
    """What ``apply`` yields."""

    def report(self) -> Report | None:
        """The latest prompt; None: everything was kept."""


class Compressor(Protocol):
    """Keeps about ``budget`` of the tokens (or bytes) of a model it is applied to.

    One with a true attribute ``adaptive`` finds its own number and runs once, whatever the budgets.
    """

    @property
    def name(self) -> str:
        """As tables show it."""

    def apply(self, model: Any, budget: float, *, seed: int) -> AbstractContextManager[Handle]:
        """Acts on ``model`` while the context lasts, then leaves it as it was, also after an error.

        ``budget`` in (0, 1] is the share kept; ``seed`` decides whatever is drawn.
        """


@dataclass(frozen=True)
class Nothing:
    """The model as it is."""

    name: str = "none"

    def apply(self, model: Any, budget: float, *, seed: int) -> AbstractContextManager[Handle]:
        """Does nothing."""
        return nullcontext(self)

    def report(self) -> None:
        """Everything is kept."""


_registry: dict[tuple[Kind, str], Compressor] = {}


def register(kind: Kind, compressor: Compressor) -> None:
    """Make ``compressor`` known by its name for models of ``kind``. Raises ValueError for a known name."""
    if kind not in KINDS:
        raise ValueError(f"register: kind must be one of {list(KINDS)}, got {kind!r}")
    if (kind, compressor.name) in _registry or compressor.name == "none":
        raise ValueError(f"register: name must be new for {kind}, got {compressor.name!r}")
    _registry[kind, compressor.name] = compressor


def kind_of(model: Any) -> Kind:
    """What can be dropped in ``model``. Raises TypeError where it is none of the kinds."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if {"vision_tower", "multi_modal_projector"} <= names:
        return "visual"
    if "patch_embeddings" in names:
        return "patches"
    if "self_attn" in names:
        return "keys"
    raise TypeError(
        f"eval: model must be like a Hugging Face Llama, ViT or LLaVA, got {type(model).__name__}"
    )


def known(kind: Kind) -> list[str]:
    """Names of the compressors for models of ``kind``, the baselines first."""
    others = sorted(name for at, name in _registry if at == kind and name not in BASELINES)
    return [*BASELINES, *others]


def get(kind: Kind, name: str) -> Compressor:
    """The compressor ``name`` for models of ``kind``. Raises ValueError with the known names."""
    if name == "none":
        return Nothing()
    if (kind, name) not in _registry:
        raise ValueError(f"eval: method must be one of {['none', *known(kind)]}, got {name!r}")
    return _registry[kind, name]
