"""Right calls of the operators on dense tokens: kcenter, topk, merge, score, linear, prefill."""

from collections.abc import Callable
from typing import Any

import torch
from fuzz_draw import FLOATS, Call, Draw
from torch import Tensor

HEADS = ("none", "kv_sum", "kv_mean", "kv_max", "mean", "rms")


def some(draw: Draw, **makers: Callable[[], Any]) -> dict[str, Any]:
    """Each optional argument or not."""
    return {name: make() for name, make in makers.items() if draw.maybe()}


def kcenter_greedy(d: Draw) -> Call:
    batch, n, c = d.size(3), d.size(70), d.size(40)
    k = d.size(n)
    options = some(
        d,
        objective=lambda: d.pick("max_min", "max_sum"),
        metric=lambda: d.pick("cosine", "l2", "dot"),
        first=lambda: d.pick("largest_nn", "index0", "centroid"),
        weight=lambda: d.positive(batch, n),
    )
    if d.maybe():
        options["lengths"] = d.integers(0, n, batch)
    elif d.maybe():
        options["seed"] = d.order(n, batch)[:, : d.size(k)]
    return Call("kcenter_greedy", {"x": d.floats(batch, n, c, dtype=d.pick(*FLOATS)), "k": k, **options})


def topk_select(d: Draw) -> Call:
    rows, slots, k = d.size(5, 0), d.size(200, 0), d.size(64, 0)
    options = some(
        d,
        k_per_row=lambda: d.integers(0, k, rows),
        head=lambda: d.size(20, 0),
        tail=lambda: d.size(20, 0),
        keep=lambda: d.bools(rows, slots),
        lengths=lambda: d.integers(0, slots, rows),
    )
    return Call("topk_select", {"score": d.floats(rows, slots, dtype=d.pick(*FLOATS)), "k": k, **options})


def topp_select(d: Draw) -> Call:
    rows, slots, k = d.size(5, 0), d.size(200, 0), d.size(64, 0)
    options = some(
        d,
        min_k=lambda: d.size(k, 0),
        head=lambda: d.size(20, 0),
        tail=lambda: d.size(20, 0),
        lengths=lambda: d.integers(0, slots, rows),
    )
    score = d.floats(rows, slots, dtype=d.pick(*FLOATS))
    return Call("topp_select", {"score": score, "p": d.random.random(), "max_k": k, **options})


