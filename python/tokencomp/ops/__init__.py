"""The operators: typed wrappers of ``torch.ops.tokencomp.*`` with value checks and fake kernels."""

from tokencomp.ops import _merge_torch, _namespace  # noqa: F401  (the first registers shapes, gradients)
from tokencomp.ops.kcenter import kcenter_greedy
from tokencomp.ops.merge import bipartite_map, cosine_match, energy_score, merge_tokens
from tokencomp.ops.score import attention_lse, column_score, diagonal_score
from tokencomp.ops.score_decode import decay_score_, head_vote, qk_scores
from tokencomp.ops.topk import topk_budget, topk_select, topp_select

_namespace.add_namespace("tokencomp")

__all__ = [
    "attention_lse",
    "bipartite_map",
    "column_score",
    "cosine_match",
    "decay_score_",
    "diagonal_score",
    "energy_score",
    "head_vote",
    "kcenter_greedy",
    "merge_tokens",
    "qk_scores",
    "topk_budget",
    "topk_select",
    "topp_select",
]
