"""What the CUDA kernels cost, from the compiler's report: no spills, no stack, registers within a budget.

Building the CUDA library leaves ``build/ptxas/<file>.log`` (or ``<file>.<arch>.log``), the output of
``nvcc -Xptxas -v``. A budget is a line directly above the kernel (a template line may follow it), in the .cu
file or a header of its family::

    // registers: kcenter_rows <= 64
"""

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokencomp
from libraries import ROOT

LOGS = ROOT / "build" / "ptxas"
SOURCES = {
    file.stem: file for folder in ("tests/emu", "csrc/cuda") for file in sorted((ROOT / folder).glob("*.cu"))
}
BUDGET = re.compile(r"^// registers: (\w+) <= (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture, as ptxas reports it. Sizes in bytes."""

    symbol: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    smem: int


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def parse(text: str) -> list[Kernel]:
    """Kernels of an ``nvcc -Xptxas -v`` log."""
    kernels = []
    for section in re.split(r"(?=Compiling entry function)", text)[1:]:
        head = re.match(r"Compiling entry function '(\S+)' for '(\w+)'", section)
        assert head, section
        symbol, arch = head.groups()
        own = re.search(
            rf"Function properties for {re.escape(symbol)}\s(.*?)(?=Function properties|\Z)",
            section,
            re.DOTALL,
        )
        used = re.search(r"Used (\d+) registers[^\n]*", section)
        assert own, f"no properties of {symbol}"
        assert used, f"no resources of {symbol}"
        kernels.append(
            Kernel(
                symbol,
                arch,
                registers=int(used.group(1)),
                spill_stores=number(r"(\d+) bytes spill stores", own.group(1)),
                spill_loads=number(r"(\d+) bytes spill loads", own.group(1)),
                stack=number(r"(\d+) bytes stack frame", own.group(1)),
                smem=number(r"(\d+) bytes smem", used.group(0)),
            )
        )
    return kernels


def kernel_names(symbols: Iterable[str]) -> dict[str, str]:
    """The plain name of each mangled kernel: no namespaces, template arguments or parameters."""
    symbols = sorted(set(symbols))
    output = subprocess.run(
        ["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout
    plain = [
        line.replace("(anonymous namespace)::", "").split("<")[0].split("::")[-1]
        for line in output.splitlines()
    ]
    return dict(zip(symbols, plain, strict=True))


def budgets(source: Path) -> dict[str, int]:
    """Budgets declared in a .cu file and the headers of its family, each directly above its kernel."""
    headers = sorted(source.parent.glob(f"{source.stem.removesuffix('_sm90')}*.h"))
    return {name: limit for file in (source, *headers) for name, limit in budgets_in(file).items()}


def budgets_in(source: Path) -> dict[str, int]:
    text = source.read_text()
    found = {}
    for match in BUDGET.finditer(text):
        name, limit = match.groups()
        below = text[match.end() : match.end() + 600]
        declaration = below.split("{")[0]
        assert re.search(rf"__global__.*\b{name}\(", declaration, re.DOTALL), (
            f"{source.name}: budget not above {name}"
        )
        found[name] = int(limit)
    return found


def complaints(kernels: list[Kernel], limits: dict[str, int]) -> list[str]:
    names = kernel_names(k.symbol for k in kernels)
    found = []
    for k in kernels:
        name = f"{names[k.symbol]} ({k.arch})"
        if k.spill_stores or k.spill_loads:
            found.append(f"{name}: spills {k.spill_stores} bytes of stores, {k.spill_loads} of loads")
        if k.stack:
            found.append(f"{name}: a stack frame of {k.stack} bytes")
        limit = limits.get(names[k.symbol])
        if limit is None:
            found.append(f"{name}: uses {k.registers} registers and declares no budget")
        elif k.registers > limit:
            found.append(f"{name}: uses {k.registers} registers, the budget is {limit}")
    return found


def serialized(text: str) -> bool:
    """Whether ptxas made warpgroup products of a kernel wait for each other."""
    return "wgmma.mma_async instructions are serialized" in text


def logs_of(stem: str) -> list[Path]:
    return [log for log in sorted(LOGS.glob(f"{stem}*.log")) if log.name.split(".")[0] == stem]


def cuda_was_built() -> bool:
    """What the build says of itself: nvcc need not be on PATH for CMake to have found it."""
    return bool(tokencomp.build_info()["nvcc"])


PRODUCT = sorted(stem for stem, file in SOURCES.items() if file.parent.name == "cuda")


@pytest.mark.skipif(not cuda_was_built(), reason="built without nvcc: nothing was compiled for a GPU")
@pytest.mark.parametrize("stem", PRODUCT)
def test_product_kernels(stem: str) -> None:
    logs = logs_of(stem)
    assert logs, f"build/ptxas/{stem}.log is missing: build the CUDA library"
    kernels = [kernel for log in logs for kernel in parse(log.read_text())]
    assert kernels, f"no kernel in {[log.name for log in logs]}"
    archs = {kernel.arch for kernel in kernels}
    if stem.endswith("_sm90"):
        assert archs == {"sm_90a"}
    assert not complaints(kernels, budgets(SOURCES[stem]))
    assert not any(serialized(log.read_text()) for log in logs)


@pytest.mark.skipif(not cuda_was_built(), reason="built without nvcc: nothing was compiled for a GPU")
def test_conformance_kernels() -> None:
    for stem in ("conformance", "conformance_halves", "conformance_kernels", "conformance_sm90"):
        kernels = [kernel for log in logs_of(stem) for kernel in parse(log.read_text())]
        assert kernels, f"build/ptxas/{stem}.log is missing: build the CUDA test library"
        assert not complaints(kernels, budgets(SOURCES[stem]))


# ---- the parser and the rules

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4test12_GLOBAL__N_14goodEPKf' for 'sm_80'
ptxas info    : Function properties for _ZN4test12_GLOBAL__N_14goodEPKf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 1 barriers, 512 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 25.225 ms
ptxas info    : Compiling entry function '_ZN4test12_GLOBAL__N_15spillI6__halfEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN4test12_GLOBAL__N_15spillI6__halfEEvPT_
    48 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 48 bytes cumulative stack size
"""


def test_parse() -> None:
    assert parse(LOG) == [
        Kernel("_ZN4test12_GLOBAL__N_14goodEPKf", "sm_80", 26, 0, 0, 0, 512),
        Kernel("_ZN4test12_GLOBAL__N_15spillI6__halfEEvPT_", "sm_90a", 255, 24, 28, 48, 0),
    ]


def test_serialized() -> None:
    warning = (
        "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized "
        "due to non wgmma instructions reading accumulator registers of a wgmma between start and end"
    )
    assert serialized(LOG + warning)
    assert not serialized(LOG)


def test_names() -> None:
    assert sorted(kernel_names(k.symbol for k in parse(LOG)).values()) == ["good", "spill"]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"good": 26, "spill": 255}, ["spill (sm_90a): spills 24", "spill (sm_90a): a stack frame of 48"]),
        (
            {"good": 25, "spill": 255},
            ["good (sm_80): uses 26 registers, the budget is 25", "spills", "stack"],
        ),
        ({"spill": 255}, ["good (sm_80): uses 26 registers and declares no budget", "spills", "stack"]),
    ],
)
def test_complaints(limits: dict[str, int], words: list[str]) -> None:
    found = complaints(parse(LOG), limits)
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


def test_budgets(tmp_path: Path) -> None:
    source = tmp_path / "x.cu"
    kernel = "template <class T>\n__global__ void __launch_bounds__(32) rows(const T* x) {\n}\n"
    source.write_text(f"// registers: rows <= 40\n{kernel}")
    assert budgets(source) == {"rows": 40}
    source.write_text(f"// registers: columns <= 40\n{kernel}")
    with pytest.raises(AssertionError, match="budget not above columns"):
        budgets(source)
