"""Methods on the KV cache as compressors of kind ``keys``: on pages, with the bytes they really hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from tokencomp import methods
from tokencomp.adapters import compress
from tokencomp.adapters.kv_handle import CompressedCache
from tokencomp.eval.compressors import Handle, Report, register
from tokencomp.methods.base import budget as count_of

BASELINES = {"random_kv", "stride_kv"}  # those of the evaluation are the same for all layers and heads
PAGES = 8  # at least so many in a budget, for methods that keep whole pages
LAST = ("window", "recent", "every")  # knobs that protect so many last tokens


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
    method: Any  # a class

    @contextmanager
    def apply(self, model: Any, budget: float, *, seed: int) -> Iterator[Handle]:
        """See ``Compressor``. The model must be called with ``input_ids``."""
        run = _Run()

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if run.handle is None:
                tokens = kwargs["input_ids"].shape[1]
                method = fitted(self.method(budget=float(budget)), tokens, seed)
                run.handle = compress(model, method, page=16)

        hook = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield run
        finally:
            hook.remove()
            if run.handle is not None:
                run.handle.remove()


def fitted(method: Any, tokens: int, seed: int = 0) -> Any:
    """``method`` with its draws from ``seed``, and with at most half of its budget at a prompt of ``tokens``
    protected at the end and a quarter at the beginning; with small pages where it keeps whole ones.
    """
    slots = count_of(method.budget, tokens)
    most = {**dict.fromkeys(LAST, max(1, slots // 2)), "sinks": slots // 4}
    changed: dict[str, Any] = {}
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name in most and isinstance(value, int) and value > most[field.name]:
            changed[field.name] = most[field.name]
        elif field.name == "page":
            changed["page"] = next(page for page in (16, 8, 4, 2, 1) if page * PAGES <= max(slots, PAGES))
        elif field.name == "seed":
            changed["seed"] = seed
        elif field.name == "method":
            changed["method"] = fitted(value, tokens, seed)
    if "method" in changed:  # a wrapper hands what it is told on to its method
        changed = {**changed, "every": None}
    return replace(method, **changed)


def _register_all() -> None:
    for entry in methods.all_methods():
        if entry.stage == "kv" and entry.name not in BASELINES:
            register("keys", Cached(entry.name, entry.cls))


_register_all()
