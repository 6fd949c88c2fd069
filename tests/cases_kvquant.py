"""Cases of the kvquant family as data, for the tests, opcheck, the per-ISA checks and the emulator."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import DTYPES
from cases_merge import generator, name_of
from tokencomp import reference
from tokencomp.ops.kvquant_pages import PageFormat
from torch import Tensor

BITS = (2, 3, 4, 8)
MMA_LAYOUTS = ("mma16_k", "mma16_v")
NAN, INF = float("nan"), float("inf")


def strided(x: Tensor, view: str) -> Tensor:
    """``[B, H, S, D]`` behind other strides, NaN between: transposed, or rows inside wider ones."""
    b, h, s, d = x.shape
    if view == "hf":
        out = x.new_full((b, s, h, d), NAN).transpose(1, 2)
    elif view == "sliced":
        out = x.new_full((b, h, s + 2, d + 3), NAN)[:, :, 1 : s + 1, 1 : d + 1]
    else:
        return x
    return out.copy_(x)


@dataclass(frozen=True)
class QuantCase:
    """One call of ``kv_quantize``, and what comes back."""

    B: int
    H: int
    S: int
    D: int
    bits: int
    dtype: str = "float32"
    axis: str = "token"
    group: int = -1
    maps: str = ""  # scale | bias | both
    layout: str = "linear"
    rounding: str = "even"
    kind: str = "int"
    view: str = ""
    data: str = "gauss"  # gauss | ties | bad (NaN, infinities, beyond fp16) | tiny | constant | offset
    slow: bool = False

    @property
    def name(self) -> str:
        return name_of(self)

    @property
    def work(self) -> int:
        return self.B * self.H * self.S * self.D * 64

    def x(self) -> Tensor:
        g = generator(self.name)
        x = torch.randn(self.B, self.H, self.S, self.D, generator=g)
        if self.data == "ties":
            x = torch.randint(0, 2 * 2**self.bits - 1, x.shape, generator=g) / 2
            x[..., :1], x[..., 1:2] = 0.0, 2**self.bits - 1
        elif self.data == "bad":
            flat = x.view(-1)
            for i, value in enumerate((NAN, INF, -INF, 7e4, -7e4, 6.55e4)):
                flat[(i * 7919 + 13) % flat.numel()] = value
        elif self.data == "tiny":
            x *= 1e-6
        elif self.data == "constant":
            x = x[..., :1].expand_as(x).clone()
        elif self.data == "offset":
            x = 30 + 0.05 * x
        return strided(x.to(getattr(torch, self.dtype)), self.view)

    def stored(self) -> dict[str, Any]:
        """Options of the stored form, shared by both directions."""
        options = {"axis": self.axis, "group": self.group, "layout": self.layout, "kind": self.kind}
        g = generator(self.name + "maps")
        shape = self.B, self.H, self.D
        if self.maps in ("scale", "both"):
            options["pre_scale"] = torch.rand(shape, generator=g) + 0.25
        if self.maps in ("bias", "both"):
            options["pre_bias"] = torch.randn(shape, generator=g)
        return options

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of ``kv_quantize``."""
        return (self.x(), self.bits), {**self.stored(), "rounding": self.rounding}


@dataclass(frozen=True)
class DequantCase:
    """A call of ``kv_dequantize`` on what a case stores."""

    case: QuantCase

    @property
    def name(self) -> str:
        return self.case.name

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (x, bits), options = self.case.arguments()
        codes, params = reference.kv_quantize(x, bits, **options, dtype=torch.float32)
        return (codes, params, bits), {**self.case.stored(), "dtype": x.dtype}


