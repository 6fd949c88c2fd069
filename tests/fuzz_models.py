"""Random methods, knobs, prompts and cache operations on tiny models, for ``fuzz.py``; and attention."""

import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from typing import Any

import decoders
import tiny_models
import tokencomp
import torch
from fuzz_draw import FLOATS, OUT_OF_MEMORY, Call, Draw, other, spoil
from fuzz_tokens import attention, some
from kv_methods import KV_METHODS
from merging import LAYER_CASES
from method_cases import LAYER_METHOD_CASES
from quant_methods import QUANT_METHODS
from sparse_methods import SPARSE_METHODS
from sparse_prompts import PROMPT_METHODS
from tokencomp import methods
from visual_views import VISUAL_METHODS

NAMED = re.compile(r"(^|, )[\w.]+: ")  # "A2SF: budget must", after the place in C++
# A right method may not fit the model, nor what it protects a share of a short prompt.
UNFIT = re.compile(r"must be of (at least )?\d+ layers|budget must be >= \d+ slots")
REFUSED = (ValueError, TypeError, RuntimeError, MemoryError)
Judge = Callable[[Call, Callable[..., Any]], str]


@cache
def models(kind: str) -> tuple[Any, list[torch.Tensor]]:
    model = {"decoder": decoders.decoder, "encoder": tiny_models.vit, "visual": tiny_models.llava}[kind]()
    if kind == "visual":  # transformers hooks the encoder when it is first asked for hidden states
        model.model.vision_tower(tiny_models.pixels(), output_hidden_states=True)
    return model, [p.detach().clone() for p in model.parameters()]


def knob(method: Any, d: Draw) -> tuple[Callable[[], Any], str]:
    """The method with one knob replaced, when called; and what that is."""
    field = d.pick(*fields(method))
    value, _ = other(getattr(method, field.name), d)
    return lambda: replace(method, **{field.name: value}), f"{type(method).__name__}.{field.name}={value!r}"


@contextmanager
def unharmed(kind: str, wrong: str, refusable: bool, done: list[str]) -> Any:
    """The model is as it was whatever happens; an error is one of ``REFUSED`` and says whose it is."""
    model, weights = models(kind)
    before = tiny_models.state(model)
    done.append("returned")
    try:
        with torch.no_grad():
            yield model
    except REFUSED as error:
        said = f"{wrong or 'right'}: {type(error).__name__}: {error}"
        named = NAMED.search(str(error)) or (wrong and any(text in str(error) for text in OUT_OF_MEMORY))
        if not (wrong or refusable or UNFIT.search(str(error))) or not named:
            raise AssertionError(said) from error
        done.append("refused")
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{wrong}: {type(error).__name__}: {error}") from error
    assert tiny_models.state(model) == before, f"{wrong}: the model is not as it was"
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert same, f"{wrong}: weights changed"


def decoder(seed: int, judge: Judge) -> str:
    d, done = Draw(seed), []
    table: dict[str, Any] = d.pick(KV_METHODS, QUANT_METHODS, SPARSE_METHODS, PROMPT_METHODS)
    chosen = d.pick(*table.values())
    make, wrong = (lambda: chosen), ""
    if d.maybe(0.5):
        make, wrong = knob(chosen, d)
    options = some(
        d, page=lambda: d.pick(16, 32, 64), chunks=lambda: d.pick("each", "last"),
        memory_limit=lambda: d.pick(1, 100_000, "1MiB"),
    )  # fmt: skip
    if d.maybe(0.2):
        options["attention"] = d.pick("model", "x")
    others = [d.pick(*SPARSE_METHODS.values())] if d.maybe(0.2) else []
    with unharmed("decoder", wrong, bool(others or options), done) as model:
        handle = tokencomp.compress(model, make(), *others, **options)
        try:
            _answer(model, d, f"{wrong} {options}", "attention" in options)
        finally:
            handle.remove()
    return done[-1]


