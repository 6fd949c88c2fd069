"""The paged cache against a plain copy of as many bytes and against the dense formulation, in one run.

    python bench/bench_kvcache.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

One layer of 8 kv heads of 128 channels. A decode step appends one token (plain: ``torch.cat``, as
``DynamicCache`` does); a prompt is appended, gathered, compacted to a half and to a quarter, turned to new
positions, and merged before it is compacted, and a half of it becomes int4 pages. Contenders take turns, and
the best time of each counts.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from bench_kvquant import plain_quantize
from common import Row, command, interleaved_seconds
from tokencomp import ops, rope
from tokencomp.ops.kvquant_pages import PageFormat
from torch import Tensor

HKV, D = 8, 128
Contenders = dict[str, Callable[[int], object]]


@dataclass(frozen=True)
class Problem:
    """A prompt of ``tokens`` in one layer; the tensors are the same every time."""

    tokens: int
    dtype: torch.dtype
    P: int

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens {str(self.dtype).removeprefix('torch.')}"

    def bytes(self, tokens: float) -> float:
        """Of the keys and values of so many tokens, read and written."""
        return 2.0 * 2 * HKV * tokens * D * self.dtype.itemsize


class Layer:
    """Filled pages in a random order, and dense tensors of the same size."""

    def __init__(self, p: Problem, device: str) -> None:
        g = torch.Generator().manual_seed(0)
        places = -(-p.tokens // p.P) + 1
        pool = torch.zeros(HKV * places, 2, p.P, D, dtype=p.dtype, device=device)
        self.pages = pool[:, 0:1], pool[:, 1:2]
        self.table = torch.randperm(HKV * places, generator=g).int().view(1, HKV, places).to(device)
        self.dense = tuple(torch.randn(1, HKV, p.tokens, D, generator=g).to(p.dtype).to(device) for _ in "kv")
        self.out = tuple(torch.empty_like(x) for x in self.dense)
        self.empty = torch.zeros(1, HKV, dtype=torch.int32, device=device)
        self.full = self.empty + p.tokens
        self.append()

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.pages, self.table, self.full

    def append(self) -> None:
        k, v = self.dense
        ops.kv_append_(*self.pages, k, v, self.table, self.empty)

    def copy(self, tokens: int, turn: int = 0) -> None:
        """As many tokens, from another place every turn, so that they come from memory as kept slots do."""
        first = turn * tokens % (self.dense[0].shape[2] - tokens + 1)
        for x, y in zip(self.out, self.dense, strict=True):
            x[:, :, first : first + tokens].copy_(y[:, :, first : first + tokens])

    def kept(self, share: float) -> tuple[Tensor, Tensor]:
        """A random choice of slots for each head, ascending, and their number."""
        g = torch.Generator().manual_seed(1)
        tokens = self.dense[0].shape[2]
        chosen = [
            torch.randperm(tokens, generator=g)[: int(share * tokens)].sort().values for _ in range(HKV)
        ]
        index = torch.stack(chosen).int()[None].to(self.table.device)
        return index, self.empty + index.shape[2]

    def select(self, index: Tensor) -> list[Tensor]:
        """What compaction is on dense tensors."""
        wide = index.long()[..., None].expand(-1, -1, -1, D)
        return [x.gather(2, wide) for x in self.dense]


def step_stage(p: Problem, device: str) -> tuple[str, float, float, Contenders]:
    layer = Layer(p, device)
    k, v = (torch.randn(1, 1, HKV, D, device=device).to(p.dtype).transpose(1, 2) for _ in "kv")
    return (
        f"append one token to {p.name}",
        0.0,
        p.bytes(1),
        {
            "tokencomp": lambda _: ops.kv_append_(*layer.pages, k, v, layer.table, layer.full),
            "dense": lambda _: [torch.cat((x, y), dim=2) for x, y in zip(layer.dense, (k, v), strict=True)],
        },
    )


def copy_stages(p: Problem, device: str) -> Iterator[tuple[str, float, float, Contenders]]:
    layer = Layer(p, device)
    tokens = p.tokens
    yield (
        f"append {p.name}",
        0.0,
        p.bytes(tokens),
        {"tokencomp": lambda _: layer.append(), "copy": lambda _: layer.copy(tokens)},
    )
    yield (
        f"gather {p.name}",
        0.0,
        p.bytes(tokens),
        {"tokencomp": lambda _: ops.kv_gather(*layer.rows, size=tokens),
         "copy": lambda _: [x.clone() for x in layer.dense]},
    )  # fmt: skip
    for share in (0.5, 0.25):
        index, count = layer.kept(share)
        yield (
            f"compact {p.name} to {share:.0%}",
            0.0,
            p.bytes(share * tokens),
            {
                "tokencomp": lambda _, i=index, n=count: ops.kv_compact_(*layer.rows, i, n),  # type: ignore[misc]
                "tokencomp, holefill": lambda _, i=index, n=count: ops.kv_compact_(  # type: ignore[misc]
                    *layer.rows, i, n, order="holefill"
                ),
                "copy": lambda turn, n=int(share * tokens): layer.copy(n, turn),  # type: ignore[misc]
                "dense": lambda _, i=index: layer.select(i),  # type: ignore[misc]
            },
        )


def turn(keys: Tensor, delta: Tensor, inv_freq: Tensor) -> Tensor:
    """``rope_shift_`` on dense keys."""
    angle = delta[..., None].float() * inv_freq
    cos, sin = angle.cos(), angle.sin()
    x, y = keys.float().chunk(2, dim=-1)
    return torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1).to(keys.dtype)


def arithmetic_stages(p: Problem, device: str) -> Iterator[tuple[str, float, float, Contenders]]:
    layer, tokens = Layer(p, device), p.tokens
    inv_freq = rope.inverse_frequencies({"rope_theta": 10000.0}, D).to(device)
    old = torch.arange(tokens, dtype=torch.int32, device=device).repeat(1, HKV, 1)
    for what, new in (("by one distance", old - 7), ("by many distances", old // 4)):
        yield (
            f"turn {p.name} {what}",
            0.0,
            p.bytes(tokens) / 2,
            {
                "tokencomp": lambda _, new=new: ops.rope_shift_(  # type: ignore[misc]
                    layer.pages[0], layer.table, layer.full, old, new, inv_freq
                ),
                "dense": lambda _, new=new: turn(layer.dense[0], new - old, inv_freq),  # type: ignore[misc]
            },
        )
    index, count = layer.kept(0.25)
    rest = [sorted(set(range(tokens)) - set(row.tolist())) for row in index[0]]
    member = torch.tensor(rest, dtype=torch.int32, device=device)[None, :, : index.shape[2]].contiguous()
    pairs = index.shape[2] * member.shape[2]
    target = (torch.arange(member.shape[2], device=device).int() % index.shape[2]).repeat(1, HKV, 1)
    weight, center = torch.ones(member.shape, device=device), torch.ones(index.shape, device=device)
    yield (
        f"assign {member.shape[2]} to {index.shape[2]} by keys and values, {p.name}",
        2.0 * 2 * HKV * pairs * D,
        p.bytes(0.5 * tokens) / 2,
        {
            "tokencomp": lambda _: ops.evict_assign(*layer.rows, index, count, member, similarity="kv"),
            "dense": lambda _: nearest(layer, index, member),
        },
    )
    yield (
        f"merge {member.shape[2]} into {index.shape[2]}, {p.name}",
        0.0,
        p.bytes(0.75 * tokens) / 2,
        {
            "tokencomp": lambda _: ops.evict_merge_(
                *layer.rows, index, count, member, target, weight, center, keys="mean"
            ),
            "dense": lambda _: mixed(layer, index, member, target, weight, center),
        },
    )


def retier_stage(p: Problem, device: str) -> tuple[str, float, float, Contenders]:
    """A random half of the slots of each head, from working pages to int4 pages."""
    layer = Layer(p, device)
    page = PageFormat(tokens=p.P, head_dim=D, layout="mma16" if device == "cuda" else "linear")
    index, _ = layer.kept(0.5)
    slots = index.view(-1, p.P)
    number = torch.arange(len(slots), dtype=torch.int32, device=device)
    sequence = number // (len(slots) // HKV)
    pool = torch.zeros(len(slots), page.page_bytes, dtype=torch.uint8, device=device)

    def dense() -> list[tuple[Tensor, Tensor]]:
        k, v = layer.select(index)
        return [plain_quantize(k, 4, "channel", p.P), plain_quantize(v, 4, "token", D)]

    return (
        f"half to int4 pages, {p.name}",
        0.0,
        p.bytes(0.5 * p.tokens) / 2 + pool.numel(),
        {
            "tokencomp": lambda _: ops.kv_retier_(
                pool, *layer.pages, layer.table, sequence, slots, number, page
            ),
            "copy": lambda turn: layer.copy(p.tokens // 2, turn),
            "dense": lambda _: dense(),
        },
    )


def nearest(layer: Layer, index: Tensor, member: Tensor) -> Tensor:
    """``evict_assign`` through the matrix of all similarities."""
    product: Tensor | None = None
    for a, b in zip(layer.select(member), layer.select(index), strict=True):
        a, b = (torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype) for x in (a, b))
        cosine = (a @ b.mT).clamp(min=0)
        product = cosine if product is None else product * cosine
    assert product is not None
    return product.max(-1).indices


def mixed(
    layer: Layer, index: Tensor, member: Tensor, target: Tensor, weight: Tensor, center: Tensor
) -> list[Tensor]:
    """``evict_merge_`` by scattered sums."""
    wide = target.long()[..., None].expand(-1, -1, -1, D)
    total = center.scatter_add(2, target.long(), weight)[..., None]
    sums = [
        (c.float() * center[..., None]).scatter_add(2, wide, x.float() * weight[..., None]) / total
        for c, x in zip(layer.select(index), layer.select(member), strict=True)
    ]
    return [x.to(layer.dense[0].dtype) for x in sums]


def stages(device: str, *, quick: bool) -> Iterator[tuple[str, float, float, Contenders]]:
    P = 64 if device == "cuda" else 32
    sizes = (2048,) if quick else (8192, 32768)
    for tokens in sizes:
        yield step_stage(Problem(tokens, torch.bfloat16, P), device)
    for tokens in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            yield from copy_stages(Problem(tokens, dtype, P), device)
    for dtype in (torch.bfloat16, torch.float32):
        yield from arithmetic_stages(Problem(sizes[0], dtype, P), device)
        yield retier_stage(Problem(sizes[0], dtype, P), device)


def check(device: str) -> None:
    """Compaction and turning give what the dense formulation gives."""
    layer = Layer(Problem(777, torch.float32, 32), device)
    index, count = layer.kept(0.5)
    want = layer.select(index)
    old = torch.arange(777, dtype=torch.int32, device=device).repeat(1, HKV, 1)
    inv_freq = rope.inverse_frequencies({"rope_theta": 10000.0}, D).to(device)
    turned = turn(want[0], torch.full_like(index, 9), inv_freq)
    ops.kv_compact_(*layer.rows, index, count)
    k, v = ops.kv_gather(*layer.pages, layer.table, count, size=index.shape[2])
    ops.rope_shift_(layer.pages[0], layer.table, count, old, old + 9, inv_freq)
    again, _ = ops.kv_gather(*layer.pages, layer.table, count, size=index.shape[2])
    if not (torch.equal(k, want[0]) and torch.equal(v, want[1]) and torch.allclose(again, turned, atol=1e-5)):
        raise SystemExit("kvcache: the cache differs from the dense formulation")


def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    if checked:
        check(device)
    rows: list[Row] = []
    for name, flops, size, contenders in stages(device, quick=quick):
        times = interleaved_seconds(contenders, device, budget=1.5)
        rows += [
            Row("kvcache", name, who, seconds, flops, size, baseline=who in ("copy", "dense"))
            for who, seconds in times.items()
        ]
        print(f"{name}: " + ", ".join(f"{who} {s * 1e3:.4f} ms" for who, s in times.items()), file=sys.stderr)
    return rows


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
