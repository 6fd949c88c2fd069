"""Every method on the KV cache in every family of decoders, with padding, against the plain cache of the
reference; and long runs.
"""

from collections.abc import Iterator
from typing import Any

import decoders
import pytest
import tokencomp
import torch
from cache_methods import pages_are_exact
from decoders import decoder, left, prompt, steps
from kv_methods import KV_METHODS
from tokencomp import methods
from tokencomp.cache import Layer
from tokencomp.cache.forward import Forward
from tokencomp.reference.kv_policy import run_policy
from torch import Tensor

pytest.importorskip("transformers", reason="models need the extra hf")
CHUNKS = [64, 20, *[1] * 12]  # a prompt, another one, and decode steps
SNAP = methods.SnapKV(12, window=4, every=3)
IN_EVERY_FAMILY = {
    "streaming": methods.StreamingLLM(12, every=3),
    "h2o": methods.H2O(12, every=3, recent=4),
    "snapkv": SNAP,
    "adakv": methods.AdaKV(SNAP),
    "keydiff": methods.KeyDiff(12, every=3),
    "lagkv": methods.LagKV(12, every=3, lag=4),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Recorded:
    """The queries, keys and values that reach each layer of a cache, and what it makes of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[int, list[tuple[Tensor, ...]]] = {}
        forward = Layer.forward

        def recording(layer: Layer, q: Tensor, k: Tensor, v: Tensor, what: Forward, *rest: Any) -> Tensor:
            output = forward(layer, q, k, v, what, *rest)
            self.seen.setdefault(layer.index, []).append((q, k, v, output))
            return output

        monkeypatch.setattr(Layer, "forward", recording)

    def of(self, layer: int) -> list[Tensor]:
        return [torch.cat([parts[i] for parts in self.seen[layer]], 2) for i in range(3)]

    def output(self, layer: int) -> Tensor:
        return torch.cat([parts[3] for parts in self.seen[layer]], 2).transpose(1, 2)


def held(cache: Any, layer: int) -> list[list[list[int]]]:
    store = cache.paged[layer].layer.store
    position, lengths = store.position(), store.host_lengths
    return [
        [position[b, h, : lengths[b, h]].tolist() for h in range(lengths.shape[1])]
        for b in range(lengths.shape[0])
    ]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("name", KV_METHODS)
def test_methods_keep_what_the_reference_keeps(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer on the queries, keys and values that came: kept sets at the end and all outputs."""
    model, method = decoder(), KV_METHODS[name]
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
        assert cache.state.seen.tolist() == mask.sum(1).tolist()
        for layer in range(3):
            trace = run_policy(
                method, *record.of(layer), chunks=CHUNKS[:2], valid=real if padded else None, layer=layer,
                layers=3, page=16, dtype=torch.float32,
            )  # fmt: skip
            assert held(cache, layer) == trace.held[-1]
            assert trace.evicted
            torch.testing.assert_close(
                record.output(layer)[real], trace.output.transpose(1, 2)[real], atol=1e-4, rtol=1e-3
            )


@pytest.mark.parametrize("name", IN_EVERY_FAMILY)
@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_methods_in_every_family(family: str, name: str) -> None:
    """Pad or not, a row keeps the same tokens and says the same, and all but the budget is given back."""
    model, method = decoder(family), IN_EVERY_FAMILY[name]
    ids = prompt(1, 40)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 9, dtype=torch.long), torch.ones_like(ids)], 1)
    both = torch.cat([torch.cat([ids, ids[:, :9]], 1), padded])
    with tokencomp.compress(model, method, page=16) as handle:
        alone = steps(model, ids, None, [28, *[1] * 12])
        kept = [held(handle.cache, i) for i in range(len(handle.cache.paged))]
        report = handle.report()
        assert report.evictions > 0
        assert all(12 <= sum(row) / len(row) <= 15 for layer in report.layers for row in layer.tokens)
        pages = handle.cache.memory().pages
        assert pages <= len(report.layers) * 2 * 2
        together = steps(model, both, torch.cat([torch.ones_like(mask), mask]), [37, *[1] * 12])
        rows = [held(handle.cache, i)[1] for i in range(len(handle.cache.paged))]
    torch.testing.assert_close(together[1:, 9:], alone, atol=2e-4, rtol=1e-3)
    assert rows == [layer[0] for layer in kept]


NORMALIZED = ("qwen3", "gemma3")  # all norms of keys are 4 but for rounding: nothing for KNorm to tell apart
PAIRS = [(f, n) for f in decoders.FAMILIES for n in KV_METHODS if n != "knorm" or f not in NORMALIZED]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_padding_changes_nothing(family: str, name: str) -> None:
    """A prompt, single tokens and three at a time; distinct tokens, whose scores do not tie."""
    model = decoder(family)
    ids = torch.randperm(127, generator=torch.Generator().manual_seed(5))[None, :47] + 1
    chunks = [40, 1, 3, 1, 1, 1]
    pads = torch.zeros(1, 9, dtype=torch.long)
    found = []
    with tokencomp.compress(model, KV_METHODS[name], page=16) as handle:
        for before in (pads[:, :0], pads):
            mask = torch.cat([before, torch.ones_like(ids)], 1)
            sizes = [before.shape[1] + chunks[0], *chunks[1:]]
            logits = steps(model, torch.cat([before, ids], 1), mask, sizes)[:, before.shape[1] :]
            cache = handle.cache
            found.append((logits, [held(cache, layer) for layer in range(len(cache.paged))]))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "adakv", "streaming"])
def test_beams_and_sixteen_bits(name: str) -> None:
    model = decoder().bfloat16()
    with tokencomp.compress(model, IN_EVERY_FAMILY[name], page=16) as handle:
        out = decoders.answer(model, prompt(2, 40), left(2, 40), num_beams=3, max_new_tokens=20)
        pages_are_exact(handle.cache)
        assert out.shape == (2, 60)
        assert handle.cache.memory().pages <= 3 * 12 * 2


def test_a_budget_in_bytes() -> None:
    model, ids = decoder(), prompt(2, 300)
    wanted = 3 * 2 * 2 * 64 * 2 * 8 * 4  # layers, rows, heads, 64 slots of key and value
    with tokencomp.compress(model, methods.SnapKV(budget=f"{wanted}B"), page=16) as handle:
        model(ids, use_cache=True)
        assert handle.cache.memory().used == wanted
        assert handle.report().layers[0].tokens == [[64, 64], [64, 64]]


def long_run(length: int, budget: int, method: Any) -> list[int]:
    """Bytes held while ``length`` tokens are decoded with eviction, 10 times."""
    model = decoder(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=16)
    bytes_held = []
    with tokencomp.compress(model, method, page=16) as handle:
        cache = model(prompt(1, 4 * budget), use_cache=True).past_key_values
        token = prompt(1, 1)
        for step in range(1, length + 1):
            token = model(token, past_key_values=cache).logits.argmax(-1)
            if step % (length // 10) == 0:  # just after an eviction
                bytes_held.append(int(handle.cache.memory()))
        assert cache.get_seq_length() == 4 * budget + length
        assert handle.report().layers[0].tokens == [[budget, budget]]
        pages_are_exact(cache)
    return bytes_held


LONG = [
    (methods.H2O, 640),
    pytest.param(methods.H2O, 20_000, marks=pytest.mark.slow),
    pytest.param(methods.StreamingLLM, 20_000, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "length"), LONG)
def test_bytes_are_constant_in_a_long_run(method: Any, length: int) -> None:
    held_bytes = long_run(length, 64, method(budget=64, every=8))
    assert len(set(held_bytes)) == 1, held_bytes
