"""Visual tokens for tests of methods: an encoder whose attention is given, tokens of worked examples."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tokencomp import methods
from tokencomp.methods.visual import VisualView
from torch import Tensor


@dataclass
class GivenEncoder:
    """Attention by layer, as tests say."""

    layers: int = 2
    has_cls: bool = True
    cls_of: dict[int, Tensor] = field(default_factory=dict)
    logits_of: dict[int, Tensor] = field(default_factory=dict)
    columns_of: dict[int, Tensor] = field(default_factory=dict)
    keys_of: dict[int, Tensor] = field(default_factory=dict)
    query_of: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    feature: Tensor | None = None
    projector: Callable[[Tensor], Tensor] = lambda x: x

    def cls(self, layer: int) -> Tensor:
        return self.cls_of[layer] if self.has_cls else self.columns_of[layer]

    def logits(self, layer: int) -> Tensor:
        return self.logits_of[layer]

    def columns(self, layer: int) -> Tensor:
        return self.columns_of[layer]

    def keys(self, layer: int) -> Tensor:
        return self.keys_of[layer]

    def cls_query(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.query_of[layer]

    def features(self) -> Tensor:
        assert self.feature is not None
        return self.feature

    def project(self, features: Tensor) -> Tensor:
        return self.projector(features)


def random_view(
    crops: int = 3, side: int = 6, heads: int = 2, layers: int = 4, has_cls: bool = True, **options: Any
) -> VisualView:
    """Crops of random tokens, all that methods may ask for."""
    g, tokens = torch.Generator().manual_seed(7), side * side

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    encoder = GivenEncoder(layers, has_cls, feature=make(crops, tokens, 6))
    weight = make(6, 8)
    encoder.projector = lambda x: torch.tanh(x @ weight)
    for layer in range(layers):
        encoder.logits_of[layer] = make(crops, tokens) * 2
        encoder.cls_of[layer] = encoder.logits_of[layer].softmax(1)
        encoder.columns_of[layer] = make(crops, tokens).softmax(1)
        encoder.keys_of[layer] = make(crops, heads, tokens, 4)
        encoder.query_of[layer] = make(crops, heads, 4), make(crops, heads, int(has_cls), 4)
    x = encoder.project(encoder.features())
    return VisualView(x, encoder, grid=(side, side), **options)


ANGLES, NORMS = (0, 10, 25, 90, 130, 200), (1.0, 2.0, 1.0, 3.0, 1.0, 0.5)
SIX = torch.tensor(
    [
        [n * math.cos(math.radians(a)), n * math.sin(math.radians(a))]
        for a, n in zip(ANGLES, NORMS, strict=True)
    ]
)[None]
"""Six tokens in the plane at these angles; norms must not matter."""


def six(**options: Any) -> VisualView:
    """The six tokens as one crop."""
    encoder = GivenEncoder(feature=SIX, **options.pop("encoder", {}))
    return VisualView(SIX, encoder, **options)


ENCODER_METHODS: list[Any] = [methods.FlowCut(keep=9)]  # they see layers, not views; test_adapters_vlm_cut.py
VISUAL_METHODS: list[Any] = [
    methods.FasterVLM(keep=9), methods.VTCCLS(keep=9), methods.FoPru(keep=9),
    methods.HiPrune(keep=9, middle=2),
    methods.GlobalCom2(), methods.VisionZip(keep=9), methods.VisPruner(keep=9), methods.CDPruner(keep=9),
    methods.Scope(keep=9), methods.VScan(keep=9, windows=2, shallow=1), methods.SliME(p=0.3),
    methods.ZOOPrune(keep=9), methods.TCC(0.4, 0.2, 1, 2), methods.ATP(methods.FasterVLM(), keep=9),
    methods.QuoTA(lambda view: torch.arange(1.0, 1 + len(view.x))), methods.PruMerge(),
    methods.ToDRE(keep=9), methods.DivPrune(keep=9), methods.LexRank(keep=9), methods.RandomVisual(keep=9),
    methods.StrideVisual(keep=9), methods.StrideVisual(keep=9, average=True), methods.AIMMerge(keep=9),
    methods.MustDrop(inside=False),
]  # fmt: skip
