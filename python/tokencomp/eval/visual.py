"""Methods on visual tokens as compressors of kind ``visual``: on the way into the language model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokencomp import methods
from tokencomp.adapters import vlm
from tokencomp.eval.compressors import Handle, Report, register


@dataclass
class _Run:
    """The model is compressed; ``stack`` knows what happened."""

    stack: vlm.VisualStack

    def report(self) -> Report:
        """The latest prompt; means over its images."""
        report = self.stack.report
        if not report.images:
            raise RuntimeError("eval: nothing to report, the model has not seen an image")
        first = report.index[0][0]
        kept = report.kept / report.images
        return Report(report.tokens // report.images, (kept,), first[first >= 0])


@dataclass(frozen=True)
class Chosen:
    """A method that chooses a share of the visual tokens."""

    name: str
    made: Callable[[float, int], Any]  # (budget, seed) -> the method

    @contextmanager
    def apply(self, model: Any, budget: float, *, seed: int) -> Iterator[Handle]:
        """See ``Compressor``."""
        stack = vlm.attach(model, self.made(budget, seed))
        try:
            yield _Run(stack)
        finally:
            vlm.detach(stack)


def _keeping(cls: Any, keep: float, seed: int) -> Any:
    return cls(keep=float(keep))


def _register_all() -> None:
    """Those with a budget, layers cut to what small encoders have. (PruMerge, SliME and TCC find their own
    number of tokens, QuoTA needs a scorer.)
    """
    plain: tuple[Any, ...] = (
        methods.CDPruner, methods.DivPrune, methods.FasterVLM, methods.FoPru, methods.GlobalCom2,
        methods.Scope, methods.ToDRE, methods.VisPruner, methods.VisionZip,
    )  # fmt: skip
    for cls in plain:
        register("visual", Chosen(cls.__name__.lower(), partial(_keeping, cls)))
    special: dict[str, Callable[[float, int], Any]] = {
        "atp": lambda keep, seed: methods.ATP(methods.FasterVLM(), keep=float(keep)),
        "downsampling": lambda keep, seed: methods.StrideVisual(keep=float(keep), average=True),
        "hiprune": lambda keep, seed: methods.HiPrune(keep=float(keep), middle=0.4),
        "fopru-row": lambda keep, seed: methods.FoPru(keep=float(keep), strategy="row"),
        "todre-kcenter": lambda keep, seed: methods.ToDRE(keep=float(keep), objective="max_min"),
        "vscan": lambda keep, seed: methods.VScan(keep=float(keep), shallow=1, windows=2),
        "vtc_cls": lambda keep, seed: methods.VTCCLS(keep=float(keep), last=3),
        "zoo_prune": lambda keep, seed: methods.ZOOPrune(keep=float(keep), seed=seed),
    }
    for name, made in special.items():
        register("visual", Chosen(name, made))


_register_all()
