"""The one place that knows in which ``torch.ops`` namespace the operators live.

The product has one, ``tokencomp``; tests switch to ``tokencomp_emu``, where the CUDA kernels run on the
emulator.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_active = "tokencomp"
_namespaces: list[str] = []
_fakes: dict[str, Callable[..., Any]] = {}
_gradients: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {}


def op(name: str) -> Any:
    """The operator ``name`` of the active namespace."""
    return getattr(getattr(torch.ops, _active), name)


def call(name: str, *arguments: Any) -> Any:
    """Call an operator that has a gradient, by the short way where none is asked for.

    A gradient registered from Python is a Python function around the kernel, entered on every call: 4 us in
    the caches and 40 us out of them, as much as a small merge.
    """
    function = op(name)
    if torch.compiler.is_compiling():
        return function(*arguments)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return function(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return function.default(*arguments)


def op_names() -> list[str]:
    """Every operator that has a fake kernel, in alphabetical order."""
    return sorted(_fakes)


def back_ends(name: str) -> list[str]:
    """Those of ``cpu`` and ``cuda`` that a kernel of operator ``name`` is loaded for."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [key.lower() for key in ("CPU", "CUDA") if has(f"{_active}::{name}", key)]


def fake(name: str) -> Callable[[F], F]:
    """Decorator: the shape function of operator ``name``, for every namespace that is or will be loaded."""

    def remember(function: F) -> F:
        _fakes[name] = function
        for namespace in _namespaces:
            torch.library.register_fake(f"{namespace}::{name}", function)
        return function

    return remember


def gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give operator ``name`` a backward, in every namespace that is or will be loaded."""
    _gradients[name] = backward, setup_context
    for namespace in _namespaces:
        _register_gradient(namespace, name)


def _register_gradient(namespace: str, name: str) -> None:
    backward, setup_context = _gradients[name]
    torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup_context)


def add_namespace(namespace: str) -> None:
    """Announce that the operators of ``namespace`` are loaded."""
    if namespace in _namespaces:
        return
    _namespaces.append(namespace)
    for name, function in _fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", function)
    for name in _gradients:
        _register_gradient(namespace, name)


@contextmanager
def use_namespace(namespace: str) -> Iterator[None]:
    """Send every wrapper to ``namespace`` while the context is open (tests only)."""
    global _active
    if namespace not in _namespaces:
        raise ValueError(f"use_namespace: namespace must be one of {_namespaces}, got {namespace!r}")
    previous, _active = _active, namespace
    try:
        yield
    finally:
        _active = previous
