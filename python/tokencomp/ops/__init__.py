"""The operators: typed wrappers of ``torch.ops.tokencomp.*`` with value checks and fake kernels."""

from tokencomp.ops import _merge_torch, _namespace  # noqa: F401  (the first registers shapes, gradients)
from tokencomp.ops.decode import merge_states, paged_decode
from tokencomp.ops.kcenter import kcenter_greedy
from tokencomp.ops.kvcache import kv_append_, kv_compact_, kv_gather
from tokencomp.ops.kvcache_merge import evict_assign, evict_merge_, rope_shift_
from tokencomp.ops.kvquant import channel_stats, hadamard, kv_dequantize, kv_quantize, kv_repack
from tokencomp.ops.kvquant_pages import kv_page_read, kv_page_write_, kv_retier_
from tokencomp.ops.linear import decay_linear_attention
from tokencomp.ops.merge import bipartite_map, bipartite_merge, cosine_match, energy_score, merge_tokens
from tokencomp.ops.prefill import flash_prefill
from tokencomp.ops.score import attention_lse, column_score, diagonal_score
from tokencomp.ops.score_decode import decay_score_, head_vote, qk_scores
from tokencomp.ops.topk import topk_budget, topk_select, topp_select

_namespace.add_namespace("tokencomp")

__all__ = [
    "attention_lse",
    "bipartite_map",
    "bipartite_merge",
    "channel_stats",
    "column_score",
    "cosine_match",
    "decay_linear_attention",
    "decay_score_",
    "diagonal_score",
    "energy_score",
    "evict_assign",
    "evict_merge_",
    "flash_prefill",
    "hadamard",
    "head_vote",
    "kcenter_greedy",
    "kv_append_",
    "kv_compact_",
    "kv_dequantize",
    "kv_gather",
    "kv_page_read",
    "kv_page_write_",
    "kv_quantize",
    "kv_repack",
    "kv_retier_",
    "merge_states",
    "merge_tokens",
    "paged_decode",
    "qk_scores",
    "rope_shift_",
    "topk_budget",
    "topk_select",
    "topp_select",
]
