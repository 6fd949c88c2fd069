"""Loads the operator libraries once and remembers what was loaded, and why something was not."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.torch_version import TorchVersion

_LIB_DIR = Path(__file__).parent / "lib"
_HOW_TO_BUILD = (
    "Build it with `pip install -e . --no-build-isolation` (or `python setup.py build_ext --inplace`) "
    "in the source checkout."
)


@dataclass(frozen=True)
class Library:
    """One operator library: ``loaded``, or not with the ``reason``."""

    name: str
    path: Path
    loaded: bool
    reason: str = ""


_libraries: dict[str, Library] = {}


def libraries() -> dict[str, Library]:
    """The libraries that were considered so far, by name: ``cpu``, ``cuda``, ``emu``."""
    return dict(_libraries)


def load_libraries() -> None:
    """Load the CPU library (mandatory: it owns the operator schemas) and the CUDA library where it can run.

    Raises:
        ImportError: PyTorch is too old; the CPU library or the native module is missing or does not load.
    """
    if "cpu" in _libraries:
        return
    if TorchVersion(torch.__version__) < "2.10":
        raise ImportError(f"tokencomp needs PyTorch >= 2.10, found {torch.__version__}")
    _native()
    path = _LIB_DIR / "libtokencomp_cpu.so"
    if not path.is_file():
        raise ImportError(f"tokencomp: {path.name} is not built. {_HOW_TO_BUILD}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"tokencomp: {path.name} does not load: {error}. {_HOW_TO_BUILD}") from error
    _libraries["cpu"] = Library("cpu", path, loaded=True)
    _libraries["cuda"] = _load_cuda(_LIB_DIR / "libtokencomp_cuda.so")


def _load_cuda(path: Path) -> Library:
    if torch.version.cuda is None:
        return Library("cuda", path, loaded=False, reason="this PyTorch is a CPU build")
    if not path.is_file():
        return Library(
            "cuda", path, loaded=False, reason="not built (no nvcc at build time, or TOKENCOMP_CUDA=0)"
        )
    if not torch.cuda.is_available():
        return Library("cuda", path, loaded=False, reason="PyTorch finds no usable GPU")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library("cuda", path, loaded=False, reason=f"does not load: {error}")
    return Library("cuda", path, loaded=True)


def load_emulator(path: Path) -> None:
    """Load the emulated CUDA operators (tests only) as the namespace ``torch.ops.tokencomp_emu``."""
    if "emu" in _libraries:
        return
    from tokencomp.ops import _namespace

    torch.ops.load_library(str(path))
    _namespace.add_namespace("tokencomp_emu")
    _libraries["emu"] = Library("emu", path, loaded=True)


def _native() -> ModuleType:
    try:
        return importlib.import_module("tokencomp._native")
    except ImportError as error:
        raise ImportError(f"tokencomp: the native module is not usable ({error}). {_HOW_TO_BUILD}") from error


def build_info() -> dict[str, Any]:
    """What was compiled in: compilers, back ends, GPU architectures."""
    return dict(_native().build_info())


def cpu_features() -> dict[str, Any]:
    """Instruction sets of the CPU kernels: the one in use and those this machine could use."""
    return dict(_native().cpu_features())
