"""Methods on models: the only place that knows Hugging Face or timm, neither of which it imports by itself.

``compress(model, method)`` is the whole use; ``register`` adds a family of encoders;
``register_attention`` makes the name ``tokencomp`` known to transformers, ``attention_scores`` collects
what each key receives.
"""

from tokencomp.adapters import timm_blocks as _timm_blocks
from tokencomp.adapters.attention import AttentionScores, attention_scores, register_attention
from tokencomp.adapters.correction import Correction, recompute_newest
from tokencomp.adapters.draft import draft_prefill, shorten_prompt
from tokencomp.adapters.families import Family, families, register, unregister
from tokencomp.adapters.flops import encoder_flops
from tokencomp.adapters.handle import Compressed, Report, compress
from tokencomp.adapters.run import Run

__all__ = [
    "AttentionScores",
    "Compressed",
    "Correction",
    "Family",
    "Report",
    "Run",
    "attention_scores",
    "compress",
    "draft_prefill",
    "encoder_flops",
    "families",
    "recompute_newest",
    "register",
    "register_attention",
    "shorten_prompt",
    "unregister",
]

del _timm_blocks
