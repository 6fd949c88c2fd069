"""The operators: typed wrappers of ``torch.ops.tokencomp.*`` with value checks and fake kernels."""

from tokencomp.ops import _merge_torch, _namespace  # noqa: F401  (the first registers shapes, gradients)
from tokencomp.ops.kcenter import kcenter_greedy
from tokencomp.ops.merge import bipartite_map, cosine_match, energy_score, merge_tokens
from tokencomp.ops.topk import topk_budget, topk_select, topp_select

_namespace.add_namespace("tokencomp")

__all__ = [
    "bipartite_map",
    "cosine_match",
    "energy_score",
    "kcenter_greedy",
    "merge_tokens",
    "topk_budget",
    "topk_select",
    "topp_select",
]
