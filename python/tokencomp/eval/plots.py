"""Pictures of a table: quality against bytes with the Pareto front, kept tokens on an image, needle depths.

Drawn without pyplot, so that no display is asked for and no state of the caller's changes. The colours are
those of Okabe and Ito, told apart without colour vision; every method has a pair of colour and marker of its
own.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokencomp.eval.compressors import BASELINES
from tokencomp.eval.table import Row, Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")
MARKERS = "osD^vP*X"
DPI = 150
DIMMED = 0.22
MANY = 9  # more lines than these cannot be told apart
ACROSS = 6  # panels in a line


def save(table: Table, folder: Path, stem: str) -> list[Path]:
    """Draws what the table has data for; returns the files."""
    figures = {"quality": quality(table)}
    if table.picture is not None and table.grid is not None:
        figures["kept"] = overlay(table)
    if table.rows[0].groups:
        figures["groups"] = heat_map(table)
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{stem}_{name}.png")
        figure.savefig(written[-1], dpi=DPI)
    return written


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def methods(table: Table, *, adaptive: bool = True) -> list[str]:
    """The methods of a table, in its order, without ``none``."""
    rows = [row for row in table.rows if row.method != "none" and (adaptive or not row.adaptive)]
    return list(dict.fromkeys(row.method for row in rows))


def budgets_of(table: Table) -> list[float]:
    """The budgets asked for, the smallest first."""
    return sorted({row.budget for row in table.rows if row.method != "none" and not row.adaptive})


def cost(row: Row) -> float:
    """What a row is paid with: KiB of cache, or tokens where there is no cache."""
    return row.tokens_kept if row.kv_bytes is None else row.kv_bytes / 1024


def pareto(table: Table) -> list[Row]:
    """Rows no other row beats in both score and cost, by rising cost."""
    sign = 1 if table.higher_is_better else -1
    front: list[Row] = []
    for row in sorted(table.rows, key=lambda row: (cost(row), -sign * row.score.mean)):
        if not front or sign * row.score.mean > sign * front[-1].score.mean:
            front.append(row)
    return front


def quality(table: Table) -> Any:
    """Score against cost, with intervals, and the Pareto front: a line a method, or a panel each where there
    are many.
    """
    names = methods(table)
    title = f"{table.model}, {table.task}: {table.samples} samples, 95 % intervals"
    if len(names) <= MANY:
        figure = _figure(7.2, 4.8)
        axes = figure.add_subplot()
        _axes(axes, table)
        for i, method in enumerate(["none", *names]):
            _line(axes, table, method, i)
        axes.set_title(title, fontsize=11, loc="left")
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.supxlabel(_cost_label(table), fontsize=10)
        figure.supylabel(table.unit, fontsize=10)
        return figure
    shown = [name for name in names if name not in BASELINES]
    panels = _grid(figure := _figure(2.1 * ACROSS, 1.75 * -(-len(shown) // ACROSS) + 0.9), len(shown))
    for axes, method in zip(panels, shown, strict=True):
        _axes(axes, table)
        for i, name in enumerate(["none", *BASELINES, method]):
            _line(axes, table, name, i)
        axes.set_title(method, fontsize=10)
        axes.tick_params(labelsize=8)
    lines, labels = panels[0].get_legend_handles_labels()
    labels[-1] = "the method"
    figure.legend(lines, labels, title=title, title_fontsize=11, fontsize=9, frameon=False,
                  loc="outside upper center", ncols=len(labels))  # fmt: skip
    figure.supxlabel(_cost_label(table), fontsize=10)
    figure.supylabel(table.unit, fontsize=10)
    return figure


def _cost_label(table: Table) -> str:
    return "image tokens kept" if table.rows[0].kv_bytes is None else "KV cache after the prompt (KiB)"


def _axes(axes: Any, table: Table) -> None:
    """The model as it is as a dotted line, and the Pareto front as a band behind."""
    axes.axhline(table.rows[0].score.mean, color="black", linewidth=0.8, linestyle=":", zorder=1)
    front = pareto(table)
    axes.plot(
        [cost(row) for row in front], [row.score.mean for row in front],
        color="#F0E442", linewidth=9, alpha=0.7, solid_capstyle="round", marker="o", markersize=13,
        markeredgewidth=0, zorder=0, label="Pareto front",
    )  # fmt: skip
    axes.set_xlim(0, 1.04 * max(cost(row) for row in table.rows))
    if table.higher_is_better:
        axes.set_ylim(-0.03, 1.03)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Any, table: Table, method: str, i: int) -> None:
    """One method with its intervals, the ``i``-th of a picture; the 0-th is ``none``."""
    rows = [row for row in table.rows if row.method == method]
    errors = [
        [max(0.0, row.score.mean - row.score.low) for row in rows],
        [max(0.0, row.score.high - row.score.mean) for row in rows],
    ]
    axes.errorbar(
        [cost(row) for row in rows], [row.score.mean for row in rows], yerr=errors, label=method, capsize=3,
        linewidth=1.4, color="black" if i == 0 else COLOURS[(i - 1) % len(COLOURS)],
        marker="*" if i == 0 else _marker(i - 1), markersize=11 if i == 0 else 6, zorder=2 + i,
    )  # fmt: skip


def _grid(figure: Any, count: int) -> list[Any]:
    """``count`` panels, ``ACROSS`` in a line, with common axes."""
    lines = -(-count // ACROSS)
    panels = list(figure.subplots(lines, ACROSS, squeeze=False, sharex=True, sharey=True).flatten())
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[max(0, count - ACROSS) : count]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    return panels[:count]


def overlay(table: Table) -> Any:
    """The first sample's image: a column a method, a row a budget, dropped tokens dimmed; many methods go on
    below.
    """
    assert table.picture is not None
    assert table.grid is not None
    image = table.picture.permute(1, 2, 0).float().cpu().numpy()
    image = (image - image.min()) / max(float(image.max() - image.min()), 1e-6)
    names, budgets = methods(table, adaptive=False), budgets_of(table)
    across = min(len(names), MANY)
    blocks = [names[first : first + across] for first in range(0, len(names), across)]
    figure = _figure(1.9 * (across + 1) + 0.4, len(blocks) * 1.95 * len(budgets) + 0.5)
    panels = figure.subplots(len(blocks) * len(budgets), across + 1, squeeze=False)
    for axes in panels.flatten():
        axes.set_axis_off()
    for line, (block, budget) in zip(panels, itertools.product(blocks, budgets), strict=True):
        top = budget == budgets[0]
        _show(line[0], image, "all tokens" if top else "")
        line[0].set_ylabel(f"budget {budget:g}", fontsize=10)
        for axes, method in zip(line[1:], block, strict=False):
            row = table.row(method, budget)
            _show(axes, _dimmed(image, row.kept_tokens, table.grid), method if top else "")
            axes.set_xlabel(f"{len(row.kept_tokens)} of {row.tokens_total:.0f}", fontsize=8)
    figure.suptitle(f"{table.model}, {table.task}: tokens kept of the first sample", fontsize=11)
    return figure


def _marker(i: int) -> str:
    """The next round of colours begins one marker on."""
    return MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]


def _show(axes: Any, image: NDArray[np.float32], title: str) -> None:
    axes.set_axis_on()
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)


def _dimmed(image: NDArray[np.float32], kept: tuple[int, ...], grid: tuple[int, int]) -> NDArray[np.float32]:
    """``image`` ``[H, W, 3]`` with the cells of ``grid`` that are not kept faded to white."""
    bright = np.zeros(grid[0] * grid[1], dtype=bool)
    bright[list(kept)] = True
    rows, columns = image.shape[0] // grid[0], image.shape[1] // grid[1]
    mask = np.kron(bright.reshape(grid), np.ones((rows, columns), dtype=bool))[..., None]
    return np.where(mask, image, DIMMED * image + (1 - DIMMED) * 0.85).astype(np.float32)


def heat_map(table: Table) -> Any:
    """Mean score by group, a line a method, a panel a budget; uppermost is the model as it is."""
    budgets, groups = budgets_of(table), list(table.rows[0].groups)
    if all(_is_number(group) for group in groups):
        groups.sort(key=float)
    names = ["none", *methods(table, adaptive=False)]
    figure = _figure(0.62 * len(groups) * len(budgets) + 2.9, 0.3 * len(names) + 1.4)
    panels = figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
    values = [list(row.groups.values()) for row in table.rows]
    low, high = (0.0, 1.0) if table.higher_is_better else (np.min(values), np.max(values))
    drawn = None
    for axes, budget in zip(panels, budgets, strict=True):
        rows = [table.rows[0], *(table.row(name, budget) for name in names[1:])]
        cells = np.array([[row.groups[group] for group in groups] for row in rows])
        drawn = axes.imshow(cells, vmin=low, vmax=high, cmap="cividis", aspect="auto")
        for (y, x), value in np.ndenumerate(cells):
            shade = (value - low) / max(high - low, 1e-9)
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8,
                      color="black" if shade > 0.5 else "white")  # fmt: skip
        axes.set_title(f"budget {budget:g}", fontsize=10)
        axes.set_xticks(range(len(groups)), groups, fontsize=9)
        axes.set_xlabel(table.group_label, fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.axhline(0.5, color="white", linewidth=2)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(drawn, ax=list(panels), fraction=0.04, pad=0.02)
    bar.set_label(table.unit, fontsize=9)
    each = table.samples / len(groups)
    figure.suptitle(f"{table.model}, {table.task}: about {each:.0f} samples a cell", fontsize=11)
    return figure


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()
