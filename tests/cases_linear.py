"""Test data of the linear family: for the tests, opcheck, the per-ISA checks and the emulator."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from cases import DTYPES
from cases_score import laid_out
from torch import Tensor


@dataclass(frozen=True)
class LinearCase:
    """One call of ``decay_linear_attention``."""

    B: int
    Hq: int
    Hkv: int
    T: int
    D: int
    dv: int
    dtype: str = "float32"
    state: bool = False
    lengths: tuple[int, ...] | None = None
    slope: float = 0.1  # of the steepest head
    layout: str = "contiguous"
    slow: bool = False

    @property
    def work(self) -> int:
        """Multiply-adds, for limits on slow back ends."""
        return 2 * self.B * self.Hq * self.T * self.D * self.dv

    @property
    def name(self) -> str:
        parts = [f"{self.B}x{self.Hq}q{self.Hkv}x{self.T}x{self.D}v{self.dv}-{self.dtype}-{self.slope:g}"]
        parts += ["state"] * self.state + ["ragged"] * bool(self.lengths)
        return "-".join(parts + [self.layout] * (self.layout != "contiguous"))

    def call(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Positional and keyword arguments of the wrapper: the same every time (seeded by the name)."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        sizes = ((self.Hq, self.D), (self.Hkv, self.D), (self.Hkv, self.dv))
        q, k, v = (
            laid_out(
                torch.randn(self.B, h, self.T, d, generator=g).to(getattr(torch, self.dtype)), self.layout
            )
            for h, d in sizes
        )
        slope = self.slope * torch.arange(self.Hq, 0, -1).float() / max(self.Hq, 1)
        options: dict[str, Any] = {"scale": 0.5}
        if self.state:
            options["state"] = torch.randn(self.B, self.Hq, self.D, self.dv, generator=g)
        if self.lengths is not None:
            options["lengths"] = torch.tensor(self.lengths, dtype=torch.int32)
        return (q, k, v, slope), options

    arguments = call


LINEAR_CASES = [
    LinearCase(1, 1, 1, 1, 1, 1),
    LinearCase(2, 4, 2, 1, 64, 64, state=True),
    LinearCase(1, 2, 1, 0, 8, 8, state=True),
    LinearCase(0, 2, 1, 5, 8, 8),
    LinearCase(2, 4, 2, 31, 16, 16),
    LinearCase(2, 4, 4, 33, 17, 23, state=True),
    LinearCase(1, 8, 1, 64, 64, 64),
    LinearCase(1, 7, 1, 65, 32, 48, state=True, slope=0.0),
    LinearCase(2, 2, 2, 130, 40, 33, slope=3.0),
    LinearCase(3, 4, 2, 97, 24, 40, lengths=(97, 64, 0), state=True),
    LinearCase(2, 3, 1, 70, 65, 5, lengths=(1, 69), layout="hf"),
    LinearCase(1, 2, 1, 129, 128, 128, slope=0.9),
    LinearCase(1, 1, 1, 40, 256, 256, state=True, slope=100.0),
    LinearCase(1, 2, 2, 2000, 64, 64, slope=0.01, slow=True),
    *(
        LinearCase(2, 4, 2, t, d, d, dtype=dtype, state=True, layout=layout)
        for dtype in DTYPES[1:]
        for t, d, layout in ((1, 64, "contiguous"), (77, 36, "sliced"), (129, 64, "contiguous"))
    ),
]
