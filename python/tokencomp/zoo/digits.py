"""Canvases of real handwritten digits for the zoo's two vision models, and questions about them.

The digits are scikit-learn's 1797 scans of 8 x 8 pixels, read once, enlarged by bicubic interpolation to
32 x 32 with a border of 4, and split by image: ``train`` (1347) and ``held_out`` (450) share none. Everything
after that is a pure function of a ``torch.Generator``: where a digit lies, how it is turned, tinted and
hidden in noise. Lengths on a canvas are pixels, pixels are normalized to [-1, 1].

digits-vit sees one digit of 24 to 32 pixels anywhere on a 64 x 64 canvas, among pieces of other digits.
digits-vlm sees 1 to 6 digits in a 3 x 3 grid of cells of 32 x 32 pixels and answers with one token.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, pad

SPLITS = ("train", "held_out")
TRAIN_IMAGES = 1347  # of 1797
SPLIT_SEED = 0
GLYPH, BORDER = 32, 4
CLASSES = 10

VIT_SIDE = 64
CLUTTER, CLUTTER_HALF = 8, 5.5
CELL = 32
VLM_CELLS = 3  # a side
VLM_SIDE = VLM_CELLS * CELL
EMPTY = 10  # what a cell without a digit holds

IMAGE_TOKENS = 144
KINDS = ("cell", "count", "is", "largest")
TRAINING_KINDS = ("row", "col")  # asked in training only: they make "is" learnable
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
ASKED = ("digit", "at", "row", "col", "how", "many", "digits", "is", "there", "a", "largest", "?")
VOCABULARY = (*SPECIAL, *"0123456789", *ASKED, "empty", "yes", "no")
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
ZERO = TOKEN["0"]
WORDS = {
    "cell": "digit at row 0 col 0 ?",
    "count": "how many digits ?",
    "is": "is there a 0 ?",
    "largest": "largest digit ?",
    "row": "a 0 at row ?",
    "col": "a 0 at col ?",
}


@dataclass(frozen=True)
class Bank:
    """The digits of one split."""

    glyphs: Tensor  # [M, 1, 40, 40] float32 in [0, 1]
    labels: Tensor  # [M] int64
    images: Tensor  # [M] int64, which of scikit-learn's images


@dataclass(frozen=True)
class Scene:
    """Canvases with one digit each, and where it lies."""

    pixels: Tensor  # [B, 3, 64, 64] float32 in [-1, 1]
    labels: Tensor  # [B] int64
    centre: Tensor  # [B, 2] x and y, pixels
    size: Tensor  # [B] side, pixels


@dataclass(frozen=True)
class VlmBatch:
    """One question of one kind for each canvas; all prompts of a kind are equally long."""

    pixels: Tensor  # [B, 3, 96, 96] float32 in [-1, 1]
    cells: Tensor  # [B, 9] int64: the digit in each cell in reading order, or EMPTY
    prompts: Tensor  # [B, 1 + 144 + question] int64: <bos>, the image's placeholders, the question
    answers: Tensor  # [B] int64, the token that answers


@cache
def bank(split: str) -> Bank:
    """The digits of ``split``, ``train`` or ``held_out``.

    Raises ValueError for another split and ImportError without scikit-learn (extra ``demo``).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"digits need scikit-learn: pip install 'tokencomp[demo]' ({error})") from error
    data = load_digits()
    order = torch.randperm(len(data.images), generator=Generator().manual_seed(SPLIT_SEED))
    chosen = order[:TRAIN_IMAGES] if split == "train" else order[TRAIN_IMAGES:]
    small = torch.from_numpy(data.images).float()[chosen, None] / 16
    large = interpolate(small, size=(GLYPH, GLYPH), mode="bicubic", align_corners=False).clamp(0, 1)
    return Bank(pad(large, (BORDER,) * 4), torch.from_numpy(data.target).long()[chosen], chosen)


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Float32 numbers of ``shape``, uniform in [low, high)."""
    return torch.rand(*shape, generator=generator) * (high - low) + low


def place(glyphs: Tensor, size: Tensor, centre: Tensor, side: int, generator: Generator) -> Tensor:
    """Draws each glyph on its own canvas, slightly turned, sheared and stretched.

    Args:
        glyphs: ``[N, 1, 40, 40]``.
        size: ``[N]`` width in pixels of the inner 32 x 32.
        centre: ``[N, 2]`` x and y in pixels.
        side: of the canvas, pixels.
        generator: rotation ±0.2 rad, shear ±0.15, aspect 0.9 to 1.1 come from it.

    Returns:
        ``[N, 1, side, side]`` in [0, 1].
    """
    count = len(glyphs)
    angle, shear = uniform(generator, -0.2, 0.2, count), uniform(generator, -0.15, 0.15, count)
    aspect = uniform(generator, 0.9, 1.1, count)
    zoom = side / (size * (GLYPH + 2 * BORDER) / GLYPH)
    cos, sin = torch.cos(angle), torch.sin(angle)
    top, bottom = torch.stack([cos * aspect, shear - sin], -1), torch.stack([sin, cos / aspect], -1)
    linear = torch.stack([top, bottom], 1) * zoom.view(-1, 1, 1)
    shift = -(linear @ (centre / side * 2 - 1)[:, :, None])
    grid = affine_grid(torch.cat([linear, shift], 2), [count, 1, side, side], align_corners=False)
    return grid_sample(glyphs, grid, align_corners=False)


def _tints(count: int, generator: Generator) -> Tensor:
    return uniform(generator, 0.5, 1.0, count, 3, 1, 1)


def _finish(image: Tensor, noise: float, generator: Generator) -> Tensor:
    """Adds grey Gaussian noise and normalizes ``[B, 3, H, W]`` from [0, 1] to [-1, 1]."""
    count, _, height, width = image.shape
    image = image + noise * torch.randn(count, 1, height, width, generator=generator)
    return (image.clamp(0, 1) - 0.5) / 0.5


def vit_scenes(
    digits: Bank, count: int, generator: Generator, clutter: int = CLUTTER, spread: float = 1.0
) -> Scene:
    """``count`` canvases of one digit and ``clutter`` pieces (11 x 11 pixels) of others outside its box.

    ``spread`` in [0, 1] scales the digit's distance from the middle: 1 is anywhere, 0 the middle.
    """
    chosen = torch.randint(len(digits.labels), (count,), generator=generator)
    size = uniform(generator, 24, 32, count)
    free = VIT_SIDE - size[:, None]
    centre = size[:, None] / 2 + uniform(generator, 0, 1, count, 2) * free
    centre = VIT_SIDE / 2 + spread * (centre - VIT_SIDE / 2)
    digit = place(digits.glyphs[chosen], size, centre, VIT_SIDE, generator) * _tints(count, generator)
    if clutter:
        pieces = count * clutter
        donors = torch.randint(len(digits.labels), (pieces,), generator=generator)
        where = uniform(generator, 0, VIT_SIDE, pieces, 2)
        shown = where + uniform(generator, -7, 7, pieces, 2)  # which piece of the donor shows
        drawn = place(digits.glyphs[donors], uniform(generator, 24, 32, pieces), shown, VIT_SIDE, generator)
        drawn = drawn * _box(where, torch.full((pieces,), CLUTTER_HALF)) * _tints(pieces, generator)
        fragments = drawn.view(count, clutter, 3, VIT_SIDE, VIT_SIDE).amax(1)
        digit = torch.maximum(digit, fragments * ~_box(centre, size / 2 - 1))
    return Scene(_finish(digit, 0.08, generator), digits.labels[chosen], centre, size)


def _box(centre: Tensor, half: Tensor) -> Tensor:
    """``[N, 1, 64, 64]`` bool: pixels closer than ``half`` to ``centre`` in x and in y."""
    pixel = torch.arange(VIT_SIDE) + 0.5
    near = (pixel - centre[:, :, None]).abs() < half[:, None, None]
    return near[:, 0, None, None, :] & near[:, 1, None, :, None]


def vit_canvases(
    count: int, generator: Generator, split: str = "held_out", clutter: int = CLUTTER
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of digits-vit: pixels ``[B, 3, 64, 64]`` float32, label ``[B]`` int64."""
    scene = vit_scenes(bank(split), count, generator, clutter)
    return scene.pixels, scene.labels


