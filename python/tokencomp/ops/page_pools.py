"""Pools of quantized pages beside the working ones, as every operator that reads pages of several types takes
them.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokencomp.ops import _check
from tokencomp.ops.kvquant_pages import TIERS, PageFormat, page_number, page_type


@dataclass(frozen=True)
class PagePools:
    """Quantized pools; an entry of a page table with i in its upper four bits names a page of pool i - 1.

    Entries with 0 there name working pages, of the dtype of the queries. Pages of all types have the same
    number of tokens, and one table may name them in any order; a quantized page is read whole, so all of its
    slots are in use unless it is the last of its row.

    Args:
        pools: ``[pages, page_bytes]`` uint8 each, contiguous, at most 7.
        formats: theirs; layout ``linear`` on the CPU, ``mma16`` on CUDA.
        k_scale, k_bias, v_scale, v_bias: ``[B, Hkv, D]`` maps per channel with which all pages of a row were
            written, as in ``kv_page_write_``.
    """

    pools: tuple[Tensor, ...] = ()
    formats: tuple[PageFormat, ...] = ()
    k_scale: Tensor | None = None
    k_bias: Tensor | None = None
    v_scale: Tensor | None = None
    v_bias: Tensor | None = None

    def repeated(self, times: int) -> "PagePools":
        """The same where every kv head is there so many times."""
        maps = {name: getattr(self, name) for name in ("k_scale", "k_bias", "v_scale", "v_bias")}
        wide = {name: None if x is None else x.repeat_interleave(times, 1) for name, x in maps.items()}
        return PagePools(self.pools, self.formats, **wide)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the operators."""
        maps = {name: getattr(self, name) for name in ("k_scale", "k_bias", "v_scale", "v_bias")}
        return {
            "pools": list(self.pools),
            "formats": [number for page in self.formats for number in _numbers(page)],
            **{name: _check.as_float32(value) for name, value in maps.items()},
        }


def arguments_of(quantized: PagePools | None) -> dict[str, Any]:
    """Keyword arguments of the operators, of None too."""
    return {} if quantized is None else quantized.arguments()


def check_entries(op: str, block_table: Tensor, working: int, quantized: PagePools | None) -> None:
    """Raise ValueError unless every entry is -1 or names a page of the ``working`` ones or of a pool."""
    counts = [working] + ([] if quantized is None else [pool.shape[0] for pool in quantized.pools])
    if len(counts) == 1:
        _check.check_range(op, "block_table", block_table, -1, working, "N")
        return
    kind, number = page_type(block_table), page_number(block_table)
    unknown = (kind >= len(counts)) & (block_table != -1)
    if bool(unknown.any()):
        where = unknown.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: block_table must name pages of a type in [0, {len(counts)}), got type "
            f"{int(kind[tuple(where)])} at {where}"
        )
    for i, count in enumerate(counts):
        missing = (kind == i) & (number >= count)
        if bool(missing.any()):
            where = missing.nonzero()[0].tolist()
            raise ValueError(
                f"{op}: block_table must name pages in [0, N={count}) of type {i}, got "
                f"{int(number[tuple(where)])} at {where}"
            )


def _numbers(page: PageFormat) -> list[int]:
    axis = ("token", "channel")
    return [
        TIERS.index(page.tier_k), axis.index(page.axis_k), page.group_k,
        TIERS.index(page.tier_v), axis.index(page.axis_v), page.group_v,
        int(page.layout == "mma16"),
    ]  # fmt: skip
