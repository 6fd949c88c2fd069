"""Quantizing keys and values against copying them and against the plain PyTorch formulation, in one run.

    python bench/bench_kvquant.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

``copy`` writes the data into a tensor that exists, ``clone`` into a new one, as ``torch.cat`` of a growing
cache does; ``plain`` is min-max quantization and packing in PyTorch. Bytes are those of the data, read, plus
those of the codes, written (of a copy: read and written). Contenders take turns, and the best time of each
counts.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Row, command, interleaved_seconds, rotating
from tokencomp import ops, reference
from torch import Tensor

SHAPES = ((1, 8, 8192, 128), (1, 8, 65536, 128))
DTYPES = (torch.bfloat16, torch.float32)
FORMATS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("int8 token 128", 8, {"group": 128}),
    ("fp8 token 128", 8, {"group": 128, "kind": "fp8"}),
    ("int4 token 128", 4, {"group": 128}),
    ("int4 channel 64", 4, {"group": 64, "axis": "channel"}),
    ("int3 token 64", 3, {"group": 64}),
    ("int2 token 32", 2, {"group": 32}),
    ("int2 channel 32", 2, {"group": 32, "axis": "channel"}),
)


@dataclass(frozen=True)
class Problem:
    """Keys of one layer; the same data every time."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.shape[2]} tokens {str(self.dtype).removeprefix('torch.')}"

    def tensor(self, device: str) -> Tensor:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0))
        return x.to(self.dtype).to(device)


def plain_quantize(x: Tensor, bits: int, axis: str, group: int) -> tuple[Tensor, Tensor]:
    """The usual few lines: group, minimum and step, round, pack neighbours along the channels."""
    b, h, s, d = x.shape
    x = x.float().view(b, h, s, d // group, group) if axis == "token" else x.float().view(b, h, -1, group, d)
    across = -1 if axis == "token" else 3
    low, high = x.amin(across, keepdim=True), x.amax(across, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((x - low) / step).round().clamp(0, 2**bits - 1).to(torch.uint8).view(b, h, s, d)
    packed = codes[..., :: 8 // bits].clone()
    for field in range(1, 8 // bits):
        packed |= codes[..., field :: 8 // bits] << (bits * field)
    return packed, torch.stack([step, low], -1).half()


def _turn(call: Callable[[Tensor], Any], copies: list[Tensor], turn: int) -> Any:
    return call(copies[turn % len(copies)])


Contenders = dict[str, Callable[[int], Any]]


def stages(p: Problem, device: str) -> Iterator[tuple[str, float, Contenders]]:
    """What is measured: a name, bytes, and who does it."""
    x = p.tensor(device)
    copies, target = rotating(x), torch.empty_like(x)
    size = float(x.numel() * x.element_size())
    base: Contenders = {
        "copy": partial(_turn, target.copy_, copies),
        "clone": partial(_turn, torch.clone, copies),
    }
    for name, bits, options in FORMATS:
        call: Contenders = {
            "tokencomp": partial(_turn, partial(ops.kv_quantize, bits=bits, **options), copies)
        }
        if bits != 3 and options.get("kind") is None:
            axis = options.get("axis", "token")
            plain = partial(plain_quantize, bits=bits, axis=axis, group=options["group"])
            call["plain"] = partial(_turn, plain, copies)
        yield f"quantize {name} {p.name}", size + x.numel() * bits / 8, {**base, **call}
    codes, params = ops.kv_quantize(x, 4, group=128)
    back = partial(ops.kv_dequantize, params=params, bits=4, group=128, dtype=p.dtype)
    yield f"dequantize int4 {p.name}", 1.25 * size, {**base, "tokencomp": lambda _: back(codes)}
    yield f"hadamard {p.name}", 2 * size, {**base, "tokencomp": partial(_turn, ops.hadamard, copies)}
    yield f"statistics {p.name}", size, {**base, "tokencomp": partial(_turn, ops.channel_stats, copies)}


def check(p: Problem, device: str) -> None:
    """The first tokens are the bytes of the specification."""
    x = p.tensor(device)[:, :, :1024]
    for name, bits, options in FORMATS:
        got = ops.kv_quantize(x, bits, **options)
        want = reference.kv_quantize(x.cpu(), bits, **options, dtype=torch.float32)
        if not all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True)):
            raise SystemExit(f"{name} {p.name}: not the bytes of the reference")


def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    rows: list[Row] = []
    for shape in SHAPES[: 1 if quick else None]:
        for dtype in DTYPES:
            p = Problem(shape, dtype)
            if checked:
                check(p, device)
            for name, size, contenders in stages(p, device):
                times = interleaved_seconds(contenders, device, budget=2.0)
                rows += [
                    Row("kvquant", name, who, seconds, 0.0, size, baseline=who != "tokencomp")
                    for who, seconds in times.items()
                ]
                line = ", ".join(f"{who} {s * 1e3:.3f} ms" for who, s in times.items())
                print(f"{name}: {line}; {times['tokencomp'] / times['copy']:.2f} copies", file=sys.stderr)
    return rows


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
