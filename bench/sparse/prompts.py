"""What sparse attention of prompts costs and saves: quality on recall-lm, and the time of one layer.

    python bench/sparse/prompts.py quality [--rows 4] [--out folder]
    python bench/sparse/prompts.py time [--tokens 8192 32768] [--out folder]

``quality``: every method with a few budgets reads prompts of 2048 tokens. Recall: facts in filler, then
questions, all in one forward, exact match of the answers; text: loss in nats per byte. Beside them the share
of the blocks that attention computed, and the share of the dense attention of each row that they hold,
``exp(lse_sparse - lse_dense)``, a mean over rows, heads and layers.

``time``: q, k and v of a layer of random weights shaped as a quarter of one of Llama-3-8B (8 and 2 heads of
128, bfloat16), one sequence; what choosing takes, what attention to the lists takes, and dense attention. CPU
times of one thread, which other load on the machine disturbs least; contenders take turns, the best counts.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokencomp
import torch
from tokencomp import block_lists, methods, ops, zoo
from tokencomp.methods.duo_attention import HeadSearch
from tokencomp.methods.prompts import rows_of
from tokencomp.methods.sparse import PromptChoice, Sparse, SparseView, Subset
from tokencomp.prompt_rows import last_rows
from tokencomp.zoo import recall
from tokencomp.zoo.text import text_loss
from torch import Tensor, nn

LENGTH = 2048
KNOBS: dict[str, list[Any]] = {
    "MInference": [
        methods.MInference(vertical=v, slash=s, queries=64, sinks=4, recent=16)
        for v, s in ((8, 16), (32, 32), (128, 64), (256, 256))
    ],
    "FlexPrefill": [methods.FlexPrefill(gamma=g, min_budget=64, block=64) for g in (0.3, 0.6, 0.9, 0.97)],
    "XAttention": [methods.XAttention(threshold=t, stride=8, block=64) for t in (0.3, 0.6, 0.8, 0.95)],
    "MoBA": [methods.MoBA(chunk=64, top=n) for n in (1, 2, 4, 8)],
    "ZipVL": [methods.ZipVL(tau=t) for t in (0.7, 0.9, 0.975, 0.995)],
    "sinks and window": [methods.DuoAttention(sinks=64, recent=n) for n in (64, 256, 512, 1024)],
}


@dataclass
class Watched(Sparse):
    """A method, and what its choices compute and hold."""

    method: Any
    density: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)

    def choose_prompt(self, view: SparseView) -> PromptChoice:
        """The method's choice."""
        choice: PromptChoice = self.method.choose_prompt(view)
        rows = rows_of(view)
        if choice is None:
            self.density.append(1.0)
            self.held.append(1.0)
        elif isinstance(choice, Subset):
            kept = float(choice.count.float().mean()) / view.q.shape[2]
            self.density.append(kept * kept)
        else:
            visible = rows.visible(choice.block_q, choice.block_k)
            self.density.append(float(block_lists.density(choice, visible).mean()))
            v = view.values()[:, :, : view.size].flatten(0, 1)[:, None]
            whole = ops.attention_lse(rows.q, rows.k, **rows.sides())
            some = ops.flash_prefill(rows.q, rows.k, v, **rows.sides(), **choice.arguments())[1]
            self.held.append(float((some - whole).exp().mean()))
        return choice


def duo(model: Any) -> list[Any]:
    """DuoAttention with the gates of another text, a few shares of streaming heads."""
    search = HeadSearch(sinks=64, recent=256, rows=192)
    tokens, _ = recall.recall(1, LENGTH, 96, 48, torch.Generator().manual_seed(7), distinct=True)
    with torch.no_grad(), tokencomp.compress(model, search):
        model(tokens)
    gates = search.gates()
    return [methods.DuoAttention(gates, streaming=s, sinks=64, recent=256) for s in (0.75, 0.5, 0.25)]


