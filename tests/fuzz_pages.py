"""Right calls of the operators on pages: kvcache, kvquant, decode, and the paged forms of others."""

from typing import Any

import torch
from fuzz_draw import FLOATS, Call, Draw
from fuzz_tokens import some
from tokencomp import ops
from tokencomp.ops.kvquant_pages import PageFormat
from tokencomp.ops.page_pools import PagePools
from torch import Tensor

TIERS = ("fp8", "int8", "int4", "int3", "int2")


def store(d: Draw, *, dim_v: int | None = None, spare: int = 0) -> tuple[dict[str, Tensor], torch.dtype]:
    """Pages, table and lengths of rows; ``spare``: slots behind the lengths that have pages too."""
    batch, heads, size, dtype = d.size(2), d.size(3), d.pick(16, 32, 64), d.pick(*FLOATS)
    lengths = torch.randint(0, 3 * size, (batch, heads), generator=d.generator, dtype=torch.int32)
    if d.maybe():
        lengths[d.random.randrange(batch)] = d.pick(0, 1, size, 2 * size)
    places = -(-(int(lengths.max()) + spare) // size) + d.size(2, 0)
    shared, dim = d.maybe(), d.size(72)
    rows = batch if shared else batch * heads
    numbers = d.order(rows * places + 2)[: rows * places].view(batch, 1 if shared else heads, places)
    table = numbers.expand(batch, heads, places).int()
    if not shared and d.maybe():
        table = table.where(torch.arange(places) * size < lengths[..., None] + spare, -1)
    shape = (rows * places + 2, heads if shared else 1, size)
    pages = {
        name: d.floats(*shape, width, dtype=dtype, layout=d.pick("contiguous", "offset", "permuted"))
        for name, width in (("k_pages", dim), ("v_pages", dim if dim_v is None else dim_v))
    }
    return pages | {"block_table": table, "lengths": lengths}, dtype


def kv_append_(d: Draw) -> Call:
    rows = d.size(40, 0)
    pages, dtype = store(d, spare=rows)
    (batch, heads), dim = pages["lengths"].shape, pages["k_pages"].shape[3]
    new = {name: d.floats(batch, heads, rows, dim, dtype=dtype) for name in ("k", "v")}
    options = {}
    if d.maybe():
        starts = d.integers(0, rows, batch)
        options = {"starts": starts} | some(d, counts=lambda: rows - starts)
    return Call("kv_append_", pages | new | options, ("k_pages", "v_pages"))


def _kept(d: Draw, lengths: Tensor) -> tuple[Tensor, Tensor]:
    count = (torch.rand(lengths.shape, generator=d.generator) * (lengths + 1)).int()
    width = int(count.max()) + d.size(3, 0) if count.numel() else 0
    return d.ascending(count, lengths, width), count


def kv_compact_(d: Draw) -> Call:
    pages, _ = store(d)
    index, count = _kept(d, pages["lengths"])
    options = some(d, order=lambda: d.pick("stable", "holefill"))
    return Call("kv_compact_", pages | {"index": index, "count": count} | options, ("k_pages", "v_pages"))


def kv_gather(d: Draw) -> Call:
    pages, _ = store(d, dim_v=d.size(72))
    options: dict[str, Any] = {"size": d.size(100, 0)}
    if d.maybe():
        index, count = _kept(d, pages["lengths"])
        options |= {"index": index} | some(d, count=lambda: count)
    return Call("kv_gather", pages | options)


def rope_shift_(d: Draw) -> Call:
    pages, _ = store(d)
    del pages["v_pages"]
    lengths, dim = pages["lengths"], pages["k_pages"].shape[3]
    if dim == 1:
        return rope_shift_(d)
    width = int(lengths.max()) + d.size(3, 0)
    positions = {name: d.integers(0, 999, *lengths.shape, width) for name in ("old_position", "new_position")}
    options = {"inv_freq": d.positive(d.size(dim // 2)), "layout": d.pick("half", "interleaved")}
    return Call("rope_shift_", pages | positions | options, ("k_pages",))


def _members(d: Draw) -> dict[str, Tensor]:
    """A store, what is kept of it, and some of what is not."""
    pages, _ = store(d)
    index, count = _kept(d, pages["lengths"])
    lengths = pages["lengths"]
    most = int(lengths.max())
    kept = torch.zeros(*lengths.shape, most + 1, dtype=torch.bool)
    kept.scatter_(2, index.long().where(index >= 0, most), True)
    member = torch.arange(most).expand(*lengths.shape, most)
    member = member.where(~kept[..., :most] & (member < lengths[..., None]), -1).int()
    return pages | {"keep_index": index, "keep_count": count, "member_index": member.contiguous()}


def evict_assign(d: Draw) -> Call:
    options = some(d, similarity=lambda: "kv", clamp=lambda: False, min_similarity=lambda: d.random.random())
    return Call("evict_assign", _members(d) | options)


def evict_merge_(d: Draw) -> Call:
    lists = _members(d)
    members, count = lists["member_index"], lists["keep_count"]
    rank = (torch.rand(members.shape, generator=d.generator) * count[..., None]).int()
    target = rank.where((members >= 0) & (count[..., None] > 0), -1)
    weight, center = d.positive(*members.shape), d.positive(*lists["keep_index"].shape)
    options = some(
        d,
        values=lambda: d.pick("mean", "sum"),
        keys=lambda: d.pick("keep", "mean", "direction"),
        by_norm=lambda: True,
    )
    more = {"target": target, "weight": weight, "center": center}
    return Call("evict_merge_", lists | more | options, ("k_pages", "v_pages"))


def _grid(d: Draw) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Shape of what is quantized, and how."""
    layout, bits, axis = (
        d.pick("linear", "linear", "mma16_k", "mma16_v"),
        d.pick(2, 3, 4, 8),
        d.pick("token", "channel"),
    )
    batch, heads = d.size(2), d.size(3)
    rows, dim = (d.size(40), 8 * d.size(9)) if layout == "linear" else (16 * d.size(3), d.pick(64, 128))
    extent = dim if axis == "token" else rows
    divisors = [n for n in range(1, extent + 1) if extent % n == 0 and (layout == "linear" or n % 16 == 0)]
    kind = "fp8" if bits == 8 and d.maybe() else "int"
    group = d.pick(-1, *divisors)
    return (batch, heads, rows, dim), {
        "bits": bits,
        "axis": axis,
        "group": group,
        "layout": layout,
        "kind": kind,
    }


def _maps(d: Draw, *shape: int) -> dict[str, Tensor]:
    return some(d, pre_scale=lambda: d.positive(*shape), pre_bias=lambda: d.floats(*shape))


def kv_quantize(d: Draw) -> Call:
    (batch, heads, rows, dim), options = _grid(d)
    if options["kind"] == "int":
        options |= some(d, rounding=lambda: d.pick("even", "away"))
    x = d.floats(batch, heads, rows, dim, dtype=d.pick(*FLOATS))
    return Call("kv_quantize", {"x": x} | options | _maps(d, batch, heads, dim))


def kv_dequantize(d: Draw) -> Call:
    shape, options = _grid(d)
    x = torch.randn(shape, generator=d.generator)
    codes, params = ops.kv_quantize(x, **options)
    options |= _maps(d, *shape[:2], shape[3]) | some(d, dtype=lambda: d.pick(*FLOATS))
    return Call("kv_dequantize", {"codes": codes, "params": params} | options)


def kv_repack(d: Draw) -> Call:
    bits = d.pick(2, 3, 4, 8, 16)
    shape = (d.size(2), d.size(3), 16 * d.size(3), d.pick(64, 128, 256) * bits // 8)
    codes = torch.randint(0, 256, shape, generator=d.generator, dtype=torch.uint8)
    names = {name: d.pick("linear", "mma16_k", "mma16_v") for name in ("source", "target")}
    return Call("kv_repack", {"codes": codes, "bits": bits} | names)


def hadamard(d: Draw) -> Call:
    dim = 2 ** d.random.randrange(9)
    shape = d.pick((), (3,), (2, 5), (2, 3, 7), (1, 2, 0), (2, 2, 2, 2))
    signs = torch.randint(0, 2, (dim,), generator=d.generator) * 2.0 - 1
    options = some(d, signs=lambda: signs, inverse=lambda: True)
    return Call("hadamard", {"x": d.floats(*shape, dim, dtype=d.pick(*FLOATS)), **options})


def channel_stats(d: Draw) -> Call:
    batch, rows = d.size(3, 0), d.size(100, 0)
    x = d.floats(batch, d.size(3), rows, d.size(72), dtype=d.pick(*FLOATS))
    bounds = some(d, lengths=lambda: d.integers(0, rows, batch), starts=lambda: d.integers(0, rows, batch))
    return Call("channel_stats", {"x": x} | bounds)


def _format(d: Draw, tokens: int, dim: int) -> PageFormat:
    axes = [d.pick("token", "channel") for _ in range(2)]
    groups = [d.pick(-1, 8) for _ in range(2)]
    return PageFormat(d.pick(*TIERS), d.pick(*TIERS), tokens, dim, *axes, *groups)


def _pool(d: Draw, page: PageFormat, count: int) -> Tensor:
    """Pages of random tokens."""
    pool = torch.zeros(count, page.page_bytes, dtype=torch.uint8)
    x = torch.randn(1, 1, page.tokens, page.head_dim, generator=d.generator)
    index = torch.arange(page.tokens).repeat(count, 1)
    ops.kv_page_write_(pool, x, x, torch.zeros(count, dtype=torch.int32), index, torch.arange(count), page)
    return pool


def _page_maps(d: Draw, *shape: int) -> dict[str, Tensor]:
    return some(
        d, k_scale=lambda: d.positive(*shape), k_bias=lambda: d.floats(*shape),
        v_scale=lambda: d.positive(*shape), v_bias=lambda: d.floats(*shape),
    )  # fmt: skip


def kv_page_write_(d: Draw) -> Call:
    batch, heads, rows, dim, number = d.size(2), d.size(3), d.size(99), 8 * d.size(9), d.size(4, 0)
    page = _format(d, d.pick(16, 32, 64), dim)
    pool = torch.zeros(number + 2, page.page_bytes, dtype=torch.uint8)
    k, v = (d.floats(batch, heads, rows, dim, dtype=d.pick(FLOATS[number % 3])) for _ in range(2))
    lists = {
        "sequence": d.integers(0, batch * heads - 1, number),
        "index": d.integers(-1, rows - 1, number, page.tokens),
        "pages": d.order(number + 2)[:number],
    }
    maps = _page_maps(d, batch, heads, dim)
    return Call("kv_page_write_", {"pool": pool, "k": k, "v": v, **lists, "page": page, **maps}, ("pool",))


def kv_retier_(d: Draw) -> Call:
    pages, _ = store(d)
    dim, size = pages["k_pages"].shape[3], pages["k_pages"].shape[2]
    lengths = pages.pop("lengths")
    if dim % 8:
        return kv_retier_(d)
    page, number = _format(d, size, dim), d.size(4, 0)
    sequence = d.integers(0, lengths.numel() - 1, number)
    slot = torch.rand(number, size, generator=d.generator) * lengths.flatten()[sequence.long()][:, None]
    slot = slot.int().where(lengths.flatten()[sequence.long()][:, None] > 0, -1)
    lists = {"sequence": sequence, "slots": slot, "pages": d.order(number + 2)[:number], "page": page}
    pool = torch.zeros(number + 2, page.page_bytes, dtype=torch.uint8)
    return Call("kv_retier_", {"pool": pool} | pages | lists | _page_maps(d, *lengths.shape, dim), ("pool",))


def kv_page_read(d: Draw) -> Call:
    page, number = _format(d, d.pick(16, 32, 64), 8 * d.size(9)), d.size(5)
    maps = _page_maps(d, 1, 2, page.head_dim)
    if maps:
        maps["sequence"] = d.integers(0, 1, number)
    pages = d.integers(0, number - 1, number)
    options = some(d, dtype=lambda: d.pick(*FLOATS))
    return Call(
        "kv_page_read", {"pool": _pool(d, page, number), "pages": pages, "page": page, **maps, **options}
    )


def _paged(d: Draw, names: tuple[str, ...]) -> tuple[dict[str, Any], torch.dtype]:
    """A store for attention, with quantized pages in it or not."""
    pages, dtype = store(d)
    table, lengths = pages["block_table"], pages["lengths"]
    size, dim = pages["k_pages"].shape[2:]
    out: dict[str, Any] = dict(zip(names, (pages["k_pages"], pages["v_pages"]), strict=False))
    if pages["k_pages"].shape[1] == 1 and dim % 8 == 0 and d.maybe():
        formats = tuple(_format(d, size, dim) for _ in range(d.size(3)))
        pools = tuple(_pool(d, page, 5) for page in formats)
        kind = torch.randint(0, len(pools) + 1, table.shape, generator=d.generator)
        entry = table.where(kind == 0, (kind << 28 | torch.randint(0, 5, table.shape, generator=d.generator)))
        table = entry.where(table >= 0, -1).int()
        maps = _page_maps(d, *lengths.shape, dim)
        out["quantized"] = PagePools(pools, formats, **maps)
    return out | {"block_table": table, "lengths": lengths}, dtype


def paged_decode(d: Draw) -> Call:
    pages, dtype = _paged(d, ("k_pages", "v_pages"))
    (batch, heads), dim = pages["lengths"].shape, pages["k_pages"].shape[3]
    slots = pages["k_pages"].shape[2] * pages["block_table"].shape[2]
    group, rows = d.pick(1, 2, 4, 7), d.size(8, 0)
    options = some(
        d,
        scale=lambda: d.random.random() + 0.01,
        key_bias=lambda: d.floats(batch, *d.pick((), (heads,)), slots),
        q_position=lambda: d.integers(0, 200, batch, rows),
        window=lambda: d.size(99),
        softcap=lambda: d.random.random() * 9 + 0.1,
        sinks=lambda: d.floats(heads * group),
        causal=lambda: False,
        logits_out=lambda: True,
    )
    if d.maybe() and slots:
        index, count = _kept(d, pages["lengths"])
        options |= {"index": index} | some(d, index_count=lambda: count)
    q = d.floats(batch, heads * group, rows, dim, dtype=dtype)
    return Call("paged_decode", {"q": q} | pages | options)


def merge_states(d: Draw) -> Call:
    shape = (d.size(4, 0), *(d.size(5, 0) for _ in range(d.size(3))))
    out = torch.randn(*shape, d.size(40, 0), generator=d.generator).to(d.pick(*FLOATS))
    return Call("merge_states", {"out": out, "lse": torch.randn(shape, generator=d.generator)})


def qk_scores(d: Draw) -> Call:
    pages, dtype = _paged(d, ("k",))
    (batch, heads), dim = pages["lengths"].shape, pages["k"].shape[3]
    slots = pages["k"].shape[2] * pages["block_table"].shape[2]
    if "quantized" not in pages and d.maybe():
        pages["k_min"] = pages["k"] - 1 if pages["k"].is_contiguous() else pages["k"]
    options = some(
        d,
        scale=lambda: d.random.random() + 0.01,
        key_bias=lambda: d.floats(batch, *d.pick((), (heads,)), slots),
        starts=lambda: d.integers(0, slots, batch),
        softcap=lambda: d.random.random() * 9 + 0.1,
    )
    q = d.floats(batch, heads * d.pick(1, 2, 4, 7), dim, dtype=dtype)
    return Call("qk_scores", {"q": q} | pages | options)


def flash_prefill_pages(d: Draw) -> Call:
    pages, dtype = _paged(d, ("k", "v"))
    (batch, heads), dim = pages["lengths"].shape, pages["k"].shape[3]
    slots, rows = pages["k"].shape[2] * pages["block_table"].shape[2], d.size(70, 0)
    options = some(
        d,
        key_bias=lambda: d.floats(batch, *d.pick((), (heads,)), slots),
        window=lambda: d.size(99),
        sinks=lambda: d.floats(heads),
        q_counts=lambda: d.integers(0, rows, batch),
    )
    q = d.floats(batch, heads, rows, dim, dtype=dtype)
    return Call("flash_prefill", {"q": q} | pages | options)
