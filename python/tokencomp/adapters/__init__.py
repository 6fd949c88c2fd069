"""Methods on models: the only place that knows Hugging Face or timm, neither of which it imports by itself.

``compress(model, method)`` is the whole use; ``register`` adds a family of encoders.
"""

from tokencomp.adapters import timm_blocks as _timm_blocks
from tokencomp.adapters.families import Family, families, register, unregister
from tokencomp.adapters.flops import encoder_flops
from tokencomp.adapters.handle import Compressed, Report, compress
from tokencomp.adapters.run import Run

__all__ = [
    "Compressed",
    "Family",
    "Report",
    "Run",
    "compress",
    "encoder_flops",
    "families",
    "register",
    "unregister",
]

del _timm_blocks
