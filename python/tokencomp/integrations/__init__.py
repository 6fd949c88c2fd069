"""Functions of tensors in the form serving engines ask for: no model classes, no engine imported.

- ``visual_keep_masks``, ``visual_tokens``: embeddings of images and videos, ragged, to keep masks.
- ``flash_pages``, ``flashinfer_pages``: an engine's paged keys and values seen by strides, not copied.
- ``kv_scores``, ``kept_slots``, ``kept_pages``, ``compact_``: which slots or pages stay, and making it so.
- ``tokencomp.integrations.kvpress``: a press for kvpress, imported by itself since it needs kvpress.
"""

from tokencomp.integrations.kv import (
    KeptPages,
    KeptSlots,
    compact_,
    kept_pages,
    kept_slots,
    kv_scores,
    last_queries,
)
from tokencomp.integrations.paged import (
    PagedKV,
    flash_pages,
    flashinfer_lists,
    flashinfer_pages,
    flashinfer_table,
)
from tokencomp.integrations.visual import KeptTokens, visual_keep_masks, visual_tokens

__all__ = [
    "KeptPages",
    "KeptSlots",
    "KeptTokens",
    "PagedKV",
    "compact_",
    "flash_pages",
    "flashinfer_lists",
    "flashinfer_pages",
    "flashinfer_table",
    "kept_pages",
    "kept_slots",
    "kv_scores",
    "last_queries",
    "visual_keep_masks",
    "visual_tokens",
]
