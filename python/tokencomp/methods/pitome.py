"""PiToMe: protect isolated tokens, merge those inside large clusters (arXiv 2405.16148)."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import base, matching
from tokencomp.methods.layers import LayerView, Metric, Reduced, Stateless
from tokencomp.methods.matching import Pairing, Plan

Flavour = Literal["plain", "bsm", "text", "tome"]
Energy = Literal["elu", "paper"]

# What the official code does to each model, by field.
PRESETS: dict[str, dict[str, Any]] = {
    "deit": {"margin": 0.75, "slope": 0.75, "early": "bsm", "proportional": False},
    "mae": {"margin": 0.75, "slope": 0.75, "flavour": "bsm", "early": "plain", "proportional": False},
    "augreg": {"margin": 0.9, "slope": 0.9, "proportional": False},
    "clip": {"margin": 0.95, "slope": 0.95, "metric": "tokens", "proportional": False},
    "clip_hf": {
        "margin": 0.9,
        "slope": 0.9,
        "early": "tome",
        "early_layers": 13,
        "metric": "tokens",
        "weighted": False,
        "proportional": False,
    },
    "blip": {"margin": 0.9, "slope": 0.9, "stop": -1, "metric": "tokens", "proportional": False},
    "blip2": {"margin": 0.75, "slope": 0.4, "proportional": True},
    "bert": {
        "margin": 0.9,
        "slope": 0.25,
        "flavour": "text",
        "stop": 3,
        "weighted": False,
        "proportional": False,
    },
}


@base.register("pitome", paper="2405.16148", stage="every encoder layer, between attention and MLP")
@dataclass(frozen=True)
class PiToMe(Stateless):
    """Merges the tokens of high energy, those with many similar ones; tokens that stand alone are protected.

    The energy of token i among T, of cosines G and at layer l of L with m = margin - slope * l / L:
    ``E_i = (1 / T) sum_j f(G_ij)``, f(g) = ELU(g - m) with ELU(z) = z for z >= 0 else alpha (e^z - 1). (The
    paper's text has f(g) = g for g >= m: ``energy="paper"``, from memory.) Each layer merges r = floor(T - T
    keep) tokens, capped at half of them, T without the prefix. Of the tokens by descending energy:

    - ``plain``: the first 2 r take part, the others are protected. Every second one, from the first on, goes
      into the most similar of those between. All r of them do, however dissimilar.
    - ``bsm``: all take part. Every second one, from the first on, finds the most similar of those between;
      the r most similar pairs are merged.
    - ``text``: the first r go into the most similar of the next r, with the Gaussian energy
      ``exp(-(1 - g)^2 / (2 sigma^2)) / (sigma sqrt(2 pi))``, sigma = 1 - m.
    - ``tome``: no energy; even and odd tokens as ToMe, with r = floor(N - N keep), N with the prefix.

    ``preset`` has what the official code does to each model. The paper uses the defaults here.
    """

    keep: float = field(default=0.9, metadata={"help": "share of the tokens each layer keeps"})
    margin: float = field(default=0.9, metadata={"help": "margin m of the first layer"})
    slope: float = field(default=0.9, metadata={"help": "what m loses from the first layer to past the last"})
    flavour: Flavour = field(default="plain", metadata={"help": "plain, bsm, text or tome"})
    early: Flavour | None = field(
        default=None, metadata={"help": "flavour of the early layers; None: the same as later"}
    )
    early_layers: int | None = field(
        default=None, metadata={"help": "how many layers are early; None: half of them, rounded up"}
    )
    stop: int | None = field(
        default=None,
        metadata={"help": "layers from here on merge nothing; counts from the end if < 0"},
    )
    energy: Energy = field(default="elu", metadata={"help": "elu (official code) or paper"})
    alpha: float = field(default=1.0, metadata={"help": "scale of the energy below the margin"})
    metric: Metric = field(
        default="keys", metadata={"help": "what is compared: keys (mean over heads) or tokens"}
    )
    weighted: bool = field(
        default=True, metadata={"help": "track sizes and weight averages by them; else plain averages"}
    )
    proportional: bool = field(default=True, metadata={"help": "add log size to the attention logits"})

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"PiToMe: keep must be in (0, 1], got {self.keep!r}")
        for name, value, known in (
            ("flavour", self.flavour, get_args(Flavour)),
            ("early", self.early, (None, *get_args(Flavour))),
            ("energy", self.energy, get_args(Energy)),
            ("metric", self.metric, get_args(Metric)),
        ):
            if value not in known:
                raise ValueError(f"PiToMe: {name} must be one of {known}, got {value!r}")
        if "text" in (self.flavour, self.early) and max(self.margin, self.margin - self.slope) >= 1.0:
            got = (self.margin, self.slope)
            raise ValueError(f"PiToMe: margin must stay below 1 with text, got margin and slope {got}")
        if self.proportional and not self.weighted:
            raise ValueError("PiToMe: proportional needs weighted=True, got weighted=False")

    @classmethod
    def preset(cls, name: str, keep: float = 0.9) -> "PiToMe":
        """The knobs of the official code for ``name``: one of ``PRESETS``.

        deit, mae, augreg: timm models (the AugReg patch of the code does not run: its flavours are unknown,
        plain here). clip, blip: LAVIS. clip_hf: the Hugging Face tower of LLaVA; the code merges behind the
        MLP and does not weight. blip2: the EVA tower. bert: only three layers merge; plain averages.

        Raises:
            KeyError: no such preset.
        """
        if name not in PRESETS:
            raise KeyError(f"PiToMe: preset must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(keep=keep, **PRESETS[name])

    def margin_at(self, layer: int, layers: int) -> float:
        """m of ``layer``: ``margin - slope * layer / layers``."""
        return self.margin - self.slope * layer / layers

    def flavour_at(self, layer: int, layers: int) -> Flavour:
        """How ``layer`` merges."""
        early = self.early_layers if self.early_layers is not None else (layers + 1) // 2
        return self.early if self.early is not None and layer < early else self.flavour

    def count(self, layer: int, layers: int, tokens: int, prefix: int) -> int:
        """r of ``layer`` that has ``tokens``, prefix included."""
        if layer not in range(layers)[: self.stop]:
            return 0
        among = tokens if self.flavour_at(layer, layers) == "tome" else tokens - prefix
        return max(min(math.floor(among - among * self.keep), (tokens - prefix) // 2), 0)

    def plan(
        self, metric: Tensor, *, prefix: int = 1, layer: int = 0, layers: int = 1, mask: Tensor | None = None
    ) -> Plan:
        """What ``layer`` of ``layers`` merges: ``(token_map [B, N] int32, out_tokens)``.

        Args:
            metric: ``[B, N, D]``, what is compared; zero rows have similarity 0 to all.
            prefix: tokens at the front that stay as they are.
            mask: ``[B, N]`` bool, False at padding, which has no part in the energies.

        Rows: prefix, tokens that stay by descending energy (bsm: by descending similarity), merged ones by
        descending energy.
        """
        r = self.count(layer, layers, metric.shape[1], prefix)
        if r == 0:
            return matching.identity(metric)
        return matching.plan_pairs(
            metric, r, prefix, self._pairing(metric, r, prefix, layer, layers, mask), mask
        )

    @torch.no_grad()
    def _pairing(
        self, metric: Tensor, r: int, prefix: int, layer: int, layers: int, mask: Tensor | None
    ) -> Pairing:
        flavour = self.flavour_at(layer, layers)
        if flavour == "tome":
            return Pairing()
        tokens = prefix + matching.ranked(self.energies(metric, prefix, layer, layers, mask))
        if flavour == "bsm":
            return Pairing(tokens[:, 0::2], tokens[:, 1::2], order="similarity")
        a, b = tokens[:, 0 : 2 * r : 2], tokens[:, 1 : 2 * r : 2]
        if flavour == "text":
            a, b = tokens[:, :r], tokens[:, r : 2 * r]
        return Pairing(a, b, tokens[:, 2 * r :], "similarity")

    def energies(
        self, metric: Tensor, prefix: int, layer: int = 0, layers: int = 1, mask: Tensor | None = None
    ) -> Tensor:
        """``[B, N - prefix]`` float32, the energy of each token behind the prefix; padding: -inf."""
        text = self.flavour_at(layer, layers) == "text"
        return ops.energy_score(
            matching.dense(metric)[:, prefix:],
            self.margin_at(layer, layers),
            alpha=self.alpha,
            kind="gauss" if text else self.energy,
            mask=None if mask is None else mask[:, prefix:].contiguous(),
        )

    def reduce(self, view: LayerView) -> Reduced | None:
        """Merge by the keys of this layer, or by the tokens themselves."""
        r = self.count(view.layer, view.layers, view.tokens, view.prefix)
        if r == 0:
            return None
        metric = view.features(self.metric)
        pairing = self._pairing(metric, r, view.prefix, view.layer, view.layers, view.mask)
        return matching.merge_pairs(view, metric, r, pairing, sized=self.weighted)
