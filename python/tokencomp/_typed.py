"""Arguments and knobs of a wrong type: what is said of them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_hints = cache(get_type_hints)


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: an argument that is not of its annotated type raises TypeError, which names function and
    argument, instead of what the function stumbled over. Errors of its own checks stay as they are.

    Types are looked at after a call has failed, not before one: a decode step has no time for it.
    """

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return function(*arguments, **options)
        except Exception as error:
            message = None if says(error, function) else _wrong_argument(function, arguments, options)
            if message is None:
                raise
            raise TypeError(message) from error

    return call


def says(error: Exception, owner: type | Callable[..., Any]) -> bool:
    """Whether ``error`` is one of the owner's own: ``kcenter_greedy: k must be ...``, after a place."""
    return f"{owner.__name__}: " in str(error)


def check_fields(instance: Any, cls: type) -> None:
    """Raise TypeError unless the fields of a dataclass are of their annotated types."""
    message = _wrong(cls.__name__, vars(instance), cls)
    if message is not None:
        raise TypeError(message)


def _wrong_argument(function: Callable[..., Any], arguments: Any, options: dict[str, Any]) -> str | None:
    try:
        given = inspect.signature(function).bind(*arguments, **options).arguments
    except TypeError:
        return None  # missing or unknown arguments: Python's own message names the function
    return _wrong(function.__name__, given, function)


def _wrong(owner: str, given: Mapping[str, Any], annotated: Any) -> str | None:
    for name, expected in _hints(annotated).items():
        if name in given and not is_of(given[name], expected):
            what = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
            return f"{owner}: {name} must be {what}, got {_shown(given[name])}"
    return None


def _shown(value: Any) -> str:
    short = isinstance(value, str | int | float | tuple | list | None)
    return f"{value!r:.40}" if short else type(value).__name__


def is_of(value: Any, expected: Any) -> bool:
    """Whether ``value`` may be given where ``expected`` is annotated. True of what cannot be told."""
    if expected in (int, float, bool):  # numbers stand for one another; symbols of a traced graph for numbers
        return not isinstance(value, Tensor) and hasattr(
            value, "__index__" if expected is int else "__float__"
        )
    origin, parts = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        return any(is_of(value, part) for part in parts)
    if origin is Literal:
        return any(value is part or value == part for part in parts if type(part) is type(value))
    if origin in (tuple, list, Sequence):
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        uniform = origin is not tuple or parts[1:] == (...,)
        return listed and (not uniform or all(is_of(item, parts[0]) for item in value))
    try:
        return isinstance(value, origin or expected)
    except TypeError:  # a protocol or a type variable
        return True
