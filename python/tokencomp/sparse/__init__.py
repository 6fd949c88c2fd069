"""Sparse attention of models that were trained for it, as exact functions of tensors on ``tokencomp.ops``."""

from tokencomp.sparse.core_context import core_context_attention, core_pool
from tokencomp.sparse.landmark import landmark_attention
from tokencomp.sparse.selected import block_attention, choose_chunks, chunk_attention, selected_attention
from tokencomp.sparse.sinks import calibrated_attention

__all__ = [
    "block_attention",
    "calibrated_attention",
    "choose_chunks",
    "chunk_attention",
    "core_context_attention",
    "core_pool",
    "landmark_attention",
    "selected_attention",
]
