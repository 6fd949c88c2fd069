"""A picture of what each token of a prompt receives, layer by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-4  # attention below a ten-thousandth is drawn as that
DPI = 150


def shares(layers: Sequence[Tensor]) -> Tensor:
    """``[layers, S]`` float32: what share of a layer's attention each key of the first sequence receives.

    With row weights 1 early keys lead under causality, because more rows see them; weights of the last rows,
    ``tokencomp.scores.window_weights``, show what these look at.

    Args:
        layers: column sums of one forward, ``[B, H, S]`` a layer, all of the same S.
    """
    if not layers:
        raise ValueError("shares: there must be at least one layer, got none")
    columns = torch.stack([layer[0].float().mean(0) for layer in layers])
    return columns / columns.sum(1, keepdim=True)


def importance_map(
    layers: Sequence[Tensor],
    path: str | Path,
    *,
    marks: Sequence[tuple[int, str]] = (),
    title: str | None = None,
) -> Path:
    """Draw ``shares(layers)`` as a heat map, layers by tokens, logarithmic; write it to ``path``.

    Args:
        layers: as for ``received``, e.g. ``scores.last`` of ``attention_scores``.
        path: of the picture; the ending decides the format.
        marks: places among the tokens to name below the map.
        title: above the map.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layers.
    """
    values = shares(layers).clamp(min=FLOOR).cpu().numpy()
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("importance_map needs matplotlib: pip install tokencomp[eval]") from error

    # Figure without pyplot: no display is asked for and no state of the caller's changes
    figure: Any = Figure(figsize=(9, 1.2 + 0.32 * len(values)), layout="constrained")
    axes = figure.subplots()
    count, tokens = values.shape
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        norm=LogNorm(FLOOR, max(float(values.max()), 10 * FLOOR)),
        extent=(-0.5, tokens - 0.5, count - 0.5, -0.5),
    )
    axes.set(xlabel="token", ylabel="layer", yticks=range(count))
    for place, text in marks:
        axes.axvline(place, color="white", linewidth=0.6, alpha=0.7)
        axes.annotate(
            text, (place, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7
        )
    if title is not None:
        axes.set_title(title, fontsize=10, pad=22 if marks else 6)
    figure.colorbar(image, ax=axes, label="share of attention", pad=0.01)
    figure.savefig(path, dpi=DPI)
    return Path(path)
