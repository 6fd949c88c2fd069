"""Every method that quantizes the KV cache, in a model, against the plain cache of the reference."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import tokencomp
import torch
from cache_methods import pages_are_exact
from decoders import decoder, prompt, steps
from quant_methods import QUANT_METHODS
from test_adapters_llm_methods import CHUNKS, Recorded
from tokencomp import methods, zoo
from tokencomp.reference.kv_policy import run_policy

pytest.importorskip("transformers", reason="models need the extra hf")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def kinds(cache: Any, layer: int) -> list[dict[int, int]]:
    """Of each row, the page type of each position held."""
    store = cache.paged[layer].layer.store
    position, kind, lengths = store.position().flatten(0, 1), store.kinds().flatten(0, 1), store.host_lengths
    return [
        dict(zip(position[row, :n].tolist(), kind[row, :n].tolist(), strict=True))
        for row, n in enumerate(lengths.ravel())
    ]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("name", QUANT_METHODS)
def test_methods_quantize_what_the_reference_quantizes(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer on the queries, keys and values that came: page types at the end and all outputs."""
    model, method = decoder(), QUANT_METHODS[name]
    ids = prompt(2, sum(CHUNKS))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    real = mask.bool()
    record = Recorded(monkeypatch)
    with tokencomp.compress(model, method, page=16) as handle:
        steps(model, ids, mask, CHUNKS)
        cache = handle.cache
        pages_are_exact(cache)
        for layer in range(3):
            trace = run_policy(
                method, *record.of(layer), chunks=CHUNKS[:2], valid=real if padded else None, layer=layer,
                layers=3, page=16, dtype=torch.float32,
            )  # fmt: skip
            rows = zip(
                (row for rows in trace.held[-1] for row in rows),
                (row for rows in trace.kinds[-1] for row in rows),
                strict=True,
            )
            assert kinds(cache, layer) == [dict(zip(*row, strict=True)) for row in rows]
            assert trace.evicted
            torch.testing.assert_close(
                record.output(layer)[real], trace.output.transpose(1, 2)[real], atol=2e-4, rtol=2e-3
            )


def test_a_model_that_answers_keeps_answering() -> None:
    """recall-lm with 8 and with 4 bits: at least 99 % of the answers are as without, and bytes are few."""
    model, tasks = zoo.load("recall-lm")
    task = tasks["recall"]
    samples = task.samples(2, task.seed)
    exact = torch.cat([task.run(model, sample) for sample in samples])
    for bits, most in ((8, 0.34), (4, 0.22)):
        found = []
        for sample in samples:
            method = methods.Uniform(bits, recent=32, edges=0)
            with tokencomp.compress(model, method, page=16) as handle:
                found.append(task.run(model, sample))
                tiers = Counter(kind for row in kinds(handle.cache, 0) for kind in row.values())
                assert tiers[1] > 0.9 * sum(tiers.values())
                size = handle.report().memory.used
                assert size < most * sum(tiers.values()) * len(handle.report().layers) * 2 * 64 * 4
        assert float((torch.cat(found) == exact).double().mean()) >= 0.99
