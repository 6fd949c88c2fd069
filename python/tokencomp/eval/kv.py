"""Methods on the KV cache as compressors of kind ``keys``: on pages, with the bytes they really hold.

Methods that quantize hold every token, so they know no budget of tokens: they have one row, with the bits
that their own knobs say.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from tokencomp import methods
from tokencomp.adapters import compress
from tokencomp.adapters.kv_handle import CompressedCache
from tokencomp.eval.compressors import Handle, Report, register
from tokencomp.methods.base import budget as count_of

BASELINES = {"random_kv", "stride_kv"}  # those of the evaluation are the same for all layers and heads
PAGES = 8  # at least so many in a budget, for methods that keep whole pages
LAST = ("window", "recent", "every")  # knobs that protect so many last tokens
EDGE = 8  # at most one layer in so many counts as an edge at either end


@dataclass
class _Run:
    """The handle; the model is compressed when it sees its first prompt, whose length the knobs must fit."""

    handle: CompressedCache | None = None

    def report(self) -> Report:
        """What the prompt left in each layer, a mean over heads."""
        if self.handle is None:
            raise RuntimeError("eval: nothing to report, the model has not seen a prompt")
        report = self.handle.report()
        kept = (sum(layer.prompt[0]) / len(layer.prompt[0]) for layer in report.layers)
        return Report(report.prompt[0], tuple(kept))


@dataclass(frozen=True)
class Cached:
    """A method on the KV cache with its own knobs, cut to fit short prompts."""

    name: str
    made: Callable[[float], Any]  # budget -> the method
    adaptive: bool = False

    @contextmanager
    def apply(self, model: Any, budget: float, *, seed: int) -> Iterator[Handle]:
        """See ``Compressor``. The model must be called with ``input_ids``."""
        run = _Run()

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if run.handle is None:
                tokens, layers = kwargs["input_ids"].shape[1], model.config.num_hidden_layers
                method = fitted(self.made(float(budget)), tokens, seed, layers=layers)
                run.handle = compress(model, method, page=16)

        hook = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield run
        finally:
            hook.remove()
            if run.handle is not None:
                run.handle.remove()


def fitted(method: Any, tokens: int, seed: int = 0, *, layers: int | None = None) -> Any:
    """``method`` with its draws from ``seed``, and with at most half of its budget at a prompt of ``tokens``
    protected at the end and a quarter at the beginning; with small pages where it keeps whole ones, and with
    few layers of more bits at the edges of so many ``layers``.
    """
    slots = tokens if method.budget is None else count_of(method.budget, tokens)
    most = {**dict.fromkeys(LAST, max(1, slots // 2)), "sinks": slots // 4}
    changed: dict[str, Any] = {}
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name == "every" and field.default is None:
            changed["every"] = None  # of a wrapper: that of its method, which may have been cut
        elif field.name in most and isinstance(value, int) and value > most[field.name]:
            changed[field.name] = most[field.name]
        elif field.name == "page":
            changed["page"] = next(page for page in (16, 8, 4, 2, 1) if page * PAGES <= max(slots, PAGES))
        elif field.name == "seed":
            changed["seed"] = seed
        elif field.name == "method":
            changed["method"] = fitted(value, tokens, seed)
        elif field.name == "edges" and layers is not None:
            changed["edges"] = min(value, layers // EDGE)
    return replace(method, **changed)


def _with_budget(cls: Any, budget: float) -> Any:
    return cls(budget=budget)


def _with_its_own(method: Any, budget: float) -> Any:
    return method


def _register_all() -> None:
    for entry in methods.all_methods():
        if entry.stage == "kv" and entry.name not in BASELINES:
            register("keys", Cached(entry.name, partial(_with_budget, entry.cls)))
    quantizing = {entry.name: entry.cls() for entry in methods.all_methods() if entry.stage == "kv-quant"}
    quantizing |= {f"uniform-{bits}": methods.Uniform(bits) for bits in (2, 8)}
    quantizing["kivi-4"] = methods.KIVI(4)
    for name, method in quantizing.items():
        register("keys", Cached(name, partial(_with_its_own, method), adaptive=True))


_register_all()
