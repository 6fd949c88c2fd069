"""Every method between decoder layers on a model: what it left out is as if masked, alone and with others."""

from typing import Any

import pytest
import tokencomp
import torch
from decoder_oracle import masked
from decoder_views import DECODER_METHODS
from test_adapters_vlm_decoder import CLOSE, STEPS, said_by
from tiny_models import state
from tiny_vlms import IMAGE, make
from tokencomp import methods
from torch import Tensor


def two_and_one() -> tuple[Any, Any, dict[str, Any], Tensor]:
    """A model in float32 and in float64, a prompt with two images beside a padded one with one."""
    (model, made), (exact, _) = make("llava", torch.float32), make("llava")
    image, text = torch.full((1, 16), IMAGE), made["input_ids"][:1, :3]
    two = torch.cat([text, image, text, image, text], 1)
    padding = torch.zeros(1, 10, dtype=torch.long)
    one = torch.cat([padding, text.repeat(1, 3), image, text.repeat(1, 2)], 1)
    mask = torch.ones_like(two).repeat(2, 1)
    mask[1, :10] = 0
    pixels = torch.cat([made["pixel_values"], made["pixel_values"][:1] * 2])
    return model, exact, {"input_ids": torch.cat([two, one]), "pixel_values": pixels}, mask


def columns_of(report: Any, width: int) -> dict[int, Tensor]:
    """``[B, width]`` bool of each layer."""
    found = {}
    for number, column in enumerate(report.columns):
        row, place = (column >= 0).nonzero(as_tuple=True)
        found[number] = torch.zeros(len(column), width, dtype=torch.bool)
        found[number][row, column[row, place]] = True
    return found


def unmoved(method: Any) -> Any:
    """``method`` where it only drops tokens and early caches keep theirs."""
    if isinstance(method, methods.MustDrop):
        return methods.MustDrop(layers=(0, 1), share=0.2, peak=0.2, merge=None, free=False)
    if isinstance(method, methods.SparseVLM):
        return methods.SparseVLM(method.keep, method.layers, method.rate, recycle=0.0)
    return method


@pytest.mark.parametrize("method", DECODER_METHODS, ids=str)
@torch.no_grad()
def test_equal_masked_columns(method: Any) -> None:
    """In generation, in a forward and without a cache; two images beside one, and padding."""
    model, exact, made, mask = two_and_one()
    method, ids = unmoved(method), made["input_ids"]
    with tokencomp.compress(model, method) as handle:
        said, logits = said_by(model, made, attention_mask=mask)
        report = handle.report()
        cached = model(**made, attention_mask=mask, use_cache=True).logits[:, -1]
        alone = model(**made, attention_mask=mask, use_cache=False).logits[:, -1]
    stays = columns_of(report, ids.shape[1])
    double = made | {"pixel_values": made["pixel_values"].double()}
    expected = masked(exact, double, said[:, :-1], stays, mask)[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(logits.double(), expected, atol=CLOSE, rtol=0)
    torch.testing.assert_close(cached, logits[:, 0], atol=CLOSE, rtol=0)
    torch.testing.assert_close(alone, logits[:, 0], atol=CLOSE, rtol=0)
    text = ~(ids == IMAGE) & mask.bool()
    for number, columns in stays.items():
        assert bool(columns[text].all())
        held = report.cache.layers[number].tokens
        assert held == [[n + STEPS - 1] * 2 for n in columns.sum(1).tolist()]
    assert int(stays[2].sum()) < int(mask.sum()) or isinstance(method, methods.ToDREStage2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_with_methods_of_other_kinds(dtype: torch.dtype) -> None:
    """Behind a choice among visual tokens, before eviction from the cache and with sparse steps."""
    model, _, made, mask = two_and_one()
    model.to(dtype)
    made["pixel_values"] = made["pixel_values"].to(dtype)
    said_by(model, made, attention_mask=mask)
    before, budget = state(model), 12
    for method in DECODER_METHODS:
        frees = isinstance(method, methods.MustDrop)
        front = [] if frees else [methods.StrideVisual(keep=0.5)]
        others = (methods.SnapKV(budget=budget, window=4), methods.Quest(k=32))
        with tokencomp.compress(model, method, *front, *others, page=16) as handle:
            _, logits = said_by(model, made, attention_mask=mask)
            report = handle.report()
        assert state(model) == before
        assert bool(logits.isfinite().all())
        assert report.chosen.kept == (48 if frees else 24)
        assert sum(report.visual[0]) <= report.chosen.kept
        for layer, tokens in zip(report.cache.layers, report.tokens, strict=True):
            most = [[min(n, budget) + STEPS - 1] * 2 for n in tokens]
            assert layer.tokens == most or (frees and max(map(max, layer.tokens)) <= max(map(max, most)))


@pytest.mark.parametrize("method", DECODER_METHODS, ids=str)
@torch.no_grad()
def test_a_failure_in_the_middle_leaves_nothing_behind(method: Any) -> None:
    model, _, made, mask = two_and_one()
    model(**made, attention_mask=mask)
    before, plain = state(model), model(**made, attention_mask=mask).logits
    last = model.model.language_model.layers[2].mlp
    with tokencomp.compress(model, method):
        hook = last.register_forward_pre_hook(lambda module, args: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            model(**made, attention_mask=mask)
        hook.remove()
        first = model(**made, attention_mask=mask).logits
        assert torch.equal(model(**made, attention_mask=mask).logits, first)
    assert state(model) == before
    assert torch.equal(model(**made, attention_mask=mask).logits, plain)
