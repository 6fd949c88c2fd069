"""Image tokens that are taken out and that are masked: the same function of a ViT and of a LLaVA."""

from collections.abc import Iterator

import pytest
import tiny_models
import torch
from tiny_models import decode, ids, pixels, prompt, some
from tokencomp import reference

IMPLEMENTATIONS = ["sdpa", "eager"]
FORMS = ["gathered", "masked"]
BATCH = 2
STEPS = [ids(BATCH, t, seed=t) for t in (1, 1, 5, 1, 2)]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- patches of a vision transformer -----------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kept", [1, 5, tiny_models.PATCHES])
def test_gathered_patches_are_masked_patches(implementation: str, kept: int) -> None:
    model = tiny_models.vit(implementation)
    said, shapes = [], []
    for form in FORMS:
        with reference.kept_patches(model, some(kept), form=form) as state:
            output = model(pixel_values=pixels(), output_hidden_states=True)
            said.append(output.logits)
            shapes.append(output.hidden_states[-1].shape[1])
        assert state.total == tiny_models.PATCHES
        assert state.index is not None
        assert state.index.shape == (BATCH, kept)
    torch.testing.assert_close(said[0], said[1], atol=1e-5, rtol=1e-5)
    assert shapes == [1 + kept, 1 + tiny_models.PATCHES]
    stock = model(pixel_values=pixels()).logits
    assert ((said[0] - stock).abs().max() < 1e-5) == (kept == tiny_models.PATCHES)


def test_patches_are_selected_with_positions_and_without_cls() -> None:
    model, found = tiny_models.vit(), []
    with reference.kept_patches(model, lambda x: found.append(x) or some(3)(x)):
        model(pixel_values=pixels())
    assert torch.equal(found[0], model.vit.embeddings(pixels())[:, 1:])
    with (
        reference.kept_patches(model, lambda x: torch.full((BATCH, 1), 16)),
        pytest.raises(ValueError, match=r"ascend within \[0, N=16\)"),
    ):
        model(pixel_values=pixels())


# ---- visual tokens of a vision-language model --------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kept", [1, 6, tiny_models.PATCHES])
@pytest.mark.parametrize("padding", [0, 2])
def test_gathered_visual_tokens_are_masked_ones(implementation: str, kept: int, padding: int) -> None:
    model, made = tiny_models.llava(implementation), prompt()
    mask = None
    if padding:
        mask = torch.ones_like(made["input_ids"])
        mask[1, :padding] = 0
    said, held = [], []
    for form in FORMS:
        with reference.kept_visual(model, some(kept), form=form) as state:
            said.append(decode(model, made, STEPS, mask))
            held.append(state.cache.get_seq_length())
    torch.testing.assert_close(said[0], said[1], atol=1e-5, rtol=1e-5)
    assert held[1] - held[0] == tiny_models.PATCHES - kept
    stock = decode(model, made, STEPS, mask)
    assert ((said[0] - stock).abs().max() < 1e-4) == (kept == tiny_models.PATCHES)


def test_kept_visual_tokens_keep_their_positions() -> None:
    """Against embeddings and positions put together by hand."""
    model, made = tiny_models.llava(), prompt(1)
    kept = some(4)(torch.empty(1, tiny_models.PATCHES, 1))[0]
    features = model.get_image_features(pixel_values=made["pixel_values"]).pooler_output[0][kept]
    embed, tokens = model.get_input_embeddings(), made["input_ids"]
    x = torch.cat([embed(tokens[:, :4]), features[None], embed(tokens[:, 20:])], dim=1)
    place = torch.cat([torch.arange(4), 4 + kept, torch.arange(20, 25)])[None]
    by_hand = model(inputs_embeds=x, position_ids=place, attention_mask=torch.ones(1, 13)).logits
    with reference.kept_visual(model, some(4)):
        found = model(**made).logits
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-5)


def test_generate_goes_on_from_kept_visual_tokens() -> None:
    model, made = tiny_models.llava(), prompt()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(made["input_ids"])
    mask[0, 0] = 0
    for given_mask in (None, mask):
        said = []
        for form in FORMS:
            with reference.kept_visual(model, some(3), form=form):
                said.append(model.generate(**made, attention_mask=given_mask, **options)[:, 25:])
        assert torch.equal(*said)
    stock = model.generate(**made, attention_mask=mask, **options)[:, 25:]
    assert not torch.equal(said[0], stock)


def test_prompts_without_image_are_left_alone_and_bad_ones_refused() -> None:
    model, made = tiny_models.llava(), prompt()
    text = {"input_ids": ids(BATCH, 9)}
    plain = model(**text).logits
    with reference.kept_visual(model, some(3)):
        output = model(**text, use_cache=True)
        assert torch.equal(output.logits, plain)
        model(input_ids=ids(BATCH, 1), past_key_values=output.past_key_values)
        first = model(**made).past_key_values
        model(**made)
        with pytest.raises(ValueError, match="latest prompt"):
            model(input_ids=ids(BATCH, 1), past_key_values=first)
        with pytest.raises(ValueError, match="one image of 16"):
            model(input_ids=made["input_ids"][:, 1:6], pixel_values=made["pixel_values"])
        with pytest.raises(ValueError, match="labels"):
            model(**made, labels=made["input_ids"])
        with pytest.raises(TypeError, match="keyword"):
            model(made["input_ids"])
