"""What this installation has, and why something is missing: ``python -m tokencomp info``."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

import tokencomp
from tokencomp import _load
from tokencomp.ops import _namespace

PACKAGES = ("transformers", "safetensors", "numpy", "matplotlib", "rich", "scikit-learn", "pillow")


def describe() -> dict[str, Any]:
    """Versions, back ends, operators, instruction sets, threads and GPU, as JSON has them."""
    features = tokencomp.cpu_features()
    return {
        "tokencomp": tokencomp.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "back_ends": {
            library.name: {"loaded": library.loaded, "reason": library.reason}
            for library in _load.libraries().values()
        },
        "operators": {name: _namespace.back_ends(name) for name in _namespace.op_names()},
        "instruction_set": {"active": features["active"], "available": list(features["available"])},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "build": {key: str(value) for key, value in sorted(tokencomp.build_info().items())},
    }


def lines(found: dict[str, Any]) -> dict[str, str]:
    """The same, a line each."""
    said = {
        "tokencomp": found["tokencomp"],
        "python": found["python"],
        "torch": f"{found['torch']} (CUDA {found['torch_cuda'] or 'none'})",
    }
    said |= {name: version or "not installed" for name, version in found["packages"].items()}
    for name, library in found["back_ends"].items():
        said[f"{name} back end"] = "loaded" if library["loaded"] else f"not loaded: {library['reason']}"
    for name in ("cpu", "cuda"):
        own = [operator for operator, back_ends in found["operators"].items() if name in back_ends]
        said[f"operators on {name}"] = f"{len(own)} of {len(found['operators'])}"
    sets = found["instruction_set"]
    said["instruction set"] = f"{sets['active']} (available: {', '.join(sets['available'])})"
    said["threads"] = f"{found['threads']} of {found['cores']} cores"
    said["gpu"] = found["gpu"] or "none"
    return said | {f"build: {key}": value or "none" for key, value in found["build"].items()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
