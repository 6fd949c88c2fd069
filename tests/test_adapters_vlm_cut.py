"""Patches left out between the layers of the vision encoder: as if later layers could not see them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import tokencomp
import torch
from encoders import layers_of
from test_adapters_vlm import compressed
from test_adapters_vlm_families import Some
from tiny_models import state
from tiny_vlms import make
from tokencomp import methods
from tokencomp.methods import flowcut
from tokencomp.methods.encoder import CutInEncoder, EncoderMethod, EncoderView
from torch import Tensor

CUT = ["llava", "llava_siglip", "llava_next", "onevision", "internvl", "qwen2_vl", "qwen3_vl"]
CUT += ["qwen2_vl_video", "qwen3_vl_video", "qwen2_5_vl", "qwen2_5_vl_video"]


@dataclass(frozen=True)
class Thinned(CutInEncoder):
    """Leaves every second token behind the first layer, and of these again behind the second."""

    seen: list[EncoderView] = field(default_factory=list)

    def cuts_after(self, last: int) -> tuple[int, ...]:
        return tuple(range(last))

    def cut(self, view: EncoderView) -> Tensor | None:
        self.seen.append(view)
        index = torch.arange(view.layer % 2, view.left, 2, dtype=torch.int32)
        return index.expand(view.x.shape[0], -1) if len(index) else None


def thinned(tokens: int, cuts: int) -> Tensor:
    """The tokens ``Thinned`` has left after so many cuts."""
    left = torch.arange(tokens)
    for layer in range(cuts):
        shorter = left[layer % 2 :: 2]
        left = shorter if len(shorter) else left
    return left


@contextmanager
def hidden(model: Any, alive: dict[int, Tensor]) -> Iterator[None]:
    """Layer by layer of the encoder, keys that are not ``alive`` (bool, of all calls) are not attended to."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = dict.fromkeys(alive, 0)
    tower: Any = getattr(model.model, "vision_tower", None) or model.model.visual
    number = {a: i for i, a in enumerate(m for m in tower.modules() if _is_attention(m))}

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Any, scaling: float | None = None, **more: Any
    ) -> Any:
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        logits = (q @ k.mT) * scale
        layer = number[module]
        if layer in alive:
            column = alive[layer][seen[layer] : seen[layer] + k.shape[2]]
            seen[layer] = (seen[layer] + k.shape[2]) % len(alive[layer])
            logits = logits.masked_fill(~column, -1e30)  # windows may be empty
        return (logits.softmax(-1) @ v).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["hidden"] = attend
    configs = {id(a.config): a.config for a in number}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = "hidden"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        del ALL_ATTENTION_FUNCTIONS["hidden"]


def _is_attention(module: Any) -> bool:
    from tokencomp.adapters.vlm_encoder import is_vision_attention

    return is_vision_attention(module)


@pytest.mark.parametrize("family", CUT)
@torch.no_grad()
def test_cutting_equals_masking(family: str) -> None:
    """Features of survivors, with the layers behind a cut seeing their keys alone, in float64."""
    model, made = make(family)
    _in_windows(model, [2])
    method, some = Thinned(), Some()
    with compressed(model, method) as stack:
        cut = stack.look.cut
        _run(model, made)
        found = stack.passes.waiting[-1][1]
        crops = [cut.crops] if hasattr(cut, "crops") else [i for i in cut.images for _ in i.patch]
    first, last = method.seen[0], cut.last
    alive: dict[int, Tensor] = {}
    for layer in range(1, last + 1):
        columns = []
        for crop in crops:
            left = thinned(crop.tokens, layer)
            patches = len(crop.token) if crop.token is not None else crop.tokens
            token = torch.arange(patches) if crop.token is None else crop.token
            column = torch.cat([torch.ones(first.prefix, dtype=torch.bool), torch.isin(token, left)])
            columns.append(column)
        alive[layer] = torch.cat(columns)
    with hidden(model, alive), compressed(model, some) as stack:
        _run(model, made)
        expected = stack.passes.waiting[-1][1]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        survivors = ours.encoder.survivors()
        tokens = ours.x.shape[1]
        assert survivors.shape[1] < tokens
        for crop in range(len(survivors)):
            assert torch.equal(survivors[crop].long(), thinned(tokens, last))
            at = survivors[crop].long()
            torch.testing.assert_close(ours.x[crop, at], theirs.x[crop, at], atol=1e-10, rtol=0)
            gone = [i for i in range(tokens) if i not in at.tolist()]
            assert not torch.allclose(ours.x[crop, gone], theirs.x[crop, gone])


