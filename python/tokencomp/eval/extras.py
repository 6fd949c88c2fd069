"""Optional packages: imported when they are needed, or named in one line."""

import importlib
from types import ModuleType


def need(module: str) -> ModuleType:
    """``module``, or ImportError in one line that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"eval needs {package}: pip install 'tokencomp[eval]' ({error})") from error
