"""Every operator in plain PyTorch, short and float64-capable: the specification and the tests' oracle.

Each function of an operator takes the operator's arguments plus ``dtype``, the type all arithmetic is done
in. ``kept_keys``, ``kept_patches`` and ``kept_visual`` drop given tokens of a Hugging Face model, ``*_keep``
choose them: the oracles of compressed models and the baselines they are compared with.
"""

from tokencomp.reference.decode import decode_visible, merge_states, paged_decode
from tokencomp.reference.kcenter import Replay, kcenter_greedy, replay
from tokencomp.reference.kept_keys import Kept, kept_keys
from tokencomp.reference.kept_patches import KeptTokens, kept_patches
from tokencomp.reference.kept_visual import KeptVisual, kept_visual
from tokencomp.reference.kvcache import (
    hole_order,
    kv_append_,
    kv_compact_,
    kv_gather,
    rope_shift_,
    rotate,
)
from tokencomp.reference.kvcache_merge import evict_assign, evict_merge_, evict_similarity
from tokencomp.reference.kvquant import channel_stats, hadamard, kv_dequantize, kv_quantize, kv_repack
from tokencomp.reference.kvquant_pages import kv_page
from tokencomp.reference.linear import decay_linear_attention
from tokencomp.reference.merge import (
    bipartite_map,
    bipartite_merge,
    cosine_match,
    energy_score,
    match_matrix,
    merge_tokens,
)
from tokencomp.reference.page_pools import paged_rows
from tokencomp.reference.page_rows import gather_pages
from tokencomp.reference.prefill import flash_prefill, listed
from tokencomp.reference.score import (
    attention_logits,
    attention_lse,
    column_score,
    decay_score_,
    diagonal_score,
    head_vote,
    qk_scores,
    visible,
)
from tokencomp.reference.selection import ends_keep, grid_keep, random_keep, stride_keep
from tokencomp.reference.topk import topk_budget, topk_select, topp_select

__all__ = [
    "Kept",
    "KeptTokens",
    "KeptVisual",
    "Replay",
    "attention_logits",
    "attention_lse",
    "bipartite_map",
    "bipartite_merge",
    "channel_stats",
    "column_score",
    "cosine_match",
    "decay_linear_attention",
    "decay_score_",
    "decode_visible",
    "diagonal_score",
    "ends_keep",
    "energy_score",
    "evict_assign",
    "evict_merge_",
    "evict_similarity",
    "flash_prefill",
    "gather_pages",
    "grid_keep",
    "hadamard",
    "head_vote",
    "hole_order",
    "kcenter_greedy",
    "kept_keys",
    "kept_patches",
    "kept_visual",
    "kv_append_",
    "kv_compact_",
    "kv_dequantize",
    "kv_gather",
    "kv_page",
    "kv_quantize",
    "kv_repack",
    "listed",
    "match_matrix",
    "merge_states",
    "merge_tokens",
    "paged_decode",
    "paged_rows",
    "qk_scores",
    "random_keep",
    "replay",
    "rope_shift_",
    "rotate",
    "stride_keep",
    "topk_budget",
    "topk_select",
    "topp_select",
    "visible",
]