def topk_budget(d: Draw) -> Call:
    batch, heads, slots, k = d.size(3, 0), d.size(9), d.size(100, 0), d.size(300, 0)
    options = some(d, floor=lambda: d.size(k // heads, 0), lengths=lambda: d.integers(0, slots, batch, heads))
    score = d.floats(batch, heads, slots, dtype=d.pick(*FLOATS))
    return Call("topk_budget", {"score": score, "k": k, **options})


def cosine_match(d: Draw) -> Call:
    batch, na, nb, c, dtype = d.size(3), d.size(70), d.size(70), d.size(40), d.pick(*FLOATS)
    options: dict[str, Any] = some(
        d,
        a_index=lambda: d.integers(-1, na - 1, batch, d.size(40)),
        b_index=lambda: d.integers(-1, nb - 1, batch, d.size(40)),
        band=lambda: d.size(20, 0) - 1,
        protect_a=lambda: d.size(5, 0),
        protect_b=lambda: d.size(5, 0),
        min_similarity=lambda: 2 * d.random.random() - 1,
        top=lambda: d.size(32),
        exclude_self=lambda: True,
    )
    ra = options["a_index"].shape[1] if "a_index" in options else na
    rb = options["b_index"].shape[1] if "b_index" in options else nb
    options |= some(
        d,
        a_weight=lambda: d.floats(batch, ra),
        b_weight=lambda: d.floats(batch, rb),
        mask_a=lambda: d.bools(batch, ra),
        mask_b=lambda: d.bools(batch, rb),
    )
    if d.maybe(0.2):
        c2 = d.size(12)
        second = {name: d.floats(batch, n, c2, dtype=dtype) for name, n in (("a2", na), ("b2", nb))}
        options |= second | {"alpha": d.random.random()}
    a, b = (d.floats(batch, n, c, dtype=dtype) for n in (na, nb))
    return Call("cosine_match", {"a": a, "b": b, **options})


def energy_score(d: Draw) -> Call:
    batch, n = d.size(3), d.size(70, 0)
    options = some(
        d,
        alpha=lambda: d.random.random(),
        kind=lambda: d.pick("elu", "paper", "gauss"),
        prefix=lambda: d.size(5, 0),
        mask=lambda: d.bools(batch, n),
    )
    x = d.floats(batch, n, d.size(40), dtype=d.pick(*FLOATS))
    return Call("energy_score", {"x": x, "margin": d.random.random() * 0.99, **options})


def bipartite_map(d: Draw) -> Call:
    batch, n = d.size(3), d.size(70)
    options: dict[str, Any] = {"order": d.pick("tome", "index", "similarity", "position")}
    options |= some(d, prefix=lambda: d.size(5, 0), distill=lambda: True)
    ra, rb = (n + 1) // 2, n // 2
    if d.maybe():
        lists, ra, rb = _token_lists(d, batch, n)
        options |= lists
    value, index = d.floats(batch, ra), d.integers(-1, rb - 1, batch, ra)
    return Call("bipartite_map", {"value": value, "index": index, "r": d.size(n, 0), "tokens": n, **options})


def _token_lists(d: Draw, batch: int, n: int) -> tuple[dict[str, Tensor], int, int]:
    order, ra = d.order(n, batch), d.size(n, 0)
    rb = d.size(n - ra, 0)
    lists = {"a_tokens": order[:, :ra], "b_tokens": order[:, ra : ra + rb]}
    if d.maybe():
        lists["rest_tokens"] = order[:, ra + rb :]
    return lists, ra, rb


def merge_tokens(d: Draw) -> Call:
    batch, n, m = d.size(3), d.size(70), d.size(40)
    options = some(d, size=lambda: d.positive(batch, n), weight=lambda: d.positive(batch, n))
    x = d.floats(batch, n, d.size(40), dtype=d.pick(*FLOATS))
    options["mode"] = d.pick("mean", "sum", "amax", "drop", "mlerp")
    token_map = d.integers(-1, m - 1, batch, n)
    return Call("merge_tokens", {"x": x, "token_map": token_map, "out_tokens": m, **options})


def bipartite_merge(d: Draw) -> Call:
    batch, n = d.size(3), d.size(70)
    options: dict[str, Any] = some(
        d,
        size=lambda: d.positive(batch, n),
        weight=lambda: d.positive(batch, n),
        prefix=lambda: d.size(5, 0),
        order=lambda: d.pick("tome", "index", "similarity", "position"),
        mode=lambda: d.pick("mean", "sum", "amax", "drop", "mlerp"),
    )
    if d.maybe():
        options |= _token_lists(d, batch, n)[0]
    x, metric = (d.floats(batch, n, d.size(40), dtype=d.pick(*FLOATS)) for _ in range(2))
    return Call("bipartite_merge", {"x": x, "metric": metric, "r": d.size(n, 0), **options})


def attention(d: Draw, values: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Queries, keys and, if asked for, values; and who sees whom."""
    batch, heads, group, dim = d.size(2, 0), d.size(2), d.pick(1, 2, 4, 7), d.size(72)
    rows, keys, dtype = d.size(70, 0), d.size(140, 0), d.pick(*FLOATS)
    tensors = {
        "q": d.floats(batch, heads * group, rows, dim, dtype=dtype),
        "k": d.floats(batch, heads, keys, dim, dtype=dtype),
    }
    if values:
        tensors["v"] = d.floats(batch, heads, keys, d.size(72), dtype=dtype)
    sight: dict[str, Any] = some(
        d,
        scale=lambda: d.random.random() + 0.01,
        key_bias=lambda: d.floats(batch, *d.pick((), (heads,)), keys),
        q_position=lambda: d.integers(-1, keys + 3, *d.pick((), (batch,)), rows),
        lengths=lambda: d.integers(0, keys, batch),
        starts=lambda: d.integers(0, keys, batch),
        softcap=lambda: d.random.random() * 20 + 0.1,
        causal=lambda: False,
    )
    if "causal" not in sight and d.maybe():
        sight["window"] = d.size(70)
    return tensors, sight


def attention_lse(d: Draw) -> Call:
    tensors, sight = attention(d, values=False)
    return Call("attention_lse", tensors | sight)


def column_score(d: Draw, name: str = "column_score") -> Call:
    tensors, sight = attention(d, values=False)
    batch, heads, rows, _ = tensors["q"].shape
    shapes = ((rows,), (batch, rows), (batch, 1, rows), (batch, heads, rows))
    options = some(
        d,
        row_weight=lambda: d.positive(*d.pick(*shapes)),
        heads=lambda: d.pick(*HEADS),
        power=lambda: 2,
    )
    if name == "column_score":
        options |= some(d, rows=lambda: d.pick("sum", "max"))
    return Call(name, tensors | {"lse": d.floats(batch, heads, rows) + 3} | sight | options)


def diagonal_score(d: Draw) -> Call:
    return column_score(d, "diagonal_score")


def head_vote(d: Draw) -> Call:
    batch, groups, slots = d.size(3, 0), d.size(3), d.size(150, 0)
    heads = groups * d.size(4)
    options = {"lse": d.floats(batch, heads) + 2, "mode": d.pick("softmax_sum", "sum", "max", "mean")}
    return Call("head_vote", {"scores": d.floats(batch, heads, slots), **options, "groups": groups})


def decay_score_(d: Draw) -> Call:
    batch, heads, group, slots, how = d.size(3, 0), d.size(3), d.size(3), d.size(150, 0), d.pick(*HEADS)
    states = 1 if how in ("mean", "rms") else heads * group if how == "none" else heads

    def clock() -> Tensor:
        return torch.randint(0, 5, (batch, states, slots), generator=d.generator, dtype=torch.int32)

    options: dict[str, Any] = {"heads": how} | some(
        d,
        lse=lambda: d.floats(batch, heads * group) + 2,
        gamma=lambda: d.random.random() * 0.9 + 0.1,
        lengths=lambda: d.integers(0, slots, batch),
        power=lambda: 2,
        count=clock,
        step=lambda: d.size(99, 0),
        alpha=lambda: d.random.random(),
    )
    if d.maybe():
        options |= {"last": clock()} | some(d, interval=clock)
    state = d.floats(batch, states, slots, layout="offset").abs()
    arguments = {"score": state, "logits": d.floats(batch, heads * group, slots), **options}
    return Call("decay_score_", arguments, ("score", "count", "last", "interval"))


def decay_linear_attention(d: Draw) -> Call:
    batch, heads, group, rows, dim = d.size(2, 0), d.size(2), d.size(3), d.size(140, 0), d.size(72)
    dtype, dim_v = d.pick(*FLOATS), d.size(72)
    shapes = {"q": (heads * group, dim), "k": (heads, dim), "v": (heads, dim_v)}
    tensors = {name: d.floats(batch, h, rows, width, dtype=dtype) for name, (h, width) in shapes.items()}
    options = some(
        d,
        scale=lambda: d.random.random() + 0.01,
        state=lambda: d.floats(batch, heads * group, dim, dim_v),
        lengths=lambda: d.integers(0, rows, batch),
    )
    return Call("decay_linear_attention", {**tensors, "slope": d.positive(heads * group), **options})


def flash_prefill(d: Draw) -> Call:
    tensors, sight = attention(d, values=True)
    batch, heads, rows, _ = tensors["q"].shape
    kv_heads, keys = tensors["k"].shape[1:3]
    sight |= some(d, sinks=lambda: d.floats(heads))
    if d.maybe() and rows and batch:
        sight |= _lists(d, batch, d.pick(1, kv_heads, heads), rows, keys)
    if d.maybe(0.2) and "q_position" not in sight:
        sight["q_starts"] = d.integers(0, rows, batch)
    return Call("flash_prefill", tensors | sight)


def _lists(d: Draw, batch: int, heads: int, rows: int, keys: int) -> dict[str, Any]:
    """Lists of key blocks, and of columns outside them."""
    block_q, block_k = d.pick(64, 128), d.pick(64, 128)
    blocks = -(-keys // block_k)
    listed = torch.rand(batch * heads * -(-rows // block_q), blocks, generator=d.generator) < 0.5
    free = ~listed.repeat_interleave(block_k, 1)[:, :keys]
    single = free & (torch.rand(free.shape, generator=d.generator) < 0.1)
    out: dict[str, Any] = {"block_q": block_q, "block_k": block_k}
    named = {("indptr", "indices"): listed}
    if d.maybe():
        named["column_ptr", "columns"] = single
    for (pointer, entries), chosen in named.items():
        out[pointer] = torch.nn.functional.pad(chosen.sum(1).cumsum(0), (1, 0))
        out[entries] = chosen.nonzero()[:, 1]
    return out
