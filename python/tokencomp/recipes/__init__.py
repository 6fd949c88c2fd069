"""Published scores, budgets and picks of the KV cache as pure functions: tensors in, scores or indices out.

They are compositions of ``tokencomp.ops`` and ``tokencomp.scores``. Scores are float32 and larger is better;
ties go to the lower index; -inf marks what may not be chosen by score (a protected window, padding).
"""

from tokencomp.recipes.accumulated import (
    accumulate_chunk,
    accumulated_attention,
    attention_sinks,
    cls_attention,
    probe_saliency,
    tova_score,
    zipvl_select,
)
from tokencomp.recipes.blocks import count_step, diverse_pages, page_keep, page_similarity, window_counts
from tokencomp.recipes.budgets import adakv_budget, prefix_budget, pyramid_budget
from tokencomp.recipes.calibration import merge_sink_outputs, redistribute_sinks
from tokencomp.recipes.common import minmax, pool_scores, select_per_head
from tokencomp.recipes.crush import (
    anchor_bits,
    bucket_picks,
    hamming_distance,
    page_scores,
    page_signatures,
    token_signatures,
)
from tokencomp.recipes.expand import expand_select
from tokencomp.recipes.forced import forgetting_mask
from tokencomp.recipes.joint import (
    attention_entropy,
    critic_budget,
    critic_score,
    global_local_score,
    merge_assign,
    merge_groups,
    merge_into_centers,
    output_gradients,
)
from tokencomp.recipes.kvquant import (
    channel_balancer,
    lse_shift,
    mean_bias,
    mean_bits,
    mikv_tiers,
    qaq_key_bits,
    qaq_value_bits,
    separable_scale,
    stored_bits,
)
from tokencomp.recipes.lagged import recurrence_clocks, recurrence_importance
from tokencomp.recipes.redundancy import key_redundancy, past_importance, rkv_score
from tokencomp.recipes.window import specpc_score, window_score

__all__ = [
    "accumulate_chunk",
    "accumulated_attention",
    "adakv_budget",
    "anchor_bits",
    "attention_entropy",
    "attention_sinks",
    "bucket_picks",
    "channel_balancer",
    "cls_attention",
    "count_step",
    "critic_budget",
    "critic_score",
    "diverse_pages",
    "expand_select",
    "forgetting_mask",
    "global_local_score",
    "hamming_distance",
    "key_redundancy",
    "lse_shift",
    "mean_bias",
    "mean_bits",
    "merge_assign",
    "merge_groups",
    "merge_into_centers",
    "merge_sink_outputs",
    "mikv_tiers",
    "minmax",
    "output_gradients",
    "page_keep",
    "page_scores",
    "page_signatures",
    "page_similarity",
    "past_importance",
    "pool_scores",
    "prefix_budget",
    "probe_saliency",
    "pyramid_budget",
    "qaq_key_bits",
    "qaq_value_bits",
    "recurrence_clocks",
    "recurrence_importance",
    "redistribute_sinks",
    "rkv_score",
    "select_per_head",
    "separable_scale",
    "specpc_score",
    "stored_bits",
    "token_signatures",
    "tova_score",
    "window_counts",
    "window_score",
    "zipvl_select",
]
