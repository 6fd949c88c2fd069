"""The adapters on the trained digit classifier, and what is counted and drawn of a pass."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokencomp
import torch
from encoders import BY_NAME, OldAttention, VisionTransformer, hf
from layer_methods import Drop, Duplicates, Nothing, Pairs
from tokencomp import adapters, merged, token_map, zoo
from tokencomp.visual import ALONE, MERGED, visualize
from tokencomp.zoo import digits
from torch.utils.flop_counter import FlopCounterMode

assert hf  # the models are Hugging Face's
SAMPLES = 192


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.load("digits-vit")[0]


@pytest.fixture(scope="module")
def canvases() -> Any:
    return digits.vit_canvases(SAMPLES, torch.Generator().manual_seed(11))


def accuracy(model: Any, canvases: Any, method: Any) -> tuple[float, tuple[int, ...]]:
    pixels, labels = canvases
    torch.manual_seed(0)
    with tokencomp.compress(model, method) as handle:
        right = (model(pixel_values=pixels).logits.argmax(-1) == labels).float().mean()
        return float(right), handle.report().tokens


def test_merging_similar_pairs_costs_little_and_beats_dropping(model: Any, canvases: Any) -> None:
    """A third of the encoder's work less: pairs lose at most 3 points; as many dropped tokens lose more."""
    whole, tokens = accuracy(model, canvases, Nothing())
    pairs, left = accuracy(model, canvases, Pairs(40))
    dropped, as_many = accuracy(model, canvases, Drop(40))
    assert left == as_many == (257, 217, 177, 137, 97)
    assert adapters.encoder_flops(model, left) < 0.67 * adapters.encoder_flops(model, tokens)
    assert whole - pairs <= 0.03
    assert pairs - dropped >= 0.01


def test_nothing_reduced_is_the_trained_model(model: Any, canvases: Any) -> None:
    pixels = canvases[0][:8]
    before = model(pixel_values=pixels).logits
    with tokencomp.compress(model, Nothing()):
        assert torch.equal(model(pixel_values=pixels).logits, before)
    with tokencomp.compress(model, Pairs(0)) as handle:
        assert torch.equal(model(pixel_values=pixels).logits, before)
        report = handle.report()
        assert str(report) == f"Pairs on {report.family} (sdpa): tokens 257 257 257 257 257"
        assert report.family in ("vit", "vit-nested")  # the latter with transformers 5.4


# ---- operations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vit-model", "dinov2-swiglu", "dinov3", "clip-vision", "bert", "distilbert", "timm"]
)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    encoder = BY_NAME[name]
    model, inputs = encoder.model(), encoder.inputs(3)
    if name == "timm":  # with attention by matrix products: not every fused one is counted
        model = VisionTransformer(attention=OldAttention)
    else:
        model.set_attn_implementation("eager")
    counted = []
    for r in (5, 0):
        with tokencomp.compress(model, Drop(r)) as handle:
            with FlopCounterMode(display=False) as counter:
                encoder.run(model, inputs)
            tokens = handle.report().tokens
        outside = counter.get_total_flops() - 3 * adapters.encoder_flops(model, tokens)
        counted.append((outside, counter.get_total_flops()))
    # patch embedding and heads are not the encoder's; they are the same for any number of tokens
    assert counted[0][0] == counted[1][0]
    assert 0 <= counted[0][0] < 0.2 * counted[0][1] < 0.2 * counted[1][1]
    with pytest.raises(ValueError, match=r"must hold L \+ 1 = 5 numbers, got 2"):
        adapters.encoder_flops(model, (37, 33))


# ---- tokens that stand for several ------------------------------------------------------------------------


def test_rotation_is_the_mean_angle() -> None:
    angle = torch.tensor([[0.2, 1.0], [0.6, 1.0], [3.0, -2.0], [0.1, 0.1]])
    source = torch.tensor([[0, 1, 1, 2, -1], [0, 1, 2, 2, 2]], dtype=torch.int32)
    cos, sin = merged.merge_rotation(angle.cos(), angle.sin(), source, 3, 1)
    assert cos.shape == (2, 1, 2, 2)
    found = torch.atan2(sin, cos)[:, 0]
    torch.testing.assert_close(found[0], torch.tensor([[0.4, 1.0], [3.0, -2.0]]))
    torch.testing.assert_close(found[1, 0], angle[0])
    opposite = torch.tensor([[0.0], [torch.pi]])
    both = torch.zeros(1, 2, dtype=torch.int32)
    cos, sin = merged.merge_rotation(opposite.cos(), opposite.sin(), both, 1, 0)
    assert (cos.item(), sin.item()) == (1.0, 0.0)  # no direction: not rotated, and not NaN


