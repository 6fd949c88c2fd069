"""What ``tokencomp.compress`` gives for a method on the KV cache."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from tokencomp.adapters import llm
from tokencomp.adapters.restoring import Restoring


@dataclass(frozen=True)
class SparseReport:
    """What one layer has read where a sparse method restricts it."""

    steps: int  # decode steps
    dense_steps: int  # of them, those that read every slot
    density: float  # slots read in decode steps, of those in use
    slots: float  # read per step and kv head, a mean
    chosen: int  # selections made
    reused: int  # steps with a selection of an earlier step or layer
    prompts: int  # prompts and chunks of them
    dense_prompts: int
    prompt_density: float  # pairs of query and key computed, of those a dense prompt has
    seconds: float  # of the host in choosing


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache."""

    number: int  # of the layer in the model
    tokens: list[list[int]]  # [B][Hkv] slots in use
    prompt: list[list[int]]  # the same, as the first prompt left them
    bytes: int  # pages and side arrays
    kinds: tuple[Any, ...]  # tokencomp.cache.PagesMemory: working pages, then each quantized type
    bits: float  # an element of keys and values takes, parameters of grids included
    evictions: int
    evicted: int  # slots, of all rows
    seconds: float  # of the host in scoring, selecting and moving
    sparse: SparseReport | None = None


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
    def bits(self) -> float:
        """Bits an element of keys and values takes, parameters of grids included, empty slots not."""
        return float(self.memory.bits)

    @property
    def seconds(self) -> float:
        """Of all layers."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def density(self) -> float:
        """Share of the slots in use that decode steps read, a mean over layers; 1 without a sparse method."""
        shares = [layer.sparse.density for layer in self.layers if layer.sparse is not None]
        return sum(shares) / len(shares) if shares else 1.0

    def __str__(self) -> str:
        rows = [row for layer in self.layers for row in layer.tokens]
        held = [tokens for row in rows for tokens in row] or [0]
        span = f"{min(held)}" if min(held) == max(held) else f"{min(held)} to {max(held)}"
        kinds = ", ".join(f"{kind.tokens} tokens in {kind.name}" for kind in self.memory.kinds)
        mixed = f" ({kinds}: {self.bits:.2f} bits an element)" if len(self.memory.kinds) > 1 else ""
        return (
            f"{self.method}: {span} tokens a head of {max(self.seen, default=0)} seen{mixed}, "
            f"{self.memory.used} bytes of pages ({self.memory.held} held), "
            f"{self.evictions} evictions in {self.seconds:.3f} s"
            + (f", {self.density:.1%} of the slots read" if self.layers and self.layers[0].sparse else "")
        )


class CompressedCache(Restoring):
    """A model whose caches a method compresses. A context manager: leaving it restores the model; caches then
    work again once it is compressed with the same method.
    """

    def __init__(self, model: nn.Module, stack: llm.Stack) -> None:
        self.model = model
        self._stack = stack
        self._final: CacheReport | None = None

    def _restore(self) -> None:
        llm.detach(self._stack)
        if self._stack.last is not None:
            self._final = self.report()
            self._stack.last = None

    @property
    def stack(self) -> llm.Stack:
        """What is on the decoder."""
        return self._stack

    @property
    def method(self) -> Any:
        """The method on the KV cache."""
        return self._stack.plan.method

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
        from tokencomp.cache.memory import bits_of

        cache = self.cache if cache is None else cache
        layers = []
        for paged, held in zip(cache.paged, cache.layer_memory(), strict=True):
            done = held.events
            prompt = [] if done.prompt is None else done.prompt.tolist()
            layers.append(
                LayerReport(
                    paged.number, held.tokens.tolist(), prompt, held.bytes, held.kinds, bits_of(held.kinds),
                    done.evictions, done.evicted, done.seconds,
                    _sparse_report(paged.layer.reader, held.tokens.size),
                )
            )  # fmt: skip
        return CacheReport(
            self._stack.plan.name,
            cache.state.seen.tolist(),
            cache.state.prompt.tolist(),
            tuple(layers),
            cache.memory(),
        )


def _sparse_report(reader: Any, rows: int) -> SparseReport | None:
    if reader is None:
        return None
    done = reader.events
    slots = int(done.read) / max(done.steps * rows, 1)
    return SparseReport(
        done.steps, done.dense, done.density, slots, done.chosen, done.reused, done.prompts,
        done.dense_prompts, done.prompt_density, done.seconds,
    )  # fmt: skip
