"""What a run holds and takes: bytes of storages, peak bytes, operations, seconds."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def cache_bytes(cache: Any) -> int:
    """Bytes a cache holds: of all storages its layers' tensors lie in, each counted once.

    So a view counts whole, as what it keeps alive does. A cache with a method ``memory()`` (bytes, an int)
    is asked instead.
    """
    if callable(getattr(cache, "memory", None)):
        return int(cache.memory())
    storages = {}
    for layer in cache.layers:
        for tensor in tree_leaves(list(vars(layer).values())):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


class Meter:
    """Collects what a task reports during one run on one sample."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}  # of a phase: seconds a token for "decode", else a call
        self.kv_bytes: int | None = None

    @contextmanager
    def phase(self, name: str, tokens: int) -> Iterator[None]:
        """Times a forward; waits for the GPU on both sides."""
        _synchronize()
        begin = time.perf_counter()
        yield
        _synchronize()
        passed = time.perf_counter() - begin
        self.seconds.setdefault(name, []).append(passed / tokens if name == "decode" else passed)

    def holds(self, cache: Any) -> None:
        """Measures the cache."""
        self.kv_bytes = cache_bytes(cache)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that were allocated at once during ``call``, above those before it (the weights).

    CUDA: ``max_memory_allocated``. CPU: storages of the tensors operators return, followed from their first
    appearance to their release; what an operator allocates and frees inside itself is not seen, and neither
    is the allocator's own overhead: it is not the resident size of the process.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    live = _LiveStorages()
    with live:
        call()
    return live.peak


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in ``call``, as PyTorch
    counts them (a multiply-add is two). What a compressor's own operators compute is not among them.
    """
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        call()
    return int(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """PyTorch counts its other fused attentions, but not the CPU's. Shapes ``[B, H, T, D]``."""
    return int(sdpa_flop_count(query, key, value))


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that appear as results and are not yet released."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.known.add(tensor.untyped_storage())  # was there before, so a view of it is nothing new
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self.known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size).atexit = False

    def _remove(self, size: int) -> None:
        self.now -= size
