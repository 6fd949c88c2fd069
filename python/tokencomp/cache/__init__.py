"""A KV cache in pages: what is evicted gives real memory back, per layer and per kv head.

``Pool`` owns the pages, ``LayerStore`` the slots of one layer, ``Layer`` lets a method decide what stays.
``PagedKVCache`` is all of them as a cache of transformers, which it needs: ``pip install tokencomp[hf]``.
"""

from typing import TYPE_CHECKING, Any

from tokencomp.cache.forward import Decoded, Forward, Packing, Rule, forward_of
from tokencomp.cache.keep_all import KeepAll
from tokencomp.cache.layer import Events, Layer
from tokencomp.cache.memory import LayerMemory, Memory, PagesMemory
from tokencomp.cache.pool import Pool, page_size
from tokencomp.cache.sparse import Reader, SparseEvents
from tokencomp.cache.store import LayerStore

if TYPE_CHECKING:
    from tokencomp.cache.paged import PagedKVCache

__all__ = [
    "Decoded",
    "Events",
    "Forward",
    "KeepAll",
    "Layer",
    "LayerMemory",
    "LayerStore",
    "Memory",
    "Packing",
    "PagedKVCache",
    "PagesMemory",
    "Pool",
    "Reader",
    "Rule",
    "SparseEvents",
    "forward_of",
    "page_size",
]


def __getattr__(name: str) -> Any:
    if name != "PagedKVCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from tokencomp.cache.paged import PagedKVCache
    except ImportError as error:
        raise ImportError("PagedKVCache needs transformers: pip install tokencomp[hf]") from error
    return PagedKVCache
