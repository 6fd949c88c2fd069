"""What every bench shares: timing, ceilings measured in the same run, the machine's name, rows and tables.

Times are medians over repeats after a warm-up; inputs rotate through copies larger than the caches where they
fit in memory. On CUDA, events time the device. Ceilings: copy bandwidth and matrix-product rate with the same
threads, and copy bandwidth with one. What one contender frees stays in the process, so that no other one pays
for giving it back to the system or for getting it again.
"""

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import tokencomp
import torch
from torch import Tensor

ROTATE_BYTES = 96 << 20  # more than the last-level cache of one socket's share


class Seconds(float):
    """A time and its ``noise``: how far apart the odd and the even repeats put it, relative to it."""

    noise: float

    def __new__(cls, seconds: float, noise: float = 0.0) -> "Seconds":
        made = super().__new__(cls, seconds)
        made.noise = noise
        return made


def estimate(times: Sequence[float], of: Callable[[Sequence[float]], float]) -> Seconds:
    """One time from those of several repeats; a single one tells no noise."""
    seconds = of(times)
    if len(times) < 2:
        return Seconds(seconds)
    return Seconds(seconds, abs(of(times[::2]) - of(times[1::2])) / seconds)


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
    tokens: float = 0.0  # that one call processes, where a model runs
    held: float = 0.0  # bytes of the model's cache behind the prompt
    peak: float = 0.0  # most bytes at once, above those of the model; 0: not measured

    @property
    def noise(self) -> float:
        return getattr(self.seconds, "noise", 0.0)

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
    copy_alone_gbytes: float  # by one thread
    fp32_gflops: float
    bf16_gflops: float

    def or_better(self, other: "Ceilings") -> "Ceilings":
        """The higher one of each."""
        return Ceilings(*map(max, astuple(self), astuple(other)))


def median_seconds(
    call: Callable[[int], Any], device: str, *, repeats: int = 7, budget: float = 2.0
) -> float:
    """Median time of ``call(i)``, i = 0, 1, ...: 3 to ``repeats`` calls, about ``budget`` seconds."""
    call(0)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (len(times) < repeats and time.perf_counter() - begin < budget):
        times.append(_seconds(lambda: call(len(times) + 1), device))
    return estimate(times, statistics.median)


def interleaved_seconds(
    calls: dict[str, Callable[[int], Any]], device: str, *, repeats: int = 200, budget: float = 5.0
) -> dict[str, float]:
    """Best time of each call where they take turns: 3 to ``repeats`` rounds, about ``budget`` seconds.

    For shared machines: what slows one contender slows all, and the best is what the code itself takes.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    begin, turn = time.perf_counter(), 0
    while turn < 3 or (turn < repeats and time.perf_counter() - begin < budget):
        turn += 1
        for name, call in calls.items():
            times[name].append(_seconds(partial(call, turn), device))
    return {name: estimate(some, min) for name, some in times.items()}


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = now()
    call()
    return now() - begin


_clock = time.perf_counter


def now() -> float:
    """Seconds of the wall, or of the processor inside ``clock``."""
    return _clock()


@contextmanager
def clock(*, processor: bool) -> Iterator[None]:
    """Which time counts inside. That of the processor does not run while others on the machine have it."""
    global _clock
    before, _clock = _clock, time.process_time if processor else time.perf_counter
    try:
        yield
    finally:
        _clock = before


@contextmanager
def peak_bytes(device: str, found: list[float]) -> Iterator[None]:
    """Appends to ``found`` the most bytes at once inside, above those before: of the GPU's allocator, else of
    memory resident for the process, what operators allocate inside themselves included. Nothing is appended
    where the system cannot tell.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found.append(float(torch.cuda.max_memory_allocated() - before))
        return
    reset = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed earlier stays resident and hides what is new
        reset.write_text("5")  # the peak begins anew
    except (OSError, AttributeError):
        yield
        return
    before = _status("VmRSS")
    yield
    found.append(float(_status("VmHWM") - before))


