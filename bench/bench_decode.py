"""Decode attention over pages against PyTorch's, in one run.

    python bench/bench_decode.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

One layer of an 8B language model (Hq=32, Hkv=8, D=128), one new token. ``sdpa`` is what Hugging Face calls:
``scaled_dot_product_attention`` on keys and values repeated for the heads of a group, ``sdpa gqa`` the
same with ``enable_gqa``, ``sdpa folded`` with the heads of a group as query rows. Peers read dense tensors,
we read pages in disorder. ``tokencomp list`` looks at 2048 slots of all, its peers attend to all. ``read`` is
a maximum over the words of the pool: the floor. By page type: bytes are those of the store; peers
dequantize all of an int4 cache before they attend, as Hugging Face's QuantizedCache does. Contenders take
turns and the best time counts, because machines are shared.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import decode_types
import engines
import torch
from common import Row, command, interleaved_seconds
from tokencomp import ops
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

HQ, HKV, D, LISTED = 32, 8, 128, 2048


@dataclass(frozen=True)
class Problem:
    """One step over ``keys`` tokens; ``tensors`` makes the same data every time."""

    keys: int
    page: int
    dtype: torch.dtype
    batch: int = 1

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"paged_decode B={self.batch} Hq={HQ} Hkv={HKV} S={self.keys} D={D} P={self.page} {dtype}"

    @property
    def bytes(self) -> float:
        return 2.0 * self.batch * HKV * self.keys * D * self.dtype.itemsize

    def tensors(self, device: str) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(0)
        pages = self.batch * HKV * self.keys // self.page
        pool = torch.randn(pages, 2, self.page, D, generator=g).to(self.dtype)
        order = torch.randperm(pages, generator=g).view(self.batch, HKV, -1)
        k, v = (pool[order.flatten(), i].view(self.batch, HKV, self.keys, D) for i in (0, 1))
        listed = torch.stack([torch.randperm(self.keys, generator=g) for _ in range(self.batch * HKV)])
        index = listed[:, :LISTED].sort(1).values.view(self.batch, HKV, -1).int()
        lengths = torch.full((self.batch, HKV), self.keys, dtype=torch.int32)
        q = torch.randn(self.batch, HQ, 1, D, generator=g).to(self.dtype)
        found = {
            "q": q,
            "pool": pool,
            "k": k,
            "v": v,
            "table": order.int(),
            "index": index,
            "lengths": lengths,
        }
        return {name: t.to(device) for name, t in found.items()}


def problems(quick: bool, device: str) -> list[Problem]:
    page = 64 if device == "cuda" else 32
    sizes = (512, 2048) if quick else (512, 2048, 8192, 32768)
    found = [Problem(keys, page, torch.bfloat16) for keys in sizes]
    if not quick:
        found += [Problem(8192, page, dtype) for dtype in (torch.float16, torch.float32)]
    if device == "cuda" and not quick:
        found += [Problem(131072, page, torch.bfloat16), Problem(8192, page, torch.bfloat16, batch=16)]
    return found


def ours(t: dict[str, Tensor], **options: Any) -> Tensor:
    k, v = t["pool"][:, 0:1], t["pool"][:, 1:2]
    return ops.paged_decode(t["q"], k, v, t["table"], t["lengths"], **options)[0]


def repeated(x: Tensor) -> Tensor:
    """Keys or values for every query head, as transformers 5.23 makes them."""
    batch, heads, keys, dim = x.shape
    return x[:, :, None].expand(batch, heads, HQ // HKV, keys, dim).reshape(batch, HQ, keys, dim)


def contenders(t: dict[str, Tensor]) -> dict[str, Callable[[int], Any]]:
    q, k, v = t["q"], t["k"], t["v"]
    folded = q.view(q.shape[0], HKV, HQ // HKV, D)
    found: dict[str, Callable[[int], Any]] = {
        "tokencomp": lambda _: ours(t),
        "tokencomp logits": lambda _: ours(t, logits_out=True),
        "sdpa": lambda _: sdpa(q, repeated(k), repeated(v)),
        "sdpa gqa": lambda _: sdpa(q, k, v, enable_gqa=True),
        "sdpa folded": lambda _: sdpa(folded, k, v),
        "read": lambda _: t["pool"].view(torch.int32).max(),
    }
    if k.shape[2] > LISTED:
        found["tokencomp list"] = lambda _: ours(t, index=t["index"])
    return found | engines.decode(q, k, v)


def measure(p: Problem, device: str) -> list[Row]:
    t = p.tensors(device)
    seconds = interleaved_seconds(contenders(t), device, repeats=60)
    flops = 4.0 * p.batch * HQ * p.keys * D
    return [
        Row("decode", p.name, name, s, 0.0 if name == "read" else flops, p.bytes, "tokencomp" not in name)
        for name, s in seconds.items()
    ]


def check(p: Problem, device: str) -> None:
    """What PyTorch gives on dense tensors; errors relative to the size of the terms."""
    t = p.tensors(device)
    q, k, v = (t[name].double() for name in ("q", "k", "v"))
    folded = q.view(p.batch, HKV, HQ // HKV, D)
    exact, size = (sdpa(folded, k, values).view(q.shape) for values in (v, v.abs()))
    peer = (sdpa(t["q"], t["k"], t["v"], enable_gqa=True) - exact).abs().max() / size.max()
    error = (ours(t) - exact).abs().max() / size.max()
    if not error <= 2 * peer + 1e-6:
        raise SystemExit(f"{p.name}: relative error {error:.3g}, the peer's {peer:.3g}")
    for name, call in engines.decode(t["q"], t["k"], t["v"]).items():
        off = (call(0).view(exact.shape) - exact).abs().max() / size.max()
        if not off <= 4 * peer + 1e-6:
            raise SystemExit(f"{p.name}: {name} is off by {off:.3g}: not called as it should be")


def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    rows: list[Row] = []
    for p in problems(quick, device):
        if checked:
            check(p, device)
        found = measure(p, device)
        rows += found
        print(f"{p.name}: " + ", ".join(f"{r.name} {r.seconds * 1e6:.0f} us" for r in found), file=sys.stderr)
    if device == "cpu":
        rows += decode_types.measure(device, quick=quick)
    return rows


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
