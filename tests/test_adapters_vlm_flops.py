"""Floating-point operations of prompts with images, counted by hand on tiny models."""

from collections.abc import Sequence
from typing import Any

import pytest
import tokencomp
import torch
from test_adapters_vlm import Given
from tiny_vlms import make
from tokencomp import methods
from tokencomp.adapters import flops
from torch import Tensor, nn

LINEAR = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48  # weights of a decoder layer: q, o, k, v, MLP
TOWER = 4 * 32 * 32 + 2 * 32 * 48  # of CLIP's, C = 32
KEEP = torch.tensor([[0, 4, 9], [5, -1, -1]], dtype=torch.int32)


def prefill(tokens: Sequence[int], before: Sequence[float] = (0, 0)) -> int:
    """Of one layer: each token attends to itself, those before it in the prompt and those in the cache."""
    pairs = sum(sum(b + i + 1 for i in range(n)) for n, b in zip(tokens, before, strict=False))
    return 2 * sum(tokens) * LINEAR + round(4 * 32 * pairs)


def tower(rows: Sequence[int], crops: int = 2) -> int:
    return crops * sum(2 * n * TOWER + 4 * 32 * n * n for n in rows)


@torch.no_grad()
def test_rows_of_different_numbers_and_padding() -> None:
    """16 visual tokens beside 7 words, of which 2 of the second row are padding."""
    model, made = make("llava", torch.float32)
    mask = torch.ones_like(made["input_ids"])
    mask[1, :2] = 0
    with tokencomp.compress(model, Given(KEEP)) as handle:
        model(**made, attention_mask=mask)
        report = handle.report()
        model(input_ids=torch.tensor([[5], [6]]))  # without a cache: another prompt
        assert handle.report().flops == handle.report().saved == 0
    assert (report.tokens, report.kept, report.text) == (32, 4, 7 + 5)
    assert report.flops == 3 * prefill([7 + 3, 5 + 1])
    assert report.dense_flops == 3 * prefill([7 + 16, 5 + 16])
    assert (report.encoder_flops, report.encoder_dense_flops) == (0, 0)
    assert report.saved == 1 - report.flops / report.dense_flops
    assert "4 of 32 visual tokens of 2 images, 16 of 44 tokens of the prompt; " in str(report)
    assert f"; {report.saved:.1%} of the FLOPs of decoder layers saved, chosen" in str(report)


@pytest.mark.parametrize("paged", [False, True])
@torch.no_grad()
def test_turns(paged: bool) -> None:
    """The second image attends to what the first one left, and in the dense count to all there was."""
    model, made = make("llava", torch.float32)
    ids, pixels, words = made["input_ids"], made["pixel_values"], torch.tensor([[9, 8, 7], [9, 8, 7]])
    more = [methods.SnapKV(budget=64, window=4)] if paged else []
    mask = torch.ones(2, 49, dtype=torch.long)
    mask[1, :2] = 0
    with tokencomp.compress(model, Given(KEEP), *more) as handle:
        cache = model(input_ids=ids, pixel_values=pixels, attention_mask=mask[:, :23]).past_key_values
        model(input_ids=words, past_key_values=cache, attention_mask=mask[:, :26])
        model(input_ids=ids, pixel_values=pixels, past_key_values=cache, attention_mask=mask)
        report = handle.report()
    assert report.flops == 3 * prefill([7 + 3, 7 + 1], [7 + 3 + 3, 5 + 1 + 3])
    assert report.dense_flops == 3 * prefill([23, 23], [26, 24])


@torch.no_grad()
def test_cuts_in_the_encoder() -> None:
    """Layers of CLIP see 17, 5 and 5 rows of a crop; the projector's work is not counted."""
    model, made = make("llava", torch.float32)
    with tokencomp.compress(model, methods.FlowCut(keep=4)) as handle:
        model(**made)
        report = handle.report()
        model(**made)
        assert handle.report().encoder_flops == report.encoder_flops  # of one prompt
    assert report.encoder_flops == tower([17, 5, 5])
    assert report.encoder_dense_flops == tower([17, 17, 17])
    assert report.flops == tower([17, 5, 5]) + 3 * prefill([11, 11])
    assert report.dense_flops == tower([17, 17, 17]) + 3 * prefill([23, 23])
    assert f"{report.saved:.1%} of the FLOPs of encoder and decoder layers" in str(report)


