"""Writes bench/KERNELS.md: what every CUDA kernel uses, and what an H200 could do with it. No GPU is needed.

    python bench/kernels.py [--cuobjdump PATH] [--out KERNELS.md]

Launches come from the launchers themselves, run on the emulator as on an H200 without running kernels
(build/lib/libtokencomp_emu.so); registers and machine code from the built CUDA library through cuobjdump, of
the CUDA toolkit or of the triton package. Bank conflicts of ldmatrix come from small calls that the emulator
runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gpu import calls, conflicts, model, sass  # noqa: E402
from gpu.render import Kernel, page  # noqa: E402
from tokencomp import _load  # noqa: E402
from tokencomp.ops import _namespace  # noqa: E402

ROOT = HERE.parent
LIBRARY = ROOT / "python" / "tokencomp" / "lib" / "libtokencomp_cuda.so"
EMULATOR = ROOT / "build" / "lib" / "libtokencomp_emu.so"
BASE, NEWER = "sm_80", ("sm_90", "sm_90a")


@dataclass
class Recorder:
    """The launches that the emulator wrote down since the last look."""

    file: Path
    read: int = 0

    def launches(self) -> list[dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        new, self.read = lines[self.read :], len(lines)
        return [json.loads(line) for line in new]


@contextmanager
def emulator(**settings: str) -> Iterator[Recorder]:
    """Operators on the emulator, recorded."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches"
        values = {"RECORD": str(file), **settings}
        os.environ.update({f"TOKENCOMP_EMU_{name}": value for name, value in values.items()})
        try:
            with _namespace.use_namespace("tokencomp_emu"):
                yield Recorder(file)
        finally:
            for name in values:
                del os.environ[f"TOKENCOMP_EMU_{name}"]


def readable(symbols: list[str]) -> dict[str, str]:
    """Mangled -> readable, types under one name whichever compiler mangled them."""
    output = subprocess.run(
        ["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    found = {}
    for symbol, text in zip(symbols, output.stdout.splitlines(), strict=True):
        for old, new in (("__nv_bfloat16", "bf16"), ("__half", "f16"), ("tokencomp::", "")):
            text = text.replace(old, new)
        found[symbol] = text.partition("::")[2] if "::" in text else text
    return found


def plain(name: str) -> str:
    return name.partition("<")[0]


def launches() -> list[tuple[str, calls.Call, model.Launch, str]]:
    """Family, call, launch and readable kernel where work is stated; each kernel once a call."""
    found = []
    with emulator(DEVICE="h200", DRY="1") as recorder:
        for family, several in calls.every().items():
            for call in several:
                call.run()
                records = recorder.launches()
                names = readable([r["kernel"] for r in records])
                seen = set()
                for r in records:
                    name = names[r["kernel"]]
                    if plain(name) in call.work and plain(name) not in seen:
                        seen.add(plain(name))
                        shape = tuple(r["grid"])
                        launch = model.Launch(
                            r["kernel"], shape, r["threads"], r["smem"], r["cluster"], r["cooperative"]
                        )
                        found.append((family, call, launch, name))
                if missing := set(call.work) - seen:
                    raise SystemExit(f"{call.name}: did not launch {', '.join(sorted(missing))}")
    return found


def measured(cuobjdump: Path) -> tuple[dict[str, list[Kernel]], dict[str, int], dict[str, int]]:
    """Rows by family, instances of each kernel in the library, and bytes that any of them spills."""
    by_arch = sass.resources(cuobjdump, LIBRARY)
    symbols = sorted({symbol for kernels in by_arch.values() for symbol in kernels})
    names = readable(symbols)
    of_name = {(arch, names[s]): s for arch, kernels in by_arch.items() for s in kernels}
    wanted = launches()
    code: dict[str, str] = {}
    for arch in NEWER:
        chosen = {of_name[arch, name] for *_, name in wanted if (arch, name) in of_name}
        code |= sass.disassemble(cuobjdump, LIBRARY, arch, sorted(chosen))
    rows: dict[str, list[Kernel]] = {}
    for family, call, launch, name in wanted:
        arch = next(a for a in NEWER if (a, name) in of_name)
        symbol = of_name[arch, name]
        instructions = sass.parse(code[symbol])
        work = call.work[plain(name)]
        loop = sass.main_loop(instructions, work.unit)
        path = loop or sass.hot_path(instructions, work.unit, leaving=True) or instructions
        older = by_arch[BASE].get(of_name.get((BASE, name), ""))
        estimate = model.estimate(launch, by_arch[arch][symbol], path, bool(loop), work)
        rows.setdefault(family, []).append(
            Kernel(
                plain(name), name, call, launch, by_arch[arch][symbol], older, path, not loop, work, estimate
            )
        )
    counts: dict[str, int] = {}
    spills: dict[str, int] = {}
    for kernels in by_arch.values():
        for symbol, usage in kernels.items():
            name = plain(names[symbol])
            counts[name] = counts.get(name, 0) + 1
            spills[name] = max(spills.get(name, 0), usage.stack, usage.local)
    return rows, counts, spills


def banks() -> list[tuple[str, str, int, int]]:
    """Call, kernel, accesses of eight rows and wavefronts they took, of small calls that really run."""
    found = []
    with emulator(DEVICE="sm_90") as recorder:
        for name, run in conflicts.every().items():
            run()
            for r in recorder.launches():
                if r["matrix_accesses"]:
                    kernel = plain(readable([r["kernel"]])[r["kernel"]])
                    found.append((name, kernel, r["matrix_accesses"], r["wavefronts"]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuobjdump", type=Path, default=sass.tool())
    parser.add_argument("--out", type=Path, default=HERE / "KERNELS.md")
    args = parser.parse_args()
    for needed in (args.cuobjdump, LIBRARY, EMULATOR):
        if not needed or not needed.is_file():
            raise SystemExit(f"kernels.py: {needed or 'cuobjdump'} is missing")
    _load.load_emulator(EMULATOR)
    rows, counts, spills = measured(args.cuobjdump)
    args.out.write_text(page(rows, counts, spills, banks()))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
