"""Every instruction-set level of the CPU library that this machine can run, and the choice between them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokencomp

LEVELS = tokencomp.cpu_features()["available"]
SCRIPT = Path(__file__).with_name("isa_check.py")
PACKAGE = Path(tokencomp.__file__).resolve().parent.parent


def run(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(PACKAGE), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TOKENCOMP_CPU_ISA": level, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("level", LEVELS)
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
