"""What is done with a paged cache between forwards: turns, crops, copies, rows that move."""

import copy
from collections.abc import Iterator

import pytest
import tokencomp
import torch
from cache_methods import KeepAll, Newest, pages_are_exact, tree
from decoders import answer, decoder, left, prompt, steps

transformers = pytest.importorskip("transformers", reason="models need the extra hf")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_several_turns_on_one_cache() -> None:
    model = decoder()
    first, second = prompt(1, 20), prompt(1, 9, seed=7)
    expected = answer(model, first, max_new_tokens=5)
    both = torch.cat([expected, second], 1)
    expected = answer(model, both, max_new_tokens=5)
    with tokencomp.compress(model, KeepAll(), page=16) as handle:
        cache = handle.new_cache()
        said = answer(model, first, max_new_tokens=5, past_key_values=cache)
        assert cache.get_seq_length() == 24
        said = answer(model, torch.cat([said, second], 1), max_new_tokens=5, past_key_values=cache)
    assert torch.equal(said, expected)


def test_an_empty_dynamic_cache_becomes_ours() -> None:
    model, ids = decoder(), prompt()
    for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        with tokencomp.compress(model, Newest(budget=8), page=16) as handle:
            answer(model, ids, past_key_values=cache)
            assert handle.cache is cache
            assert cache.memory().pages == 3 * 4


def test_crop_takes_tokens_back() -> None:
    model, ids, mask = decoder(), prompt(2, 40), left(2, 40)
    with tokencomp.compress(model, Newest(budget=12, every=99), page=16) as handle:
        steps(model, ids[:, :20], mask[:, :20], [20])
        cache, before = handle.cache, tree(handle.cache)
        steps(model, ids, mask, [20])  # another one
        for _ in range(2):
            output = model(
                ids[:, 20:26], attention_mask=mask[:, :26], past_key_values=cache,
                position_ids=(mask.cumsum(1) - 1)[:, 20:26],
            )  # fmt: skip
            logits = output.logits
            cache.crop(-6)
            after = tree(cache)
            assert {**after, "layers": None} == {**before, "layers": None}
            for (n, sides, kv), (m, theirs, held) in zip(after["layers"], before["layers"], strict=True):
                assert (n, sides, kv) == (m, theirs, held)
            pages_are_exact(cache)
            again = model(
                ids[:, 20:26], attention_mask=mask[:, :26], past_key_values=cache,
                position_ids=(mask.cumsum(1) - 1)[:, 20:26],
            ).logits  # fmt: skip
            assert torch.equal(again, logits)
            cache.crop(-6)
        with pytest.raises(ValueError, match="cannot remove 21 of 20"):
            cache.crop(-21)


def test_crop_counts_padding_columns() -> None:
    model, ids = decoder(), prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 20:24] = mask[1, 28:] = 0
    with tokencomp.compress(model, KeepAll(), page=16) as handle:
        steps(model, ids, mask, [20, 10])
        handle.cache.crop(-5)
        assert handle.cache.state.seen.tolist() == [21, 25]
        handle.cache.crop(-3)
        assert handle.cache.state.seen.tolist() == [20, 22]
        assert handle.report().layers[0].tokens == [[20, 20], [22, 22]]
        steps(model, ids[:, :22], mask[:, :22], [22])


def test_rows_of_a_cache() -> None:
    model, ids, mask = decoder(), prompt(2, 20), left()
    with tokencomp.compress(model, Newest(budget=12, every=4), page=16) as handle:
        steps(model, ids, mask, [20])
        cache = handle.cache
        single = copy.deepcopy(cache)
        cache.batch_repeat_interleave(2)
        step = prompt(4, 6, seed=3)
        wide = torch.cat([mask.repeat_interleave(2, 0), torch.ones(4, 6, dtype=torch.long)], 1)
        position = (wide.cumsum(1) - 1)[:, 20:]
        out = [
            model(
                step[:, i : i + 1],
                attention_mask=wide[:, : 21 + i],
                past_key_values=cache,
                position_ids=position[:, i : i + 1],
            ).logits
            for i in range(6)
        ]
        pages_are_exact(cache)
        cache.batch_select_indices(torch.tensor([1, 2]))
        pages_are_exact(cache)
        assert cache.state.seen.tolist() == [21, 26]
        for i in range(6):
            rows = torch.tensor([1, 2])
            alone = model(
                step[rows, i : i + 1], attention_mask=wide[rows, : 21 + i], past_key_values=single,
                position_ids=position[rows, i : i + 1],
            )  # fmt: skip
            torch.testing.assert_close(alone.logits, out[i][rows], atol=1e-4, rtol=1e-4)


def test_a_copied_cache_is_independent() -> None:
    model, ids = decoder("gemma2"), prompt(2, 20)
    with tokencomp.compress(model, Newest(budget=12, every=3), page=16) as handle:
        steps(model, ids, None, [20])
        cache, before = handle.cache, tree(handle.cache)
        other = copy.deepcopy(cache)
        for _ in range(9):
            model(ids[:, :1], past_key_values=other)
        assert tree(cache) == before
        assert other.get_seq_length() == 29
        pages_are_exact(cache)
        pages_are_exact(other)
        moved = copy.deepcopy(cache).to("cpu")
        assert tree(moved) == before
        pages_are_exact(moved)


def test_reset_starts_over() -> None:
    model, ids = decoder(), prompt()
    with tokencomp.compress(model, Newest(budget=12), page=16) as handle:
        expected = steps(model, ids, left(), [20])
        cache = handle.cache
        cache.reset()
        assert cache.get_seq_length() == cache.memory().pages == 0
        again = steps(model, ids[:1], left()[:1], [20], cache)
        torch.testing.assert_close(again, expected[:1], atol=1e-4, rtol=1e-4)


def test_assisted_decoding_takes_rejected_tokens_back() -> None:
    model, ids = decoder(), prompt(1)
    expected = answer(model, ids, eos_token_id=2)  # early versions look up nothing without an end
    with tokencomp.compress(model, KeepAll(), page=16):
        assert torch.equal(answer(model, ids, eos_token_id=2, prompt_lookup_num_tokens=3), expected)