def test_rows_weighted_for_a_plain_mean() -> None:
    x, size = torch.randn(2, 5, 3), torch.tensor([[1.0, 4.0, 1.0, 2.5, 1.0]] * 2)
    expected = (x[:, 1:] * size[:, 1:, None]).sum(1) / size[:, 1:].sum(1, keepdim=True)
    rows = merged.weigh_rows(x, size, 1)
    torch.testing.assert_close(rows[:, 1:].mean(1), expected)
    assert torch.equal(rows[:, 0], x[:, 0])


def test_key_bias_and_masks() -> None:
    assert merged.key_bias(None, None) is None
    size = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False]])
    low = torch.finfo(torch.float32).min
    assert merged.key_bias(size, mask).tolist() == [[[[0.0, float(torch.tensor(2.0).log()), low]]]]
    assert merged.key_bias(None, mask).tolist() == [[[[0.0, 0.0, low]]]]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert merged.as_bias(merged.key_bias(size, mask), dtype).isfinite().all()
    maps = torch.tensor([[0, 0, 1, 2, -1]], dtype=torch.int32)
    kept = torch.tensor([[True, False, False, True, True]])
    assert merged.merge_mask(kept, maps, 4).tolist() == [[True, False, True, False]]


# ---- pictures ---------------------------------------------------------------------------------------------


def test_picture_of_groups(tmp_path: Path) -> None:
    """Patches 1 and 2 are one group, 3 is alone, 4 is dropped."""
    image = torch.rand(3, 8, 8)
    groups = torch.tensor([0, 1, 1, 2, -1])
    picture = visualize(image, groups, (2, 2), path=tmp_path / "picture.png")
    assert picture.shape == (32, 32, 3)
    shown = picture.permute(2, 0, 1).float() / 255
    mean = image[:, :4].mean((1, 2))
    for centre in ((8, 8), (8, 24)):
        torch.testing.assert_close(shown[:, centre[0], centre[1]], mean, atol=0.003, rtol=0)
    assert torch.equal(picture[8, 15], picture[8, 16])  # no border inside a group
    assert (shown[:, 0, 8] == torch.tensor(MERGED).mul(255).round() / 255).all()
    assert (shown[:, 31, 8] == torch.tensor(ALONE).mul(255).round() / 255).all()
    torch.testing.assert_close(shown[:, 24, 8], image[:, 6, 2], atol=0.003, rtol=0)
    torch.testing.assert_close(shown[:, 28, 20], image[:, 7, 5] * 0.25, atol=0.003, rtol=0)
    from PIL import Image

    assert Image.open(tmp_path / "picture.png").size == (32, 32)


def test_picture_takes_bytes_and_centred_floats() -> None:
    image, groups = torch.rand(3, 32, 32), token_map.identity(1, 5)[0]
    plain = visualize(image, groups, (2, 2)).int()
    for other in ((image * 255).round().to(torch.uint8), image * 2 - 1):
        assert (visualize(other, groups, (2, 2)).int() - plain).abs().max() <= 1
    assert visualize(image[:1], groups[:4], (2, 2), prefix=0).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("image", "tokens", "grid", "message"),
    [
        ((3, 8, 8), 5, (3, 2), "rows \\* columns = 7 numbers"),
        ((3, 8, 8), 7, (3, 2), "multiples of the grid 3 x 2"),
        ((8, 8), 5, (2, 2), r"must be \[3, H, W\]"),
    ],
)
def test_picture_refuses(image: Any, tokens: int, grid: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize(torch.rand(image), torch.arange(tokens), grid)


def test_picture_of_a_pass(model: Any, canvases: Any) -> None:
    with tokencomp.compress(model, Duplicates(0)) as handle:
        model(pixel_values=canvases[0][:1])
        report = handle.report()
    picture = visualize(canvases[0][0], report.token_map[0], report.grid, prefix=report.prefix)
    assert picture.shape == (256, 256, 3)
