"""Methods between attention and MLP of a vision transformer, as compressors for the evaluation.

The budget is the share of image tokens that the MLPs work on, averaged over layers: the same work as dropping
the other tokens before the first layer, which is what ``random`` and ``stride`` do. A method that merges some
tokens in every layer has its rate chosen for it; where a layer can give up no more than half of its tokens a
small budget is out of reach, and the table shows what was kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tokencomp import adapters, methods
from tokencomp.eval.compressors import Handle, Report, register
from tokencomp.methods.layers import LayerMethod

# (budget, layers, image tokens) -> the method with its rate
Make = Callable[[float, int, int], LayerMethod]


def left_by_count(r: int, layers: int, tokens: int) -> list[int]:
    """Image tokens after each layer where every layer merges ``r``, half of what is there at most."""
    left = []
    for _ in range(layers):
        tokens -= min(r, tokens // 2)
        left.append(tokens)
    return left


def left_by_share(keep: float, layers: int, tokens: int) -> list[int]:
    """Image tokens after each layer where every layer keeps the share ``keep``, half at least."""
    left = []
    for _ in range(layers):
        tokens -= min(int(tokens - tokens * keep), tokens // 2)
        left.append(tokens)
    return left


def count_for(budget: float, layers: int, tokens: int) -> int:
    """The smallest r that leaves ``budget`` of the tokens on average, or the least that can be left."""
    for r in range(tokens // 2):
        if sum(left_by_count(r, layers, tokens)) <= budget * layers * tokens:
            return r
    return tokens // 2


def share_for(budget: float, layers: int, tokens: int) -> float:
    """The largest share per layer, in steps of 1 %, that leaves ``budget`` on average; at least a half."""
    for percent in range(100, 50, -1):
        if sum(left_by_share(percent / 100, layers, tokens)) <= budget * layers * tokens:
            return percent / 100
    return 0.5


@dataclass(frozen=True)
class _State:
    """The handle of a compressed encoder."""

    compressed: Any

    def report(self) -> Report:
        seen = self.compressed.report()
        total = seen.tokens[0] - seen.prefix
        return Report(total, tuple(float(count - seen.prefix) for count in seen.tokens[1:]))


@dataclass(frozen=True)
class InEncoder:
    """A method inside the encoder of a model with ``image_size`` and ``patch_size`` in its configuration."""

    name: str
    make: Make

    @contextmanager
    def apply(self, model: Any, budget: float, *, seed: int) -> Iterator[Handle]:
        """See ``Compressor``. Nothing is drawn: ``seed`` is not used."""
        tokens = (model.config.image_size // model.config.patch_size) ** 2
        method = self.make(float(budget), int(model.config.num_hidden_layers), tokens)
        with adapters.compress(model, method) as compressed:
            yield _State(compressed)


def _first_layer(budget: float, layers: int, tokens: int) -> int:
    return tokens - round(budget * tokens)


_MAKERS: dict[str, Make] = {
    "tome": lambda *shape: methods.ToMe(r=count_for(*shape), metric="tokens"),
    "pitome": lambda *shape: methods.PiToMe(keep=share_for(*shape), metric="tokens"),
    "tofu": lambda *shape: methods.ToFu(r=count_for(*shape)),
    "mctf": lambda *shape: methods.MCTF(r=count_for(*shape)),
    "vidtldr": lambda *shape: methods.VidTLDR(r=[count_for(*shape)] * shape[1]),
    "gtp": lambda *shape: methods.GTP(drop=[_first_layer(*shape)]),
    "zerotprune": lambda *shape: methods.ZeroTPrune(keep=shape[0], layers=(0,)),
}


def _register_all() -> None:
    for name, make in _MAKERS.items():
        register("patches", InEncoder(name, make))


_register_all()
