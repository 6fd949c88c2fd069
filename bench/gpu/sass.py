"""Reading machine code: what cuobjdump says of the kernels in a library, and what their main loops issue."""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\d+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
CUBIN = re.compile(r"^arch = (sm_\w+)$.*?(?=^Fatbin elf code|\Z)", re.MULTILINE | re.DOTALL)
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
MMA_FLOPS = {"HMMA.16816": 4096, "HMMA.1688": 2048, "IMMA.16832": 8192}
LANES = 32

# Opcodes by what they keep busy; everything else is integer and address arithmetic.
KINDS = {
    "tensor": "HGMMA HMMA IMMA",
    "copy": "LDGSTS UBLKCP",
    "global": "LDG STG LD ST RED REDG ATOM ATOMG LDL STL",
    "shared": "LDS STS LDSM STSM ATOMS",
    "special": "MUFU",
    "fp32": "FFMA FADD FMUL",
    "compare": "FMNMX FSETP FSEL FSET FCHK",
    "half": "HADD2 HMUL2 HFMA2 HMNMX2 HSETP2",
    "convert": "I2F F2I F2F F2FP I2FP FRND I2I",
    "shuffle": "SHFL VOTE VOTEU REDUX MATCH MOVM",
    "control": "BRA BRX BRXU BSSY BSYNC BREAK BAR WARPSYNC EXIT CALL RET NOP YIELD SYNCS DEPBAR LDGDEPBAR "
    "FENCE ENDCOLLECTIVE WARPGROUP CCTL MEMBAR ERRBAR CGAERRBAR USETMAXREG NANOSLEEP BPT ELECT ARRIVES "
    "UCGABAR_ARV UCGABAR_WAIT B2R R2B",
}
KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Usage:
    """What ptxas gave a kernel on one architecture."""

    registers: int
    stack: int
    shared: int  # static, bytes
    local: int


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: LDG.E.128.CONSTANT
    target: int | None = None  # of a branch
    conditional: bool = False

    @property
    def ends(self) -> bool:
        """Whether the instruction after it is reached by branches alone."""
        leaves = self.opcode.partition(".")[0] in ("BRA", "BRX", "EXIT", "RET")
        return leaves and not self.conditional

    @property
    def kind(self) -> str:
        return KIND_OF.get(self.opcode.partition(".")[0], "integer")

    @property
    def flops(self) -> float:
        """Of the tensor cores, for one warp; a warpgroup's product is shared by its four warps."""
        if self.opcode.startswith("HGMMA"):
            m, n, k = map(int, re.findall(r"\d+", self.opcode)[:3])
            return 2.0 * m * n * k / 4
        return next((float(f) for name, f in MMA_FLOPS.items() if self.opcode.startswith(name)), 0.0)

    @property
    def bytes(self) -> float:
        """That one warp moves, every lane taking part; 0 for what does not touch memory."""
        if self.kind not in ("copy", "global", "shared"):
            return 0.0
        if ".M88" in self.opcode or ".MT88" in self.opcode:
            return 128.0 * int(self.opcode.rpartition(".")[2]) if self.opcode[-1] in "24" else 128.0
        width = next((w for w in ("128", "64") if f".{w}" in self.opcode), "")
        small = {".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2}
        size = next((s for name, s in small.items() if name in self.opcode), int(width or 32) // 8)
        return float(LANES * size)

    @property
    def loads(self) -> float:
        """Bytes one warp brings from global memory."""
        return self.bytes if self.opcode.startswith(("LDG", "LD.")) else 0.0

    @property
    def fmas(self) -> float:
        """Operations of one warp's multiply-add in float32."""
        return 2.0 * LANES if self.opcode.startswith("FFMA") else 0.0

    def amount(self, unit: str) -> float:
        """Of ``tensor``, ``fp32`` or ``loads``."""
        return {"tensor": self.flops, "fp32": self.fmas, "loads": self.loads}[unit]


def tool() -> Path | None:
    """cuobjdump: on PATH, in the CUDA toolkit, or in the triton package of some Python on PATH."""
    for found in (shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"):
        if found and Path(found).is_file():
            return Path(found)
    try:
        import triton  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.is_file() else None


def resources(cuobjdump: Path, library: Path) -> dict[str, dict[str, Usage]]:
    """Architecture -> mangled kernel -> usage."""
    text = subprocess.run(
        [cuobjdump, "--dump-resource-usage", library], capture_output=True, text=True, check=True
    )
    return parse_resources(text.stdout)


def parse_resources(text: str) -> dict[str, dict[str, Usage]]:
    found: dict[str, dict[str, Usage]] = {}
    for cubin in CUBIN.finditer(text):
        here = found.setdefault(cubin.group(1), {})
        for name, *numbers in USAGE.findall(cubin.group(0)):
            here[name] = Usage(*map(int, numbers))
    return found


def disassemble(cuobjdump: Path, library: Path, arch: str, kernels: Iterable[str]) -> dict[str, str]:
    """Mangled kernel -> machine code."""
    command: list[str | Path] = [cuobjdump, "-sass", "-arch", arch, "-fun", ",".join(kernels), library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {part.split("\n", 1)[0].strip(): part for part in text.split("Function : ")[1:]}


def parse(text: str) -> list[Instruction]:
    """The instructions of one kernel."""
    found = []
    for address, predicate, opcode, operands in LINE.findall(text):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        conditional = bool(predicate) or bool(target and re.search(r"P\d|DIV|UR", opcode + operands))
        place = int(target.group(1), 16) if target else None
        found.append(Instruction(int(address, 16), opcode, place, conditional))
    return found


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What lies between the target of each backward branch and the branch."""
    found = []
    for branch in code:
        if branch.target is not None and branch.target < branch.address:
            first = branch.target
            found.append([i for i in code if first <= i.address <= branch.address])
    return found


def main_loop(code: list[Instruction], unit: str) -> list[Instruction]:
    """The smallest loop with at least half of the work of any loop; empty where no loop has any.

    Loops are compared by their way from the first instruction to the branch back that does the most.
    """
    found = [way for loop in loops(code) if (way := hot_path(loop, unit))]
    amounts = [sum(i.amount(unit) for i in way) for way in found]
    most = max(amounts, default=0.0)
    heavy = [way for way, amount in zip(found, amounts, strict=True) if 2 * amount >= most > 0]
    return min(heavy, key=len, default=[])


def blocks(code: list[Instruction]) -> list[list[Instruction]]:
    """Cut at branches and their targets."""
    heads = {i.target for i in code if i.target is not None}
    found: list[list[Instruction]] = [[]]
    for i in code:
        if found[-1] and (i.address in heads or found[-1][-1].ends or found[-1][-1].target is not None):
            found.append([])
        found[-1].append(i)
    return found


def hot_path(code: list[Instruction], unit: str, *, leaving: bool = False) -> list[Instruction]:
    """The way to the end (``leaving``: to an exit) that works most, then copies most, then is the shortest.

    Inner loops are run through once. A jump by table may go to any block that nothing else leads to. Of loads
    only the widest count: narrow ones are those of tails and lists. Empty where no way leads to the end.
    """
    widest = max((i.bytes for i in code if i.loads), default=0.0)

    def weigh(block: list[Instruction]) -> tuple[float, float, int]:
        wide = [i for i in block if unit != "loads" or i.loads == widest]
        copies = sum(i.bytes for i in block if i.kind == "copy")
        return sum(i.amount(unit) for i in wide), copies, -len(block)

    parts = blocks(code)
    at = {block[0].address: n for n, block in enumerate(parts)}
    ways = successors(parts, at)
    best: dict[int, tuple[tuple[float, float, int], int]] = {0: (weigh(parts[0]), -1)}
    for n in range(len(parts)):
        if n not in best:
            continue
        for to in ways[n]:
            a, b = best[n][0], weigh(parts[to])
            value = (a[0] + b[0], a[1] + b[1], a[2] + b[2])
            if to not in best or value > best[to][0]:
                best[to] = (value, n)
    exits = [n for n in best if parts[n][-1].opcode.startswith("EXIT")] if leaving else [len(parts) - 1]
    n = max((n for n in exits if n in best), key=lambda n: best[n][0], default=-1)
    found: list[Instruction] = []
    while n in best and n >= 0:
        found = parts[n] + found
        n = best[n][1]
    return found


def successors(parts: list[list[Instruction]], at: dict[int, int]) -> list[list[int]]:
    """Later blocks that each block leads to."""
    found = []
    for n, block in enumerate(parts):
        last = block[-1]
        targets = [at[last.target]] if last.target in at else []
        if not last.ends and n + 1 < len(parts):
            targets.append(n + 1)
        found.append([t for t in targets if t > n])
    reached = {t for targets in found for t in targets}
    for n, block in enumerate(parts):
        if block[-1].opcode.startswith("BRX"):
            found[n] += [t for t in range(n + 1, len(parts)) if t not in reached]
    return found


def mix(code: list[Instruction]) -> Counter[str]:
    """How many instructions of each kind."""
    return Counter(i.kind for i in code)
