"""The demo: keep a tenth of the patches of two photographs, by k-center, at random, and on a uniform grid.

Then the models that ship: ``demo_models``.

A patch of 16 x 16 pixels is a token. Its features are the low frequencies of its colours: the 2-D cosine
transform of luma around mid-grey (8 x 8 coefficients) and, twice as heavy, of red and blue against luma (4 x
4 each), and a constant that keeps nearly grey patches alike: 97 channels. The pictures show what is kept, the
image rebuilt by putting in every place the kept patch most like it, and outlined in red the patch that is
represented worst: the radius.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp import ops
from tokencomp.reference import grid_keep
from tokencomp.reference.kcenter_plain import plain_loop

PATCH = 16
LUMA, CHROMA = 8, 4  # side of the kept corner of the cosine transform
CHROMA_WEIGHT, CONSTANT = 2.0, 0.25
RANDOM_DRAWS = 20
REPEATS = 15
DIMMED = 0.16
MARGIN, CAPTION = 12, 46


@dataclass(frozen=True)
class Photo:
    """One photograph, cropped to whole patches."""

    name: str
    pixels: Tensor  # [rows * PATCH, columns * PATCH, 3] float32 in [0, 1]

    @property
    def grid(self) -> tuple[int, int]:
        return self.pixels.shape[0] // PATCH, self.pixels.shape[1] // PATCH

    def patches(self) -> Tensor:
        """``[N, PATCH, PATCH, 3]`` in raster order."""
        rows, columns = self.grid
        tiles = self.pixels.reshape(rows, PATCH, columns, PATCH, 3).transpose(1, 2)
        return tiles.reshape(rows * columns, PATCH, PATCH, 3)

    def tokens(self) -> Tensor:
        """``[1, N, 97]`` float32, see the module's docstring."""
        red, green, blue = self.patches().unbind(-1)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        features = [_cosine_transform(luma - 0.5, LUMA)]
        features += [CHROMA_WEIGHT * _cosine_transform(channel - luma, CHROMA) for channel in (red, blue)]
        features += [torch.full((len(luma), 1), CONSTANT)]
        return torch.cat(features, dim=-1)[None]


def _cosine_transform(tiles: Tensor, side: int) -> Tensor:
    """Lowest ``side`` x ``side`` DCT-II coefficients of ``[N, PATCH, PATCH]``; the first is the mean."""
    position, frequency = torch.arange(PATCH), torch.arange(side)[:, None]
    basis = torch.cos(math.pi / PATCH * (position + 0.5) * frequency) * math.sqrt(2) / PATCH
    basis[0] /= math.sqrt(2)
    return (basis @ tiles @ basis.T).flatten(1)


def photos() -> list[Photo]:
    """The two photographs that come with scikit-learn."""
    found = []
    data = load_sample_images()
    for name, image in zip(data.filenames, data.images, strict=True):
        pixels = torch.from_numpy(image.copy()).float() / 255
        height, width = (side - side % PATCH for side in pixels.shape[:2])
        found.append(Photo(Path(name).stem, pixels[:height, :width]))
    return found


@dataclass(frozen=True)
class Quality:
    """How well kept tokens stand for all: over tokens, the distance ``1 - cos`` to the nearest kept one."""

    radius: float  # largest distance
    similarity: float  # mean cosine


def quality(x: Tensor, kept: Tensor) -> Quality:
    """How the tokens ``kept`` ``[K]`` stand for those of ``x`` ``[1, N, C]``."""
    nearest = _similarity(x, kept).amax(1)
    return Quality(1 - nearest.min().item(), nearest.mean().item())


def _similarity(x: Tensor, kept: Tensor) -> Tensor:
    unit = normalize(x[0], dim=-1)
    return unit @ unit[kept].T


