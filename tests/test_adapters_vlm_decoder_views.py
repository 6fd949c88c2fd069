"""What methods between decoder layers see of a model; all of them on every make; what goes wrong."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import tokencomp
import torch
from decoder_views import DECODER_METHODS
from test_adapters_vlm_decoder import CLOSE, TURN
from tiny_models import llama, state
from tiny_vlms import FAMILIES, IMAGE, make
from tokencomp import methods
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning


@dataclass(frozen=True)
class Curious(Pruning):
    """Leaves every second visual token out behind layers 0 and 1, and keeps what it saw."""

    seen: list[Any] = field(default_factory=list)
    fails: bool = False

    @property
    def watches(self) -> tuple[str, ...]:
        return ("transition", "activation")

    def acts_after(self, layers: int) -> tuple[int, ...]:
        return (0, 1)

    def prune(self, view: DecoderView) -> DecoderKeep:
        if self.fails and view.layer == 1:
            raise ZeroDivisionError
        rows = view.real
        every = view.own.received(rows, heads="none"), view.next().received(rows, heads="none")
        self.seen.append((view, every, view.own.rows(view.text)))
        return DecoderKeep(view.visual & (view.visual.long().cumsum(1) % 2 == 0))


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_attention_is_that_of_the_layers(padded: bool) -> None:
    """Against eager attention: of the stop's own layer, and of the next one to the unpruned hidden states."""
    model, made = make("llava", torch.float32)
    mask = torch.ones_like(made["input_ids"])
    mask[0, :2] = 1 - int(padded)
    curious = Curious()
    with tokencomp.compress(model, curious):
        model(**made, attention_mask=mask)
    model.set_attn_implementation("eager")
    out = model(**made, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    view, (own, after), (rows, there) = curious.seen[0]
    real = mask.bool()
    for found, eager in ((own, out.attentions[0]), (after, out.attentions[1])):
        expected = (eager * real[:, None, :, None]).sum(2)
        torch.testing.assert_close(found * real[:, None], expected * real[:, None], atol=1e-4, rtol=0)
    text = out.attentions[0].mean(1)[:, -4:]
    assert view.text.sum(1).tolist() == [4, 4]
    assert bool(there.all())
    torch.testing.assert_close(rows * real[:, None], text * real[:, None], atol=1e-5, rtol=0)
    states = out.hidden_states[1]
    torch.testing.assert_close(view.x[real], states[real], atol=1e-4, rtol=0)
    layer = model.model.language_model.layers[0]
    (attention, mlp), activation = view.transition, view.activation
    torch.testing.assert_close(attention.before, layer.input_layernorm(view.embeds), atol=1e-5, rtol=0)
    torch.testing.assert_close(mlp.after, layer.mlp.down_proj(activation), atol=1e-5, rtol=0)
    total = view.embeds + attention.after + mlp.after
    torch.testing.assert_close(total, view.x, atol=1e-4, rtol=0)
    second = curious.seen[1][0]
    assert second.x.shape[1] == view.x.shape[1] - 8
    assert second.tokens == [16, 16]
    values = torch.arange(23.0).expand(2, -1)
    assert torch.equal(second.by_row(values)[second.real].long(), second.column[second.real])
    assert torch.equal(
        second.by_row(second.by_column(second.column.float()))[second.real],
        second.column[second.real].float(),
    )


@torch.no_grad()
def test_attention_reaches_back_into_the_cache() -> None:
    """An image in a second turn: what its rows attend to in the first one counts in the softmax."""
    model, made = make("llava", torch.float32)
    for method in (None, methods.Uniform()):
        curious = Curious()
        more = [] if method is None else [method]
        with tokencomp.compress(model, curious, *more) as handle:
            cache = handle.new_cache()
            model(input_ids=made["input_ids"][:, :3].repeat(1, 4), past_key_values=cache)
            model(**made, past_key_values=cache)
        _, (own, after), _ = curious.seen[0]
        assert own.shape[2] == after.shape[2] == 23
        full = torch.full((2,), 23.0 * 4)
        assert bool((own.sum((1, 2)) < full).all())
        assert bool((own.sum((1, 2)) > 0.1 * full).all())
        if method is None:
            plain = torch.cat([made["input_ids"][:, :3].repeat(1, 4), made["input_ids"]], 1)
            model.set_attn_implementation("eager")
            out = model(input_ids=plain, pixel_values=made["pixel_values"], output_attentions=True)
            expected = out.attentions[0][:, :, 12:, 12:].sum(2)
            torch.testing.assert_close(own, expected, atol=1e-4, rtol=0)
            model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_failures_leave_the_model_as_it_was() -> None:
    model, made = make("llava", torch.float32)
    model.generate(**made, max_new_tokens=1)
    before, plain = state(model), model(**made).logits
    with tokencomp.compress(model, Curious(fails=True)) as handle:
        cache = handle.new_cache()
        model(input_ids=TURN.repeat(2, 1), past_key_values=cache)
        with pytest.raises(ZeroDivisionError):
            model(**made, past_key_values=cache)
        assert cache.get_seq_length() == 10
        assert all(row == [10, 10] for layer in handle.report().cache.layers for row in layer.tokens)
        again = model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache).logits
    ids = torch.cat([TURN.repeat(2, 1), torch.tensor([[5], [6]])], 1)
    torch.testing.assert_close(again[:, -1], model(input_ids=ids).logits[:, -1], atol=CLOSE, rtol=0)
    with pytest.raises(ZeroDivisionError), tokencomp.compress(model, Curious()):
        raise ZeroDivisionError
    assert state(model) == before
    assert torch.equal(model(**made).logits, plain)


