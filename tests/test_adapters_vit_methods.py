"""Every registered method that works between attention and MLP, on every family."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import tokencomp
import torch
from encoders import ALL, DENSE, LAYERS, Encoder
from tokencomp import methods
from tokencomp.methods.layers import LayerMethod

REGISTERED = [
    entry
    for entry in methods.all_methods()
    if inspect.isclass(entry.cls) and hasattr(entry.cls, "reduce") and isinstance(entry.cls(), LayerMethod)
]


def by_name(case: Any) -> str:
    return case.name


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("entry", REGISTERED, ids=by_name)
@pytest.mark.parametrize("encoder", ALL + DENSE, ids=by_name)
def test_every_method_on_every_family(encoder: Encoder, entry: Any) -> None:
    model, inputs = encoder.model(), encoder.inputs(2)
    before = encoder.result(model, inputs)
    with tokencomp.compress(model, entry.cls()) as handle:
        if encoder.text or encoder.prefix == 0:  # methods that need a grid or a CLS token say so
            try:
                encoder.result(model, inputs)
            except ValueError as error:
                needs = re.match(rf"{entry.cls.__name__}: .*?\b(grid|prefix|CLS)\b", str(error))
                if needs is None or (needs[1] != "grid") is encoder.text:
                    raise
                return
        after = encoder.result(model, inputs)
        report = handle.report()
        again = encoder.result(model, inputs)
    after, again, before = (t if isinstance(t, tuple) else (t,) for t in (after, again, before))
    for old, new, repeated in zip(before, after, again, strict=True):
        assert new.shape == old.shape
        assert new.isfinite().all()
        assert torch.equal(new, repeated)
    assert len(report.tokens) == LAYERS + 1
    assert report.tokens[-1] <= report.tokens[0]
    groups = report.token_map
    assert groups.max() < report.tokens[-1]
    restored = encoder.result(model, inputs)
    restored = restored if isinstance(restored, tuple) else (restored,)
    assert all(torch.equal(a, b) for a, b in zip(restored, before, strict=True))


NEED_A_GRID = {"algm", "gtp"}  # text has none


@pytest.mark.parametrize("entry", REGISTERED, ids=by_name)
def test_padding_is_never_mixed_with_tokens(entry: Any) -> None:
    """What is padded changes nothing in a padded batch, whatever the method."""
    encoder = next(e for e in ALL if e.name == "bert")
    model, tokens = encoder.model(), encoder.inputs(3)["input_ids"]
    mask = torch.arange(33) < torch.tensor([33, 20, 27])[:, None]
    results = []
    with tokencomp.compress(model, entry.cls()) as handle:
        for filler in (5, 7):
            ids = torch.where(mask, tokens, filler)
            inputs = {"input_ids": ids, "attention_mask": mask.long()}
            if entry.name in NEED_A_GRID:
                with pytest.raises(ValueError, match=r"grid .*got None"):
                    encoder.result(model, inputs)
                return
            results.append(encoder.result(model, inputs))
            padded_groups = torch.where(mask, -1, handle.report().token_map)
            real_groups = torch.where(mask, handle.report().token_map, -1)
            for padded, real in zip(padded_groups, real_groups, strict=True):
                assert not {*padded.tolist()} & {*real.tolist()} - {-1}
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