def median_ms(*calls: Callable[[], object]) -> list[float]:
    """Median milliseconds of each call, taking turns, so that a busy moment hits all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS + 1):
        for call, own in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            own.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(own[1:]) for own in times]


@dataclass(frozen=True)
class Shown:
    """What is said of one photograph."""

    name: str
    tokens: int
    kept: int
    channels: int
    quality: dict[str, list[Quality]]  # by selection: of each draw
    ms: float  # of the selection by k-center
    loop_ms: float  # of the same as a loop in PyTorch
    picture: Path


def run(keep: float, out: Path, as_json: bool = False) -> int:
    """Print one table per photograph, or all as JSON, and write one picture each into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    if not as_json:
        print(f"Tokens: patches of {PATCH} x {PATCH} pixels; {keep:.0%} are kept. Radius: the largest")
        print(
            f"1 - cos of any token to the nearest kept one. Times: median of {REPEATS}, {threads} threads.\n"
        )
    shown = []
    for photo in photos():
        shown.append(_show(photo, keep, out))
        if not as_json:
            _print_table(shown[-1])
    tables: list[object] = []
    try:
        from tokencomp import demo_models

        tables = demo_models.run(quiet=as_json)
    except ImportError as error:
        print(f"models that ship: not shown, {error}", file=sys.stderr)
    if as_json:
        pictures = [{**asdict(photo), "picture": str(photo.picture)} for photo in shown]
        print(json.dumps({"keep": keep, "threads": threads, "photos": pictures, "models": tables}, indent=1))
    return 0


def _show(photo: Photo, keep: float, out: Path) -> Shown:
    x = photo.tokens()
    n, k = x.shape[1], max(1, round(keep * x.shape[1]))
    picks = ops.kcenter_greedy(x, k)[0][0].long()
    draws = [torch.randperm(n, generator=torch.Generator().manual_seed(i))[:k] for i in range(RANDOM_DRAWS)]
    chosen = {"k-center": picks, "random": draws[0], "uniform grid": grid_keep(*photo.grid, k)}
    measured = {name: [quality(x, kept)] for name, kept in chosen.items()}
    measured["random"] = [quality(x, kept) for kept in draws]
    path = out / f"demo_{photo.name}.png"
    draw(photo, x, chosen, measured).save(path)
    ours, loop = median_ms(lambda: ops.kcenter_greedy(x, k), lambda: plain_loop(x, k))
    return Shown(photo.name, n, k, x.shape[2], measured, ours, loop, path)


def _print_table(shown: Shown) -> None:
    faster = f"{shown.loop_ms / shown.ms:.1f} x faster than the PyTorch loop ({shown.loop_ms:.2f} ms)"
    times = {"k-center": f"{shown.ms:9.3f} ms   {faster}"}
    print(f"{shown.name}: {shown.kept} of {shown.tokens} tokens, {shown.channels} channels")
    print(f"  {'selection':24}{'radius':>8}{'mean cosine':>13}{'time':>12}")
    for selection, results in shown.quality.items():
        label = selection if len(results) == 1 else f"{selection} (mean of {len(results)})"
        radius = statistics.fmean(result.radius for result in results)
        similarity = statistics.fmean(result.similarity for result in results)
        print(f"  {label:24}{radius:8.3f}{similarity:13.3f}{times.get(selection, ''):>12}")
    print(f"  picture: {shown.picture}\n")


def draw(
    photo: Photo, x: Tensor, chosen: dict[str, Tensor], measured: dict[str, list[Quality]]
) -> Image.Image:
    """One column per selection: kept patches with the rest dimmed, and the image rebuilt from them."""
    height, width, _ = photo.pixels.shape
    columns, panel = len(chosen), (height + MARGIN)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, CAPTION + 2 * panel + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=22)
    patches = photo.patches()
    for column, (name, kept) in enumerate(chosen.items()):
        left = MARGIN + column * (width + MARGIN)
        first = measured[name][0]
        numbers = f"radius {first.radius:.2f}, mean cosine {first.similarity:.2f}"
        caption = f"{name}: {len(kept)} of {len(patches)}, {numbers}"
        pen.text((left, MARGIN), caption, fill="black", font=font)
        bright = torch.full((len(patches), 1, 1, 1), DIMMED)
        bright[kept] = 1.0
        nearest = kept[_similarity(x, kept).argmax(1)]
        worst = int(_similarity(x, kept).amax(1).argmin())
        across, down = worst % photo.grid[1] * PATCH, worst // photo.grid[1] * PATCH
        for row, tiles in enumerate((patches * bright + 0.9 * (1 - bright), patches[nearest])):
            top = CAPTION + row * panel
            sheet.paste(_assembled(tiles, photo.grid), (left, top))
            corner = (left + across, top + down)
            pen.rectangle((*corner, corner[0] + PATCH, corner[1] + PATCH), outline="red", width=3)
    return sheet


def _assembled(tiles: Tensor, grid: tuple[int, int]) -> Image.Image:
    rows, columns = grid
    pixels = (
        tiles.reshape(rows, columns, PATCH, PATCH, 3)
        .transpose(1, 2)
        .reshape(rows * PATCH, columns * PATCH, 3)
    )
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
