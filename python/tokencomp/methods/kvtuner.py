"""KVTuner: a number of bits for the keys and the values of each layer (arXiv 2502.04420)."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base, quantizing
from tokencomp.methods.eviction import Evicting
from tokencomp.methods.kv import KVView, PageSpec
from tokencomp.ops.kvquant import Axis
from tokencomp.recipes.common import require

Pair = tuple[int, int]
PAIRS: tuple[Pair, ...] = ((8, 8), (8, 4), (4, 8), (4, 4), (4, 2), (2, 4), (2, 2))


@base.register("kvtuner", paper="2502.04420", stage="kv-quant")
@dataclass(frozen=True)
class KVTuner(quantizing.Quantizing):
    """A table of bits, ``((key, value), ...)`` by layer: given, or searched for with ``Sensitivity``.

    The paper searches with many runs of a task; ``Sensitivity`` measures on one text what each pair does to
    the output of each layer, and the table is the one of least total error among those of no more bits. One
    pair in ``table`` is for all layers. A table has its own edges, so ``edges`` is 0.
    """

    table: tuple[Pair, ...] = field(default=((4, 4),), metadata={"help": "(key, value) bits of each layer"})
    k_axis: Axis = field(default="channel", metadata={"help": "what a key's grid spans: channel or token"})
    k_group: int = field(default=-1, metadata={"help": "elements of a key's grid; -1: the page, or the head"})
    v_group: int = field(default=-1, metadata={"help": "channels of a value's grid; -1: the head"})
    edges: int = field(default=0, kw_only=True, metadata={"help": quantizing.EDGES_HELP})

    def __post_init__(self) -> None:
        require(len(self.table) > 0, "KVTuner", "table", "of one pair of bits at least", self.table)
        super().__post_init__()

    @property
    def specs(self) -> tuple[PageSpec, ...]:
        """Those of the table."""
        return tuple(dict.fromkeys(map(self._spec, self.table)))

    def split(self, tokens: int) -> tuple[int, ...]:
        """All in the one tier of a layer."""
        return (tokens,)

    def layer_specs(self, layer: int, layers: int) -> tuple[PageSpec, ...]:
        """The layer's one. Raises ValueError where the table is of another number of layers."""
        fits = len(self.table) in (1, layers)
        require(fits, "KVTuner", "table", f"of 1 or {layers} layers", len(self.table))
        spec = self._spec(self.table[layer if len(self.table) > 1 else 0])
        edge = min(layer, layers - 1 - layer) < self.edges
        return (quantizing.raised(spec) if edge else spec,)

    def _spec(self, pair: Pair) -> PageSpec:
        return quantizing.page_spec(*pair, k_axis=self.k_axis, k_group=self.k_group, v_group=self.v_group)


class Sensitivity(Evicting):
    """Measures, as a method that evicts nothing, how far pairs of bits move the attention output of each
    layer.

    ``with compress(model, Sensitivity()) as handle: model(ids)`` over a calibration text, then
    ``table(bits)``. Errors are ``|out' - out| / |out|`` of the last ``rows`` queries of each prompt, summed
    over prompts.

    Args:
        pairs: (key, value) bits to try.
        k_axis, page: of the format they will be stored in.
    """

    budget, every = 1.0, 0

    def __init__(
        self, pairs: Sequence[Pair] = PAIRS, *, k_axis: Axis = "channel", page: int = 64, rows: int = 64
    ) -> None:
        require(rows >= 1, "Sensitivity", "rows", ">= 1", rows)
        self.pairs, self.k_axis, self.page, self.rows = tuple(pairs), k_axis, page, rows
        self.errors: dict[int, dict[Pair, float]] = {}

    @property
    def queries(self) -> int:
        """Those whose output is compared."""
        return self.rows

    @property
    def evicts_prompts(self) -> bool:
        """Nothing goes."""
        return False

    def resolve(
        self, tokens: int, layers: int, *, rows: int = 1, slot_bytes: int = 0, page: int = 1
    ) -> tuple[int, ...]:
        """All tokens."""
        return (tokens,) * layers

    def record_prompt(self, view: KVView) -> None:
        """Measures the pairs. Prompts without padding only."""
        require(view.counts is None, "Sensitivity", "prompts", "without padding", "padded ones")
        q, k, v = (
            t.float() for t in (view.q, view.keys()[:, :, : view.size], view.values()[:, :, : view.size])
        )
        errors = pair_errors(
            q[:, :, -self.rows :], k, v, self.pairs, scale=view.scale, k_axis=self.k_axis, page=self.page
        )
        known = self.errors.setdefault(view.layer, dict.fromkeys(self.pairs, 0.0))
        for pair, error in errors.items():
            known[pair] += error

    def table(self, bits: float) -> tuple[Pair, ...]:
        """``best_table`` of what was measured. Raises ValueError where nothing was."""
        require(len(self.errors) > 0, "Sensitivity", "table", "asked for after a prompt", "before any")
        return best_table([self.errors[layer] for layer in sorted(self.errors)], bits)


def pair_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Sequence[Pair],
    *,
    scale: float,
    k_axis: Axis = "channel",
    page: int = 64,
) -> dict[Pair, float]:
    """Relative error of the attention output, ``|out' - out| / |out|``, with keys and values of such bits.

    Args:
        q: ``[B, Hq, T, D]``, the last T queries. k, v: ``[B, Hkv, S, D]``; whole pages of them are quantized.
    """
    quantized = {bits: _rounded(k, bits, k_axis, page) for bits in {k for k, _ in pairs}}
    values = {bits: _rounded(v, bits, "token", page) for bits in {v for _, v in pairs}}
    exact = _attention(q, k, v, scale)
    size = float(exact.norm().clamp(min=1e-30))
    return {
        pair: float((_attention(q, quantized[pair[0]], values[pair[1]], scale) - exact).norm()) / size
        for pair in pairs
    }


def best_table(errors: Sequence[Mapping[Pair, float]], bits: float) -> tuple[Pair, ...]:
    """One pair a layer, of least total error among those of at most ``bits`` a number on average.

    Exact, by dynamic programming over the bits spent. Ties: fewer bits. Raises ValueError where no pairs are
    so small.
    """
    most = int(bits * 2 * len(errors) + 1e-9)
    best: dict[int, tuple[float, tuple[Pair, ...]]] = {0: (0.0, ())}
    for layer in errors:
        found: dict[int, tuple[float, tuple[Pair, ...]]] = {}
        for (spent, (error, chosen)), pair in itertools.product(best.items(), layer):
            total, own = spent + sum(pair), error + layer[pair]
            if total <= most and (total not in found or own < found[total][0]):
                found[total] = own, (*chosen, pair)
        best = found
    least = sum(min(map(sum, layer)) for layer in errors) / (2 * len(errors))
    require(len(best) > 0, "best_table", "bits", f">= {least:g} with these pairs", bits)
    return min((error, spent, chosen) for spent, (error, chosen) in best.items())[2]


def _rounded(x: Tensor, bits: int, axis: Axis, page: int) -> Tensor:
    whole = x.shape[2] // page * page
    if whole == 0:
        return x
    group = page if axis == "channel" else -1
    codes, params = ops.kv_quantize(x[:, :, :whole], bits, axis=axis, group=group)
    return torch.cat([ops.kv_dequantize(codes, params, bits, axis=axis, group=group), x[:, :, whole:]], 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, scale=scale, enable_gqa=True, is_causal=False, attn_mask=_causal(q, k)
    )


def _causal(q: Tensor, k: Tensor) -> Tensor:
    rows, keys = q.shape[2], k.shape[2]
    return torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
