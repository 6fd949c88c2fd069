"""kvpress on recall-lm: the tasks, prompts, budgets and measures of ``python -m tokencomp eval``.

kvpress 0.5.5 pins transformers < 5.3, so it runs in a virtual environment of its own, see README.md. The
tables are JSON that ``tokencomp.eval.Table`` reads.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvpress
import torch
from tokencomp import zoo
from tokencomp.eval import compressors
from tokencomp.eval.compressors import Report
from tokencomp.eval.run import evaluate

WINDOW, KERNEL = 32, 5  # of SnapKV and what is built on it


@dataclass
class Kept:
    """What the latest prompt left: a compressor's handle. And the position of the next token, which kvpress
    leaves to its pipeline: a model counts on from what the cache holds.
    """

    total: int = 0
    layers: tuple[float, ...] = ()
    seen: int = 0

    def before(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Before the model's forward."""
        tokens = kwargs["input_ids"].shape[1]
        kwargs["position_ids"] = torch.arange(self.seen, self.seen + tokens)[None]
        self.seen += tokens
        return args, kwargs

    def report(self) -> Report:
        """See ``tokencomp.eval.compressors.Handle``."""
        return Report(self.total, self.layers)

    def after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """After the model's forward; the first one is the prompt."""
        if not self.layers:
            self.total = kwargs["input_ids"].shape[1]
            self.layers = tuple(float(layer.keys.shape[2]) for layer in output.past_key_values.layers)


@dataclass(frozen=True)
class Press:
    """One press as a compressor of kind ``keys``."""

    name: str
    make: Callable[[float], Any]  # of the compression ratio, which is the share removed
    eager: bool = False

    @contextmanager
    def apply(self, model: Any, budget: float, *, seed: int) -> Iterator[Kept]:
        """See ``tokencomp.eval.compressors.Compressor``."""
        kept, attention = Kept(), model.config._attn_implementation
        hooks = [
            model.register_forward_pre_hook(kept.before, with_kwargs=True),
            model.register_forward_hook(kept.after, with_kwargs=True),
        ]
        try:
            if self.eager:
                model.set_attn_implementation("eager")
            with torch.random.fork_rng(), self.make(1.0 - budget)(model):
                torch.manual_seed(seed)
                yield kept
        finally:
            for hook in hooks:
                hook.remove()
            model.set_attn_implementation(attention)


def _snapkv(removed: float) -> Any:
    return kvpress.SnapKVPress(removed, window_size=WINDOW, kernel_size=KERNEL)


PRESSES = (
    Press("kvpress-random", kvpress.RandomPress),
    Press("kvpress-streaming", kvpress.StreamingLLMPress),
    Press("kvpress-knorm", kvpress.KnormPress),
    Press("kvpress-keydiff", kvpress.KeyDiffPress),
    Press("kvpress-lagkv", kvpress.LagKVPress),
    Press("kvpress-tova", kvpress.TOVAPress),
    Press("kvpress-snapkv", _snapkv),
    Press(
        "kvpress-pyramidkv",
        lambda removed: kvpress.PyramidKVPress(removed, window_size=WINDOW, kernel_size=KERNEL),
    ),
    Press("kvpress-h2o", kvpress.ObservedAttentionPress, eager=True),
    Press("kvpress-adakv", lambda removed: kvpress.AdaKVPress(_snapkv(removed))),
)


def main() -> None:
    """Run every press on the chosen tasks and write one JSON table a task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="recall,needle,text")
    parser.add_argument("--presses", help="names without kvpress-, separated by commas; default: all")
    parser.add_argument("--budgets", default="0.1,0.25,0.5")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--out", type=Path, default=Path("build/peers/kvpress"))
    options = parser.parse_args()
    for press in PRESSES:
        compressors.register("keys", press)
    names = {f"kvpress-{name}" for name in (options.presses or "").split(",")}
    chosen = [press for press in PRESSES if not options.presses or press.name in names]
    model, tasks = zoo.load("recall-lm")
    budgets = [float(budget) for budget in options.budgets.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.tasks.split(","):
        table = evaluate(model, tasks[name], chosen, budgets, samples=options.samples, name="recall-lm")
        table.print()
        (options.out / f"{name}.json").write_text(table.to_json() + "\n")


if __name__ == "__main__":
    main()
