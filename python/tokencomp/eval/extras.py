"""Optional packages: all there when they are needed, or named in one line."""

import importlib

EXTRAS = {"rich": "eval", "matplotlib": "eval", "transformers": "hf", "safetensors": "hf", "sklearn": "demo"}
PACKAGES = {"sklearn": "scikit-learn"}


def need(*modules: str) -> None:
    """ImportError in one line that names every one of ``modules`` that is missing, and the extras that bring
    them.
    """
    missing = {module: error for module in modules if (error := _failure(module)) is not None}
    if missing:
        packages = ", ".join(PACKAGES.get(module, module) for module in missing)
        extras = ",".join(dict.fromkeys(EXTRAS[module] for module in missing))
        why = "; ".join(map(str, missing.values()))
        raise ImportError(f"eval needs {packages}: pip install 'tokencomp[{extras}]' ({why})")


def _failure(module: str) -> ImportError | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return error
    return None
