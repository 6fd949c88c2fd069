"""The reference compressors: plain PyTorch of ``tokencomp.reference``, in its ``gathered`` form.

What they drop is really freed, so their bytes and times are those of a smaller cache and fewer tokens. (The
``masked`` form computes the same, frees nothing, and is the oracle of the tests.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from tokencomp import methods, reference
from tokencomp.eval.compressors import Handle, Kind, Report, register
from tokencomp.methods.base import budget as count_of

# (n, k, grid, generator) -> the kept ones of a row of n tokens, [k]; grid where they are an image
Pick = Callable[[int, int, tuple[int, int] | None, Generator], Tensor]
# (budget, x [B, N, C]) -> the kept ones, [B, K]
Choose = Callable[[float, Tensor], Tensor]


def _random(n: int, k: int, grid: tuple[int, int] | None, generator: Generator) -> Tensor:
    return reference.random_keep(n, k, 1, generator)[0]


def _stride(n: int, k: int, grid: tuple[int, int] | None, generator: Generator) -> Tensor:
    return reference.grid_keep(*grid, k) if grid else reference.stride_keep(n, k)


def _ends(n: int, k: int, grid: tuple[int, int] | None, generator: Generator) -> Tensor:
    return reference.ends_keep(n, k)


@dataclass(frozen=True)
class _State:
    """The handle of a reference compressor."""

    kept: Any

    def report(self) -> Report:
        if not self.kept.total:
            raise RuntimeError("eval: nothing to report, the model has not seen a prompt")
        layers = self.kept.index if isinstance(self.kept.index, list) else [self.kept.index]
        first = layers[0][0, 0] if layers[0].ndim == 3 else layers[0][0]
        return Report(self.kept.total, tuple(float(layer.shape[-1]) for layer in layers), first)


@dataclass(frozen=True)
class KeysOnce:
    """Forgets keys of a language model after the prompt, the same ones in all layers and heads."""

    name: str
    pick: Pick

    @contextmanager
    def apply(self, model: Any, budget: float, *, seed: int) -> Iterator[Handle]:
        """See ``Compressor``. Padding is never kept; the budget is of all slots."""
        generator, chosen = Generator().manual_seed(seed), [torch.empty(0)]

        def select(layer: int, keys: Tensor, valid: Tensor | None) -> Tensor:
            batch, heads, n, _ = keys.shape
            if layer == 0:
                chosen[0] = _rows(self.pick, batch, n, count_of(float(budget), n), valid, generator)
            return chosen[0][:, None].expand(-1, heads, -1)

        with reference.kept_keys(model, select) as kept:
            yield _State(kept)


def _rows(pick: Pick, batch: int, n: int, k: int, valid: Tensor | None, generator: Generator) -> Tensor:
    """``[batch, k]``: what ``pick`` keeps of the valid tokens of each row."""
    rows = []
    for row in range(batch):
        place = torch.arange(n) if valid is None else valid[row].cpu().nonzero()[:, 0]
        if len(place) < k:
            raise ValueError(f"eval: a row with {len(place)} tokens without padding cannot keep {k}")
        rows.append(place[pick(len(place), k, None, generator)])
    return torch.stack(rows)


@dataclass(frozen=True)
class TokensOnce:
    """Drops image tokens of a ViT or of a vision-language model before its layers.

    Either ``pick`` chooses by place, or ``choose`` by the tokens themselves.
    """

    name: str
    kind: Kind
    pick: Pick | None = None
    choose: Choose | None = None

    @contextmanager
    def apply(self, model: Any, budget: float, *, seed: int) -> Iterator[Handle]:
        """See ``Compressor``. Square numbers of tokens are taken for a square image."""
        generator = Generator().manual_seed(seed)

        def select(x: Tensor) -> Tensor:
            if self.choose is not None:
                return self.choose(float(budget), x)
            assert self.pick is not None
            n = x.shape[1]
            side = round(n**0.5)
            grid = (side, side) if side * side == n else None
            k = count_of(float(budget), n)
            return torch.stack([self.pick(n, k, grid, generator) for _ in range(len(x))])

        drop = reference.kept_patches if self.kind == "patches" else reference.kept_visual
        with drop(model, select) as kept:
            yield _State(kept)


def _register_all() -> None:
    for name, pick in (("random", _random), ("stride", _stride), ("ends", _ends)):
        register("keys", KeysOnce(name, pick))
    kinds: tuple[Kind, ...] = ("patches", "visual")
    for kind in kinds:
        register(kind, TokensOnce("random", kind, pick=_random))
        register(kind, TokensOnce("stride", kind, pick=_stride))
    patches: dict[str, Choose] = {
        "divprune": lambda keep, x: methods.DivPrune(keep).select(x),
        "todre": lambda keep, x: methods.ToDRE(keep).select(x),
    }
    for name, choose in patches.items():
        register("patches", TokensOnce(name, "patches", choose=choose))


_register_all()