@torch.no_grad()
def test_no_image_does_nothing() -> None:
    model, made = make("llava", torch.float32)
    text = TURN.repeat(2, 1)
    expected = model(input_ids=text).logits
    with tokencomp.compress(model, methods.FastV(layer=1)) as handle:
        with pytest.raises(RuntimeError, match="there was no prompt yet"):
            handle.report()
        torch.testing.assert_close(model(input_ids=text).logits, expected, atol=CLOSE, rtol=0)
        assert str(handle.report()) == "FastV: no image in the prompt, nothing done"
        model.generate(**made, max_new_tokens=2)
        report = handle.report()
        assert report.visual == ([16, 16], [8, 8], [8, 8])
        assert report.prompts == 2
        linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)

        def of(n: int) -> int:
            return n * linear + 4 * 32 * n * (n + 1) // 2

        assert report.dense_flops == 2 * 3 * of(23)
        assert report.flops == 2 * (of(23) + 2 * of(15))
        assert f"{report.saved:.1%}" in str(report)
        assert str(report).startswith("FastV: visual tokens by layer 32 16 16; ")


def test_errors() -> None:
    model, made = make("llava", torch.float32)
    with pytest.raises(ValueError, match=r"FastV: keep must be a ratio in \(0, 1\] or a count >= 1, got 1.5"):
        methods.FastV(keep=1.5)
    with pytest.raises(ValueError, match=r"FastV: layer must be in \[1, 3\), got 3"):
        tokencomp.compress(model, methods.FastV(layer=3))
    with pytest.raises(TypeError, match="at most one method between decoder layers"):
        tokencomp.compress(model, methods.FastV(layer=1), methods.FastV(layer=2))
    with pytest.raises(TypeError, match="FastV is a method of the decoder's own attention, which take"):
        tokencomp.compress(model, methods.FastV(layer=1), attention="model")
    with pytest.raises(ValueError, match="found no vision-language model in LlamaForCausalLM"):
        tokencomp.compress(llama(), methods.FastV(layer=1))
    with tokencomp.compress(model, methods.FastV(layer=1)):
        with pytest.raises(ValueError, match="compressed already"):
            tokencomp.compress(model, methods.FastV(layer=1))
        model(**made)
    model.model.language_model.layers[0].input_layernorm = None
    with pytest.raises(ValueError, match="layers of LlamaModel must have self_attn, input_layernorm, mlp"):
        tokencomp.compress(model, methods.FastV(layer=1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_methods_on_every_make(family: str) -> None:
    model, made = make(family, torch.float32)
    visual = (made["input_ids"] == IMAGE).sum(1).tolist()
    for method in DECODER_METHODS:
        if isinstance(method, methods.MustDrop):
            continue
        with tokencomp.compress(model, method, methods.SnapKV(budget=128, window=4)) as handle:
            said = model.generate(**made, max_new_tokens=2, do_sample=False, suppress_tokens=[IMAGE])
            report = handle.report()
        assert said.shape[0] == 2
        assert report.visual[0] == visual or isinstance(method, methods.Probe)
        assert all(left <= n for left, n in zip(report.visual[-1], visual, strict=True))
        assert report.saved > 0 or isinstance(method, methods.ToDREStage2)
        for layer, n in zip(report.cache.layers, report.tokens, strict=True):
            assert layer.tokens == [[count + 1] * 2 for count in n]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "qwen2_5_vl"])
