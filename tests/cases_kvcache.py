"""Cases of the paged KV cache: pools, tables and lengths, and the arguments of every operator on them.

Pages are handed out in a random order, every page nobody uses and every slot behind a row's length is NaN,
and so are the gaps between the slots of engines that keep keys and values side by side.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokencomp.reference.kvcache import write_row
from torch import Tensor

LAYOUTS = ("own", "flashinfer", "vllm")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class Cache:
    """A pool with rows in it: the first four arguments of every operator."""

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    lengths: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k_pages, self.v_pages, self.block_table, self.lengths

    def clone(self) -> "Cache":
        """The same strides, memory of its own."""
        return Cache(*(_clone(t) for t in self.parts))


def _clone(t: Tensor) -> Tensor:
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    if t.numel() == 0:
        return t.clone()
    return t.as_strided((span,), (1,), t.storage_offset()).clone().as_strided(t.shape, t.stride())


@dataclass(frozen=True)
class KVCase:
    """One cache and what is done to it."""

    lengths: tuple[tuple[int, ...], ...]  # [B][Hkv]
    D: int = 64
    Dv: int = 0  # 0: as D
    P: int = 16
    dtype: str = "float32"
    layout: str = "own"
    T: int = 1  # tokens appended
    padded: str = ""  # "" | left | right
    keep: float = 0.5  # share of the slots kept
    slow: bool = False

    @property
    def B(self) -> int:
        return len(self.lengths)

    @property
    def Hkv(self) -> int:
        return len(self.lengths[0])

    @property
    def work(self) -> int:
        return (sum(map(sum, self.lengths)) + self.B * self.Hkv * self.T) * (self.D + (self.Dv or self.D))

    @property
    def name(self) -> str:
        parts = ["/".join("+".join(map(str, row)) for row in self.lengths) + f"d{self.D}"]
        parts += [f"v{self.Dv}"] * bool(self.Dv) + [f"p{self.P}", self.dtype, self.layout, f"t{self.T}"]
        parts += [self.padded] * bool(self.padded) + [f"keep{self.keep}"] * (self.keep != 0.5)
        return "-".join(parts)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

    def cache(self) -> Cache:
        """Rows filled with random tokens, and places for ``T`` more."""
        g, dtype = self.generator(), getattr(torch, self.dtype)
        lengths = torch.tensor(self.lengths, dtype=torch.int32).view(self.B, self.Hkv)
        places = -(-(lengths + self.T) // self.P)
        shared = self.layout != "own"
        table = torch.full((self.B, 1 if shared else self.Hkv, int(places.max()) + 2), -1, dtype=torch.int32)
        wanted = places.amax(1, keepdim=True) if shared else places
        free = torch.randperm(int(wanted.sum()) + 3, generator=g).int()
        N, used = len(free), 0
        for b in range(self.B):
            for h in range(table.shape[1]):
                n = int(wanted[b, h])
                table[b, h, :n] = free[used : used + n]
                used += n
        table = table.expand(self.B, self.Hkv, -1)
        k_pages, v_pages = self._pools(N, dtype)
        for b, row in enumerate(self.lengths):
            for h, n in enumerate(row):
                for pages in (k_pages, v_pages):
                    write_row(pages, table, b, h, 0, torch.randn(n, pages.shape[3], generator=g))
        return Cache(k_pages, v_pages, table, lengths)

    def _pools(self, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        D, Dv, H, P = self.D, self.Dv or self.D, self.Hkv, self.P
        nan = float("nan")
        if self.layout == "vllm":  # [N, P, H, D], keys and values apart
            return (
                torch.full((N, P, H, D), nan, dtype=dtype).transpose(1, 2),
                torch.full((N, P, H, Dv), nan, dtype=dtype).transpose(1, 2),
            )
        if self.layout == "flashinfer":  # [N, 2, P, H, D], one tensor
            pool = torch.full((N, 2, P, H, max(D, Dv)), nan, dtype=dtype).transpose(2, 3)
            return pool[:, 0, :, :, :D], pool[:, 1, :, :, :Dv]
        pool = torch.full((N, 2, P, max(D, Dv)), nan, dtype=dtype)
        return pool[:, 0:1, :, :D], pool[:, 1:2, :, :Dv]

    def tokens(self) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        """New tokens as attention hands them over, ``[B, T, H, D]`` seen as ``[B, H, T, D]``; their range."""
        g, dtype = self.generator(), getattr(torch, self.dtype)
        k, v = (
            torch.randn(self.B, self.T, self.Hkv, D, generator=g).to(dtype).transpose(1, 2)
            for D in (self.D, self.Dv or self.D)
        )
        if not self.padded:
            return (k, v), {}
        counts = torch.randint(0, self.T + 1, (self.B,), generator=g, dtype=torch.int32)
        starts = self.T - counts if self.padded == "left" else torch.zeros_like(counts)
        return (k, v), {"starts": starts, "counts": counts}

    def kept(self) -> tuple[Tensor, Tensor]:
        """Ascending slots to keep, -1 padded, and their number: ragged."""
        g = self.generator()
        lists = [
            (torch.rand(n, generator=g) < self.keep).nonzero()[:, 0] for row in self.lengths for n in row
        ]
        return pad_lists(lists, self.B, self.Hkv)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Old and new positions by slot ``[B, Hkv, S]``: ascending; some tokens stay, most move far."""
        g, S = self.generator(), max(map(max, self.lengths)) + 2
        old = torch.randint(0, 9, (self.B, self.Hkv, S), generator=g).cumsum(2) * 50
        new = torch.arange(S).expand(self.B, self.Hkv, S).clone()
        new[:, :, : S // 4] = old[:, :, : S // 4]
        return old.int(), new.int()

    def frequencies(self) -> Tensor:
        """Of two thirds of the channels, in pairs."""
        pairs = max(1, self.D // 3)
        return 10000.0 ** -(torch.arange(pairs) / pairs)

    def members(self) -> Tensor:
        """Two thirds of the slots that are not kept ``[B, Hkv, M]``, in a random order, with holes."""
        g, (index, count) = self.generator(), self.kept()
        lists = []
        for b, row in enumerate(self.lengths):
            for h, n in enumerate(row):
                kept = set(index[b, h, : int(count[b, h])].tolist())
                rest = torch.tensor([slot for slot in range(n) if slot not in kept], dtype=torch.int64)
                order = torch.randperm(len(rest), generator=g)[: (2 * len(rest) + 2) // 3]
                lists.append(rest[order].where(torch.rand(len(order), generator=g) > 0.1, -1))
        return pad_lists(lists, self.B, self.Hkv)[0]

    def mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """Targets and weights of the members, weights of the kept slots; some are -1 or 0."""
        g, (index, count), member = self.generator(), self.kept(), self.members()
        rank = (torch.rand(member.shape, generator=g) * (count[..., None] + 1)).int() - 1
        weight, center = (torch.rand(t.shape, generator=g) for t in (member, index))
        return rank, weight * (weight > 0.1), center * (center > 0.2)

    def arguments(self, op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of operator ``op``."""
        cache = self.cache().parts
        if op == "kv_append_":
            (k, v), ranges = self.tokens()
            return (cache[0], cache[1], k, v, *cache[2:]), ranges
        if op == "rope_shift_":
            return (cache[0], *cache[2:], *self.positions(), self.frequencies()), {}
        index, count = self.kept()
        if op == "kv_gather":
            return cache, {"index": index, "count": count, "size": index.shape[2] + 3}
        if op == "evict_assign":
            return (*cache, index, count, self.members()), {"similarity": "kv"}
        if op == "evict_merge_":
            return (*cache, index, count, self.members(), *self.mixture()), {"keys": "direction"}
        return (*cache, index, count), {}


def pad_lists(lists: list[Tensor], B: int, Hkv: int, spare: int = 2) -> tuple[Tensor, Tensor]:
    """Lists of slots as ``[B, Hkv, K]`` int32, -1 padded, and their lengths ``[B, Hkv]``."""
    K = max((len(slots) for slots in lists), default=0) + spare
    index = torch.full((B * Hkv, K), -1, dtype=torch.int32)
    for row, slots in enumerate(lists):
        index[row, : len(slots)] = slots.int()
    count = torch.tensor([len(slots) for slots in lists], dtype=torch.int32)
    return index.view(B, Hkv, K), count.view(B, Hkv)


RAGGED = ((0, 1, 15), (16, 17, 33), (70, 5, 64))


def _cases() -> list[KVCase]:
    base = KVCase(RAGGED)
    cases = [
        replace(base, P=P, dtype=DTYPES[i // 3], layout=LAYOUTS[i % 3])
        for i, P in enumerate((16, 32, 64) * 3)
    ]
    cases += [replace(base, dtype=dtype, layout=layout) for dtype in DTYPES for layout in LAYOUTS]
    cases += [replace(base, D=D, dtype=dtype) for D in (96, 128, 256) for dtype in ("float32", "bfloat16")]
    cases += [replace(base, D=D, Dv=Dv, dtype=dtype, layout=layout)
              for (D, Dv), dtype, layout in zip(((1, 3), (7, 80), (65, 64), (192, 128), (100, 36), (24, 8)),
                                                DTYPES * 2, sorted(LAYOUTS * 2), strict=True)]  # fmt: skip
    cases += [replace(base, T=T, padded=padded, P=P) for T, P in ((7, 16), (40, 32), (129, 64))
              for padded in ("", "left", "right")]  # fmt: skip
    cases += [replace(base, keep=keep, layout=layout) for keep in (0.0, 0.1, 0.9, 1.0) for layout in LAYOUTS]
    cases += [
        KVCase(((0,),)),
        KVCase(((0, 0), (0, 0)), layout="vllm"),
        KVCase(((1,),), D=128, dtype="bfloat16"),
    ]
    cases += [KVCase(((300, 3, 257, 64),), D=128, P=32, dtype="bfloat16", T=3, keep=0.3)]
    cases += [KVCase(((2000, 1500),) * 4, D=128, P=64, dtype="float16", T=64, slow=True)]
    return list(dict.fromkeys(cases))


KV_CASES = _cases()