class Sees(nn.Module):
    """A model whose forward begins with an empty cache, so that what is read is a prompt."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return self.model(input_ids=input_ids, use_cache=True)


def quality(rows: int) -> list[dict[str, Any]]:
    """One row a method and budget."""
    model, _ = zoo.load("recall-lm")
    found = []
    everything = {"dense": [None], **KNOBS, "DuoAttention": duo(model)}
    for name, knobs in everything.items():
        for method in knobs:
            watched = Watched(method)
            if method is None:
                exact = recall.score(model, LENGTH, 96, 32, rows, seed=1, distinct=True)[0]
                loss = text_loss(model, LENGTH, rows, seed=1)
                watched.density, watched.held = [1.0], [1.0]
            else:
                with tokencomp.compress(model, watched):
                    exact = recall.score(Sees(model), LENGTH, 96, 32, rows, seed=1, distinct=True)[0]
                    loss = text_loss(Sees(model), LENGTH, rows, seed=1)
            held = statistics.mean(watched.held) if watched.held else None
            found.append(
                {"method": name, "knobs": short(method), "density": statistics.mean(watched.density),
                 "held": held, "recall": float(exact.float().mean()), "loss": loss}
            )  # fmt: skip
            print(found[-1], flush=True)
    return found


def short(method: Any) -> str:
    """The knobs that are not the defaults, without tables."""
    if method is None:
        return ""
    plain = type(method)()
    names = [
        n for n in method.__dataclass_fields__ if getattr(method, n) != getattr(plain, n) and n != "gates"
    ]
    return ", ".join(f"{n}={getattr(method, n)}" for n in names)


TIMED: dict[str, Any] = {
    "MInference": methods.MInference(vertical=512, slash=512),
    "FlexPrefill": methods.FlexPrefill(gamma=0.9, min_budget=512, max_budget=1024),
    "XAttention, stride 16": methods.XAttention(threshold=0.1, stride=16),
    "XAttention, stride 8": methods.XAttention(threshold=0.1, stride=8),
    "MoBA": methods.MoBA(chunk=512, top=3),
    "sinks and window": methods.DuoAttention(),
}


def layer(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q, and k, v of a layer of random weights: 8 and 2 heads of 128, bfloat16."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    g = torch.Generator().manual_seed(0)
    hidden, dim = 4096, 128
    x = torch.randn(1, tokens, hidden, generator=g)
    made = []
    for heads in (8, 2, 2):
        weight = torch.randn(heads * dim, hidden, generator=g) * (2.0 / hidden**0.5)
        made.append((x @ weight.T).view(1, tokens, heads, dim).transpose(1, 2).bfloat16())
    config = LlamaConfig(hidden_size=1024, num_attention_heads=8, max_position_embeddings=tokens)
    cos, sin = LlamaRotaryEmbedding(config)(made[0], torch.arange(tokens)[None])
    q, k = apply_rotary_pos_emb(made[0], made[1], cos, sin)
    return q.contiguous(), k.contiguous(), made[2].contiguous()


def timed(tokens: int, turns: int) -> list[dict[str, Any]]:
    """Seconds of choosing and of attention, of each method, and of dense attention."""
    torch.set_num_threads(1)
    q, k, v = layer(tokens)
    rows = last_rows(q, k)
    lists = {name: m.lists(rows, 0) for name, m in TIMED.items()}
    calls: dict[str, Any] = {"dense": lambda: ops.flash_prefill(q, k, v)}
    calls["dense, torch"] = lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    for name, m in TIMED.items():
        calls[f"{name}: choose"] = lambda m=m: m.lists(rows, 0)
        calls[f"{name}: attend"] = lambda n=name: ops.flash_prefill(q, k, v, **lists[n].arguments())
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            spent[name].append(time.process_time() - begin)
    seconds = {name: min(t) for name, t in spent.items()}
    found = [
        {"tokens": tokens, "method": name, "density": 1.0, "choose": 0.0, "attend": seconds[name]}
        for name in ("dense", "dense, torch")
    ]
    for name in TIMED:
        visible = rows.visible(lists[name].block_q, lists[name].block_k)
        share = float(block_lists.density(lists[name], visible).mean())
        found.append(
            {"tokens": tokens, "method": name, "density": share, "choose": seconds[f"{name}: choose"],
             "attend": seconds[f"{name}: attend"]}
        )  # fmt: skip
        print(found[-1], flush=True)
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Recall and the attention that is held, against the share of blocks."""
    from matplotlib.figure import Figure
    from tokencomp.eval.plots import COLOURS, DPI, MARKERS

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "dense"]
    dense = next(row for row in rows if row["method"] == "dense")
    for axis, key, label in (
        (axes[0], "recall", "recall of 96 facts (exact match)"),
        (axes[1], "held", "share of the attention that is held"),
    ):
        axis.axhline(dense[key], color="black", linewidth=0.8, label="dense")
        for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
            own = sorted((r["density"], r[key]) for r in rows if r["method"] == name and r[key] is not None)
            if own:
                axis.plot(*zip(*own, strict=True), color=colour, marker=marker, markersize=5, label=name)
        axis.set_xlabel("share of the visible blocks that is computed")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("quality", "time", "draw"))
    parser.add_argument("--rows", type=int, default=4, help="sequences of each task")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stored = args.out / "sparse_prompts.json"
    known = json.loads(stored.read_text()) if stored.exists() else {}
    with torch.no_grad():
        if args.what == "quality":
            known["quality"] = quality(args.rows)
        if args.what == "time":
            others = [row for row in known.get("time", []) if row["tokens"] not in args.tokens]
            known["time"] = others + [row for tokens in args.tokens for row in timed(tokens, args.turns)]
    stored.write_text(json.dumps(known, indent=1) + "\n")
    if "quality" in known:
        draw(known["quality"], args.out / "sparse_prompts.png")


if __name__ == "__main__":
    main()