@torch.no_grad()
def test_must_drop_at_all_places(family: str, inside: bool) -> None:
    """Windows merge in the encoder or behind it, key tokens stay between layers, caches of the layers of the
    stops let go.
    """
    model, made = make(family, torch.float32)
    method = methods.MustDrop(
        layers=(0, 1), share=1.0, peak=1.0, merge=-1.0, window=2, key=0.2, inside=inside
    )
    model.generate(**made, max_new_tokens=1)
    before = state(model)
    with tokencomp.compress(model, method) as handle:
        model.generate(**made, max_new_tokens=2, do_sample=False, suppress_tokens=[IMAGE])
        report = handle.report()
    assert state(model) == before
    chosen = report.chosen
    assert 0 < chosen.kept < chosen.tokens
    keys = int(chosen.key.sum())
    assert sum(report.visual[0]) == chosen.kept
    assert sum(report.visual[1]) == sum(report.visual[2]) == keys  # all others are passed over
    held = [[row[0] for row in layer.tokens] for layer in report.cache.layers]
    assert held[0] == held[1] == held[2] == [n + 1 for n in report.tokens[2]]
    with pytest.raises(TypeError, match="at most one method on visual tokens"):
        tokencomp.compress(model, method, methods.ToDRE())


class SecondIsKey:
    """All tokens go on; the second of each image is a key token."""

    def looks_at(self, layers: int) -> tuple[int, ...]:
        return ()

    def choose(self, view: Any) -> Any:
        index = torch.arange(view.x.shape[1], dtype=torch.int32).repeat(view.x.shape[0], 1)
        return methods.VisualKeep(index, key=index == 1)


@torch.no_grad()
def test_key_tokens_of_images_in_turns() -> None:
    """Images of two sizes alternate: the encoder's groups are not the prompt's order."""
    model, made = make("qwen2_5_vl", torch.float32)
    counts, grid, pixels = [16, 6, 16], made["image_grid_thw"][[0, 1, 0]], made["pixel_values"]
    text = made["input_ids"][:1, :3]
    parts = [part for n in counts for part in (text, torch.full((1, n), IMAGE))]
    ids = torch.cat([*parts, text], 1)
    large = int(made["image_grid_thw"][0].prod())
    curious = Curious()
    with tokencomp.compress(model, SecondIsKey(), curious):
        model(
            input_ids=ids, image_grid_thw=grid, pixel_values=torch.cat([pixels, pixels[:large] * 2]),
            mm_token_type_ids=(ids == IMAGE).int(),
        )  # fmt: skip
    first, second = (view for view, _, _ in curious.seen)
    for view in (first, second):  # even ones stay
        assert view.column[view.key].tolist() == [4, 23, 32]
