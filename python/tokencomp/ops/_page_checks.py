"""Page tables of the operators that read keys in pages: what they mean, and checks that need the data."""

import torch
from torch import Tensor

from tokencomp.ops import _check, _score_sides
from tokencomp.ops.kvquant_pages import page_number, page_type
from tokencomp.ops.page_pools import PagePools


def slots(k: Tensor, block_table: Tensor | None) -> int | None:
    """S; None where a shape is wrong, which the operator refuses."""
    keys = _score_sides.dense_keys(k)
    if keys is None or block_table is None:
        return keys
    return keys * block_table.shape[2] if block_table.dim() == 3 else None


def as_table(table: Tensor | None) -> Tensor | None:
    """int32; a table expanded over heads stays a view."""
    integer = table is not None and not (table.is_floating_point() or table.is_complex())
    return table.to(torch.int32) if table is not None and integer and table.dtype != torch.bool else table


def check_table(
    op: str, table: Tensor, lengths: Tensor | None, pool: Tensor, quantized: PagePools | None
) -> None:
    """Raise ValueError unless the entries in use are -1 or name pages of ``pool`` or a quantized one."""
    if not _check.checked(table, lengths) or table.dim() != 3 or pool.dim() != 4:
        return None
    if table.is_floating_point() or table.is_complex():
        return None
    if lengths is not None and lengths.shape in (table.shape[:1], table.shape[:2]):
        first = torch.arange(table.shape[2], device=table.device) * pool.shape[2]
        length = lengths[:, None, None] if lengths.dim() == 1 else lengths[..., None]
        table = torch.where(first < length, table, -1)
    pools = () if quantized is None else quantized.pools
    if not pools:
        return _check.check_range(op, "block_table", table, -1, pool.shape[0], "pages")
    count = torch.tensor([len(pool), *map(len, pools)] + [0] * (15 - len(pools)), device=table.device)
    bad = (table != -1) & ((table < 0) | (page_number(table) >= count[page_type(table).long()]))
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        entry = table[tuple(where)]
        raise ValueError(
            f"{op}: block_table must be -1 or name a page of the {1 + len(pools)} pools, got page "
            f"{int(page_number(entry))} of type {int(page_type(entry))} at {where}"
        )
    return None
