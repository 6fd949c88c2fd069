"""The test libraries and how a test reaches them.

A library that should have been built and is not there is a failure, never a skip; only a missing GPU skips.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "lib"

SCHEDULES: list[dict[str, str]] = [
    {"SCHED": "fixed"},
    {"SCHED": "reverse"},
    {"SCHED": "fixed", "ASYNC": "eager"},
    *({"SCHED": "random", "SEED": str(seed)} for seed in range(4)),
    {"SCHED": "random", "SEED": "9", "ASYNC": "eager", "THREADS": "2"},
]


def path(variant: str) -> Path:
    return FOLDER / f"libtokencomp_test_{variant}.so"


@cache
def load(variant: str) -> Any:
    """The operators of a variant: ``emu``, ``race`` or ``cuda``. (``ubsan`` aborts: it gets a process.)"""
    library = path(variant)
    if not library.is_file():
        pytest.fail(f"{library.relative_to(ROOT)} is missing: build the target test_libraries")
    torch.ops.load_library(str(library))
    return getattr(torch.ops, f"tokencomp_test_{variant}")


@contextmanager
def emulator(**settings: str) -> Iterator[None]:
    """Settings of the emulator, by the last word of their name: ``emulator(SCHED="random", SEED="3")``."""
    before = {k: v for k, v in os.environ.items() if k.startswith("TOKENCOMP_EMU_")}
    for name in before:
        del os.environ[name]
    os.environ.update({f"TOKENCOMP_EMU_{k}": v for k, v in settings.items()})
    try:
        yield
    finally:
        for name in settings:
            del os.environ[f"TOKENCOMP_EMU_{name}"]
        os.environ.update(before)


class Device:
    """Calls test operators with tensors from the CPU and brings the results back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ops = load(name)
        self.device = "cuda" if name == "cuda" else "cpu"

    def __getattr__(self, op: str) -> Any:
        def call(*args: Any) -> Any:
            moved = [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in args]
            result = getattr(self.ops, op)(*moved)
            if isinstance(result, torch.Tensor):
                return result.cpu()
            return tuple(r.cpu() if isinstance(r, torch.Tensor) else r for r in result)

        return call


def require_sm90(device: Device) -> None:
    """Skips on a GPU before Hopper, where the instruction would trap. The emulated device is an sm_90."""
    if device.name == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs an sm_90 GPU")


def make_device(name: str) -> Device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that this PyTorch can use")
    return Device(name)
