"""Methods on visual tokens as compressors of kind ``visual``: all that are registered for one.

Those with a number ``keep`` get the budget; the others find their own number of tokens and have one row. Of
methods between decoder layers the budget is what the last layer gets.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tokencomp import methods
from tokencomp.adapters import compress
from tokencomp.eval.compressors import Handle, Report, register
from tokencomp.methods.base import Method

Make = Callable[[float, int], Any]  # (budget, seed) -> the method


@dataclass
class _Run:
    """The model is compressed; ``handle`` knows what happened."""

    handle: Any

    def report(self) -> Report:
        """The latest prompt; means over its images, or over its rows where layers differ."""
        try:
            report = self.handle.report()
        except RuntimeError:
            report = None
        by_layer = getattr(report, "visual", None)  # of each sequence, from methods between decoder layers
        if by_layer:
            kept = tuple(sum(layer) / len(layer) for layer in by_layer)
            return Report(round(max(kept)), kept)
        if not getattr(report, "images", 0):
            raise RuntimeError("eval: nothing to report, the model has not seen an image")
        assert report is not None
        first = report.index[0][0]
        return Report(report.tokens // report.images, (report.kept / report.images,), first[first >= 0])


@dataclass(frozen=True)
class Chosen:
    """A method that chooses a share of the visual tokens, or as many as it sees fit."""

    name: str
    made: Make
    adaptive: bool = False

    @contextmanager
    def apply(self, model: Any, budget: float, *, seed: int) -> Iterator[Handle]:
        """See ``Compressor``."""
        with compress(model, self.made(budget, seed)) as handle:
            yield _Run(handle)


# Layers cut to what small encoders have, and what has no default.
SPECIAL: dict[str, Make] = {
    "atp": lambda keep, seed: methods.ATP(methods.FasterVLM(), keep=float(keep)),
    "hiprune": lambda keep, seed: methods.HiPrune(keep=float(keep), middle=0.4),
    "quota": lambda keep, seed: methods.QuoTA(lambda view: torch.ones(len(view.x)), keep=float(keep)),
    "slime": lambda keep, seed: methods.SliME(p=float(keep)),
    "vscan": lambda keep, seed: methods.VScan(keep=float(keep), shallow=1, windows=2),
    "vtc_cls": lambda keep, seed: methods.VTCCLS(keep=float(keep), last=3),
    "zoo_prune": lambda keep, seed: methods.ZOOPrune(keep=float(keep), seed=seed),
}


def _falling(keep: float) -> tuple[float, ...]:
    """Shares of three stages that fall by the same factor, the last one ``keep``."""
    return tuple(float(keep) ** (stage / 3) for stage in (1, 2, 3))


# Between decoder layers, for shallow decoders.
SPECIAL |= {
    "pyramid_drop": lambda keep, seed: methods.PyramidDrop(keep=_falling(keep), layers=(1, 2, 3)),
    "sparse_vlm": lambda keep, seed: methods.SparseVLM(keep=_falling(keep), layers=(0, 1, 2)),
    "trans_prune": lambda keep, seed: methods.TransPrune(keep=_falling(keep), layers=(1, 2, 3), since=0),
}
VARIANTS: dict[str, Make] = {
    "downsampling": lambda keep, seed: methods.StrideVisual(keep=float(keep), average=True),
    "fopru-row": lambda keep, seed: methods.FoPru(keep=float(keep), strategy="row"),
    "todre-kcenter": lambda keep, seed: methods.ToDRE(keep=float(keep), objective="max_min"),
}
# TCC publishes no thresholds: with these it keeps about a quarter of the tokens of digits-vlm
ADAPTIVE: dict[str, Make] = {
    "tcc": lambda keep, seed: methods.TCC(0.5, 0.2, 1, -2),
    "aim": lambda keep, seed: methods.AIM(start=0, span=4),
    "core_matching": lambda keep, seed: methods.CoreMatching(layers=(1,)),
    "must_drop": lambda keep, seed: methods.MustDrop(layers=(0, 1, 2)),
}
BASELINES = {"random_visual", "stride_visual"}  # those of the evaluation do the same


def visual_methods() -> list[Method]:
    """Those registered for visual tokens of vision-language models; baselines and what works in encoder
    layers left out.
    """
    stages = ("visual tokens", "decoder layers")
    found = [m for m in methods.all_methods() if any(stage in m.stage for stage in stages)]
    return [m for m in found if m.name not in BASELINES and not hasattr(m.cls, "reduce")]


def _keeping(cls: Any, keep: float, seed: int) -> Any:
    return cls(keep=float(keep))


def _as_it_is(cls: Any, keep: float, seed: int) -> Any:
    return cls()


def _compressor(entry: Method) -> Chosen:
    if entry.name in SPECIAL:
        return Chosen(entry.name, SPECIAL[entry.name])
    if entry.name in ADAPTIVE:
        return Chosen(entry.name, ADAPTIVE[entry.name], adaptive=True)
    if any(knob.name == "keep" and isinstance(knob.default, int | float) for knob in entry.knobs):
        return Chosen(entry.name, partial(_keeping, entry.cls))
    return Chosen(entry.name, partial(_as_it_is, entry.cls), adaptive=True)


def _register_all() -> None:
    for entry in visual_methods():
        register("visual", _compressor(entry))
    for name, made in VARIANTS.items():
        register("visual", Chosen(name, made))


_register_all()
