"""What ``tokencomp.compress`` gives for a method on the KV cache."""

from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from tokencomp.adapters import llm


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache."""

    number: int  # of the layer in the model
    tokens: list[list[int]]  # [B][Hkv] slots in use
    prompt: list[list[int]]  # the same, as the first prompt left them
    bytes: int  # pages and side arrays
    evictions: int
    evicted: int  # slots, of all rows
    seconds: float  # of the host in scoring, selecting and moving


@dataclass(frozen=True)
class CacheReport:
    """What became of the tokens of one cache."""

    method: str
    seen: list[int]  # tokens of each sequence so far, without padding
    prompt: list[int]  # of the first forward
    layers: tuple[LayerReport, ...]
    memory: Any  # tokencomp.cache.Memory

    @property
    def evictions(self) -> int:
        """Of all layers."""
        return sum(layer.evictions for layer in self.layers)

    @property
    def seconds(self) -> float:
        """Of all layers."""
        return sum(layer.seconds for layer in self.layers)

    def __str__(self) -> str:
        rows = [row for layer in self.layers for row in layer.tokens]
        held = [tokens for row in rows for tokens in row] or [0]
        span = f"{min(held)}" if min(held) == max(held) else f"{min(held)} to {max(held)}"
        return (
            f"{self.method}: {span} tokens a head of {max(self.seen, default=0)} seen, "
            f"{self.memory.used} bytes of pages ({self.memory.held} held), "
            f"{self.evictions} evictions in {self.seconds:.3f} s"
        )


class CompressedCache:
    """A model whose caches a method compresses. A context manager: leaving it restores the model."""

    def __init__(self, model: nn.Module, stack: llm.Stack) -> None:
        self.model = model
        self._stack = stack
        self._removed = False
        self._final: CacheReport | None = None

    def __enter__(self) -> "CompressedCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was. Doing it again does nothing. Caches work again once the model is
        compressed with the same method.
        """
        if not self._removed:
            self._removed = True
            llm.detach(self._stack)
            if self._stack.last is not None:
                self._final = self.report()
                self._stack.last = None

    @property
    def cache(self) -> Any:
        """The ``PagedKVCache`` of the last forward. Raises RuntimeError before the first one, or after
        ``remove()``, which lets go of it.
        """
        if self._stack.last is None:
            raise RuntimeError("compress: there was no forward with a cache, or the handle was removed")
        return self._stack.last

    def new_cache(self) -> Any:
        """An empty ``PagedKVCache`` for this model, to be passed as ``past_key_values``."""
        return self._stack.new_cache()

    def report(self, cache: Any = None) -> CacheReport:
        """What ``cache`` holds and what happened to it; default: the cache of the last forward.

        Raises RuntimeError where there was none.
        """
        if cache is None and self._final is not None:
            return self._final
        cache = self.cache if cache is None else cache
        layers = []
        for paged, held in zip(cache.paged, cache.layer_memory(), strict=True):
            done = held.events
            prompt = [] if done.prompt is None else done.prompt.tolist()
            layers.append(
                LayerReport(
                    paged.number, held.tokens.tolist(), prompt, held.bytes, done.evictions, done.evicted,
                    done.seconds,
                )
            )  # fmt: skip
        name = type(self._stack.plan.method).__name__
        return CacheReport(
            name, cache.state.seen.tolist(), cache.state.prompt.tolist(), tuple(layers), cache.memory()
        )
