"""What an H200 could do with a launch: residency, the floor, and which unit of a multiprocessor is busiest.

Nothing here was measured on a GPU. Cycles are of one of the four schedulers of a multiprocessor; a main loop
costs what its busiest unit costs, as if nothing ever waited.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from gpu.sass import Instruction, Usage

SMS, SCHEDULERS, CLOCK = 132, 4, 1.83e9  # the clock at which the dense rate below is quoted
HBM = 4.8e12  # bytes/s: the floor; a copy reaches about 4.3e12
COPY = 4.3e12
DENSE = 989e12  # FLOP/s, bfloat16, wgmma
MMA_SYNC = 0.62  # share of that rate which mma.sync reaches, from published measurements of an H100
FP32 = 67e12
LAUNCH = 2.5e-6  # seconds that a launch and its tail add (assumed)
THREADS, REGISTERS, SHARED, BLOCKS = 2048, 65536, 228 << 10, 32  # of a multiprocessor
RESERVED_SHARED, REGISTER_UNIT, SHARED_UNIT = 1024, 256, 128

# Cycles of a scheduler for one warp instruction, where that is more than issuing it: lanes per cycle and
# multiprocessor from the throughput table of NVIDIA's programming guide for 9.0, over four.
PIPES = {"special": 8.0, "integer": 2.0, "compare": 2.0, "convert": 2.0, "shuffle": 4.0}
PIPE_NAMES = {"special": "MUFU", "integer": "integer", "compare": "integer", "convert": "convert"}


@dataclass(frozen=True)
class Launch:
    """As the launcher asked for it."""

    kernel: str  # mangled by g++
    grid: tuple[int, int, int]
    threads: int
    smem: int
    cluster: int = 1
    cooperative: bool = False

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Work:
    """What a launch must do, and what its main loop is counted by."""

    bytes: float  # moved between the device's memory and the chip, each once
    flops: float = 0.0
    unit: str = "loads"  # tensor | fp32 | loads
    turns: float | None = None  # of a warp through the main loop, where more than the minimum is done
    reads: float | None = None  # bytes read, if not all of ``bytes``

    def floor(self) -> float:
        """Seconds below which no kernel can be."""
        return max(self.bytes / HBM, self.flops / (FP32 if self.unit == "fp32" else DENSE))

    @property
    def amount(self) -> float:
        """Of the unit, in the launch."""
        return (self.bytes if self.reads is None else self.reads) if self.unit == "loads" else self.flops


def blocks_per_sm(threads: int, registers: int, smem: int) -> int:
    """Resident blocks; ``smem`` static and dynamic."""
    warps = ceil(threads / 32)
    per_warp = ceil(registers * 32 / REGISTER_UNIT) * REGISTER_UNIT
    # registers are given out by scheduler: each serves a quarter of the warps
    by_registers = REGISTERS // 4 // per_warp * 4 // warps
    by_smem = SHARED // (ceil((smem + RESERVED_SHARED) / SHARED_UNIT) * SHARED_UNIT)
    return max(0, min(BLOCKS, THREADS // (warps * 32), by_registers, by_smem))


def cycles(code: Sequence[Instruction]) -> dict[str, float]:
    """Cycles of a scheduler by unit, for one warp that runs the code once."""
    found = {"issue": float(len(code)), "tensor": 0.0, "shared": 0.0, "MUFU": 0.0, "integer": 0.0}
    found |= {"convert": 0.0, "fp32": 0.0, "shuffle": 0.0}
    rate = DENSE / (SMS * SCHEDULERS * CLOCK)
    for i in code:
        if i.flops:
            found["tensor"] += i.flops / (rate if i.opcode.startswith("HGMMA") else rate * MMA_SYNC)
        if i.kind == "shared" or i.opcode.startswith("LDGSTS"):
            found["shared"] += i.bytes / 32  # 128 bytes a cycle for four schedulers
        if i.kind == "fp32":
            found["fp32"] += 1
        if i.kind == "shuffle":
            found["shuffle"] += PIPES["shuffle"]
        if i.kind in PIPE_NAMES:
            found[PIPE_NAMES[i.kind]] += PIPES[i.kind]
    return found


@dataclass(frozen=True)
class Estimate:
    """Seconds by unit, and what follows."""

    floor: float
    seconds: dict[str, float]
    resident: int
    filled: float  # share of the multiprocessors with work in an average wave

    @property
    def bound(self) -> str:
        name = max(self.seconds, key=self.seconds.__getitem__)
        return "launch" if self.seconds[name] < LAUNCH else name

    @property
    def share(self) -> float:
        """Of the floor: what the busiest unit leaves, a launch included."""
        return self.floor / (max(self.seconds.values()) + LAUNCH)


def filled(launch: Launch, resident: int) -> float:
    """Blocks over places in as many waves as they take; of multiprocessors where one wave is not full."""
    places = SMS * max(1, resident)
    if launch.blocks >= places:
        return launch.blocks / (ceil(launch.blocks / places) * places)
    return min(1.0, launch.blocks / SMS)


def estimate(launch: Launch, usage: Usage, path: Sequence[Instruction], looped: bool, work: Work) -> Estimate:
    """Of one launch, from the loop that does its work, or from code that every warp runs once."""
    resident = blocks_per_sm(launch.threads, usage.registers, usage.shared + launch.smem)
    share = filled(launch, resident)
    a_turn = sum(i.amount(work.unit) for i in path)
    turns = launch.blocks * ceil(launch.threads / 32) if not looped else work.turns or work.amount / a_turn
    rate = SMS * SCHEDULERS * CLOCK * share
    seconds = {"memory": work.bytes / COPY}
    seconds |= {unit: turns * c / rate for unit, c in cycles(path).items() if c}
    return Estimate(work.floor(), seconds, resident, share)
