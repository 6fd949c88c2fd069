"""Checks of values, which need the data: shapes, dtypes and devices are checked once, in the operator itself.

On CPU they always run. On CUDA they would wait for the device, so they run only under
``TOKENCOMP_CHECKED=1`` (and then cannot be captured in a CUDA graph). While a graph is traced there is
no data to look at.
"""

import os
from importlib import import_module

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_all_within = import_module("tokencomp._native").all_within


def checked(*tensors: Tensor | None) -> bool:
    """Whether the values of all ``tensors`` that are there may be looked at."""
    if torch.compiler.is_compiling():
        return False
    return all(t is None or _readable(t) for t in tensors)


def _readable(t: Tensor) -> bool:
    if (
        isinstance(t, FakeTensor) or t.is_complex()
    ):  # complex numbers have no order; every operator refuses them
        return False
    return t.is_cpu or (t.is_cuda and asked())


def asked() -> bool:
    """Whether values are to be checked even where a call is too short for it: ``TOKENCOMP_CHECKED=1``."""
    return not torch.compiler.is_compiling() and os.environ.get("TOKENCOMP_CHECKED") == "1"


def as_int32(t: Tensor | None) -> Tensor | None:
    """Any integer dtype to contiguous int32; another dtype is left for the operator to refuse."""
    if t is None:
        return None
    if t.dtype == torch.int32:  # the usual case: every further question costs as much as this one
        return t.contiguous()
    if t.dtype == torch.bool or t.is_floating_point() or t.is_complex():
        return t
    return t.to(torch.int32).contiguous()


def as_mask(t: Tensor | None) -> Tensor | None:
    """Contiguous, of whatever dtype: another than bool is left for the operator to refuse."""
    return None if t is None else t.contiguous()


def as_float32(t: Tensor | None) -> Tensor | None:
    """Any integer or float dtype to contiguous float32; another dtype is left for the operator to refuse."""
    if t is None:
        return None
    if t.dtype == torch.float32:
        return t.contiguous()
    if t.dtype == torch.bool or t.is_complex():
        return t
    return t.to(torch.float32).contiguous()


def check_lengths(op: str, lengths: Tensor, n: int) -> None:
    """Raise ValueError unless every length is in [0, N]."""
    check_within(op, "lengths", lengths, 0, n, "N")


def check_within(op: str, argument: str, values: Tensor, low: int, high: int, name: str) -> None:
    """Raise ValueError unless every integer of ``values`` is in [low, high], where ``high`` is ``name``."""
    _refuse(op, argument, f"in [{low}, {name}={high}]", values, (values < low) | (values > high))


def check_weight(op: str, weight: Tensor, name: str = "weight") -> None:
    """Raise ValueError unless every weight is finite and not negative."""
    _refuse(op, name, "finite and >= 0", weight, ~(torch.isfinite(weight) & (weight >= 0)))


def check_bias(op: str, bias: Tensor) -> None:
    """Raise ValueError unless every bias is finite or -inf."""
    _refuse(op, "key_bias", "finite or -inf", bias, bias.isnan() | (bias == torch.inf))


def check_finite(op: str, argument: str, values: Tensor) -> None:
    """Raise ValueError unless every number of ``values`` is finite."""
    _refuse(op, argument, "finite", values, ~torch.isfinite(values))


def check_seed(op: str, seed: Tensor, n: int, lengths: Tensor | None) -> None:
    """Raise ValueError unless each row of ``seed`` [B, s] holds distinct tokens below the item's length.

    Rows of items without any token (length 0) are not looked at: there is nothing they could name.
    """
    limits = torch.full((seed.shape[0],), n, device=seed.device) if lengths is None else lengths
    bad = ((seed < 0) | (seed >= limits[:, None])) & (limits[:, None] > 0)
    if bool(bad.any()):
        b, j = (int(i) for i in bad.nonzero()[0])
        bound = f"N={n}" if lengths is None else f"length={int(limits[b])}"
        raise ValueError(f"{op}: seed must be in [0, {bound}), got {int(seed[b, j])} in item {b}")
    ordered = seed.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (limits[:, None] > 0)
    if bool(repeated.any()):
        b, j = (int(i) for i in repeated.nonzero()[0])
        raise ValueError(
            f"{op}: seed must hold distinct tokens per item, got {int(ordered[b, j])} twice in item {b}"
        )


def check_index(op: str, argument: str, index: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless every entry of ``index`` is a row of ``x`` [B, N, C] or -1, a hole."""
    if index is not None and x.dim() == 3:
        check_range(op, argument, index, -1, x.shape[1], "N")


def check_range(op: str, argument: str, values: Tensor, low: int, limit: int, name: str) -> None:
    """Raise ValueError unless all integer ``values`` are in [low, limit)."""
    if values.dtype == torch.int32 and values.is_cpu and values.is_contiguous():
        # by far the most calls: the reduction below takes 2 us, 30 us where its code is not in the caches
        if _all_within(values.data_ptr(), values.numel(), low, limit):
            return
    elif values.numel() == 0 or values.dtype == torch.bool or values.is_floating_point():
        return  # nothing to refuse, or the operator refuses the dtype
    smallest, largest = (int(v) for v in values.aminmax())
    if smallest < low or largest >= limit:
        _refuse(op, argument, f"in [{low}, {name}={limit})", values, (values < low) | (values >= limit))


def check_distinct(op: str, arguments: str, values: Tensor) -> None:
    """Raise ValueError if an entry of a row of ``values`` [B, n] repeats."""
    ordered = values.sort(dim=1).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if bool(repeated.any()):
        b, j = (int(i) for i in repeated.nonzero()[0])
        raise ValueError(
            f"{op}: {arguments} must not repeat a token, got {int(ordered[b, j])} twice in item {b}"
        )


def _refuse(op: str, argument: str, expected: str, values: Tensor, bad: Tensor) -> None:
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise ValueError(f"{op}: {argument} must be {expected}, got {values[tuple(where)].item()} at {where}")
