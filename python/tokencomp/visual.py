"""A picture of what was merged with what."""

from pathlib import Path

import torch
from torch import Tensor

MIN_CELL = 16  # pixels a side at which the border of a patch can be seen
DROPPED = 0.25  # what is left of the light of a dropped patch
ALONE, MERGED = (0.22, 0.22, 0.22), (1.0, 0.82, 0.1)  # colours of borders


def visualize(
    image: Tensor,
    token_map: Tensor,
    grid: tuple[int, int],
    *,
    prefix: int = 1,
    path: str | Path | None = None,
) -> Tensor:
    """Paint groups of patches with their mean colour and draw the borders between groups.

    Borders of groups of several patches are yellow. Patches that are alone show their own pixels and a faint
    border. Groups need not be connected; parts of one group show by their equal colour. Dropped patches are
    darkened and crossed out.

    Args:
        image: ``[3, H, W]`` or ``[1, H, W]``: uint8, or floats in [0, 1] (or in [-1, 1] where one is
            negative).
        token_map: ``[N]`` integers with N = prefix + rows * columns: the group of each token, -1 where it was
            dropped. ``handle.report().token_map[b]``.
        grid: rows and columns of patches; H and W are multiples of them. ``handle.report().grid``.
        prefix: tokens before the patches.
        path: where to write a PNG (needs pillow); the folder must exist.

    Returns:
        ``[h, w, 3]`` uint8, a whole multiple of the image, at least 16 pixels a patch.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    rows, columns = grid
    pixels = _unit_range(image)
    if token_map.dim() != 1 or token_map.shape[0] != prefix + rows * columns:
        raise ValueError(
            f"visualize: token_map must hold prefix + rows * columns = {prefix + rows * columns} numbers "
            f"of one image, got {list(token_map.shape)}"
        )
    if pixels.shape[1] % rows or pixels.shape[2] % columns:
        raise ValueError(
            f"visualize: image sides must be multiples of the grid {rows} x {columns}, "
            f"got {list(image.shape)}"
        )
    groups = token_map[prefix:].long().cpu().view(rows, columns)
    high, wide = pixels.shape[1] // rows, pixels.shape[2] // columns
    zoom = max(1, -(-MIN_CELL // min(high, wide)))
    painted = _paint(pixels, groups, high, wide)
    painted = painted.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    _draw_borders(painted, groups, high * zoom, wide * zoom)
    picture = (painted.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    if path is not None:
        _write(picture, path)
    return picture


def _unit_range(image: Tensor) -> Tensor:
    """``[3, H, W]`` float32 in [0, 1] on the CPU."""
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"visualize: image must be [3, H, W] or [1, H, W], got {list(image.shape)}")
    pixels = image.detach().cpu().float()
    if image.dtype == torch.uint8:
        pixels = pixels / 255
    elif bool((pixels < 0).any()):
        pixels = (pixels + 1) / 2
    return pixels.expand(3, -1, -1).clamp(0, 1)


def _paint(pixels: Tensor, groups: Tensor, high: int, wide: int) -> Tensor:
    """The image with each group of several patches in its mean colour."""
    number = int(groups.max()) + 1
    flat = torch.where(groups < 0, number, groups).flatten()
    cells = pixels.unfold(1, high, high).unfold(2, wide, wide).mean(dim=(3, 4)).flatten(1)
    count = torch.bincount(flat, minlength=number + 1)
    mean = torch.zeros(3, number + 1).index_add(1, flat, cells) / count.clamp(min=1)

    def spread(patches: Tensor) -> Tensor:
        return patches.repeat_interleave(high, -2).repeat_interleave(wide, -1)

    colours = spread(mean[:, flat].view(3, *groups.shape))
    painted = torch.where(spread((count[flat] > 1).view(groups.shape)), colours, pixels)
    return torch.where(spread(groups < 0), pixels * DROPPED, painted)


def _draw_borders(painted: Tensor, groups: Tensor, high: int, wide: int) -> None:
    """Lines between patches of different groups, and a diagonal through dropped ones, in place."""
    count = torch.bincount(groups.clamp(min=0).flatten())
    several = (groups >= 0) & (count[groups.clamp(min=0)] > 1)
    for row, column in ((r, c) for r in range(groups.shape[0]) for c in range(groups.shape[1])):
        top, left = row * high, column * wide
        cell = painted[:, top : top + high, left : left + wide]
        colour = torch.tensor(MERGED if several[row, column] else ALONE)[:, None]
        group = groups[row, column]
        if group < 0:
            steps = torch.arange(min(high, wide))
            cell[:, steps * high // len(steps), steps * wide // len(steps)] = colour
        beside = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
        for edge, (r, c) in enumerate(beside):
            inside = 0 <= r < groups.shape[0] and 0 <= c < groups.shape[1]
            if inside and group >= 0 and groups[r, c] == group:
                continue
            line = (cell[:, 0], cell[:, -1], cell[:, :, 0], cell[:, :, -1])[edge]
            line[:] = colour


def _write(picture: Tensor, path: str | Path) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"visualize needs pillow: pip install 'tokencomp[demo]' ({error})") from error
    Image.fromarray(picture.numpy()).save(path)