def _quant_cases() -> list[QuantCase]:
    base = QuantCase(2, 3, 33, 128, 4)
    cases = [replace(base, bits=b, dtype=d, group=g) for b in BITS for d in DTYPES for g in (128, 32)]
    cases += [replace(base, bits=b, dtype=d, axis="channel", group=11) for b in BITS for d in DTYPES]
    cases += [replace(base, bits=b, S=48, axis="channel", group=g, D=64) for b in BITS for g in (16, -1)]
    cases += [
        replace(base, B=1, H=2, S=32, D=d, bits=b, layout=layout, axis=axis, group=16)
        for b in BITS
        for d in (64, 128, 256)
        for layout in MMA_LAYOUTS
        for axis in ("token", "channel")
    ]
    cases += [
        replace(base, maps=m, axis=a, view=v)
        for m, v in (("scale", "hf"), ("bias", "sliced"), ("both", ""))
        for a in ("token", "channel")
    ]
    cases += [replace(base, dtype=d, view=v, bits=2, group=64) for d in DTYPES for v in ("hf", "sliced")]
    for data in ("ties", "bad", "tiny", "constant", "offset"):
        cases += [replace(base, data=data, bits=b, rounding=r) for b in (2, 4) for r in ("even", "away")]
        cases += [replace(base, data=data, axis="channel", bits=3, rounding="away", group=3)]
        cases += [replace(base, data=data, bits=8, kind="fp8", group=64)]
    cases += [replace(base, data="bad", dtype="bfloat16", axis="channel")]
    cases += [
        replace(base, bits=8, kind="fp8", dtype=d, axis=a, maps="both")
        for d in DTYPES
        for a in ("token", "channel")
    ]
    cases += [replace(base, S=16, D=64, bits=8, kind="fp8", layout="mma16_v")]
    sizes = [(1, 8), (4, 4), (40, 20), (24, 8), (96, 48), (80, -1), (256, 256), (104, 13), (200, 25)]
    cases += [
        replace(base, D=d, group=g, bits=b, S=5)
        for d, g in sizes
        for b in BITS
        if d % 8 == 0 or b in (4, 8) or (b == 2 and d % 4 == 0)
        if d > 1 or b == 8
        if g == -1 or d % g == 0
    ]
    cases += [
        replace(base, B=0),
        replace(base, S=0),
        replace(base, S=0, axis="channel"),
        replace(base, S=1, axis="channel", group=1),
    ]
    return [
        *cases,
        QuantCase(1, 8, 4096, 128, 4, "bfloat16", slow=True),
        QuantCase(1, 4, 2048, 128, 2, "float16", axis="channel", group=64, slow=True),
    ]


