"""The oracles of compressed models: what is taken out and what is masked give the same function."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import decode, ids, pixels, prompt
from tokencomp import reference
from tokencomp.eval.measure import cache_bytes
from torch import Tensor

IMPLEMENTATIONS = ["sdpa", "eager"]
FORMS = ["gathered", "masked"]
N, BATCH, LAYERS, HEADS = 24, 2, 3, 2


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def given(index: list[Tensor]) -> Callable[..., Tensor]:
    return lambda layer, keys, valid: index[layer]


# ---- keys of a language model ------------------------------------------------------------------------------

STEPS = [ids(BATCH, t, seed=t) for t in (1, 1, 5, 1, 2)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kept", [1, 6, N])
def test_gathered_keys_are_masked_keys(implementation: str, kept: int) -> None:
    """Grouped heads, batch 2, other tokens in every layer, row and head; one and several tokens appended."""
    model = tiny_models.llama(implementation=implementation)
    index = tiny_models.lists(LAYERS, BATCH, HEADS, N, kept)
    said = []
    for form in FORMS:
        with reference.kept_keys(model, given(index), form=form) as state:
            said.append(decode(model, {"input_ids": ids(BATCH, N)}, STEPS))
            assert state.total == N
            assert all(torch.equal(a, b) for a, b in zip(state.index, index, strict=True))
    stock = decode(model, {"input_ids": ids(BATCH, N)}, STEPS)
    torch.testing.assert_close(said[0], said[1], atol=1e-5, rtol=1e-5)
    assert ((said[0] - stock).abs().max() < 1e-4) == (kept == N)


def test_masked_keys_are_a_mask_of_the_whole_sequence() -> None:
    """Against one forward without a cache under a 4-D mask: nothing of the hooks is used."""
    model = tiny_models.llama()
    index = torch.tensor([[0, 3, 4, 11, 20], [1, 2, 9, 10, 23]])
    step = ids(BATCH, 6, seed=1)
    row = torch.arange(N + 6)
    seen = torch.zeros(BATCH, N + 6, dtype=torch.bool).scatter_(1, index, True)
    seen[:, N:] = True
    visible = (row <= row[:, None]) & (seen[:, None] | (row < N)[:, None])
    whole = model(
        input_ids=torch.cat([ids(BATCH, N), step], 1), attention_mask=visible[:, None], use_cache=False
    ).logits[:, N - 1 :]
    everywhere = index[:, None].expand(-1, HEADS, -1)
    for form in FORMS:
        with reference.kept_keys(model, lambda *_: everywhere, form=form):
            found = decode(model, {"input_ids": ids(BATCH, N)}, [step])
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_left_padding_changes_nothing(implementation: str) -> None:
    """A padded row with shifted positions says what the row says alone; padding is never kept."""
    model, pad = tiny_models.llama(implementation=implementation), 7
    alone = tiny_models.lists(LAYERS, 1, HEADS, N - pad, 5)
    full = tiny_models.lists(LAYERS, 1, HEADS, N, 5, seed=1)
    both = [torch.cat([a + pad, b]) for a, b in zip(alone, full, strict=True)]
    tokens, mask = ids(BATCH, N), torch.ones(BATCH, N, dtype=torch.long)
    mask[0, :pad] = 0
    steps = [step[:1] for step in STEPS]
    for form in FORMS:
        with reference.kept_keys(model, given(both), form=form):
            padded = decode(model, {"input_ids": tokens}, STEPS, mask)
        with reference.kept_keys(model, given(alone), form=form):
            plain = decode(model, {"input_ids": tokens[:1, pad:]}, steps)
        torch.testing.assert_close(padded[:1], plain, atol=1e-5, rtol=1e-5)
    with (
        reference.kept_keys(model, given([index.clamp(max=3) for index in both])),
        pytest.raises(ValueError, match="ascend"),
    ):
        model(input_ids=tokens, attention_mask=mask)
    bad = [index.clone() for index in both]
    bad[1][0, 0, 0] = 2
    with reference.kept_keys(model, given(bad)), pytest.raises(ValueError, match="padding"):
        model(input_ids=tokens, attention_mask=mask)


def test_padding_behind_the_prompt_is_not_seen() -> None:
    """Held slots are presented as the last positions, which the padding of the prompt must not hide."""
    model, mask = tiny_models.llama(), torch.ones(BATCH, N, dtype=torch.long)
    mask[0, -6:] = 0
    index = tiny_models.lists(LAYERS, BATCH, HEADS, N - 6, 15)
    said = []
    for form in FORMS:
        with reference.kept_keys(model, given(index), form=form):
            said.append(decode(model, {"input_ids": ids(BATCH, N)}, STEPS, mask))
    torch.testing.assert_close(said[0][:, 1:], said[1][:, 1:], atol=1e-5, rtol=1e-5)
    padded = torch.cat([mask, torch.zeros(BATCH, 1, dtype=torch.long)], dim=1)
    with reference.kept_keys(model, given(index)):
        cache = model(input_ids=ids(BATCH, N), attention_mask=mask).past_key_values
        with pytest.raises(ValueError, match="without padding after the prompt"):
            model(input_ids=ids(BATCH, 1), attention_mask=padded, past_key_values=cache)


def test_layers_may_keep_different_numbers() -> None:
    model = tiny_models.llama()
    index = [tiny_models.lists(1, BATCH, HEADS, N, k, seed=k)[0] for k in (3, 10, 7)]
    single = [ids(BATCH, 1, seed=t) for t in range(4)]
    said = []
    for form in FORMS:
        with reference.kept_keys(model, given(index), form=form):
            said.append(decode(model, {"input_ids": ids(BATCH, N)}, single))
    torch.testing.assert_close(said[0], said[1], atol=1e-5, rtol=1e-5)
    with reference.kept_keys(model, given(index)), pytest.raises(ValueError, match="one token at a time"):
        decode(model, {"input_ids": ids(BATCH, N)}, [ids(BATCH, 2)])


def test_masked_lists_may_be_ragged() -> None:
    """A hole keeps nothing: the same as the shorter list."""
    model = tiny_models.llama()
    short = tiny_models.lists(LAYERS, BATCH, HEADS, N, 4)
    holes = [torch.cat([index, torch.full_like(index[..., :2], -1)], dim=-1) for index in short]
    said = []
    for index in (short, holes):
        with reference.kept_keys(model, given(index), form="masked"):
            said.append(decode(model, {"input_ids": ids(BATCH, N)}, STEPS))
    assert torch.equal(*said)
    with reference.kept_keys(model, given(holes)), pytest.raises(ValueError, match="holes"):
        model(input_ids=ids(BATCH, N))


@pytest.mark.parametrize("kept", [2, 16])
def test_gathered_keys_free_their_bytes(kept: int) -> None:
    model, tokens = tiny_models.llama(), ids(1, 64)
    full = cache_bytes(model(input_ids=tokens).past_key_values)
    assert full == 2 * LAYERS * HEADS * 64 * 8 * 4
    index = tiny_models.lists(LAYERS, 1, HEADS, 64, kept)
    with reference.kept_keys(model, given(index)):
        cache = model(input_ids=tokens).past_key_values
    assert cache_bytes(cache) == full * kept // 64
    assert cache.get_seq_length() == 64
    with reference.kept_keys(model, given(index), form="masked"):
        assert cache_bytes(model(input_ids=tokens).past_key_values) == full


@pytest.mark.parametrize("padding", [0, 4])
def test_generate_goes_on_from_kept_keys(padding: int) -> None:
    """The library's own loop, with its masks and positions, says what the loop by hand does."""
    model = tiny_models.llama()
    index = [kept + padding for kept in tiny_models.lists(LAYERS, BATCH, HEADS, N - padding, 5)]
    mask = torch.ones(BATCH, N, dtype=torch.long)
    mask[0, :padding] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    said = []
    for form in FORMS:
        with reference.kept_keys(model, given(index), form=form):
            said.append(model.generate(ids(BATCH, N), attention_mask=mask, **options)[:, N:])
            place = mask.cumsum(1) - 1
            output = model(input_ids=ids(BATCH, N), attention_mask=mask, position_ids=place, use_cache=True)
            for step in range(6):
                token, place = output.logits[:, -1:].argmax(-1), place[:, -1:] + 1
                assert torch.equal(token[:, 0], said[-1][:, step])
                grown = torch.cat([mask, mask.new_ones(BATCH, step + 1)], dim=1)
                output = model(
                    input_ids=token,
                    attention_mask=grown,
                    position_ids=place,
                    past_key_values=output.past_key_values,
                )
    assert torch.equal(*said)
    assert not torch.equal(said[0], model.generate(ids(BATCH, N), attention_mask=mask, **options)[:, N:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_of_a_vision_language_model(implementation: str) -> None:
    """Its image tokens are keys like others."""
    model, made = tiny_models.llava(implementation), prompt()
    index = tiny_models.lists(2, BATCH, HEADS, 25, 6)
    said = []
    for form in FORMS:
        with reference.kept_keys(model, given(index), form=form):
            said.append(decode(model, made, STEPS))
    torch.testing.assert_close(said[0], said[1], atol=1e-5, rtol=1e-5)
    assert (said[0] - decode(model, made, STEPS)).abs().max() > 1e-3


def test_a_new_prompt_is_compressed_anew_and_caches_do_not_mix() -> None:
    model = tiny_models.llama()
    with reference.kept_keys(model, lambda layer, keys, valid: torch.zeros(1, HEADS, 1)) as state:
        first = model(input_ids=ids(1, 8)).past_key_values
        second = model(input_ids=ids(1, 9)).past_key_values
        assert state.total == 9
        model(input_ids=ids(1, 1), past_key_values=second)
        with pytest.raises(ValueError, match="latest prompt"):
            model(input_ids=ids(1, 1), past_key_values=first)


def test_kept_layers_forget_only_what_was_appended() -> None:
    model = tiny_models.llama()
    with reference.kept_keys(model, lambda layer, keys, valid: torch.zeros(1, HEADS, 1)):
        cache = model(input_ids=ids(1, 8)).past_key_values
        before = model(input_ids=ids(1, 2), past_key_values=cache).logits
        cache.crop(-2)
        assert cache.get_seq_length() == 8
        assert torch.equal(model(input_ids=ids(1, 2), past_key_values=cache).logits, before)
        with pytest.raises(ValueError, match=r"must be in \[-2, 0\], got -3"):
            cache.layers[0].crop(-3)
        with pytest.raises(NotImplementedError):
            cache.layers[0].reset()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(1, 1, 1), r"must be \[B=1, Hkv=2, K >= 1\], got \[1, 1, 1\]"),
        (torch.zeros(1, 2, 0), "K >= 1"),
        (torch.full((1, 2, 1), 8), "below N=8"),
        (torch.tensor([[[1, 0], [0, 1]]]), "ascend"),
        (torch.tensor([[[0, 0], [0, 1]]]), "ascend"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_bad_selections_are_refused(index: Tensor, message: str, form: Any) -> None:
    model = tiny_models.llama()
    with reference.kept_keys(model, lambda *_: index, form=form), pytest.raises(ValueError, match=message):
        model(input_ids=ids(1, 8))


def test_other_caches_and_forms_are_refused() -> None:
    from transformers import StaticCache

    model = tiny_models.llama()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with (
        reference.kept_keys(model, lambda *_: torch.zeros(1, 2, 1)),
        pytest.raises(TypeError, match="Static"),
    ):
        model(input_ids=ids(1, 8), past_key_values=cache)
    for context in (reference.kept_keys, reference.kept_patches, reference.kept_visual):
        with (
            pytest.raises(ValueError, match="form must be gathered or masked, got 'wrong'"),
            context(model, lambda *_: torch.zeros(1), form="wrong"),
        ):
            pass  # fmt: skip
    with pytest.raises(TypeError, match="patch embeddings"), reference.kept_patches(model, lambda x: x):
        pass


# ---- what a context leaves behind --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["keys", "patches", "visual"])
def test_the_model_is_as_before_also_after_an_error(kind: str, form: Any) -> None:
    contexts = {
        "keys": (tiny_models.llama, reference.kept_keys, {"input_ids": ids(1, 8)}),
        "patches": (tiny_models.vit, reference.kept_patches, {"pixel_values": pixels(1)}),
        "visual": (tiny_models.llava, reference.kept_visual, prompt(1)),
    }
    make, context, inputs = contexts[kind]
    model = make()
    logits = model(**inputs).logits  # the first forward installs the library's own hooks
    before = tiny_models.state(model)

    def broken(*_: Any) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), context(model, broken, form=form):
        model(**inputs)
    assert tiny_models.state(model) == before
    assert torch.equal(model(**inputs).logits, logits)
