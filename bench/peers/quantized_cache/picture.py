"""The table and the picture of docs/kv_quantization.md, from what ``quantized.py`` left."""

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tokencomp.eval.plots import COLOURS, DPI
from tokencomp.eval.table import Row, Table

ROOT = Path(__file__).resolve().parents[3]
STEPS = {"uniform": "o", "mixed": "D", "peer": "s", "eviction": "x"}
TICKS = (320, 400, 512, 640, 800, 1024, 1280)
UNIFORM = ("int", "k4v2", "KIVI", "QServe", "KVTuner")


def kind(row: Row) -> str:
    """Which group of points a row belongs to."""
    if row.method.startswith("HF"):
        return "peer"
    if row.budget < 1:
        return "eviction"
    return "uniform" if row.method.startswith(UNIFORM) else "mixed"


def per_token(row: Row) -> float:
    """Bytes of the cache over tokens of the prompt."""
    assert row.kv_bytes is not None
    return row.kv_bytes / row.tokens_total


def draw(table: Table, path: Path) -> None:
    """Score against bytes a token of the prompt."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = {
        "uniform": "ours, one precision",
        "mixed": "ours, several precisions",
        "peer": "transformers QuantizedCache",
        "eviction": "eviction",
    }
    for colour, (name, marker) in zip(COLOURS, STEPS.items(), strict=False):
        rows = [
            row for row in table.rows if kind(row) == name and row.method not in ("none", "random", "stride")
        ]
        x, y = [per_token(row) for row in rows], [row.score.mean for row in rows]
        axes.scatter(x, y, color=colour, marker=marker, label=labels[name], alpha=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
    axes.set_xlabel("bytes of the cache a token of the prompt")
    axes.set_ylabel(table.unit)
    axes.set_title(f"{table.model}, {table.task}: {table.answers} answers")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=DPI)


def markdown(tables: dict[str, Table]) -> str:
    """One line a method, most bytes first: bytes a token of the recall task, then every table's score."""
    first = tables["recall"]
    heads = [
        "",
        "bytes a token",
        *(f"{name} ({table.unit.partition(' (')[0]})" for name, table in tables.items()),
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in sorted(first.rows, key=per_token, reverse=True):
        cells = [
            row.method if row.budget == 1 else f"{row.method}, {row.budget:.0%}",
            f"{per_token(row):.0f}",
        ]
        for table in tables.values():
            found = [r for r in table.rows if (r.method, r.budget) == (row.method, row.budget)]
            cells.append(interval(found[0]) if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(row: Row) -> str:
    """The score and its 95 % interval."""
    return f"{row.score.mean:.3f} [{row.score.low:.2f}, {row.score.high:.2f}]"


def main() -> None:
    """Draw the recall task, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=Path, default=ROOT / "build/peers/quantized_cache")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    tables: dict[str, Table] = {}
    for path in sorted(options.tables.glob("*.json"), key=lambda path: (len(path.name), path.name)):
        table = Table.from_json(path.read_text())
        outliers = table.model.partition("outliers")[1]
        tables[f"{table.task}, {outliers}" if outliers else table.task] = table
    ordered = {"recall": tables.pop("recall"), **tables}
    for name, table in ordered.items():
        print(f"{name}: {table.samples} samples, {table.answers} scored")
    print(f"\n{markdown(ordered)}")
    draw(ordered["recall"], options.out / "kv_quantization.png")


if __name__ == "__main__":
    main()
