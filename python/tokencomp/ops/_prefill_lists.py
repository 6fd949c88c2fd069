"""Checks of the values of key lists, which need the data."""

import torch
from torch import Tensor

from tokencomp.ops import _check

INDEX_BITS = 0x7FFFFFFF


def check(
    op: str,
    q: Tensor,
    keys: int,
    indptr: Tensor | None,
    indices: Tensor | None,
    column_ptr: Tensor | None,
    columns: Tensor | None,
    block_q: int,
    block_k: int,
) -> None:
    """Raise ValueError unless lists are ordered, in range, and columns lie outside the blocks of their rows.

    What is not of an integer dtype or of no possible shape is left for the operator to refuse.
    """
    rows = q.shape[0] * -(-q.shape[2] // block_q)
    blocks = -(-keys // block_k)
    if not _usable(indptr, indices, rows):
        return
    assert indptr is not None and indices is not None  # noqa: PT018  (for the type checker)
    members = _members(op, "indptr", indptr, "indices", indices & INDEX_BITS, blocks, "blocks of keys")
    if not _usable(column_ptr, columns, rows):
        return
    assert column_ptr is not None and columns is not None  # noqa: PT018
    singles = _members(op, "column_ptr", column_ptr, "columns", columns, keys, "S")
    listed = torch.zeros(len(indptr) - 1, blocks, dtype=torch.bool, device=q.device)
    listed[members] = True
    heads = [(len(pointers) - 1) // rows for pointers in (indptr, column_ptr)]
    listed = listed.view(q.shape[0], heads[0], rows // q.shape[0], blocks)
    if heads[0] > heads[1]:
        listed = listed.unflatten(1, (heads[1], -1)).any(2)
    listed = listed.repeat_interleave(heads[1] // listed.shape[1], dim=1).flatten(0, 2)
    twice = listed[singles[0], singles[1] // block_k]
    if bool(twice.any()):
        at = int(twice.nonzero()[0])
        raise ValueError(
            f"{op}: columns must not lie in a listed block, got {int(singles[1][at])} in list "
            f"{int(singles[0][at])}"
        )


def _usable(pointers: Tensor | None, entries: Tensor | None, rows: int) -> bool:
    if pointers is None or entries is None or not _check.checked(pointers, entries):
        return False
    integers = not any(
        t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in (pointers, entries)
    )
    flat = pointers.dim() == entries.dim() == 1 and len(pointers) > 1
    return integers and flat and rows > 0 and (len(pointers) - 1) % rows == 0


def _members(
    op: str,
    pointer_name: str,
    pointers: Tensor,
    entries_name: str,
    entries: Tensor,
    limit: int,
    limit_name: str,
) -> tuple[Tensor, Tensor]:
    """The list and the value of each entry that belongs to a list, checked."""
    pointers = pointers.long()
    counts = pointers.diff()
    if int(pointers[0]) != 0 or bool((counts < 0).any()) or int(pointers[-1]) > len(entries):
        raise ValueError(
            f"{op}: {pointer_name} must start at 0, not fall, and end at most at the {len(entries)} elements "
            f"of {entries_name}, got {int(pointers[0])} ... {int(pointers[-1])}"
        )
    used = entries[: int(pointers[-1])].long()
    _check.check_range(op, entries_name, used, 0, limit, limit_name)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=used.device), counts)
    falls = (used.diff() <= 0) & (owner.diff() == 0)
    if bool(falls.any()):
        at = int(falls.nonzero()[0]) + 1
        raise ValueError(
            f"{op}: {entries_name} must ascend in each list, got {int(used[at])} after {int(used[at - 1])} "
            f"in list {int(owner[at])}"
        )
    return owner, used
