"""The operators: typed wrappers of ``torch.ops.tokencomp.*`` with value checks and fake kernels."""

from tokencomp.ops import _namespace
from tokencomp.ops.kcenter import kcenter_greedy

_namespace.add_namespace("tokencomp")

__all__ = ["kcenter_greedy"]
