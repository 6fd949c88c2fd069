"""Where operators run in the tests: the CPU library, the CUDA sources on the emulator, a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Inputs, keep_strides
from tokencomp import _load, ops
from tokencomp.ops import _namespace
from tokencomp.ops.page_pools import PagePools
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "build" / "lib" / "libtokencomp_emu.so"


def cuda_missing() -> str:
    """Why the CUDA back end cannot run here; empty where it can. A GPU without it is a failure."""
    cuda = _load.libraries()["cuda"]
    if not cuda.loaded and torch.cuda.is_available():
        pytest.fail(f"there is a GPU, but the CUDA library is not loaded: {cuda.reason}")
    return "" if cuda.loaded else cuda.reason


@dataclass(frozen=True)
class Backend:
    """Where an operator runs: its namespace and the device its tensors live on."""

    name: str
    namespace: str
    device: str

    @contextmanager
    def active(self) -> Iterator[None]:
        with _namespace.use_namespace(self.namespace):
            yield

    def kcenter(self, x: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        """``ops.kcenter_greedy`` on this back end; arguments from the CPU, results to the CPU."""
        call = Inputs(x, k, options).to(self.device)
        with self.active():
            index, value = ops.kcenter_greedy(call.x, call.k, **call.options)
        return index.cpu(), value.cpu()

    def run(self, name: str, *arguments: Any, **options: Any) -> Any:
        """The operator ``name`` through its wrapper; tensors from the CPU, results to the CPU."""
        with self.active():
            return _moved(getattr(ops, name)(*self.here(arguments), **self.here(options)), "cpu")

    def run_kernel(self, name: str, *arguments: Any, **options: Any) -> Any:
        """The operator below the wrapper: values are not checked in Python."""
        kernel = getattr(getattr(torch.ops, self.namespace), name)
        return _moved(kernel(*self.here(arguments), **self.here(options)), "cpu")

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """The wrapper ``name`` on tensors that are moved here unless they are here already (and may be
        changed); results stay. To be used inside ``active()``.
        """
        return getattr(ops, name)(*self.here(arguments), **self.here(options))

    def here(self, values: Any) -> Any:
        return _moved(values, self.device)

    def home(self, values: Any) -> Any:
        return _moved(values, "cpu")

    def kernel(self, x: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        """The operator below the wrapper: values are not checked in Python."""
        call = Inputs(x, k, options).to(self.device)
        index, value = getattr(torch.ops, self.namespace).kcenter_greedy(call.x, call.k, **call.options)
        return index.cpu(), value.cpu()


def _moved(values: Any, device: str) -> Any:
    """Tensors in (nested) tuples and dictionaries on another device, with the strides they have."""
    if isinstance(values, Tensor):
        return keep_strides(values, device)
    if isinstance(values, tuple | list):
        return tuple(_moved(value, device) for value in values)
    if isinstance(values, dict):
        return {key: _moved(value, device) for key, value in values.items()}
    if isinstance(values, PagePools):
        return replace(values, **{f.name: _moved(getattr(values, f.name), device) for f in fields(values)})
    return values


def make_backend(name: str) -> Backend:
    if name == "cpu":
        return Backend("cpu", "tokencomp", "cpu")
    if name == "emu":
        if not EMULATOR.is_file():
            pytest.fail(f"{EMULATOR.relative_to(ROOT)} is missing: build it with `make test-libraries`")
        _load.load_emulator(EMULATOR)
        return Backend("emu", "tokencomp_emu", "cpu")
    if cuda_missing():
        pytest.skip(cuda_missing())
    return Backend("cuda", "tokencomp", "cuda")
