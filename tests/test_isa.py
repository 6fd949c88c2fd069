"""Every instruction-set level of the CPU library that this machine can run, and the choice between them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokencomp

LEVELS = tokencomp.cpu_features()["available"]
COMPILED = tokencomp.cpu_features()["compiled"]
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).with_name("isa_check.py")
PACKAGE = Path(tokencomp.__file__).resolve().parent.parent


def run(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(PACKAGE), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TOKENCOMP_CPU_ISA": level, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("level", LEVELS[:-1])  # the last one runs in all other tests
def test_level_agrees_with_reference(level: str) -> None:
    done = run(level, str(SCRIPT), level)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{level}: " in done.stdout


def test_best_level_is_the_default() -> None:
    assert "scalar" in LEVELS
    print_level = "import tokencomp; print(tokencomp.cpu_features()['active'])"
    env = {key: v for key, v in os.environ.items() if key != "TOKENCOMP_CPU_ISA"}
    env["PYTHONPATH"] = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", print_level], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == LEVELS[-1]


def test_unknown_level_is_an_error() -> None:
    done = run("avx1024", "-c", "import tokencomp; tokencomp.cpu_features()")
    assert done.returncode != 0
    assert f"TOKENCOMP_CPU_ISA: must be one of {', '.join(LEVELS)}" in done.stderr
    assert "got avx1024" in done.stderr


def merged_symbols(listing: str) -> list[str]:
    """Symbols of an object file (``nm``) of which the linker keeps one copy for the whole library."""
    return [line for line in listing.splitlines() if re.match(r"[0-9a-f]*\s+[WVu]\s", line)]


@pytest.mark.parametrize("level", COMPILED)
def test_no_code_of_a_level_can_leak(level: str) -> None:
    """Inline functions compiled out of line are merged, and then run with the flags of any level."""
    objects = list(ROOT.glob(f"build/cmake/CMakeFiles/cpu_kernels_{level}.dir/csrc/cpu/*_kernels.cpp.o"))
    assert objects, "built elsewhere: run `make build`"
    for path in objects:
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        assert f"tokencomp::cpu::{level}::" in listing
        assert merged_symbols(listing) == []


def test_merged_symbols_are_seen() -> None:
    listing = "00000 T f()\n00000 W std::vector<int>::push_back(int)\n                 U memcpy\n"
    assert merged_symbols(listing) == ["00000 W std::vector<int>::push_back(int)"]
    assert merged_symbols("00000 V g(int, int)\n00000 t h()") == ["00000 V g(int, int)"]