def _status(key: str) -> int:
    """Bytes from what Linux says about the process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def keep_freed_memory() -> bool:
    """Whether freed memory stays in the process from now on, whatever its size: where the C library is glibc.

    Otherwise the free that lets the heap's unused end grow beyond a limit gives all of it back. That can be a
    call that freed kilobytes, of megabytes that the contender before it had, and it takes milliseconds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return mallopt is not None and bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def rotating(x: Tensor) -> list[Tensor]:
    """Copies of ``x`` to take turns, so that none is found in a cache; at most 8."""
    copies = min(8, 1 + ROTATE_BYTES // max(1, x.numel() * x.element_size()))
    return [x, *(x.clone() for _ in range(copies - 1))]


def measure_ceilings(device: str) -> Ceilings:
    """Copy and matrix-product rates with the threads in use: of the best times, as a ceiling is."""
    source = torch.zeros((1 << 30 if device == "cuda" else 64 << 20) // 4, device=device)
    target = torch.empty_like(source)
    size = 2 * source.numel() * 4 / 1e9
    copy = _best_seconds(lambda _: target.copy_(source), device)
    with threads(1):
        alone = _best_seconds(lambda _: target.copy_(source), device)
    rates = [_product_gflops(dtype, device) for dtype in (torch.float32, torch.bfloat16)]
    return Ceilings(size / copy, size / alone, rates[0], rates[1])


Measured = TypeVar("Measured")


def beside_ceilings(device: str, measure: Callable[[], Measured]) -> tuple[Measured, Ceilings]:
    """What ``measure`` gives, and the ceilings before or behind it, the higher ones: on a machine that others
    use too they move by a third within minutes, and a share is of what the machine could do just then.
    """
    before = measure_ceilings(device)
    found = measure()
    return found, before.or_better(measure_ceilings(device))


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """So many of the processor inside; None: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _product_gflops(dtype: torch.dtype, device: str) -> float:
    size = 4096 if device == "cuda" else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda _: torch.mm(a, a, out=out), device) / 1e9


def _best_seconds(call: Callable[[int], Any], device: str) -> float:
    return interleaved_seconds({"": call}, device, budget=1.0)[""]


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
        "clock": "wall" if _clock is time.perf_counter else "processor, all threads together",
        "torch": torch.__version__,
        "tokencomp": tokencomp.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


PEERS = ("transformers", "kvpress", "optimum-quanto", "hqq", "tomesd", "flash-attn", "flashinfer-python")


def peers() -> dict[str, str]:
    """Version of each package that a bench compares with."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "(not installed)"
    return found


def table(rows: list[Row], ceilings: Ceilings) -> str:
    """Markdown, one line a measurement; speed-ups are against each baseline of the same case."""
    peers = sorted({row.name for row in rows if row.baseline})
    columns = _columns(rows, ceilings)
    head = ["case", "", "ms", *(f"x {peer}" for peer in peers), *columns]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for i, row in enumerate(rows):
        case = row.case if i == 0 or rows[i - 1].case != row.case else ""
        by_peer = {r.name: r.seconds for r in rows if r.case == row.case and r.baseline}
        ratios = [f"{by_peer[peer] / row.seconds:.2f}" if peer in by_peer else "" for peer in peers]
        rates = [show(row) for show in columns.values()]
        lines.append("| " + " | ".join([case, row.name, f"{row.seconds * 1e3:.3f}", *ratios, *rates]) + " |")
    return "\n".join(lines)


def _columns(rows: list[Row], ceilings: Ceilings) -> dict[str, Callable[[Row], str]]:
    """Rates: tokens and the cache of a model; work of an operator and its share of the ceilings."""
    if any(row.tokens for row in rows):
        return {
            "tokens/s": lambda row: f"{row.tokens / row.seconds:.1f}" if row.tokens else "",
            "cache MB": lambda row: f"{row.held / 1e6:.2f}" if row.held else "",
            "peak MB": lambda row: f"{row.peak / 1e6:.0f}" if row.peak else "",
        }
    return {
        "GB/s": lambda row: f"{row.gbytes:.1f}",
        "% copy": lambda row: f"{100 * row.gbytes / ceilings.copy_gbytes:.0f}",
        "GFLOP/s": lambda row: f"{row.gflops:.1f}",
        "% fp32 matmul": lambda row: f"{100 * row.gflops / ceilings.fp32_gflops:.0f}",
    }


def document(device: str, ceilings: dict[str, Ceilings], rows: list[Row]) -> str:
    """Everything of one run as JSON, a line for each measurement; ``ceilings`` of each family of rows."""
    measured = ",\n".join("  " + json.dumps(asdict(row) | {"noise": row.noise}) for row in rows)
    limits = {family: asdict(ceilings[family]) for family in sorted({row.family for row in rows})}
    facts = {"machine": machine(device), "ceilings": limits}
    return json.dumps(facts, indent=1)[:-2] + f',\n "rows": [\n{measured}\n ]\n}}\n'


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every command here understands."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, help="of the processor; default: torch's")
    parser.add_argument(
        "--processor",
        action="store_true",
        help="count time of the processor; with --threads 1",
    )
    parser.add_argument("--check", action="store_true", help="also hold the results to the specification")
    parser.add_argument("--quick", action="store_true", help="the smallest shapes only")
    return parser


def command(run: Callable[..., list[Row]], description: str | None, *, products: bool = False) -> int:
    """The command line of a bench: measure, print the table (``products``: and of matrices), write JSON."""
    parser = arguments(description)
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    args = parser.parse_args()
    keep_freed_memory()
    with threads(args.threads), clock(processor=args.processor):
        rows, ceilings = beside_ceilings(
            args.device, partial(run, args.device, quick=args.quick, checked=args.check)
        )
        print(table(rows, ceilings))
        if products:
            print(
                f"\nproducts: bfloat16 {ceilings.bf16_gflops:.0f} GFLOP/s, float32 {ceilings.fp32_gflops:.0f}"
            )
        if args.out:
            args.out.write_text(document(args.device, {row.family: ceilings for row in rows}, rows))
    return 0