@dataclass(frozen=True)
class PageCase:
    """Pages of one format, written in disorder with holes, and read back."""

    tier_k: str
    tier_v: str
    P: int = 32
    D: int = 64
    axis_k: str = "channel"
    axis_v: str = "token"
    group_k: int = -1
    group_v: int = -1
    layout: str = "linear"
    dtype: str = "float32"
    maps: bool = False
    holes: bool = False
    n: int = 5

    @property
    def name(self) -> str:
        return name_of(self)

    @property
    def work(self) -> int:
        return self.n * self.P * self.D * 128

    @property
    def format(self) -> PageFormat:
        return PageFormat(
            self.tier_k, self.tier_v, self.P, self.D,
            self.axis_k, self.axis_v, self.group_k, self.group_v, self.layout,
        )  # fmt: skip

    def inputs(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """``pool, k, v, sequence, index, pages`` and the maps."""
        g = generator(self.name)
        b, h, s, total = 2, 3, 3 * self.P + 5, self.n + 4
        k, v = (
            strided(torch.randn(b, h, s, self.D, generator=g).to(getattr(torch, self.dtype)), "hf")
            for _ in "kv"
        )
        pool = torch.randint(0, 256, (total, self.format.page_bytes), generator=g).to(torch.uint8)
        sequence = torch.randint(0, b * h, (self.n,), generator=g).int()
        index = torch.rand(self.n, s, generator=g).argsort(1)[:, : self.P].int()
        if self.holes:
            index[torch.rand(index.shape, generator=g) < 0.3] = -1
            index[0] = -1
        pages = torch.randperm(total, generator=g)[: self.n].int()
        maps: dict[str, Tensor] = {}
        if self.maps:
            for name in ("k_scale", "k_bias", "v_scale", "v_bias"):
                maps[name] = torch.rand(b, h, self.D, generator=g) + 0.5
        return (pool, k, v, sequence, index, pages), maps


@dataclass(frozen=True)
class RetierCase:
    """The same pages, from slots of working pages: one head a page, or all (``engine``)."""

    case: PageCase
    engine: bool = False

    @property
    def name(self) -> str:
        return f"{self.case.name}{'-engine' if self.engine else ''}"

    def inputs(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """``pool, k_pages, v_pages, block_table, sequence, slots, pages`` and the maps."""
        (pool, k, v, sequence, index, pages), maps = self.case.inputs()
        (b, h, s, d), size, g = k.shape, self.case.P, generator(self.name)
        places = -(-s // size)
        owners = b if self.engine else b * h
        table = torch.randperm(owners * places + 2, generator=g)[: owners * places].int()
        table = table.view(b, -1, places).expand(b, h, places).contiguous()
        rows = [
            torch.zeros(owners * places + 2, h if self.engine else 1, size, d, dtype=k.dtype) for _ in "kv"
        ]
        for target, x in zip(rows, (k, v), strict=True):
            padded = torch.nn.functional.pad(x, (0, 0, 0, places * size - s)).unflatten(2, (places, size))
            for head in range(h):
                target[table[:, head].long(), head if self.engine else 0] = padded[:, head]
        if self.engine:  # as FlashInfer has them
            rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in rows]
        return (pool, *rows, table, sequence, index, pages), maps

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tensors, maps = self.inputs()
        return tensors, {**self.case.format.options(), **maps}


@dataclass(frozen=True)
class PageCall:
    """A page operator's arguments, as it is called below the wrapper."""

    name: str
    positional: tuple[Any, ...]
    options: dict[str, Any]

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.positional, self.options


def _page_cases() -> list[PageCase]:
    base = PageCase("int4", "int4")
    tiers = ("fp8", "int8", "int4", "int3", "int2")
    cases = [
        replace(base, tier_k=k, tier_v=tiers[(i + 2) % 5], layout=layout)
        for i, k in enumerate(tiers)
        for layout in ("linear", "mma16")
    ]
    cases += [
        replace(base, P=p, D=d, axis_k="token", group_k=32, group_v=64, layout=layout, tier_k="int2")
        for p in (16, 64)
        for d in (64, 128, 256)
        for layout in ("linear", "mma16")
    ]
    cases += [
        replace(base, dtype=d, maps=True, holes=h, axis_v=a)
        for d in DTYPES
        for h in (False, True)
        for a in ("token", "channel")
    ]
    return [
        *cases,
        replace(base, holes=True, layout="mma16"),
        replace(base, n=0),
        replace(base, D=40, group_k=16, axis_v="channel"),
    ]


QUANT_CASES, PAGE_CASES = _quant_cases(), _page_cases()
RETIER_CASES = [RetierCase(case, engine=i % 3 == 1) for i, case in enumerate(PAGE_CASES)]


def opcheck_cases() -> dict[str, list[Any]]:
    """Operator -> cases small enough for opcheck."""
    small = [c for c in QUANT_CASES if not c.slow and c.data != "bad"][::23]
    pages: dict[str, list[Any]] = {"kv_page_write_": [], "kv_page_read": []}
    for case in PAGE_CASES[::17]:
        tensors, maps = case.inputs()
        options = {**case.format.options(), **maps}
        pages["kv_page_write_"].append(PageCall(case.name, tensors, options))
        zeros = torch.zeros_like(tensors[0])  # random bytes would hold steps that are NaN
        read = (zeros, tensors[5], case.P, case.D)
        options = {**options, "sequence": tensors[3], "dtype": torch.float16}
        pages["kv_page_read"].append(PageCall(case.name, read, options))
    x, codes = torch.randn(2, 3, 7, 16), torch.randint(0, 256, (2, 2, 16, 32)).to(torch.uint8)
    signs = torch.randn(16).sign()
    return {
        "kv_quantize": small,
        "kv_dequantize": [DequantCase(case) for case in small[1::2]],
        "kv_repack": [PageCall("repack", (codes, 4, "linear", "mma16_k"), {})],
        "hadamard": [PageCall("plain", (x,), {}), PageCall("signs", (x, signs), {"inverse": True})],
        "kv_retier_": RETIER_CASES[::11],
        "channel_stats": [PageCall("stats", (x,), {"lengths": torch.tensor([3, 7], dtype=torch.int32)})],
        **pages,
    }