def _in_windows(model: Any, full: list[int]) -> None:
    """Layers but ``full`` attend in windows, where there are any: the first cut is of windows, too."""
    tower = getattr(model.model, "visual", None)
    if getattr(tower, "fullatt_block_indexes", None) is not None:
        tower.fullatt_block_indexes = full


@pytest.mark.parametrize("full", [[], [0], [1]], ids=str)
@torch.no_grad()
def test_windows_keep_their_members(full: list[int]) -> None:
    """Sets that attend to themselves behind each cut are the windows' survivors; empty ones are gone."""
    model, made = make("qwen2_5_vl", torch.float32)
    _in_windows(model, full)
    with compressed(model, Thinned()) as stack:
        _run(model, made)
        cut = stack.look.cut
    whole, windows = [64, 24], [16, 16, 16, 16, 16, 8]
    # of 4 x 4 tokens columns 0 and 2, then column 2; of 2 x 3 tokens 0, 2, 4, then 2; four patches each
    inside = [windows, [8] * 4 + [8, 4], [8, 8, 4]]
    outside = [whole, [32, 12], [16, 4]]
    expected = [(outside if n in full else inside)[n] for n in range(3)]
    assert [done for done, _ in cut.lengths] == expected
    assert [dense for _, dense in cut.lengths] == [whole if n in full else windows for n in range(3)]


def _run(model: Any, made: dict[str, Any]) -> None:
    from tiny_vlms import encode

    encode(model, made)


@pytest.mark.parametrize("family", CUT)
@torch.no_grad()
def test_flowcut_on_every_make(family: str) -> None:
    """As many tokens as asked for go through the last layer and into the prompt; the model is as it was."""
    model, made = make(family, torch.float32)
    model.generate(**made, max_new_tokens=1)
    before = state(model)
    with tokencomp.compress(model, methods.FlowCut(keep=0.25), newlines="none") as handle:
        first = model.generate(**made, max_new_tokens=2, do_sample=False)
        report = handle.report()
        again = model.generate(**made, max_new_tokens=2, do_sample=False)
    assert torch.equal(first, again)
    assert state(model) == before
    sizes = {len(row[row >= 0]) for index in report.index for row in index}
    assert sizes <= {4, 2, 1}  # of 16, of 6, of 4 tokens
    assert report.method == "FlowCut"
    assert 0 < report.kept < 0.5 * report.tokens


@torch.no_grad()
def test_later_layers_see_fewer_rows() -> None:
    model, made = make("llava", torch.float32)
    rows: list[int] = []
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)  # before transformers 5.23
    hooks = [
        layer.register_forward_pre_hook(lambda m, a: rows.append(a[0].shape[1])) for layer in layers_of(tower)
    ]
    with tokencomp.compress(model, methods.FlowCut(keep=4)):
        model(**made)
    for hook in hooks:
        hook.remove()
    assert rows == [17, 5, 5]  # layer 1 makes the features, so all goes behind layer 0


def test_worked_example_of_the_authors_code() -> None:
    g = torch.tensor([[0.40, 0.30, 0.20, 0.05, 0.05]])
    z = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.1]])
    v = torch.tensor([[1.0, -1], [2, 0], [0.5, 0.5], [3, -1], [0, 1]])[None, None].expand(-1, 2, -1, -1)
    expected = torch.tensor([[1.2444, 1.0444, 0.4222, 1.0889, 0.1611]])
    torch.testing.assert_close(flowcut.score(g, z, v), expected, atol=1e-4, rtol=0)
    ratio = float(flowcut.entropy_ratio(g)[0])
    assert ratio == pytest.approx(0.8383, abs=1e-4)
    assert [flowcut.cut_count(ratio, 5, 2, rho) for rho in (4, 2, 1, 0)] == [0, 1, 1, 3]