@torch.no_grad()
def test_windows_of_the_encoder() -> None:
    """Qwen2.5-VL, 8 x 8 and 4 x 6 patches in windows of 4 x 4, but the last layer; a quarter stays."""
    model, made = make("qwen2_5_vl", torch.float32)
    model.model.visual.fullatt_block_indexes = [2]
    linear = 4 * 32 * 32 + 3 * 32 * 48

    def layer(sets: Sequence[int]) -> int:
        return 2 * sum(sets) * linear + 4 * 32 * sum(n * n for n in sets)

    windows = [16, 16, 16, 16, 16, 8]
    with tokencomp.compress(model, FirstOfEach()) as handle:
        model(**made)
        report = handle.report()
    assert report.encoder_dense_flops == 2 * layer(windows) + layer([64, 24])
    assert report.encoder_flops == layer(windows) + layer([4, 4, 4, 4, 4, 4]) + layer([16, 8])


class FirstOfEach(methods.encoder.CutInEncoder):
    """Leaves the first token of every window of 2 x 2 tokens, of 4 x 4 and of 2 x 3."""

    def cuts_after(self, last: int) -> tuple[int, ...]:
        return (0,)

    def cut(self, view: Any) -> Tensor:
        return torch.tensor([[0, 2, 8, 10] if view.left == 16 else [0, 2]], dtype=torch.int32)


@torch.no_grad()
def test_tower_flops_are_those_of_a_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, made = make("llava", torch.float32)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model.model.vision_tower(made["pixel_values"])
    counted = counter.get_flop_counts()
    layers = {name: sum(of.values()) for name, of in counted.items() if name.rsplit(".", 1)[-1] in "012"}
    assert sorted(layers.values()) == [tower([17])] * 3


@torch.no_grad()
def test_between_layers_behind_a_choice() -> None:
    """The whole saving against all visual tokens, and what the choice in front saved alone."""
    model, made = make("llava", torch.float32)
    with tokencomp.compress(model, methods.StrideVisual(keep=8), methods.FastV(keep=2, layer=1)) as handle:
        model(**made)
        report = handle.report()
        assert report.flops == prefill([15, 15]) + 2 * prefill([9, 9])
        assert report.chosen.flops == 3 * prefill([15, 15])
        assert report.dense_flops == report.chosen.dense_flops == 3 * prefill([23, 23])
        assert f"{report.saved:.1%} of the FLOPs of 3 layers saved, {report.chosen.saved:.1%} before" in str(
            report
        )
    with tokencomp.compress(model, methods.FlowCut(keep=8), methods.FastV(keep=2, layer=1)) as handle:
        model(**made)
        report = handle.report()
    assert report.flops == tower([17, 9, 9]) + prefill([15, 15]) + 2 * prefill([9, 9])
    assert report.dense_flops == tower([17, 17, 17]) + 3 * prefill([23, 23])
    assert "of the FLOPs of 3 layers and the encoder saved" in str(report)


@torch.no_grad()
def test_turns_between_layers() -> None:
    """Layers attend to what their own caches hold of the prompt before."""
    model, made = make("llava", torch.float32)
    with tokencomp.compress(model, methods.FastV(keep=4, layer=1)) as handle:
        cache = model(**made).past_key_values
        model(**made, past_key_values=cache)
        report = handle.report()
    assert report.flops == prefill([23, 23], [23, 23]) + 2 * prefill([11, 11], [11, 11])
    assert report.dense_flops == 3 * prefill([23, 23], [23, 23])


def test_decoders_of_another_build_are_not_counted() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

    assert flops.decoder_layers(Two()) == []
