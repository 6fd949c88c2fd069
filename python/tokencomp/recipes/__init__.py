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
from tokencomp.recipes.budgets import adakv_budget, prefix_budget, pyramid_budget
from tokencomp.recipes.common import minmax, pool_scores, select_per_head
from tokencomp.recipes.crush import (
    anchor_bits,
    bucket_picks,
    hamming_distance,
    page_scores,
    page_signatures,
    token_signatures,
)
from tokencomp.recipes.joint import (
    attention_entropy,
    critic_budget,
    critic_score,
    global_local_score,
    merge_assign,
    merge_groups,
    output_gradients,
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
    "cls_attention",
    "critic_budget",
    "critic_score",
    "global_local_score",
    "hamming_distance",
    "key_redundancy",
    "merge_assign",
    "merge_groups",
    "minmax",
    "output_gradients",
    "page_scores",
    "page_signatures",
    "past_importance",
    "pool_scores",
    "prefix_budget",
    "probe_saliency",
    "pyramid_budget",
    "recurrence_clocks",
    "recurrence_importance",
    "rkv_score",
    "select_per_head",
    "specpc_score",
    "token_signatures",
    "tova_score",
    "window_score",
    "zipvl_select",
]
