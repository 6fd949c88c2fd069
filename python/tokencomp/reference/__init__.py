"""Every operator in plain PyTorch, short and float64-capable: the specification and the tests' oracle.

Each function of an operator takes the operator's arguments plus ``dtype``, the type all arithmetic is done
in. ``kept_keys``, ``kept_patches`` and ``kept_visual`` drop given tokens of a Hugging Face model, ``*_keep``
choose them: the oracles of compressed models and the baselines they are compared with.
"""

from tokencomp.reference.kcenter import Replay, kcenter_greedy, replay
from tokencomp.reference.kept_keys import Kept, kept_keys
from tokencomp.reference.kept_patches import KeptTokens, kept_patches
from tokencomp.reference.kept_visual import KeptVisual, kept_visual
from tokencomp.reference.merge import bipartite_map, cosine_match, energy_score, match_matrix, merge_tokens
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
    "column_score",
    "cosine_match",
    "decay_score_",
    "diagonal_score",
    "ends_keep",
    "energy_score",
    "grid_keep",
    "head_vote",
    "kcenter_greedy",
    "kept_keys",
    "kept_patches",
    "kept_visual",
    "match_matrix",
    "merge_tokens",
    "qk_scores",
    "random_keep",
    "replay",
    "stride_keep",
    "topk_budget",
    "topk_select",
    "topp_select",
    "visible",
]
