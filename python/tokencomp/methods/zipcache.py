"""ZipCache: salient tokens, as probe queries see them, in more bits (arXiv 2405.14256)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokencomp import recipes, scores
from tokencomp.methods import base, kv_attention, quantizing
from tokencomp.methods.kv import ChannelMaps, KVView, PageSpec, Side
from tokencomp.ops.kvquant import Axis
from tokencomp.recipes.common import require

Norm = Literal["none", "rows_all", "rows_probe"]


@dataclass(frozen=True)
class Probed(quantizing.Quantizing):
    """Scores by the attention of probe rows in prompts, and of the last query where decode quantizes."""

    every: int = field(default=100, kw_only=True, metadata={"help": quantizing.EVERY_HELP})
    high: int = field(default=4, metadata={"help": "bits of salient tokens"})
    low: int = field(default=2, metadata={"help": "bits of the others"})
    probes: float = field(default=0.05, metadata={"help": "share of the newest queries that are probes"})
    drawn: float = field(default=0.05, metadata={"help": "share of queries drawn from the others"})
    seed: int = field(default=0, metadata={"help": "of the probes drawn"})
    norm: Norm = field(
        default="rows_probe",
        metadata={"help": "divide by the probes that see a token (the paper), rows_all (the code) or none"},
    )
    k_axis: Axis = field(default="channel", metadata={"help": "what a key's grid spans: channel or token"})

    def __post_init__(self) -> None:
        name, norms = type(self).__name__, ("none", "rows_all", "rows_probe")
        require(self.norm in norms, name, "norm", f"one of {list(norms)}", repr(self.norm))
        require(
            self.k_axis in ("token", "channel"), name, "k_axis", "'token' or 'channel'", repr(self.k_axis)
        )
        require(0 < self.probes <= 1, name, "probes", "in (0, 1]", self.probes)
        require(0 <= self.drawn <= 1, name, "drawn", "in [0, 1]", self.drawn)
        require(self.high > self.low, name, "high", f"more than low={self.low}", self.high)
        super().__post_init__()

    @property
    def specs(self) -> tuple[PageSpec, ...]:
        """Salient, and the others."""
        return tuple(quantizing.page_spec(bits, k_axis=self.k_axis) for bits in (self.high, self.low))

    @property
    def needs_logits(self) -> bool:
        """Where every step quantizes; otherwise they are computed for the step that does."""
        return self.every == 1

    @property
    def needs_lse(self) -> bool:
        """For the probes."""
        return True

    @property
    def queries(self) -> int:
        """All: any may be drawn."""
        return -1

    @property
    def sides(self) -> Mapping[str, Side]:
        """Attention received, and by how many rows."""
        return {"mass": Side(torch.float32, 0), "count": Side(torch.float32, 0)}

    def record_prompt(self, view: KVView) -> None:
        """Adds what the probes of this forward give."""
        weight = self._probes(view)
        mass, count = view.state["mass"], view.state["count"]
        mass[:, :, : view.size] += kv_attention.received(view, row_weight=weight)
        rows = kv_attention.rows_of(view)
        seen = torch.where(rows.age >= 0, 1.0, 0.0)
        if self.norm != "rows_all":
            seen = seen * weight.repeat_interleave(view.lengths.shape[1], 0)
        lengths = kv_attention.row_lengths(view)
        found = scores.count_correction(
            view.size, seen.shape[1], row_weight=seen, q_position=rows.slot, lengths=lengths
        )
        count[:, :, : view.size] += kv_attention.by_head(view, found)

    def record_step(self, view: KVView) -> None:
        """What the last query gives, not normalised, in place of what was known of tokens before."""
        if view.step % self.every == 0:
            view.state["mass"][:, :, : view.size] = kv_attention.last_received(view)
            view.state["count"].fill_(1)

    def score(self, view: KVView) -> Tensor:
        """The mean over the rows that count; 0 where there is none."""
        mass, count = view.state["mass"], view.state["count"]
        return mass if self.norm == "none" else torch.where(count > 0, mass / count.clamp(min=1e-9), 0.0)

    def maps(self, view: KVView) -> ChannelMaps | None:
        """Values by channel over ``sqrt(max |v|)``, and keys too where they are quantized by token."""
        v_scale = recipes.separable_scale(quantizing.row_stats(view, view.values()).absmax)
        if self.k_axis == "channel":
            return ChannelMaps(v_scale=v_scale)
        return ChannelMaps(
            recipes.separable_scale(quantizing.row_stats(view, view.keys()).absmax), v_scale=v_scale
        )

    def _probes(self, view: KVView) -> Tensor:
        """``[B, T]``: 1 for the probes of each sequence, 0 for other rows and padding."""
        rows, batch = view.q.shape[2], view.q.shape[0]
        counts = [rows] * batch if view.counts is None else view.counts.tolist()
        starts = [0] * batch if view.starts is None else view.starts.tolist()
        weight = torch.zeros(batch, rows)
        for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
            weight[b, start : start + count] = scores.probe_weights(
                count, recent=self.probes, random=self.drawn, seed=self.seed
            )
        return weight.to(view.q.device)


@base.register("zipcache", paper="2405.14256", stage="kv-quant")
@dataclass(frozen=True)
class ZipCache(Probed):
    """4 bits for salient tokens, 2 for the share ``ratio`` of least saliency, decided head by head.

    Saliency is the attention received from probe rows (the newest 5 % and a random 5 %) over the number of
    probes that see the token; the official code divides by the number of all rows that do
    (``norm="rows_all"``). Keys are quantized by channel, values by token over channels divided by ``sqrt(max
    |v|)``. Official: a grid spans all tokens of a tier, or all heads of a token; every ``every`` steps the
    whole cache is quantized again from what came back, the prompt has no exact window (``sinks=0, recent=0,
    edges=0``), and channel maxima are taken anew. Here grids are those of a page and head, each token is
    quantized once, and maxima are the prompt's; tokens that leave the window are ranked by the last query of
    the step.
    """

    ratio: float = field(default=0.4, metadata={"help": "share of tokens in the low tier, in [0, 1]"})

    def __post_init__(self) -> None:
        require(0 <= self.ratio <= 1, "ZipCache", "ratio", "in [0, 1]", self.ratio)
        super().__post_init__()

    def split(self, tokens: int) -> tuple[int, ...]:
        """Of the tokens that are not protected, ``floor(ratio n)`` are low."""
        left = max(0, tokens - sum(self.protected(tokens)))
        low = math.floor(self.ratio * left + 1e-9)
        return left - low, low
