"""What sparse decode steps lose, against how much they read: facts recalled by recall-lm from long contexts.

    python bench/sparse_accuracy.py --length 2048 8192 --stretch 1 4 --rows 3 --out found.json
    python bench/sparse_accuracy.py --length --stretch --read found.json --plot docs/sparse_decode.png

A row is ``recall`` of 48 facts in ``length`` tokens, the prompt read densely and once; then 8 questions come
token by token, each read by the selector in turn. ``exact``: answers right in both tokens. ``read``: slots
read, of those in use, over all layers. ``mass``: attention, of a dense step in its place, that the slots
hold, a mean over sparse layers, kv heads and steps. ``ms``: a token, the whole model; its layers are so small
that this is mostly the cost of calls. ``stretch`` enlarges the base of the rotary embedding by
``stretch ** (d / (d - 2))`` (NTK-aware scaling) for contexts beyond the 2048 tokens of training.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokencomp
import torch
from tokencomp import methods, zoo
from tokencomp.cache import PagedKVCache
from tokencomp.methods import SlotLists, Sparse, SparseView
from tokencomp.methods import sparse_select as select
from tokencomp.zoo import recall
from torch import Tensor

FACTS, QUESTIONS = 48, 8
SHARES = (0.02, 0.05, 0.1, 0.25)


@dataclass(frozen=True)
class Exact(Sparse):
    """The slots of largest logit of each kv head: what selectors approach."""

    k: int

    def choose(self, view: SparseView) -> SlotLists | None:
        """See ``SparseMethod``."""
        scores, _ = view.scores(select.flat_queries(view), scale=view.scale)
        score = select.votes(view, scores[..., : view.size], None, "max", view.lengths.shape[1])
        return select.best_slots(score, view.lengths, self.k, tail=1)


@dataclass(frozen=True)
class Random(Sparse):
    """Any slots, and the newest."""

    k: int

    def choose(self, view: SparseView) -> SlotLists | None:
        """See ``SparseMethod``."""
        generator = torch.Generator().manual_seed(view.size * 64 + view.layer)
        score = torch.rand(*view.lengths.shape, view.size, generator=generator)
        return select.best_slots(score, view.lengths, self.k, tail=1)


def selectors(k: int) -> dict[str, Any]:
    """All with about ``k`` slots a step, except those that choose their number."""
    near = max(k // 8, 4)
    return {
        "random": Random(k),
        "first and newest": methods.DuoAttention(sinks=near, recent=k - near),
        "exact top-k": Exact(k),
        "Quest, pages of 16": methods.Quest(k=max(k, 16), dense=0),
        "Quest, pages of 4": methods.Quest(k=k, chunk=4, dense=0),
        "InfLLM, blocks of 16": methods.InfLLM(
            blocks=max((k - 2 * near) // 16, 1), block=16, sinks=near, recent=near
        ),
        "TokenSelect": methods.TokenSelect(k=k - 2 * near, sinks=near, recent=near, theta=None),
        "TokenSelect, cosine 0.9": methods.TokenSelect(k=k - 2 * near, sinks=near, recent=near),
        "TidalDecode, layers 0 and 2": methods.TidalDecode(k=k, first=0, again=2),
        "TidalDecode, layers 1 and 2": methods.TidalDecode(k=k, first=1, again=2),
    }


def of_share() -> dict[str, Any]:
    """Selectors that take a share of the attention."""
    return {f"Twilight, p={p}": methods.Twilight(p=p, dense=0) for p in (0.5, 0.7, 0.85, 0.95)}


@dataclass
class Switch(Sparse):
    """One method after the other on copies of one cache; measures what mass they choose if asked to."""

    now: Any = field(default_factory=Sparse)
    masses: list[Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Switch":
        return self

    def choose(self, view: SparseView) -> SlotLists | None:
        """See ``SparseMethod``."""
        lists: SlotLists | None = self.now.choose(view)
        if lists is not None and self.masses is not None:
            scores, lse = view.scores(select.flat_queries(view), scale=view.scale)
            p = select.votes(view, scores, lse, "softmax_sum", view.lengths.shape[1], share=True)
            entry = torch.arange(lists.index.shape[2]) < lists.count[..., None]
            held = p.gather(2, lists.index.clamp(min=0).long())
            self.masses.append(torch.where(entry & (lists.index >= 0), held, 0.0).sum(-1).mean())
        return lists

    def wants_logits(self, view: SparseView) -> bool:
        """See ``SparseMethod``."""
        return bool(self.now.wants_logits(view))

    def observe(self, view: SparseView, logits: Tensor, lse: Tensor) -> None:
        """See ``SparseMethod``."""
        self.now.observe(view, logits, lse)


@dataclass
class Found:
    """One selector at one size."""

    right: list[bool] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Means; of the times the median."""
        return {
            "exact": sum(self.right) / len(self.right),
            "read": sum(self.read) / len(self.read),
            "mass": sum(self.mass) / max(len(self.mass), 1),
            "ms": 1e3 * sorted(self.seconds)[len(self.seconds) // 2],
        }


def stretched(model: Any, factor: float) -> Any:
    """``model`` with the base of its rotary embedding enlarged."""
    if factor > 1:
        rotary = model.model.rotary_emb
        dim = 2 * rotary.inv_freq.numel()
        base = model.config.rope_parameters["rope_theta"] * factor ** (dim / (dim - 2))
        rotary.inv_freq = base ** (-torch.arange(0, dim, 2).float() / dim)
    return model


def contenders(length: int) -> Iterator[tuple[str, float, Any]]:
    """Name, size, method."""
    yield "dense", 1.0, Sparse()
    for share in SHARES:
        yield from ((name, share, method) for name, method in selectors(int(length * share)).items())
    yield from ((name, 0.0, method) for name, method in of_share().items())


@torch.no_grad()
def run(model: Any, length: int, rows: int) -> dict[tuple[str, float], Found]:
    """All selectors on the same rows."""
    found: dict[tuple[str, float], Found] = {}
    for seed in range(rows):
        generator = torch.Generator().manual_seed(seed)
        tokens, labels = recall.recall(1, length, FACTS, QUESTIONS, generator, distinct=True)
        first = length - QUESTIONS * recall.FACT_TOKENS
        switch = Switch()
        with tokencomp.compress(model, switch, page=16) as handle:
            cache = handle.new_cache()
            switch.now = methods.InfLLM(block=16)  # it alone looks at prompts
            hook = _prompt_too(switch)
            model(input_ids=tokens[:, :first], past_key_values=cache, logits_to_keep=1)
            hook()
            for name, share, method in contenders(length):
                switch.now = method
                _ask(model, cache, switch, tokens, labels, first, found.setdefault((name, share), Found()))
    return found


def _prompt_too(switch: Switch) -> Any:
    object.__setattr__(switch, "choose_prompt", switch.now.choose_prompt)
    return lambda: object.__delattr__(switch, "choose_prompt")


def _ask(
    model: Any, filled: PagedKVCache, switch: Switch, tokens: Tensor, labels: Tensor, first: int, into: Found
) -> None:
    for measured in (False, True):
        cache, said = copy.deepcopy(filled), []
        switch.masses = [] if measured else None
        for at in range(first, tokens.shape[1] if not measured else first + 8):
            begin = time.perf_counter()
            said.append(model(input_ids=tokens[:, at : at + 1], past_key_values=cache).logits)
            if not measured:
                into.seconds.append(time.perf_counter() - begin)
        if measured:
            into.mass += [float(mass) for mass in switch.masses or []]
            continue
        logits = torch.cat(said, 1)
        into.right += recall.exact_match(logits, labels[:, first:]).tolist()
        readers = [paged.layer.reader for paged in cache.paged]
        into.read += [reader.events.density for reader in readers if reader is not None]


def table(found: dict[tuple[str, float], Found]) -> str:
    """Markdown: a selector a row, sizes side by side."""
    rows = {key: each.row() for key, each in found.items()}
    head = "| | " + " | ".join(f"{share:.0%}" for share in SHARES) + " | ms at 10 % |"
    lines = [head, "|---" * (len(SHARES) + 2) + "|"]
    for name in dict.fromkeys(name for name, share in rows if share in SHARES):
        cells = [rows[name, share] for share in SHARES]
        text = [f"{c['exact']:.2f} ({c['read']:.1%}, {c['mass']:.2f})" for c in cells]
        lines.append(f"| {name} | " + " | ".join(text) + f" | {cells[SHARES.index(0.1)]['ms']:.1f} |")
    for (name, share), row in rows.items():
        if share not in SHARES:
            lines.append(f"| {name} | {row['exact']:.2f} ({row['read']:.1%}, {row['mass']:.2f})"
                         f"{' |' * len(SHARES)} {row['ms']:.1f} |")  # fmt: skip
    return "\n".join(lines)


def plot(results: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    """Accuracy against what is read, a panel a length."""
    import matplotlib.pyplot as plt

    size, colors = (4.5 * len(results) + 2.5, 4.2), plt.get_cmap("tab20")
    figure, axes = plt.subplots(1, len(results), figsize=size, squeeze=False, sharey=True)
    for axis, (length, rows) in zip(axes[0], results.items(), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for key, row in rows.items():
            name = key.rpartition(" at ")[0].partition(", p=")[0]
            lines.setdefault(name, []).append((row["read"], row["exact"]))
        for i, (name, points) in enumerate(lines.items()):
            dense = name == "dense"
            style = ":" if dense else "--" if i < 3 else "-"
            x, y = zip(*sorted([*points, (0.008, points[0][1])] if dense else points), strict=True)
            axis.plot(x, y, marker="" if dense else "o", ms=4, ls=style, label=name, color=colors(i))
        axis.set(xscale="log", xlabel="share of the slots read", title=f"{length} tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("exact match")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, nargs="*", default=[2048])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--stretch", type=float, nargs="*", default=[1.0], help="one a length")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--plot", type=Path, help="draw all --read files")
    parser.add_argument("--read", type=Path, nargs="+", default=[], help="files of --out")
    args = parser.parse_args()
    results: dict[int, dict[tuple[str, float], Found]] = {}
    for length, factor in zip(args.length, args.stretch, strict=True):
        model = stretched(zoo.load("recall-lm")[0], factor)
        results[length] = run(model, length, args.rows)
        print(
            f"\n{length} tokens, stretch {factor:g}, {args.rows} rows\n\n{table(results[length])}", flush=True
        )
    if args.out:
        numbers = {
            str(length): {f"{name} at {share}": each.row() for (name, share), each in found.items()}
            for length, found in results.items()
        }
        args.out.write_text(json.dumps(numbers, indent=1) + "\n")
    if args.plot:
        plot(
            {int(n): rows for path in args.read for n, rows in json.loads(path.read_text()).items()},
            args.plot,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
