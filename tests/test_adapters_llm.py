"""Decoders on a paged cache: tokens of sdpa where nothing is evicted, those of a masked cache where something
is, and real memory given back.
"""

from collections.abc import Iterator
from typing import Any

import decoders
import pytest
import tiny_models
import tokencomp
import torch
from cache_methods import KeepAll, Listed, Newest, pages_are_exact, tree
from decoders import answer, decoder, left, prompt, steps
from tokencomp import methods, reference

transformers = pytest.importorskip("transformers", reason="models need the extra hf")

# Logits are up to 9 here: those of sdpa in float32 are up to 6e-5 from float64, and so are ours.
NOISE = {"atol": 1e-4, "rtol": 1e-4}

GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 8},
    "long-chunks": {"prefill_chunk_size": 11},
    "returned": {"num_return_sequences": 2, "do_sample": True},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- nothing is evicted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["paged", "model"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_tokens_are_those_of_sdpa(options: dict[str, Any], padded: bool, attention: Any) -> None:
    model, ids = decoder(), prompt()
    mask = left() if padded else torch.ones_like(ids)
    expected = answer(model, ids, mask, **options)
    with tokencomp.compress(model, KeepAll(), page=16, attention=attention) as handle:
        assert torch.equal(answer(model, ids, mask, **options), expected)
        pages_are_exact(handle.cache)
    assert torch.equal(answer(model, ids, mask, **options), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_logits_of_every_family(family: str, padded: bool) -> None:
    """A prompt longer than the window, one chunk more, a few tokens at a time, then single steps."""
    ids = prompt(2, 48)
    mask = torch.cat([left(2, 20), torch.ones(2, 28, dtype=torch.long)], 1) if padded else None
    chunks = [20, 12, 3, 5, 1, 1, 1, 1, 1, 1, 1, 1]
    expected = steps(decoder(family, "eager"), ids, mask, chunks)
    model = decoder(family)
    with tokencomp.compress(model, KeepAll(), page=16) as handle:
        found = steps(model, ids, mask, chunks)
        others = len(handle.cache.layers) - len(handle.cache.paged)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=1e-4)
    assert others == (2 if decoders.TWO_SLIDE in decoders.FAMILIES[family][1].values() else 0)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_models_whose_layers_all_slide_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="no full-attention layer"):
        tokencomp.compress(decoder(family, sliding_window=8), KeepAll())


