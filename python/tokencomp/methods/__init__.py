"""Published token-compression methods: one file, one frozen dataclass of knobs, pure functions of tensors.

``tokencomp.methods.get("divprune").cls(keep=0.1).select(x)``; ``all_methods()`` lists what there is.
"""

from tokencomp.methods.base import Knob, Method, all_methods, get, register
from tokencomp.methods.divprune import DivPrune
from tokencomp.methods.todre import ToDRE

__all__ = ["DivPrune", "Knob", "Method", "ToDRE", "all_methods", "get", "register"]
