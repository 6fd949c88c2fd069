"""Visual tokens of LLaVA-like models chosen on the way into the decoder: against the reference and masks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import tokencomp
import torch
from tiny_models import IMAGE, PATCHES, decode, ids, llava, pixels, prompt, some, state
from tokencomp import methods, reference
from tokencomp.adapters import vlm
from tokencomp.methods.visual import VisualKeep, VisualView
from torch import Tensor


@dataclass(frozen=True)
class Given:
    """Keeps what a test says."""

    index: Tensor
    x: Tensor | None = None
    seen: list[VisualView] = field(default_factory=list)

    def looks_at(self, layers: int) -> tuple[int, ...]:
        return (layers - 2,)

    def choose(self, view: VisualView) -> VisualKeep:
        self.seen.append(view)
        return VisualKeep(self.index, self.x)


@contextmanager
def compressed(model: Any, method: Any, **options: Any) -> Iterator[vlm.VisualStack]:
    stack = vlm.attach(model, method, **options)
    try:
        yield stack
    finally:
        vlm.detach(stack)


def index_of(select: Any, batch: int = 2) -> Tensor:
    chosen: Tensor = select(torch.zeros(batch, PATCHES, 1))
    return chosen.to(torch.int32)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_equals_the_reference(implementation: str) -> None:
    model, made, select = llava(implementation), prompt(), some(5)
    steps = [ids(2, 1, seed=1), ids(2, 3, seed=2), ids(2, 1, seed=3)]
    with reference.kept_visual(model, select):
        expected = decode(model, made, steps)
    before = state(model)
    with compressed(model, Given(index_of(select))) as stack:
        found = decode(model, made, steps)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert state(model) == before
    assert (stack.report.kept, stack.report.tokens, stack.report.images) == (10, 32, 2)


@torch.no_grad()
def test_generate_equals_the_reference() -> None:
    model, made, select = llava(), prompt(), some(4)
    options = {"max_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        with reference.kept_visual(model, select):
            expected = model.generate(**made, **options) if beams == 1 else None
        index = index_of(select).repeat_interleave(beams, 0)
        with compressed(model, Given(index)):
            found = model.generate(**made, **options, num_beams=beams)
        assert found.shape[0] == 2
        if expected is not None:
            assert torch.equal(found, expected)


@torch.no_grad()
def test_all_kept_changes_nothing() -> None:
    model, made = llava(), prompt()
    every = torch.arange(PATCHES, dtype=torch.int32).repeat(2, 1)
    expected = decode(model, made, [ids(2, 1)])
    with compressed(model, Given(every)):
        torch.testing.assert_close(decode(model, made, [ids(2, 1)]), expected, atol=1e-6, rtol=0)


def double(made: dict[str, Tensor]) -> dict[str, Tensor]:
    return made | {"pixel_values": made["pixel_values"].double()}


def masked(
    model: Any, made: dict[str, Tensor], keep: Tensor, steps: list[Tensor], mask: Tensor | None
) -> Tensor:
    """Logits where dropped columns are masked, every token at its own position."""
    image = made["input_ids"] == IMAGE
    kept = torch.zeros(len(keep), PATCHES + 1, dtype=torch.bool)
    kept.scatter_(1, torch.where(keep < 0, PATCHES, keep).long(), True)
    stays = (~image).masked_scatter(image, kept[:, :PATCHES].flatten())
    real = torch.ones_like(image) if mask is None else mask.bool()
    position = torch.arange(image.shape[1])[None].expand(len(image), -1)
    output = model(**made, attention_mask=(stays & real).long(), position_ids=position, use_cache=True)
    said, held = [output.logits[:, -1:]], stays & real
    for step in steps:
        held = torch.cat([held, torch.ones_like(step, dtype=torch.bool)], 1)
        start = held.shape[1] - step.shape[1]
        output = model(
            input_ids=step, attention_mask=held.long(), past_key_values=output.past_key_values,
            position_ids=torch.arange(start, held.shape[1])[None],
        )  # fmt: skip
        said.append(output.logits)
    return torch.cat(said, 1)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_rows_that_keep_different_numbers(padded: bool) -> None:
    """Shorter rows are padded on the left; user padding goes too. Equal to masked columns."""
    model, made = llava().double(), double(prompt())
    mask = None
    if padded:
        front = torch.zeros(2, 4, dtype=torch.long)
        made["input_ids"] = torch.cat([front, made["input_ids"]], 1)
        mask = torch.ones_like(made["input_ids"])
        mask[0, :4] = 0
        mask[1, :1] = 0
    keep = torch.tensor([[0, 3, 7, 9, 15], [2, 5, -1, -1, -1]], dtype=torch.int32)
    steps = [ids(2, 1, seed=8), ids(2, 2, seed=9)]
    expected = masked(model, made, keep, steps, mask)
    with compressed(model, Given(keep)):
        found = decode(model, made, steps, mask)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_merged_values_reach_the_decoder() -> None:
    model, made, index = llava(), prompt(1), torch.tensor([[1, 4]], dtype=torch.int32)
    width = model.config.text_config.hidden_size
    changed = torch.randn(1, 2, width)
    seen: list[Tensor] = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with compressed(model, Given(index, changed)):
        model(**made)
    hook.remove()
    assert torch.equal(seen[0][:, 4:6], changed)


@torch.no_grad()
def test_compact_positions_are_those_of_a_shorter_prompt() -> None:
    model, made, select = llava(), prompt(1), some(6)
    index = index_of(select, 1)
    features = torch.stack(list(model.model.get_image_features(made["pixel_values"]).pooler_output))
    image = made["input_ids"] == IMAGE
    embeds = model.get_input_embeddings()(made["input_ids"]).masked_scatter(image[..., None], features)
    first = int(image[0].int().argmax())
    keep = [*range(first), *(first + i for i in index[0].tolist()), *range(first + PATCHES, image.shape[1])]
    short = model.model.language_model(inputs_embeds=embeds[:, keep], use_cache=True)
    expected = [model.lm_head(short.last_hidden_state[:, -1:])]
    again = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(ids(1, 2)), past_key_values=short.past_key_values
    )
    expected.append(model.lm_head(again.last_hidden_state))
    with compressed(model, Given(index), positions="compact"):
        found = decode(model, made, [ids(1, 2)])
    torch.testing.assert_close(found, torch.cat(expected, 1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_second_image_in_a_second_turn() -> None:
    model, made, keep = llava().double(), double(prompt(1)), torch.tensor([[1, 6, 11]], dtype=torch.int32)
    turn = {"input_ids": prompt(1)["input_ids"][:, 1:], "pixel_values": pixels(3)[2:].double()}
    with compressed(model, Given(keep)):
        first = model(**made, use_cache=True)
        found = model(**turn, past_key_values=first.past_key_values).logits
        tail = model(input_ids=ids(1, 2), past_key_values=first.past_key_values).logits
    whole = {
        "input_ids": torch.cat([made["input_ids"], turn["input_ids"]], 1),
        "pixel_values": torch.cat([made["pixel_values"], turn["pixel_values"]]),
    }
    image = whole["input_ids"] == IMAGE
    kept = torch.zeros(2, PATCHES, dtype=torch.bool).scatter(1, keep.expand(2, -1).long(), True)
    stays = (~image).masked_scatter(image, kept.flatten())
    position = torch.arange(image.shape[1])[None]
    output = model(**whole, attention_mask=stays.long(), position_ids=position, use_cache=True)
    torch.testing.assert_close(found[:, -1], output.logits[:, -1], atol=1e-12, rtol=0)
    mask = torch.cat([stays.long(), torch.ones(1, 2, dtype=torch.long)], 1)
    start = image.shape[1]
    position = torch.arange(start, start + 2)[None]
    expected = model(
        input_ids=ids(1, 2),
        past_key_values=output.past_key_values,
        attention_mask=mask,
        position_ids=position,
    ).logits
    torch.testing.assert_close(tail, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_two_images_in_a_prompt_and_one_in_another() -> None:
    model = llava().double()
    image = torch.full((1, PATCHES), IMAGE)
    two = torch.cat([ids(1, 2), image, ids(1, 2, seed=6), image, ids(1, 3, seed=7)], 1)
    one = torch.cat([ids(1, 2 + PATCHES, seed=8), ids(1, 2, seed=6), image, ids(1, 3, seed=9)], 1)
    made = {"input_ids": torch.cat([two, one]), "pixel_values": pixels(3).double()}
    keep = torch.tensor([[0, 1, -1], [3, 4, 5], [7, -1, -1]], dtype=torch.int32)
    is_image = made["input_ids"] == IMAGE
    kept = torch.zeros(3, PATCHES + 1, dtype=torch.bool)
    kept.scatter_(1, torch.where(keep < 0, PATCHES, keep).long(), True)
    stays = (~is_image).masked_scatter(is_image, kept[:, :PATCHES].flatten())
    position = torch.arange(is_image.shape[1])[None].expand(2, -1)
    expected = model(**made, attention_mask=stays.long(), position_ids=position).logits[:, -1]
    given = Given(keep)
    with compressed(model, given):
        found = model(**made).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    view = given.seen[0]
    assert view.text is not None
    assert view.text_mask is not None
    assert view.text.shape[0] == 3
    assert view.text_mask.sum(1).tolist() == [7, 7, 23]
    assert view.grid == (4, 4)


@torch.no_grad()
def test_what_methods_see_is_what_eager_attention_computes() -> None:
    model, made = llava("eager"), prompt()
    tower = model.model.vision_tower
    output = tower(made["pixel_values"], output_attentions=True, output_hidden_states=True)
    given = Given(torch.arange(4, dtype=torch.int32).repeat(2, 1))
    with compressed(model, given):
        model(**made)
    encoder = given.seen[0].encoder
    attention = output.attentions[0].mean(1)
    torch.testing.assert_close(encoder.cls(0), attention[:, 0, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.columns(0), attention.mean(1)[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.features(), output.hidden_states[-2][:, 1:])
    torch.testing.assert_close(encoder.project(encoder.features()), given.seen[0].x)
    assert encoder.logits(0).shape == (2, PATCHES)
    with pytest.raises(RuntimeError, match="encoder layer 1 was not looked at"):
        encoder.cls(1)


@torch.no_grad()
def test_no_image_means_nothing_is_done() -> None:
    model = llava()
    plain = model(input_ids=ids(1, 6)).logits
    with compressed(model, Given(torch.zeros(1, 1, dtype=torch.int32))) as stack:
        assert torch.equal(model(input_ids=ids(1, 6)).logits, plain)
        assert "no image" in str(stack.report)


ALL: list[Any] = [
    methods.FasterVLM(keep=5), methods.VTCCLS(keep=5), methods.FoPru(keep=5),
    methods.HiPrune(keep=5, middle=1),
    methods.GlobalCom2(), methods.VisionZip(keep=5), methods.VisPruner(keep=5), methods.CDPruner(keep=5),
    methods.Scope(keep=5), methods.VScan(keep=5, windows=2, shallow=0), methods.SliME(p=0.3),
    methods.ZOOPrune(keep=5), methods.TCC(0.4, 0.2, 0, 1), methods.ATP(methods.FasterVLM(), keep=5),
    methods.QuoTA(lambda view: torch.arange(1.0, 1 + len(view.x))), methods.PruMerge(),
    methods.ToDRE(keep=5), methods.DivPrune(keep=5), methods.LexRank(keep=5), methods.RandomVisual(keep=5),
    methods.StrideVisual(keep=5, average=True),
]  # fmt: skip


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_every_method_generates(method: Any) -> None:
    model, made = llava(), prompt()
    model.generate(**made, max_new_tokens=1)  # leaves notes of its own in the model
    before = state(model)
    with compressed(model, method) as stack:
        tokens = model.generate(**made, max_new_tokens=3, do_sample=False)
        again = model.generate(**made, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, again)
    assert 0 < stack.report.kept < stack.report.tokens == 32
    assert state(model) == before


@torch.no_grad()
def test_errors() -> None:
    from tiny_models import llama

    with pytest.raises(ValueError, match="found no vision-language model in LlamaForCausalLM"):
        vlm.attach(llama(), methods.DivPrune())
    model = llava()
    with pytest.raises(ValueError, match="positions must be preserve or compact, got 'x'"):
        vlm.attach(model, methods.DivPrune(), positions="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"FasterVLM: layer must be in \[-2, 2\)"):
        vlm.attach(model, methods.FasterVLM(layer=5))
    before = state(model)
    with compressed(model, methods.DivPrune()), pytest.raises(ValueError, match="compressed already"):
        vlm.attach(model, methods.DivPrune())
    assert state(model) == before
    features = model.model.get_image_features(pixels(1))
    early = pytest.raises(ValueError, match="encoded before the model was compressed")
    with compressed(model, methods.DivPrune()), early:
        model(input_ids=prompt(1)["input_ids"], mm_encoder_outputs={"image": features})


# --- through compress -------------------------------------------------------------------------------------


@torch.no_grad()
def test_compress_restores_the_model_and_reports() -> None:
    model, made = llava(), prompt()
    model.generate(**made, max_new_tokens=1)
    before = state(model)
    with tokencomp.compress(model, methods.DivPrune(keep=4)) as handle:
        with pytest.raises(RuntimeError, match="there was no prompt yet"):
            handle.report()
        model.generate(**made, max_new_tokens=2)
        report = handle.report()
        assert (report.tokens, report.kept, report.images, report.text) == (32, 8, 2, 18)
        assert "8 of 32 visual tokens of 2 images" in str(report)
        picture = handle.overlay(made["pixel_values"][1], number=1)
        assert picture.shape[2] == 3
        with pytest.raises(ValueError, match=r"overlay: number must be in \[0, 2\), got 2"):
            handle.overlay(made["pixel_values"][1], number=2)
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), tokencomp.compress(model, methods.DivPrune(keep=4)):
        raise ZeroDivisionError
    assert state(model) == before


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_visual_tokens_and_the_cache_together(padded: bool) -> None:
    """A paged cache of what the decoder got holds no more, and answers the same."""
    model, made, keep = llava(), prompt(), torch.tensor([[0, 3, 7], [2, 5, -1]], dtype=torch.int32)
    mask = torch.ones_like(made["input_ids"])
    if padded:
        mask[1, :2] = 0
    steps = [ids(2, 1, seed=1), ids(2, 2, seed=2)]
    with compressed(model, Given(keep)):
        expected = decode(model, made, steps, mask)
    for more in (methods.SnapKV(budget=64), methods.StreamingLLM(budget=64)):
        with tokencomp.compress(model, Given(keep), more) as handle:
            found = decode(model, made, steps, mask)
            held = handle.report().cache.layers[0].tokens
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        real = mask.sum(1) - 16 + (keep >= 0).sum(1) + 3
        assert [row[0] for row in held] == real.tolist()


@torch.no_grad()
def test_three_methods_in_one_call() -> None:
    model, made = llava(), prompt()
    chain = methods.ToDRE(keep=0.5), methods.SnapKV(budget=12, window=4), methods.Quest(k=32)
    with tokencomp.compress(model, *chain, page=16) as handle:
        model.generate(**made, max_new_tokens=3, do_sample=False)
        report = handle.report()
    assert report.kept == 16
    assert all(tokens <= 16 for row in report.cache.layers[0].tokens for tokens in row)
    with pytest.raises(TypeError, match="at most one method on visual tokens"):
        tokencomp.compress(model, methods.ToDRE(), methods.DivPrune())
    with pytest.raises(TypeError, match="which take no page"):
        tokencomp.compress(model, methods.ToDRE(), page=16)
