"""How the time of each family's main operators grows: with tokens, sequences, budgets and densities.

    python bench/scaling.py [--only FAMILY,...] [--largest SIZE] [--out scaling.png]

With the problems of the benches, in bfloat16, on one thread, in time of the processor: others on the machine
take turns with us, which would bend the curves. The order is the slope of log time over log size in the
upper half of the sizes, by least squares; below, constant costs count. What it should be stands beside it: an
operator that is worse by half an order fails the run. The curves of a family take turns at each size, and
the best time of each counts; a curve ends where a turn would take seconds. Data that no longer fits into a
cache makes a curve steeper where that happens.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_decode
import bench_kcenter
import bench_kvcache
import bench_kvquant
import bench_linear
import bench_merge
import bench_prefill
import bench_score
import bench_topk
import torch
from common import clock, cpu_name, keep_freed_memory, now, rotating, threads
from tokencomp import block_lists, ops
from tokencomp.eval.plots import COLOURS

HALF = torch.bfloat16
TOLERANCE, BUDGET = 0.5, 0.2
Calls = dict[str, Callable[[int], Any]]


@dataclass(frozen=True)
class Family:
    """Curves over the same sizes; ``orders`` by curve, None for a peer. ``calls`` of a size may lack some."""

    name: str
    sizes: tuple[int, ...]
    orders: dict[str, float | None]
    calls: Callable[[int], Calls]
    along: str = "tokens"


def powers(first: int, last: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(first, last + 1))


def decode(tokens: int) -> Calls:
    t = bench_decode.Problem(tokens, 32, HALF).tensors("cpu")
    every = bench_decode.contenders(t)
    g = torch.Generator().manual_seed(1)  # other slots every turn: those of the last one are in a cache
    few = [torch.randperm(tokens, generator=g)[:512].sort().values for _ in range(16 * bench_decode.HKV)]
    lists = torch.stack(few).view(16, 1, bench_decode.HKV, -1).int()
    return {
        "paged_decode": every["tokencomp"],
        "of 512 slots": lambda turn: bench_decode.ours(t, index=lists[turn % 16]),
        "sdpa": every["sdpa folded"],
    }


def decode_batch(sequences: int) -> Calls:
    every = bench_decode.contenders(bench_decode.Problem(4096, 32, HALF, sequences).tensors("cpu"))
    return {"paged_decode": every["tokencomp"], "sdpa": every["sdpa folded"]}


def decode_budget(slots: int) -> Calls:
    t = bench_decode.Problem(65536, 32, HALF).tensors("cpu")
    g = torch.Generator().manual_seed(1)
    few = [torch.randperm(65536, generator=g)[:slots].sort().values for _ in range(4 * bench_decode.HKV)]
    lists = torch.stack(few).view(4, 1, bench_decode.HKV, -1).int()
    return {"paged_decode of listed slots": lambda turn: bench_decode.ours(t, index=lists[turn % 4])}


def listed(p: bench_prefill.Problem, share: float) -> Callable[[int], Any]:
    q, k, v = p.tensors("cpu")
    indptr, indices = block_lists.block_mask_to_csr(p.blocks(share, 64, "cpu"))
    return lambda _: ops.flash_prefill(q, k, v, indptr=indptr, indices=indices, block_q=64)


def prefill(tokens: int) -> Calls:
    p = bench_prefill.Problem(tokens, tokens, HALF)
    q, k, v = p.tensors("cpu")
    calls: Calls = {}
    if tokens <= 16384:
        calls["flash_prefill"] = lambda _: ops.flash_prefill(q, k, v)
    calls["8 blocks a row"] = listed(p, min(1.0, 512 / tokens))  # about eight blocks of 64 a row of blocks
    if tokens <= 8192:
        calls["sdpa"] = lambda _: bench_prefill.torch_attention(q, k, v)
    return calls


def prefill_density(percent: int) -> Calls:
    return {"flash_prefill of listed blocks": listed(bench_prefill.Problem(8192, 8192, HALF), percent / 100)}


def score(tokens: int) -> Calls:
    found: Calls = {}
    for name, rows in (("column_score", tokens), ("of 64 queries", 64)):
        if rows > 8192:
            continue
        q, k = bench_score.Problem("column_score", rows, tokens, HALF).tensors("cpu")
        lse = ops.attention_lse(q, k)
        found[name] = lambda _, q=q, k=k, lse=lse: ops.column_score(q, k, lse)  # type: ignore[misc]
    return found


def kcenter(tokens: int) -> Calls:
    p = bench_kcenter.Problem(1, tokens, 256, 64, HALF, "max_min", "index0", "clusters")
    x = p.tokens("cpu")
    return {"kcenter_greedy, 64 picks": lambda _: ops.kcenter_greedy(x, p.k, first=p.first)}


def topk(tokens: int) -> Calls:
    x = bench_topk.Problem("topk_select", 8, tokens, tokens // 16, HALF, "gauss").scores("cpu")
    return {
        "topk_select, a sixteenth": lambda _: ops.topk_select(x, tokens // 16),
        "torch.topk, sort": lambda _: x.topk(tokens // 16, dim=-1).indices.sort(dim=-1).values,
    }


def merge(tokens: int) -> Calls:
    p = bench_merge.Problem(1, tokens, 1024, tokens // 4, HALF)
    x, metric, size = p.tensors("cpu")
    mapped, copies = bench_merge.tome_map(metric, p.r), rotating(x)
    return {
        "cosine_match": lambda _: ops.cosine_match(metric[:, 0::2], metric[:, 1::2]),
        "merge_tokens": lambda turn: ops.merge_tokens(copies[turn % len(copies)], mapped, p.count, size=size),
    }


def kvcache(tokens: int) -> Calls:
    layer = bench_kvcache.Layer(bench_kvcache.Problem(tokens, HALF, 32), "cpu")
    index, count = layer.kept(0.25)
    return {
        "kv_append_": lambda _: layer.append(),
        "kv_compact_ to a quarter": lambda _: ops.kv_compact_(*layer.rows, index, count),
        "copy": lambda _: layer.copy(tokens),
    }


def kvquant(tokens: int) -> Calls:
    x = bench_kvquant.Problem((1, 8, tokens, 128), HALF).tensor("cpu")
    target = torch.empty_like(x)
    return {
        "kv_quantize, int4": lambda _: ops.kv_quantize(x, 4, group=128),
        "copy": lambda _: target.copy_(x),
    }


def linear(tokens: int) -> Calls:
    q, k, v, slope, state = bench_linear.Problem(1, tokens, HALF).tensors("cpu")
    return {"decay_linear_attention": lambda _: ops.decay_linear_attention(q, k, v, slope, state=state)}


FAMILIES = (
    Family("decode", powers(10, 17), {"paged_decode": 1, "of 512 slots": 0, "sdpa": None}, decode),
    Family(
        "decode_batch", powers(0, 6), {"paged_decode": 1, "sdpa": None}, decode_batch, "sequences of 4096"
    ),
    Family(
        "decode_budget",
        powers(6, 14),
        {"paged_decode of listed slots": 1},
        decode_budget,
        "slots",
    ),
    Family("prefill", powers(8, 17), {"flash_prefill": 2, "8 blocks a row": 1, "sdpa": None}, prefill),
    Family(
        "prefill_density",
        (3, 6, 12, 25, 50, 100),
        {"flash_prefill of listed blocks": 1},
        prefill_density,
        "% of blocks",
    ),
    Family("score", powers(8, 17), {"column_score": 2, "of 64 queries": 1}, score),
    Family("kcenter", powers(9, 15), {"kcenter_greedy, 64 picks": 1}, kcenter),
    Family("topk", powers(12, 18), {"topk_select, a sixteenth": 1, "torch.topk, sort": None}, topk),
    Family("merge", powers(9, 13), {"cosine_match": 2, "merge_tokens": 1}, merge),
    Family(
        "kvcache",
        powers(10, 15),
        {"kv_append_": 1, "kv_compact_ to a quarter": 1, "copy": None},
        kvcache,
    ),
    Family("kvquant", powers(10, 15), {"kv_quantize, int4": 1, "copy": None}, kvquant),
    Family("linear", powers(8, 12), {"decay_linear_attention": 1}, linear),
)

Curves = dict[str, dict[int, float]]  # name -> tokens -> seconds


def measure(family: Family, largest: int | None) -> Curves:
    curves: Curves = {name: {} for name in family.orders}
    for tokens in family.sizes:
        if largest is None or tokens <= largest:
            calls = family.calls(tokens)
            for name, call in calls.items():
                call(0)  # warms up
                curves[name][tokens] = math.inf
            begin, turn = now(), 0
            while turn < 3 or (turn < 100 and now() - begin < BUDGET):
                turn += 1
                for name, call in calls.items():
                    start = now()
                    call(turn)
                    curves[name][tokens] = min(curves[name][tokens], now() - start)
    return curves


def order(curve: dict[int, float]) -> float:
    """Slope of the upper half of the sizes, three at least."""
    points = sorted(curve.items())[-max(3, (len(curve) + 1) // 2) :]
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def table(found: dict[str, Curves]) -> Iterator[str]:
    yield "| family | operator | along | from, to | ms | order | as designed |"
    yield "|---|---|---|---|---|---:|---:|"
    for family in FAMILIES:
        for name, curve in found.get(family.name, {}).items():
            sizes, wanted = sorted(curve), family.orders[name]
            span, times = f"{sizes[0]} to {sizes[-1]}", [f"{curve[n] * 1e3:.3g}" for n in sizes]
            cells = [
                family.name,
                name,
                family.along,
                span,
                f"{times[0]} to {times[-1]}",
                f"{order(curve):.2f}",
            ]
            yield "| " + " | ".join([*cells, "peer" if wanted is None else f"{wanted:g}"]) + " |"


def too_steep(found: dict[str, Curves]) -> list[str]:
    return [
        f"{family.name}: {name} grows with order {order(curve):.2f}, designed for {wanted:g}"
        for family in FAMILIES
        for name, curve in found.get(family.name, {}).items()
        if (wanted := family.orders[name]) is not None and order(curve) > wanted + TOLERANCE
    ]


def draw(found: dict[str, Curves], path: Path) -> None:
    """A panel a family; dotted: the designed order through the last point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(found))
    figure = Figure(figsize=(4.2 * columns, 3.4 * -(-len(found) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    families = {family.name: family for family in FAMILIES}
    for place, (name_of, curves) in enumerate(found.items()):
        family = families[name_of]
        axes = figure.add_subplot(-(-len(found) // columns), columns, place + 1)
        for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
            sizes, wanted = sorted(curve), family.orders[name]
            times = [curve[n] * 1e3 for n in sizes]
            style = "--" if wanted is None else "-"
            axes.plot(
                sizes, times, style, color=colour, marker="o", ms=3, label=f"{name}: {order(curve):.2f}"
            )
            if wanted is not None:
                slope = [times[-1] * (n / sizes[-1]) ** wanted for n in sizes]
                axes.plot(sizes, slope, ":", color=colour, alpha=0.6)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(family.name)
        axes.set_xlabel(family.along)
        axes.set_ylabel("ms of one processor")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"time against size and fitted orders, {cpu_name()}, one thread")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="families, separated by commas; default: all")
    parser.add_argument("--largest", type=int, help="leave out larger sizes")
    parser.add_argument("--out", type=Path, default=Path("build/scaling.png"))
    args = parser.parse_args()
    names = args.only.split(",") if args.only else [family.name for family in FAMILIES]
    found = {}
    keep_freed_memory()
    with torch.no_grad(), threads(1), clock(processor=True):
        for family in FAMILIES:
            if family.name in names:
                found[family.name] = measure(family, args.largest)
                print(f"{family.name}: measured", file=sys.stderr)
    print("\n".join(table(found)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(found, args.out)
    print(f"wrote {args.out}")
    steep = too_steep(found)
    print("\n".join(steep))
    return 1 if steep else 0


if __name__ == "__main__":
    raise SystemExit(main())
