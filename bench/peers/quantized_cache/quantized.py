"""Quantized caches on recall-lm: ours, QuantizedCache of transformers, and eviction at the same bytes.

Every row is judged by the tasks and the measures of ``python -m tokencomp eval``; the model runs in bfloat16,
so that what is not quantized has 16 bits. See README.md for the environment with transformers' two backends.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokencomp import compress, methods, zoo
from tokencomp.eval import compressors
from tokencomp.eval.compressors import Handle, Report
from tokencomp.eval.kv import Cached
from tokencomp.eval.run import evaluate
from tokencomp.eval.table import Table

PAGE = 32
OWN: dict[str, Any] = {"sinks": 4, "recent": 32, "edges": 0}  # 4 layers: all would be edges by default
BARE: dict[str, Any] = {"sinks": 0, "recent": 0, "edges": 0}  # the whole prompt, as QuantizedCache does
EVICTION = ("snapkv", "keydiff", "streaming_llm")
BUDGETS = (0.15, 0.2, 0.3, 0.5)
PAIRS = (3, 17)  # channels that rotate together, (d, d + D/2), blown up by ``outliers``


@dataclass(frozen=True)
class Prompted:
    """A handle that tells how many tokens the prompt left, in whatever form."""

    handle: Any

    def report(self) -> Report:
        """See ``tokencomp.eval.compressors.Handle``."""
        report = self.handle.report()
        kept = (sum(layer.prompt[0]) / len(layer.prompt[0]) for layer in report.layers)
        return Report(report.prompt[0], tuple(kept))


@dataclass(frozen=True)
class Ours:
    """A method that quantizes, with a prompt's worth of protected tokens."""

    name: str
    make: Callable[[], Any]

    page: int = PAGE

    @contextmanager
    def apply(self, model: Any, budget: float, *, seed: int) -> Iterator[Handle]:
        """See ``tokencomp.eval.compressors.Compressor``; ``budget`` is not looked at."""
        with compress(model, self.make(), page=self.page) as handle:
            yield Prompted(handle)


@dataclass(frozen=True)
class Peer:
    """transformers' QuantizedCache, with its own defaults otherwise."""

    name: str
    backend: str
    bits: int

    @contextmanager
    def apply(self, model: Any, budget: float, *, seed: int) -> Iterator[Handle]:
        """See ``tokencomp.eval.compressors.Compressor``; ``budget`` is not looked at."""
        from transformers import QuantizedCache

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if kwargs.get("past_key_values") is None:
                cache: Any = QuantizedCache(self.backend, model.config, nbits=self.bits)
                cache.memory = lambda: sum(map(held, cache.layers))
                kwargs["past_key_values"] = cache
            return args, kwargs

        hook = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield compressors.Nothing()
        finally:
            hook.remove()


def held(thing: Any) -> int:
    """Bytes of the tensors in a layer, those inside the backends' own types too."""
    if isinstance(thing, torch.Tensor):
        inner = [getattr(thing, name, None) for name in ("_data", "_scale", "_shift")]
        if type(thing) is not torch.Tensor and any(isinstance(t, torch.Tensor) for t in inner):
            return sum(held(t) for t in inner if t is not None)
        return thing.numel() * thing.element_size()
    if isinstance(thing, dict):
        return sum(map(held, thing.values()))
    if isinstance(thing, tuple | list):
        return sum(map(held, thing))
    return held(vars(thing)) if hasattr(thing, "_quantized_keys") else 0


