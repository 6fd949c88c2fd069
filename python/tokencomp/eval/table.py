"""The result of an evaluation: rows, their JSON, and the table on a terminal."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tokencomp.eval.extras import need
from tokencomp.eval.statistics import Estimate

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One method at one budget, over all samples."""

    method: str
    budget: float  # share of tokens asked for; 1 where nothing was
    score: Estimate
    versus_none: Estimate  # paired difference of the score
    versus_random: Estimate | None  # at the same budget; None for none, random and adaptive ones
    tokens_kept: float  # mean over samples and layers
    tokens_total: float
    kept_per_layer: tuple[float, ...]  # mean over samples; one number where all layers keep the same
    kv_bytes: float | None  # in the cache the prompt left, mean over samples; None: no cache
    prefill_ms: float  # median over samples, batch 1, with the compression
    decode_ms: float | None  # a token, median
    peak_bytes: int  # of one sample's run, above the weights
    flops: int  # of one sample's run, see ``measure.count_flops``
    scores: tuple[float, ...]  # of each sample
    groups: dict[str, float] = field(default_factory=dict)  # mean score by group, e.g. depth of the needle
    kept_tokens: tuple[int, ...] = ()  # of the first sample, where tokens are those of an image
    adaptive: bool = False  # the method finds its own number of tokens, or bits


@dataclass(frozen=True)
class Table:
    """All rows of a model on a task. ``print()``, ``save(folder)``, ``to_json()`` and back."""

    model: str
    task: str
    metric: str
    unit: str  # of the score, as axes are labelled
    higher_is_better: bool
    samples: int
    answers: int  # scored in all samples together
    seed: int
    card_score: float | None  # uncompressed, as the model's card has it
    card_samples: int
    group_label: str
    grid: tuple[int, int] | None  # rows and columns of image tokens
    environment: dict[str, str]
    rows: tuple[Row, ...]
    picture: Tensor | None = field(default=None, compare=False, repr=False)  # [3, H, W] of the first sample

    def row(self, method: str, budget: float = 1.0) -> Row:
        """The row of ``method`` at ``budget`` (of none at 1). Raises KeyError where there is none."""
        for row in self.rows:
            if (row.method, row.budget) == (method, budget):
                return row
        raise KeyError(f"table: no row of {method!r} at {budget}")

    def to_json(self) -> str:
        """Everything but the picture."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "picture"}
        content["rows"] = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({"format": FORMAT, **content}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """What ``to_json`` wrote. Raises ValueError for another format."""
        content = json.loads(text)
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"table: format must be {FORMAT}")
        grid = content.pop("grid")
        rows = tuple(_row(row) for row in content.pop("rows"))
        return cls(**content, rows=rows, grid=None if grid is None else (grid[0], grid[1]))

    def print(self, file: Any = None) -> None:
        """A table on standard output, or on ``file``. Raises ImportError without rich."""
        need("rich")
        from rich.console import Console

        console = Console(file=file)
        if not console.is_terminal:
            console = Console(file=file, width=170)
        console.print(_rendered(self))

    def save(self, folder: Path | str) -> list[Path]:
        """Writes ``<model>_<task>.json`` and pictures beside it; returns what was written.

        Raises ImportError without matplotlib, before anything is written.
        """
        from tokencomp.eval import plots

        need("matplotlib")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.model}_{self.task}"
        written = [folder / f"{stem}.json"]
        written[0].write_text(self.to_json() + "\n")
        return written + plots.save(self, folder, stem)


def _row(content: dict[str, Any]) -> Row:
    for name in ("score", "versus_none", "versus_random"):
        content[name] = content[name] and Estimate(**content[name])
    for name in ("kept_per_layer", "scores", "kept_tokens"):
        content[name] = tuple(content[name])
    return Row(**content)


def _rendered(table: Table) -> Any:
    from rich.table import Table as RichTable

    title = f"{table.model}, {table.task}: {table.unit}, {table.answers} answers in {table.samples} samples"
    notes = [f"seed {table.seed}; 95 % intervals by bootstrap over samples; differences are paired"]
    if table.card_score is not None:
        notes.append(f"uncompressed on the card: {table.card_score:.4f} of {table.card_samples}")
    notes.append("times: batch 1, medians, " + ", ".join(table.environment.values()))
    made = RichTable(title=title, caption="\n".join(notes), caption_justify="left")
    made.add_column("method")
    has_cache = any(row.kv_bytes is not None for row in table.rows)
    heads = ["budget", "score", "against none", "against random", "tokens kept"]
    heads += ["KV bytes"] * has_cache + ["prefill ms"] + ["decode ms"] * has_cache + ["GFLOP", "peak MiB"]
    for head in heads:
        made.add_column(head, justify="right")
    for row in table.rows:
        cells = [
            row.method,
            "own" if row.adaptive else f"{row.budget:g}",
            _interval(row.score),
            _interval(row.versus_none if row.method != "none" else None, "+"),
        ]
        cells += [_interval(row.versus_random, "+"), f"{row.tokens_kept:.0f} of {row.tokens_total:.0f}"]
        cells += [_number(row.kv_bytes, ",.0f")] * has_cache + [_number(row.prefill_ms, ".2f")]
        cells += [_number(row.decode_ms, ".2f")] * has_cache
        cells += [f"{row.flops / 1e9:.3f}", f"{row.peak_bytes / 2**20:.2f}"]
        made.add_row(*cells, end_section=row.method == "none" or row is _last_of(table, row))
    return made


def _last_of(table: Table, row: Row) -> Row:
    return [other for other in table.rows if other.method == row.method][-1]


def _interval(value: Estimate | None, sign: str = "") -> str:
    return "" if value is None else f"{value.mean:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