def test_padding_in_later_turns_and_between_tokens() -> None:
    """Second prompts of different lengths, padded on either side, and a step that only one row takes."""
    model = decoder()
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = mask[1, 20:26] = mask[0, 41:50] = mask[0, 55] = mask[1, 57] = 0
    ids, chunks = prompt(2, 60), [20, 30, 3, 1, 1, 1, 1, 1, 1, 1]
    with tokencomp.compress(model, KeepAll(), page=16) as handle:
        found = steps(model, ids, mask, chunks)
        assert handle.cache.state.seen.tolist() == mask.sum(1).tolist()
        assert handle.report().layers[0].tokens == [[n, n] for n in mask.sum(1).tolist()]
        for row in range(2):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real], use_cache=True).logits
            torch.testing.assert_close(found[row, real], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_models(dtype: torch.dtype) -> None:
    """The error against float64 is at most twice that of the model's own attention."""
    ids, chunks = prompt(2, 30), [20, *[1] * 10]
    exact = steps(decoder().double(), ids, left(2, 30), chunks)
    model = decoder().to(dtype)
    theirs = (steps(model, ids, left(2, 30), chunks).double() - exact)[:, 20:].abs().mean()
    with tokencomp.compress(model, KeepAll(), page=16):
        ours = (steps(model, ids, left(2, 30), chunks).double() - exact)[:, 20:].abs().mean()
    assert ours <= 2 * theirs


def test_without_a_cache_nothing_changes() -> None:
    model, ids = decoder(), prompt()
    expected = model(ids, attention_mask=left(), use_cache=False).logits
    with tokencomp.compress(model, KeepAll()):
        found = model(ids, attention_mask=left(), use_cache=False)
    assert found.past_key_values is None
    torch.testing.assert_close(found.logits[left().bool()], expected[left().bool()], atol=1e-5, rtol=1e-5)


# ---- something is evicted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pads", [0, 10])
@pytest.mark.parametrize("more", [[1, 1, 1], [3, 1], [14, 1], [3, 12]])
def test_kept_sets_of_every_layer_row_and_head(pads: int, more: list[int]) -> None:
    """Different sets in every layer, row and head, padded or not, against the masks of the reference."""
    ids = prompt(2, 40 + sum(more))
    lists = tiny_models.lists(3, 2, 2, 40, 8)
    model = decoder()
    with reference.kept_keys(model, lambda layer, keys, valid: lists[layer], form="masked"):
        expected = steps(model, ids, None, [40, *more])
    padded = torch.cat([torch.zeros(2, pads, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, pads, dtype=torch.long), torch.ones_like(ids)], 1)
    with tokencomp.compress(model, Listed(index=lists), page=16) as handle:
        found = steps(model, padded, mask, [40 + pads, *more])[:, pads:]
        torch.testing.assert_close(found, expected, **NOISE)
        for layer in handle.report().layers:
            assert layer.tokens == [[8 + sum(more)] * 2] * 2


@pytest.mark.parametrize("more", [[1, 1, 1], [3, 1], [14, 1]])
def test_layers_and_heads_of_different_budgets(more: list[int]) -> None:
    ids = prompt(2, 40 + sum(more))
    lists = []
    for layer, kept in enumerate([40, 21, 5]):
        index = tiny_models.lists(1, 2, 2, 40, kept, seed=layer)[0]
        index[0, 1, kept // 2 :] = -1
        index[1, 0, 3:] = -1
        lists.append(index)
    model = decoder()
    with reference.kept_keys(model, lambda layer, keys, valid: lists[layer], form="masked"):
        expected = steps(model, ids, None, [40, *more])
    with tokencomp.compress(model, Listed(index=lists), page=16) as handle:
        found = steps(model, ids, None, [40, *more])
        tokens = [layer.tokens for layer in handle.report().layers]
        pages_are_exact(handle.cache)
    torch.testing.assert_close(found, expected, **NOISE)
    new = sum(more)
    assert tokens == [[[k + new, k // 2 + new], [3 + new, k + new]] for k in (40, 21, 5)]


def test_lengths_and_bytes_after_an_eviction() -> None:
    model, ids = decoder(), prompt(2, 200)
    lists = tiny_models.lists(3, 2, 2, 200, 40)
    with tokencomp.compress(model, Listed(index=lists), page=16) as handle:
        model(ids, use_cache=True)
        cache, memory = handle.cache, handle.cache.memory()
        assert cache.get_seq_length() == 200
        assert memory.pages == 3 * 4 * 3  # layers, rows, pages of 16 slots
        page_bytes = 16 * 2 * 8 * 4
        assert memory.used == memory.pages * page_bytes
        assert memory.peak <= memory.used + 4 * page_bytes * 13
        storages = {pool.data.untyped_storage().nbytes() for pool in cache.state.pools.values()}
        assert sum(storages) == memory.capacity
        assert int(memory) == memory.capacity + memory.side
        seen = []
        hook = model.model.rotary_emb.register_forward_pre_hook(
            lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True
        )
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        hook.remove()
        assert seen[0].tolist() == [[200]]
        assert cache.layers[0].layer.store.position()[0, 0, 40] == 200


def test_a_prompt_is_evicted_before_it_is_stored() -> None:
    """The pages of a long prompt are never taken: the pool's peak is that of what stays."""
    model, ids = decoder(), prompt(1, 400)
    with tokencomp.compress(model, Newest(budget=32), page=16) as handle:
        model(ids, use_cache=True)
        assert handle.cache.memory().peak == handle.cache.memory().used


@pytest.mark.parametrize(
    "method", [methods.D2O(methods.H2O(budget=40)), methods.AdaKV(methods.SnapKV(budget=64, window=8))]
)
def test_what_a_prompt_needed_for_a_moment_goes_back(method: Any) -> None:
    """Merging needs the whole prompt in pages, ragged heads take those of the longest: not afterwards."""
    model, ids = decoder(), prompt(1, 400)
    with tokencomp.compress(model, method, page=16):
        cache = model(ids, use_cache=True).past_key_values
        memory = cache.memory()
        assert memory.peak > 1.25 * memory.used
        assert memory.capacity <= 1.125 * memory.used
        pages_are_exact(cache)
        for step in range(40):
            model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        pages_are_exact(cache)


@pytest.mark.parametrize("attention", ["paged", "model"])
def test_eviction_in_decode_steps(attention: Any) -> None:
    """Against the same with all layers' masks cut by hand: the newest tokens and the first."""
    model, ids = decoder(), prompt(2, 40)
    budget = 9

    def visible(upto: int) -> list[int]:  # slots held after ``upto`` tokens, evicted after every forward
        held: list[int] = []
        for size in [20, *[1] * (upto - 20)] if upto >= 20 else []:
            held += range(len(held) and held[-1] + 1, (held[-1] + 1 if held else 0) + size)
            held = [held[0], *held[len(held) - budget + 1 :]] if len(held) > budget else held
        return held

    full = torch.ones(40, 40, dtype=torch.bool).tril()
    for row in range(20, 40):
        full[row, :row] = False
        full[row, visible(row)] = True
    float_mask = torch.zeros(40, 40).masked_fill(~full, float("-inf"))[None, None].expand(2, 1, -1, -1)
    expected = model(ids, attention_mask=float_mask, use_cache=False).logits
    with tokencomp.compress(model, Newest(budget=budget), page=16, attention=attention) as handle:
        found = steps(model, ids, None, [20, *[1] * 20])
        report = handle.report()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert [layer.tokens for layer in report.layers] == [[[9, 9]] * 2] * 3
    assert report.evictions == 3 * 21
    assert sum(layer.evicted for layer in report.layers) == 3 * 4 * 31
    assert "9 tokens a head of 40 seen" in str(report)


def test_rotated_keys_are_those_of_a_shorter_text() -> None:
    """Attention of the next token depends on distances in the cache alone, as if the gap had not been."""
    model, ids = decoder(), prompt(1, 40)
    lists = [torch.cat([torch.arange(4), torch.arange(30, 40)]).expand(1, 2, -1)] * 3

    class Turned(Listed):
        rerotates = True

    with tokencomp.compress(model, Turned(index=lists, rerotates=True), page=16) as handle:
        output = model(ids, use_cache=True)
        after = model(ids[:, :1], past_key_values=output.past_key_values).logits
        turned = [paged.layer.store.gather() for paged in handle.cache.paged]
    cache = transformers.DynamicCache(config=model.config)
    with tokencomp.compress(model, Listed(index=lists), page=16) as handle:
        model(ids, use_cache=True)
        plain = [paged.layer.store.gather() for paged in handle.cache.paged]
    angle = torch.arange(64)[:, None] * model.model.rotary_emb.inv_freq
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    half = lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1)  # noqa: E731
    old, new = lists[0][0, 0], torch.arange(14)
    for number, (k, v) in enumerate(plain):
        k = k[:, :, :14]
        raw = k * cos[old] - half(k) * sin[old]
        cache.update(raw * cos[new] + half(raw) * sin[new], v[:, :, :14], number)
    expected = model(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[14]])).logits
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(turned[0][0][0, 0, 0], plain[0][0][0, 0, 0], atol=1e-3)


def test_re_rotation_twice_is_as_once() -> None:
    model, ids = decoder(), prompt(1, 60)
    with tokencomp.compress(model, Newest(budget=12, every=1, rerotates=True), page=16) as handle:
        steps(model, ids, None, [40, *[1] * 20])
        k, _ = handle.cache.paged[0].layer.store.gather()
    with tokencomp.compress(
        model,
        Listed(
            index=[torch.cat([torch.zeros(1), torch.arange(49, 60)]).int().expand(1, 2, -1)] * 3,
            rerotates=True,
        ),
        page=16,
    ) as handle:
        model(ids, use_cache=True)
        once, _ = handle.cache.paged[0].layer.store.gather()
    torch.testing.assert_close(k[:, :, :12], once[:, :, :12], atol=1e-4, rtol=1e-4)


# ---- chunks of a prompt ------------------------------------------------------------------------------------


def test_each_chunk_is_evicted_from() -> None:
    model, ids = decoder(), prompt(1, 45)
    with tokencomp.compress(model, Newest(budget=12), page=16) as handle:
        output = model(ids[:, :20], use_cache=True)
        assert handle.report().layers[0].tokens == [[12, 12]]
        model(ids[:, 20:], past_key_values=output.past_key_values)
        assert handle.report().layers[0].tokens == [[12, 12]]
        positions = handle.cache.paged[0].layer.store.position()[0, 0, :12]
    assert positions.tolist() == [0, *range(34, 45)]


@pytest.mark.parametrize("chunks", [[30], [20, 10], [11, 10, 9]])
def test_the_last_chunk_is_known_by_the_first_step(chunks: list[int]) -> None:
    model, ids = decoder(), prompt(2, 34)
    with tokencomp.compress(model, Newest(budget=12, every=99), page=16) as handle:
        expected = steps(model, ids, left(2, 34), [30, 1, 1, 1, 1])
        whole = tree(handle.cache)
    with tokencomp.compress(model, Newest(budget=12, every=99), page=16, chunks="last") as handle:
        output = steps(model, ids[:, :30], left(2, 30), chunks)
        assert handle.report().layers[0].tokens == [[25, 25], [30, 30]]
        found = steps(model, ids, left(2, 34), [*chunks, 1, 1, 1, 1])
        parts = tree(handle.cache)
    assert torch.allclose(found[:, :30][left(2, 30).bool()], output[left(2, 30).bool()])
    torch.testing.assert_close(found[:, 30:], expected[:, 30:], atol=1e-4, rtol=1e-4)
    assert [layer[0] for layer in parts["layers"]] == [layer[0] for layer in whole["layers"]]
    assert [layer[1][0] for layer in parts["layers"]] == [layer[1][0] for layer in whole["layers"]]
