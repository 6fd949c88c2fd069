"""MustDrop's first stage: windows of patches merge behind the encoder's first layer."""

from typing import Any

import pytest
import tokencomp
import torch
from test_adapters_vlm import compressed
from tiny_models import state
from tiny_vlms import encode, make
from tokencomp import methods
from tokencomp.methods.encoder import EncoderView
from tokencomp.methods.must_drop import even_windows
from torch import Tensor

FAMILIES = [
    "llava",
    "llava_siglip",
    "llava_next",
    "onevision",
    "internvl",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
]
# The authors' example: windows of 2 x 2 with similarities 1, 1/3, 0.9 and -1/3; 0 and 2 merge at 0.8.
TOKENS = {
    0: (1, 0), 1: (1, 0), 4: (1, 0), 5: (1, 0), 2: (1, 0), 3: (1, 0), 6: (0, 1), 7: (0, 1),
    8: (1, 0), 9: (1, 0), 12: (1, 0), 13: (0.8, 0.6), 10: (1, 0), 11: (0, 1), 14: (-1, 0), 15: (0, -1),
}  # fmt: skip
LEFT = [2, 3, 5, 6, 7, 10, 11, 13, 14, 15]


def view_of(x: Tensor, prefix: int, token: Tensor | None = None, tokens: int = 16) -> EncoderView:
    none = torch.zeros(1)
    return EncoderView(
        0, 3, x, none, none, none, 1.0, prefix, tokens, tokens, None if token is None else token[None], (4, 4)
    )


def test_worked_example() -> None:
    """CLS stays, (7, 7); the means are (1, 0) and (.95, .15), at the last places of their windows."""
    x = torch.tensor([(7, 7), *(TOKENS[i] for i in range(16))], dtype=torch.float32)
    found = methods.MustDrop(window=2).cut(view_of(x[None], 1))
    assert found is not None
    assert found.index.tolist() == [LEFT]
    expected = torch.stack([x[1 + i] for i in LEFT])
    expected[2], expected[7] = torch.tensor([1.0, 0]), torch.tensor([0.95, 0.15])
    torch.testing.assert_close(found.x[0], expected)
    assert methods.MustDrop(window=2, merge=1.0, layers=(1,)).cut(view_of(-x[None].cumsum(1), 1)) is None


def test_tokens_of_two_patches_merge_patch_by_patch() -> None:
    """Patches lie in another order: token 15 first, each token's second patch, three times as long, later."""
    token = torch.arange(15, -1, -1).repeat_interleave(2)
    x = torch.tensor([TOKENS[int(i)] for i in token], dtype=torch.float32)
    x[1::2] *= 3
    found = methods.MustDrop(window=2).cut(view_of(x[None], 0, token))
    assert found is not None
    assert found.index.tolist() == [LEFT]
    ones = methods.MustDrop(window=2).cut(view_of(x[::2].flip(0)[None], 0))
    assert ones is not None
    torch.testing.assert_close(found.x[0, ::2], ones.x[0].flip(0))
    torch.testing.assert_close(found.x[0, 1::2], 3 * ones.x[0].flip(0))


def test_crops_merge_equally_many_windows() -> None:
    """The second crop has one window that is alike, so of the first one's two only the more alike merges."""
    first = torch.tensor([TOKENS[i] for i in range(16)], dtype=torch.float32)
    second = first.clone()
    second[[0, 1, 4]] = torch.tensor([0.0, -1])
    group = even_windows(torch.stack([first, second]), (4, 4), 2, 0.8)
    assert group[0].tolist() == [5, 5, 2, 3, 5, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert group[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 13, 13, 10, 11, 13, 13, 14, 15]
    second[13] = torch.tensor([-1.0, 0])
    assert torch.equal(even_windows(torch.stack([first, second]), (4, 4), 2, 0.8)[0], torch.arange(16))


@torch.no_grad()
def test_equals_the_tower_with_shorter_states() -> None:
    """CLIP layer by layer, its 4 x 4 patches merged by a plain loop behind the first one."""
    model, made = make("llava", torch.float32)
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers  # before transformers 5.23
    states = tower(made["pixel_values"], output_hidden_states=True).hidden_states[1]
    windows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    index = [window[-1] for window in windows]
    x = torch.stack([states[:, 0], *(states[:, 1:][:, window].mean(1) for window in windows)], 1)
    for layer in layers[1:2]:
        x = layer(x, attention_mask=None)
    expected = model.model.multi_modal_projector(x[:, 1:])
    with compressed(model, methods.MustDrop(layers=(0,), merge=-1.0, window=2)) as stack:
        encode(model, made)
        (found,) = stack.passes.waiting[-1][1]
    assert found.encoder.survivors().tolist() == [index, index]
    torch.testing.assert_close(found.x[:, index], expected, atol=1e-5, rtol=0)
    q, k, scale = found.encoder._seen[2]
    assert k.shape[2] == 5
    row = (q[:, :, :1] @ k.mT * scale).softmax(-1)[:, :, 0, 1:].mean(1)
    assert torch.equal(found.encoder.cls(2)[:, index], row)
    assert int((found.encoder.cls(2) > 0).sum()) == 8
    assert found.encoder.keys(2)[0, :, index].equal(k[0, :, 1:])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_on_every_make(family: str) -> None:
    """Each window becomes one token, and the encoder computes less; the model is as it was."""
    model, made = make(family, torch.float32)
    model.generate(**made, max_new_tokens=1)
    before, method = state(model), methods.MustDrop(layers=(0,), merge=-1.0, window=2)
    with tokencomp.compress(model, method, newlines="none") as handle:
        first = model.generate(**made, max_new_tokens=2, do_sample=False, suppress_tokens=[60])
        report = handle.report().chosen
        again: Any = model.generate(**made, max_new_tokens=2, do_sample=False, suppress_tokens=[60])
    assert torch.equal(first, again)
    assert state(model) == before
    sizes = {len(row[row >= 0]) for index in report.index for row in index}
    assert sizes <= {4, 3}  # of 4 x 4 tokens, and of 2 x 3
    assert 0 < report.encoder_flops < report.encoder_dense_flops
    assert int(report.key.sum()) == sum(len(index) for index in report.index)  # one of each crop


@torch.no_grad()
def test_frames_of_a_video_merge_together() -> None:
    for family in ("qwen2_vl_video", "qwen2_5_vl_video", "qwen3_vl_video"):
        model, made = make(family, torch.float32)
        with tokencomp.compress(model, methods.MustDrop(layers=(0,), merge=-1.0, window=2)) as handle:
            model(**made)
            chosen = handle.report().chosen
        assert [index.tolist() for index in chosen.index] == [[[2, 4, 5]] * 3, [[3]] * 3]
    model, made = make("onevision_video", torch.float32)
    with tokencomp.compress(
        model, methods.MustDrop(layers=(0,), merge=-1.0, window=2, inside=False)
    ) as handle:
        model(**made)
        assert [index.tolist() for index in handle.report().chosen.index] == [[[3]] * 6]