def ours(table: Any) -> list[Ours]:
    """The configurations compared; ``table`` is KVTuner's."""
    m: Any = methods
    page: dict[str, Any] = {"k_axis": "token"}
    made: dict[str, Callable[[], Any]] = {
        "int8": lambda: m.Uniform(8, **OWN),
        "int4": lambda: m.Uniform(4, **OWN),
        "int3": lambda: m.Uniform(3, **OWN),
        "int2": lambda: m.Uniform(2, **OWN),
        "int8, whole prompt": lambda: m.Uniform(8, **BARE),
        "int4, whole prompt": lambda: m.Uniform(4, **BARE),
        "int2, whole prompt": lambda: m.Uniform(2, **BARE),
        "int4 by token, whole prompt": lambda: m.Uniform(4, **page, **BARE),
        "k4v2": lambda: m.Uniform(4, 2, **OWN),
        "int4 by token": lambda: m.Uniform(4, **page, **OWN),
        "int4 by token, rotated": lambda: m.Uniform(4, rotate="keys", **page, **OWN),
        "int4 by token, centered": lambda: m.Uniform(4, center=True, **page, **OWN),
        "QServe": lambda: m.QServe(**OWN),
        "KIVI-4": lambda: m.KIVI(4, **OWN),
        "KIVI-2": lambda: m.KIVI(2, **OWN),
        "KVTuner 3 bits": lambda: m.KVTuner(table, **OWN),
        "MiKV 20% 16 + 2": lambda: m.MiKV(0.2, **OWN),
        "MiKV 20% 8 + 2": lambda: m.MiKV(0.2, high=8, **OWN),
        "ZipCache 4 + 2": lambda: m.ZipCache(**OWN),
        "ZipVL 4 + 2": lambda: m.ZipVL(tau=0.9, **OWN),
        "QAQ": lambda: m.QAQ(error=0.3, **OWN),
        "Tiered A2SF 16, 4, 2, evict": lambda: m.Tiered(**OWN),
        "Tiered KeyDiff 4, 2, evict": lambda: m.Tiered(m.KeyDiff(1.0), {4: 0.4, 2: 0.4, "evict": 0.2}, **OWN),
    }
    wide = ("int4, whole prompt", "int2, whole prompt")  # also with grids of 64 tokens, the page of a GPU
    return [Ours(name, make) for name, make in made.items()] + [
        Ours(f"{name}, page 64", made[name], page=64) for name in wide
    ]


def peers() -> list[Peer]:
    """The configurations of QuantizedCache."""
    return [Peer(f"HF quanto {bits}", "quanto", bits) for bits in (4, 2)] + [
        Peer(f"HF hqq {bits}", "hqq", bits) for bits in (8, 4, 2)
    ]


def calibrated(model: Any, task: Any, bits: float) -> tuple[tuple[int, int], ...]:
    """KVTuner's table from one prompt of another seed than the evaluation's."""
    recorder = methods.Sensitivity(page=PAGE)
    sample = task.samples(1, task.seed + 1)[0]
    with torch.no_grad(), compress(model, recorder, page=PAGE):
        model(**sample.prompt, use_cache=True, logits_to_keep=1)
    return recorder.table(bits)


def outliers(model: Any, factor: float) -> None:
    """Make key channels of very different sizes, and leave every logit as it is.

    Keys of some channels times ``factor``, queries over it; both channels that rotate together, so that the
    rotation does not see it. Large key channels are what biases of the key projection make in Qwen2.5.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        size = attention.head_dim
        rows = torch.tensor([d + half for d in PAIRS for half in (0, size // 2)])
        for projection, by in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
            weight = projection.weight.data.unflatten(0, (-1, size))
            weight[:, rows] *= by
            if projection.bias is not None:
                projection.bias.data.unflatten(0, (-1, size))[:, rows] *= by


def in_bfloat16(model: Any) -> Any:
    """Parameters alone: the frequencies of the rotary embedding stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    return model


def compared(model: Any, task: Any, samples: int | None, chosen: list[Any], evicts: bool, name: str) -> Table:
    """One table of everything: quantized caches at their own size, eviction at its budgets."""
    table = evaluate(model, task, chosen, (1.0,), samples=samples, name=name)
    rows = tuple(row for row in table.rows if row.method not in compressors.BASELINES)
    if evicts:
        evicting: list[Any] = [Cached(m, methods.get(m).cls) for m in EVICTION]
        rest = evaluate(model, task, evicting, BUDGETS, samples=samples, name=name)
        rows += tuple(row for row in rest.rows if row.method != "none")
    return replace(table, rows=rows)


def main() -> None:
    """Run the comparison and write one JSON table a task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="recall,needle,text")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--outliers", type=float, default=1.0, help="factor on some key channels")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--without-eviction", action="store_true")
    parser.add_argument("--only", help="names of ours and peers, separated by semicolons")
    parser.add_argument("--out", type=Path, default=Path("build/peers/quantized_cache"))
    options = parser.parse_args()
    model, tasks = zoo.load("recall-lm")
    model = in_bfloat16(model)
    table = calibrated(model, tasks["recall"], 3.0)
    print("KVTuner's table:", table)
    name = "recall-lm"
    if options.outliers != 1:
        outliers(model, options.outliers)
        name = f"recall-lm-outliers-{options.outliers:g}"
    chosen: list[Any] = [*ours(table), *([] if options.without_peers else peers())]
    if options.only:
        chosen = [one for one in chosen if one.name in options.only.split(";")]
    options.out.mkdir(parents=True, exist_ok=True)
    for task in options.tasks.split(","):
        found = compared(model, tasks[task], options.samples, chosen, not options.without_eviction, name)
        found.print()
        (options.out / f"{name}_{task}.json").write_text(found.to_json() + "\n")


if __name__ == "__main__":
    main()
