"""Every operator in plain PyTorch, short and float64-capable: the specification and the tests' oracle.

Each function takes the operator's arguments plus ``dtype``, the type all arithmetic is done in.
"""

from tokencomp.reference.kcenter import Replay, kcenter_greedy, replay

__all__ = ["Replay", "kcenter_greedy", "replay"]