def grid_canvases(
    digits: Bank,
    count: int,
    generator: Generator,
    *,
    side: int = VLM_CELLS,
    fewest: int = 1,
    most: int = 6,
    jitter: float = 2.5,
) -> tuple[Tensor, Tensor]:
    """Canvases of ``side`` x ``side`` cells of 32 pixels, ``fewest`` to ``most`` of them with a digit.

    A digit is 24 to 30 pixels wide and at most ``jitter`` pixels off its cell's centre in x and y.

    Returns:
        Pixels ``[count, 3, 32 * side, 32 * side]`` and cells ``[count, side * side]``, see ``VlmBatch``.
    """
    cells = side * side
    tiles = count * cells
    chosen = torch.randint(len(digits.labels), (tiles,), generator=generator)
    number = torch.randint(fewest, most + 1, (count, 1), generator=generator)
    held = torch.rand(count, cells, generator=generator).argsort(1).argsort(1) < number
    size = uniform(generator, 24, 30, tiles)
    centre = CELL / 2 + uniform(generator, -jitter, jitter, tiles, 2)
    drawn = place(digits.glyphs[chosen], size, centre, CELL, generator) * _tints(tiles, generator)
    drawn = drawn * held.view(tiles, 1, 1, 1)
    image = drawn.view(count, side, side, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    pixels = _finish(image.reshape(count, 3, side * CELL, side * CELL), 0.06, generator)
    return pixels, torch.where(held, digits.labels[chosen].view(count, cells), EMPTY)


def vlm_canvases(count: int, generator: Generator, split: str = "held_out") -> tuple[Tensor, Tensor]:
    """Images of digits-vlm: pixels ``[B, 3, 96, 96]`` float32 and cells ``[B, 9]`` int64."""
    return grid_canvases(bank(split), count, generator)


def ask(cells: Tensor, kind: str, generator: Generator) -> tuple[Tensor, Tensor]:
    """One question of ``kind`` about each canvas.

    Args:
        cells: ``[B, 9]``, at least one digit, one empty cell and one absent digit in each row.
        kind: ``cell`` (of a cell with a digit in 70 %), ``count``, ``is`` (yes in 50 %), ``largest``, or the
            training-only ``row`` and ``col`` of a digit's first occurrence in reading order.
        generator: which cell or digit is asked for.

    Returns:
        Questions ``[B, L]`` and answers ``[B]``, both token ids; ``L`` depends on ``kind`` alone.
    """
    if kind not in WORDS:
        raise ValueError(f"kind must be one of {', '.join(WORDS)}, got {kind!r}")
    count, held = len(cells), cells != EMPTY
    question = torch.tensor([TOKEN[word] for word in WORDS[kind].split()]).repeat(count, 1)
    if kind == "count":
        return question, ZERO + held.sum(1)
    if kind == "largest":
        return question, ZERO + torch.where(held, cells, -1).amax(1)
    if kind == "is":
        present = torch.zeros(count, EMPTY + 1, dtype=torch.bool).scatter_(1, cells, True)[:, :EMPTY]
        yes = torch.rand(count, generator=generator) < 0.5
        digit = _pick(torch.where(yes[:, None], present, ~present), generator)
        question[:, 3] += digit
        return question, torch.where(yes, TOKEN["yes"], TOKEN["no"])
    if kind == "cell":
        full = torch.rand(count, generator=generator) < 0.7
        cell = _pick(torch.where(full[:, None], held, ~held), generator)
        question[:, 3] += cell // VLM_CELLS + 1
        question[:, 5] += cell % VLM_CELLS + 1
        value = cells.gather(1, cell[:, None])[:, 0]
        return question, torch.where(value == EMPTY, TOKEN["empty"], ZERO + value)
    digit = cells.gather(1, _pick(held, generator)[:, None])
    first = (cells == digit).int().argmax(1)
    question[:, 1] += digit[:, 0]
    return question, ZERO + 1 + (first // VLM_CELLS if kind == "row" else first % VLM_CELLS)


def _pick(allowed: Tensor, generator: Generator) -> Tensor:
    """``[B]``: one of the true places of each row of ``[B, M]``, all equally likely."""
    return torch.multinomial(allowed.float(), 1, generator=generator)[:, 0]


def vlm_batch(kind: str, count: int, generator: Generator, split: str = "held_out") -> VlmBatch:
    """Inputs of digits-vlm: ``count`` canvases of ``split`` with one question of ``kind`` each."""
    pixels, cells = vlm_canvases(count, generator, split)
    question, answers = ask(cells, kind, generator)
    begin = torch.full((count, 1), TOKEN["<bos>"])
    image = torch.full((count, IMAGE_TOKENS), TOKEN["<image>"])
    return VlmBatch(pixels, cells, torch.cat([begin, image, question], 1), answers)


@torch.no_grad()
def vlm_matches(model: Any, batch: VlmBatch) -> Tensor:
    """``[B]`` bool: greedy decoding of the stock model gives the answer and then ``<eos>``, nothing else."""
    ids = torch.cat([batch.prompts, batch.answers[:, None]], 1)
    said = model(input_ids=ids, pixel_values=batch.pixels, logits_to_keep=2).logits.argmax(-1)
    right: Tensor = (said[:, 0] == batch.answers) & (said[:, 1] == TOKEN["<eos>"])
    return right


def vlm_exact_match(model: Any, kind: str, samples: int, seed: int, batch: int = 64) -> float:
    """Share of ``samples`` held-out canvases for which the question of ``kind`` is answered exactly."""
    generator, right = Generator().manual_seed(seed), 0
    for start in range(0, samples, batch):
        made = vlm_batch(kind, min(batch, samples - start), generator)
        right += int(vlm_matches(model, made).sum())
    return right / samples


@torch.no_grad()
def vit_accuracy(model: Any, samples: int, seed: int, batch: int = 64) -> float:
    """Share of ``samples`` held-out canvases whose digit the stock classifier names."""
    generator, right = Generator().manual_seed(seed), 0
    for start in range(0, samples, batch):
        pixels, labels = vit_canvases(min(batch, samples - start), generator)
        right += int((model(pixel_values=pixels).logits.argmax(-1) == labels).sum())
    return right / samples
