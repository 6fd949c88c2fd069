"""Pages of keys and values: one tensor, and the book of who uses which page."""

import contextlib
import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokencomp.methods.kv import PageSpec
from tokencomp.native import PagePool
from tokencomp.ops.kvquant_pages import PageFormat, kv_pages_repack

if TYPE_CHECKING:
    from typing_extensions import Self

Ints: TypeAlias = NDArray[np.int32]

PAGE_CPU, PAGE_CUDA = 32, 64
SLACK = 4  # a pool that must grow takes a share 1/SLACK more than is needed now


def page_size(device: torch.device) -> int:
    """Slots of a page where nobody chooses: 32 on a CPU, 64 on CUDA."""
    return PAGE_CUDA if device.type == "cuda" else PAGE_CPU


class Account:
    """The bytes that several pools together may hold; ``limit`` None: as many as there are."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.pools: weakref.WeakSet[Pages] = weakref.WeakSet()

    def left_for(self, pool: "Pages") -> int | None:
        """Pages that ``pool`` may have, beside the other pools as they are."""
        if self.limit is None:
            return None
        others = sum(other.capacity * other.page_bytes for other in self.pools if other is not pool)
        return max(0, self.limit - others) // pool.page_bytes

    def __deepcopy__(self, memo: dict[int, Any]) -> "Account":
        """For other pools, which are still to come."""
        return Account(self.limit)


class Pages:
    """Pages of ``page`` slots each, one tensor with a page a row, and the book of who uses which.

    Args:
        page: slots of a page, 16, 32 or 64.
        elements: of a page.
        dtype: of these.
        device: of the pages.
        account: of the bytes that this and other pools may hold.
    """

    def __init__(
        self, page: int, elements: int, dtype: torch.dtype, device: torch.device, account: Account
    ) -> None:
        if page not in (16, 32, 64):
            raise ValueError(f"cache: page must be 16, 32 or 64 slots, got {page}")
        self.page, self.dtype, self.device, self.account = page, dtype, device, account
        self.page_bytes = elements * dtype.itemsize
        self.book = PagePool(0)
        self._peak = 0  # of books before this one
        self._use(torch.empty(0, elements, dtype=dtype, device=device))
        account.pools.add(self)

    @property
    def capacity(self) -> int:
        """Pages there are."""
        return self.data.shape[0]

    @property
    def peak(self) -> int:
        """The most pages that were in use at a time."""
        return max(self._peak, int(self.book.peak))

    def reserve(self, pages: int, *, slack: bool = False) -> None:
        """See to it that ``pages`` are free.

        Raises MemoryError, and changes nothing, where the limit or the device has no room for them.
        """
        wanted = self.book.in_use + pages
        if wanted <= self.capacity:
            return
        most = self.account.left_for(self)
        if most is not None and wanted > most:
            raise MemoryError(
                f"cache: {self._wants(pages)}; the limit of {self.account.limit} bytes is {most} pages"
            )
        grown = wanted + wanted // SLACK if slack else wanted
        if most is not None:  # half of what is left, for other pools may need it too
            grown = min(grown, wanted + (most - wanted) // 2)
        try:
            data = torch.empty(grown, self.data.shape[1], dtype=self.dtype, device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise MemoryError(
                f"cache: {self._wants(pages)}, and {self.device} has no room: {error}"
            ) from error
        data[: self.capacity] = self.data
        self._use(data)
        self.book.grow(grown)

    def expect(self, pages: int) -> None:
        """Have room for ``pages`` more, if there is any to be had, so that it need not grow step by step."""
        most = self.account.left_for(self)
        most = pages if most is None else most - self.book.in_use
        with contextlib.suppress(MemoryError):
            self.reserve(max(0, min(pages, most)))

    def expect_like(self, own: int, times: int) -> None:
        """``expect`` so many times the pages of a layer that has ``own``.

        Where others have pages too, the free ones stay for those that they expect.
        """
        in_use = int(self.book.in_use)
        self.expect(times * own + (self.capacity - in_use if in_use > own else 0))

    def allocate(self, pages: int) -> Ints:
        """``pages`` page numbers, the lowest free ones first; grows where needed. Raises as ``reserve``."""
        self.reserve(pages, slack=True)
        return np.asarray(self.book.allocate(pages), dtype=np.int32)

    def shrink(self) -> Ints | None:
        """Give the free pages back to the device where they are more than an eighth of those in use.

        Pages in use move to the front, in order. Returns the new number of every page, None where nothing
        was done. For a moment both pools are there.
        """
        uses = self.book.refcount(np.arange(self.capacity, dtype=np.int32))
        used = np.flatnonzero(uses)
        if self.capacity <= len(used) + len(used) // 8:
            return None
        data = self.data[torch.from_numpy(used).to(self.device)]
        self._peak, self.book = self.peak, _book(uses[used])
        self._use(data)
        number = np.zeros(len(uses), np.int32)
        number[used] = np.arange(len(used), dtype=np.int32)
        return number

    def copy_pages(self, source: Ints, target: Ints) -> None:
        """The contents of pages ``source`` into pages ``target``."""
        self.data[torch.from_numpy(target).to(self.device)] = self.data[
            torch.from_numpy(source).to(self.device)
        ]

    def to(self, device: torch.device, account: Account | None = None) -> "Self":
        """The same pages, with their numbers, on another device; ``account``: another than one of its own."""
        moved = copy.copy(self)
        moved.device, moved.account = device, Account(self.account.limit) if account is None else account
        moved.account.pools.add(moved)
        moved.book = _book(self.book.refcount(np.arange(self.capacity, dtype=np.int32)))
        moved._use(self.data.to(device, copy=True))
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> "Self":
        return self.to(self.device, copy.deepcopy(self.account, memo))

    def _use(self, data: Tensor) -> None:
        self.data = data

    def _wants(self, pages: int) -> str:
        return (
            f"{pages} more pages of {self.page} slots ({pages * self.page_bytes} bytes) are needed where "
            f"{self.book.in_use} of {self.capacity} are in use"
        )


class Pool(Pages):
    """Pages in the working dtype; a page holds keys and values of one (sequence, kv head) of any layer.

    Args:
        page: slots of a page, 16, 32 or 64.
        width: D, channels of a key.
        value_width: Dv, channels of a value.
        dtype: of both.
        device: of the pages.
        limit: bytes that are never exceeded, those of the quantized pages included, but not those that are
            copied from while a pool grows; None: no limit. Or an account that other pools have a share in.
        formats: types of quantized pages that slots of these pages are demoted to.
    """

    def __init__(
        self,
        page: int,
        width: int,
        value_width: int,
        dtype: torch.dtype,
        device: torch.device,
        limit: int | Account | None = None,
        formats: Sequence[PageSpec] = (),
    ) -> None:
        account = limit if isinstance(limit, Account) else Account(limit)
        self.width, self.value_width = width, value_width
        super().__init__(page, page * (width + value_width), dtype, device, account)
        if formats and width != value_width:
            raise ValueError(
                f"cache: keys and values of quantized pages must have the same width, got {width} and "
                f"{value_width}"
            )
        self.quantized = tuple(
            QuantizedPool(format_of(spec, page, width, device), device, account) for spec in formats
        )

    def to(self, device: torch.device, account: Account | None = None) -> "Self":
        """Those of the quantized pages too."""
        moved = super().to(device, account)
        moved.quantized = tuple(pool.to(device, moved.account) for pool in self.quantized)
        return moved

    def _use(self, data: Tensor) -> None:
        super()._use(data)
        keys = self.page * self.width
        self.k_pages = data[:, :keys].unflatten(1, (1, self.page, self.width))
        self.v_pages = data[:, keys:].unflatten(1, (1, self.page, self.value_width))


class QuantizedPool(Pages):
    """Pages of one format, which nobody writes to once they are there."""

    def __init__(self, page: PageFormat, device: torch.device, account: Account) -> None:
        self.format = page
        super().__init__(page.tokens, page.page_bytes, torch.uint8, device, account)

    def to(self, device: torch.device, account: Account | None = None) -> "Self":
        """In the layout of that device."""
        moved = super().to(device, account)
        moved.format = replace(self.format, layout=layout_of(device))
        moved._use(kv_pages_repack(moved.data, self.format, moved.format.layout))
        return moved


def layout_of(device: torch.device) -> Literal["linear", "mma16"]:
    """The layout of quantized pages that operators read there."""
    return "mma16" if device.type == "cuda" else "linear"


def format_of(spec: PageSpec, page: int, width: int, device: torch.device) -> PageFormat:
    """``spec`` for pages of so many tokens and channels."""
    groups = {
        which: min(group, width if axis == "token" else page)
        for which, axis, group in (
            ("group_k", spec.k_axis, spec.k_group),
            ("group_v", spec.v_axis, spec.v_group),
        )
    }
    return PageFormat(
        spec.k, spec.v, page, width, spec.k_axis, spec.v_axis, layout=layout_of(device), **groups
    )


def _book(uses: NDArray[np.int64]) -> PagePool:
    """A book of as many pages, each used so often."""
    book = PagePool(len(uses))
    book.allocate(len(uses))
    book.free(np.flatnonzero(uses == 0))
    for more in range(1, int(uses.max(initial=0))):
        book.retain(np.flatnonzero(uses > more))
    return book
