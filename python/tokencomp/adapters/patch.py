"""Change what modules of a user's model do, and change it back.

A patched module gets a subclass of its own class; nothing is written into the module. So ``isinstance``,
names, hooks, parameters and ``state_dict`` stay what they are, copies and pickles of a patched model are
of the plain model, and taking the patch away is setting the class back.
"""

import copyreg
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

ORIGINAL = "_tokencomp_original"
_threads = threading.local()


def is_patched(module: nn.Module) -> bool:
    """Whether ``module`` has a patch on it."""
    return hasattr(type(module), ORIGINAL)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` without a patch."""
    return getattr(type(module), ORIGINAL, type(module))


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """What is patched inside is as it was again where an exception, KeyboardInterrupt included, ends it."""
    blocks: list[list[Patches]] = vars(_threads).setdefault("blocks", [])
    begun: list[Patches] = []
    try:
        blocks.append(begun)
        yield
        _forget(blocks, begun)
    except BaseException:
        _forget(blocks, begun)
        for patches in reversed(begun):
            patches.restore()
        raise


def _forget(blocks: list[list["Patches"]], begun: list["Patches"]) -> None:
    blocks[:] = [block for block in blocks if block is not begun]  # remove() takes an equal one


class Patches:
    """The modules that one call has patched, and the hooks that it has put on others."""

    def __init__(self) -> None:
        self._patched: list[tuple[nn.Module, type]] = []
        self._hooks: list[Any] = []
        for block in vars(_threads).get("blocks", ()):
            block.append(self)

    def hook(self, register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
        """Register a hook that is removed with the patches."""
        self._hooks.append(register(hook, **options))

    def keep(self, handle: Any) -> None:
        """The hook of ``handle`` is removed with the patches."""
        self._hooks.append(handle)

    def add(self, module: nn.Module, **members: Any) -> None:
        """Give ``module`` a subclass of its class with these methods, properties and attributes.

        Raises ValueError where it is patched already or where the instance hides the method of its class.
        """
        cls = type(module)
        if is_patched(module):
            raise ValueError(f"compress: this {cls.__name__} is compressed already; remove() that first")
        hidden = sorted(set(members) & set(vars(module)) - {"config"})
        if hidden:
            raise ValueError(
                f"compress: this {cls.__name__} has its own {', '.join(hidden)} (a wrapper such as "
                "accelerate's device_map set it), which a patch of its class would not reach"
            )
        identity = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        members = {**identity, ORIGINAL: cls, "__reduce_ex__": _reduce_as_original, **members}
        metaclass: Any = type(cls)
        subclass = metaclass(cls.__name__, (cls,), members)
        self._patched.append((module, subclass))  # first: an interrupt may come between the two
        module.__class__ = subclass

    def restore(self) -> None:
        """Set every class back. Raises RuntimeError, at the end, where somebody has changed one since."""
        changed = []
        while self._hooks:
            self._hooks.pop().remove()
        while self._patched:
            module, subclass = self._patched.pop()
            original = getattr(subclass, ORIGINAL)
            if type(module) is subclass:
                module.__class__ = original
            elif type(module) is not original:
                changed.append(type(module).__name__)
        if changed:
            raise RuntimeError(f"remove: the class was changed after compress of: {', '.join(changed)}")


def _reduce_as_original(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Copy and pickle as the plain class. ``copyreg.__newobj__`` would insist on the patched one."""
    cls = original_class(self)
    reduced = cls.__reduce_ex__(self, max(int(protocol), 2))
    assert isinstance(reduced, tuple)
    return (copyreg._reconstructor, (cls, object, None), *reduced[2:])  # type: ignore[attr-defined]