def _answer(model: Any, d: Draw, about: str, dense: bool) -> None:
    """A prompt in chunks, decode steps, and what generation does to caches in between."""
    batch, length = d.size(2), d.size(90)
    ids = torch.randint(1, 128, (batch, length), generator=d.generator)
    mask = torch.ones_like(ids)
    if d.maybe() and not dense:
        mask[0, : d.size(length, 0)] = 0
    if d.maybe(0.2) and not dense:
        mask[-1, length - d.size(length, 0) :] = 0
    held: Any = None
    for size in (length, *[d.size(9) for _ in range(d.size(6))]):
        if held is not None:
            new = torch.randint(1, 128, (batch, size), generator=d.generator)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        output = model(
            input_ids=ids[:, -size:], attention_mask=mask, past_key_values=held, use_cache=True,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -size:],
        )  # fmt: skip
        assert not output.logits[mask[:, -size:].bool()].isnan().any(), f"{about}: NaN"
        held = output.past_key_values
        if d.maybe(0.2):
            order = torch.randint(0, batch, (batch,), generator=d.generator)
            held.reorder_cache(order)
            ids, mask = ids[order], mask[order]
        assert int(held.memory()) >= 0


def encoder(seed: int, judge: Judge) -> str:
    d, done = Draw(seed), []
    chosen = d.pick(*LAYER_CASES.values(), *(case[0] for case in LAYER_METHOD_CASES))
    make, wrong = (lambda: chosen), ""
    if d.maybe(0.6):
        make, wrong = knob(chosen, d)
    options = some(d, dense=lambda: d.pick(True, False))
    counts = "counts" in repr(chosen) or type(chosen).__name__ == "DiffRate"  # made for other models
    with unharmed("encoder", wrong, counts, done) as model:
        handle = tokencomp.compress(model, make(), **options)
        try:
            for _ in range(2):
                x = torch.randn(d.size(3), 3, 32, 32, generator=d.generator)
                logits = model(pixel_values=x).logits
                assert not logits.isnan().any(), f"{wrong or chosen}: NaN"
            handle.report()
        finally:
            handle.remove()
    return done[-1]


def visual(seed: int, judge: Judge) -> str:
    d, done = Draw(seed), []
    chosen = d.pick(*VISUAL_METHODS)
    make, wrong = (lambda: chosen), ""
    if d.maybe(0.5):
        make, wrong = knob(chosen, d)
    options = some(
        d, positions=lambda: d.pick("preserve", "compact"), newlines=lambda: d.pick("rows", "all", "none")
    )
    others = [d.pick(*KV_METHODS.values())] if d.maybe(0.3) else []
    with unharmed("visual", wrong, True, done) as model:
        handle = tokencomp.compress(model, make(), *others, **options)
        try:
            given = tiny_models.prompt(d.size(2))
            answer = model(**given, use_cache=True)
            assert not answer.logits.isnan().any(), f"{wrong or chosen}: NaN"
            model.generate(**given, max_new_tokens=3, do_sample=False)
        finally:
            handle.remove()
    return done[-1]


def selector(seed: int, judge: Judge) -> str:
    """Methods that choose among tokens without a model."""
    d = Draw(seed)
    keep = d.pick(d.size(20), d.random.random() + 0.001)
    cls = d.pick(methods.DivPrune, methods.ToDRE, methods.LexRank, methods.Random, methods.Stride)
    x = d.floats(d.size(3), d.size(70), d.size(40), dtype=d.pick(*FLOATS))
    return judge(Call(cls.__name__, {"x": x}), cls(keep=keep).select)


def sdpa(seed: int, judge: Judge) -> str:
    d = Draw(seed)
    tensors, _ = attention(d, values=True)
    batch, heads, rows, _ = tensors["q"].shape
    keys = tensors["k"].shape[2]
    options: dict[str, Any] = {"enable_gqa": True, "is_causal": d.maybe()} | some(
        d,
        scale=lambda: d.random.random() + 0.01,
        return_lse=lambda: True,
        return_columns=lambda: True,
        column_weights=lambda: d.positive(*d.pick((rows,), (batch, rows), (batch, heads, rows))),
        heads=lambda: d.pick("none", "kv_sum", "mean"),
        softcap=lambda: d.random.random() * 9 + 0.1,
        sinks=lambda: d.floats(heads),
    )
    if options["is_causal"]:
        options |= some(d, window=lambda: d.size(50), key_mask=lambda: d.bools(batch, keys))
    elif d.maybe():
        options["attn_mask"] = d.pick(d.bools, d.floats)(*d.pick((), (batch, 1), (batch, heads)), rows, keys)
    call = Call(
        "scaled_dot_product_attention", tensors | options, also=("flash_prefill", "_lse", "_score", "_decode")
    )
    if d.maybe(0.5):
        call = spoil(call, d)
    return judge(call, tokencomp.scaled_dot_product_attention)


PARTS: dict[str, Callable[[int, Judge], str]] = {
    "decoder": decoder, "encoder": encoder, "visual": visual, "selector": selector, "sdpa": sdpa,
}  # fmt: skip