def _view(layer: int, last: int, scratch: dict[str, Any], prefix: int, n: int = 12) -> EncoderView:
    g = torch.Generator().manual_seed(layer)
    q, k, v = (3 * torch.randn(2, 3, prefix + n, 4, generator=g) for _ in range(3))
    return EncoderView(layer, last, q[:, 0], q, k, v, 0.5, prefix, 12, n, scratch=scratch)


@pytest.mark.parametrize("prefix", [0, 1])
def test_flowcut_accumulates_scores(prefix: int) -> None:
    """Written out for one crop: scores of all layers count, cuts come behind every second one."""
    method, scratch, total = methods.FlowCut(keep=3), dict[str, Any](), None
    for layer in range(2):
        view = _view(layer, 4, scratch, prefix)
        query = view.q[:, :, :1] if prefix else view.q.mean(2, keepdim=True)
        g = ((query @ view.k.mT) * 0.5).softmax(-1)[:, :, 0].mean(1)[:, prefix:]
        density = view.v[:, :, prefix:].mean(1).abs().sum(-1)
        new = g * density
        if prefix:
            z = (view.v[:, :, :1] @ view.v.mT).softmax(-1)[:, :, 0].mean(1)[:, prefix:]
            new = (g / g.sum(1, keepdim=True) + z / z.sum(1, keepdim=True)) * density
        total = new if total is None else (total + new) / 2
        index = method.cut(view)
        assert (index is None) == (layer == 0)  # three layers are left then, and two behind layer 1
    assert index is not None
    assert total is not None
    p = g / g.sum(1, keepdim=True)
    ratio = -(p * p.log()).sum(1) / torch.tensor(12.0).log()
    gone = max(round(float(9 / 2**0.5 * (1 - r**2))) for r in ratio)
    assert 0 < gone < 9
    assert index.shape[1] == 12 - gone
    assert index.tolist() == [sorted(row.topk(index.shape[1]).indices.tolist()) for row in total]
    torch.testing.assert_close(scratch["score"], total.gather(1, index.long()))
    assert method.cuts_after(4) == (0, 1, 2, 3)


def test_flowcut_reaches_its_target_at_the_last_layer() -> None:
    scratch: dict[str, Any] = {}
    index = methods.FlowCut(keep=3).cut(_view(3, 4, scratch, 1))
    assert index is not None
    assert index.shape == (2, 3)
    assert methods.FlowCut(keep=3).cut(_view(3, 4, {}, 1, n=3)) is None


def test_tokens_of_several_patches_go_whole() -> None:
    token = torch.tensor([[0, 1, 0, 1, 2, 2]])
    view = EncoderView(
        0, 1, *(torch.zeros(1, 1, 6, 2) for _ in range(4)), 1.0, 0, 3, 3, token=token
    )  # fmt: skip
    score = torch.tensor([[1.0, 5, 3, 7, 0, 4]])
    assert view.by_token(score).tolist() == [[2.0, 6.0, 2.0]]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"FlowCut: keep must be a ratio in \(0, 1\] or a count >= 1, got 0"):
        methods.FlowCut(keep=0)
    with pytest.raises(ValueError, match="FlowCut: the encoder must have 2 layers or more, got 1"):
        methods.FlowCut().cuts_after(0)
    model, made = make("onevision_video", torch.float32)
    with (
        compressed(model, methods.FlowCut(keep=0.5)),
        pytest.raises(ValueError, match="frames of this model are made smaller behind the encoder"),
    ):
        model(**made)
    assert isinstance(methods.FlowCut(), EncoderMethod)
    assert not isinstance(methods.DivPrune(), EncoderMethod)


@torch.no_grad()
def test_with_a_method_on_the_cache() -> None:
    """What left the encoder is all the cache gets to see."""
    model, made = make("llava", torch.float32)
    with tokencomp.compress(model, methods.FlowCut(keep=4), methods.SnapKV(budget=64)) as handle:
        model.generate(**made, max_new_tokens=2, do_sample=False)
        report = handle.report()
    assert report.kept == 8
    text = made["input_ids"].shape[1] - 16
    assert {n for row in report.cache.layers[0].tokens for n in row} == {text + 4 + 1}
