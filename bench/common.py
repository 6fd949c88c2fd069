"""What every bench shares: timing, ceilings measured in the same run, the machine's name, rows and tables.

Times are medians over repeats after a warm-up; inputs rotate through copies larger than the caches where they
fit in memory. On CUDA, events time the device. Ceilings: copy bandwidth and matrix-product rate with the same
threads.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokencomp
import torch
from torch import Tensor

ROTATE_BYTES = 96 << 20  # more than the last-level cache of one socket's share


@dataclass(frozen=True)
class Row:
    """One measurement. ``flops`` and ``bytes`` are those of the plain formulation: effective rates."""

    family: str
    case: str
    name: str  # who was measured
    seconds: float
    flops: float
    bytes: float
    baseline: bool = False  # a peer that speed-ups are quoted against

    @property
    def gflops(self) -> float:
        return self.flops / self.seconds / 1e9

    @property
    def gbytes(self) -> float:
        return self.bytes / self.seconds / 1e9


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of this machine: a copy (read + write), float32 and bfloat16 products."""

    copy_gbytes: float
    fp32_gflops: float
    bf16_gflops: float


def median_seconds(
    call: Callable[[int], Any], device: str, *, repeats: int = 7, budget: float = 2.0
) -> float:
    """Median time of ``call(i)``, i = 0, 1, ...: 3 to ``repeats`` calls, about ``budget`` seconds."""
    call(0)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (len(times) < repeats and time.perf_counter() - begin < budget):
        times.append(_seconds(lambda: call(len(times) + 1), device))
    return statistics.median(times)


def interleaved_seconds(
    calls: dict[str, Callable[[int], Any]], device: str, *, repeats: int = 200, budget: float = 5.0
) -> dict[str, float]:
    """Best time of each call where they take turns: 3 to ``repeats`` rounds, about ``budget`` seconds.

    For shared machines: what slows one contender slows all, and the best is what the code itself takes.
    """
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call(0)
    begin, turn = time.perf_counter(), 0
    while turn < 3 or (turn < repeats and time.perf_counter() - begin < budget):
        turn += 1
        for name, call in calls.items():
            best[name] = min(best[name], _seconds(partial(call, turn), device))
    return best


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def rotating(x: Tensor) -> list[Tensor]:
    """Copies of ``x`` to take turns, so that none is found in a cache; at most 8."""
    copies = min(8, 1 + ROTATE_BYTES // max(1, x.numel() * x.element_size()))
    return [x, *(x.clone() for _ in range(copies - 1))]


def measure_ceilings(device: str) -> Ceilings:
    """Copy and matrix-product rates with the threads in use."""
    source = torch.zeros((1 << 30 if device == "cuda" else 64 << 20) // 4, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda _: target.copy_(source), device)
    rates = [_product_gflops(dtype, device) for dtype in (torch.float32, torch.bfloat16)]
    return Ceilings(2 * source.numel() * 4 / copy / 1e9, rates[0], rates[1])


def _product_gflops(dtype: torch.dtype, device: str) -> float:
    size = 4096 if device == "cuda" else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds(lambda _: torch.mm(a, a, out=out), device) / 1e9


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(device: str) -> dict[str, str]:
    """The header of every result: what it was measured on."""
    features = tokencomp.cpu_features()
    facts = {
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "isa": f"{features['active']} (available: {', '.join(features['available'])})",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "tokencomp": tokencomp.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def table(rows: list[Row], ceilings: Ceilings) -> str:
    """Markdown, one line a measurement; speed-ups are against each baseline of the same case."""
    peers = sorted({row.name for row in rows if row.baseline})
    head = ["case", "", "ms", *(f"x {peer}" for peer in peers), "GB/s", "% copy", "GFLOP/s", "% fp32 matmul"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for i, row in enumerate(rows):
        case = row.case if i == 0 or rows[i - 1].case != row.case else ""
        by_peer = {r.name: r.seconds for r in rows if r.case == row.case and r.baseline}
        ratios = [f"{by_peer[peer] / row.seconds:.2f}" if peer in by_peer else "" for peer in peers]
        rates = [f"{row.gbytes:.1f}", f"{100 * row.gbytes / ceilings.copy_gbytes:.0f}"]
        rates += [f"{row.gflops:.1f}", f"{100 * row.gflops / ceilings.fp32_gflops:.0f}"]
        lines.append("| " + " | ".join([case, row.name, f"{row.seconds * 1e3:.3f}", *ratios, *rates]) + " |")
    return "\n".join(lines)


def document(device: str, ceilings: Ceilings, rows: list[Row]) -> dict[str, Any]:
    """Everything of one run, ready for JSON."""
    return {"machine": machine(device), "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}


def command(run: Callable[..., list[Row]], description: str | None) -> int:
    """The command line of a bench: measure, print the table, write JSON where asked to."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, help="of the processor; default: torch's")
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    parser.add_argument("--check", action="store_true", help="also hold the results to the specification")
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    ceilings = measure_ceilings(args.device)
    rows = run(args.device, quick=args.quick, checked=args.check)
    print(table(rows, ceilings))
    if args.out:
        args.out.write_text(json.dumps(document(args.device, ceilings, rows), indent=1) + "\n")
    return 0
