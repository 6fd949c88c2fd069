"""Published token-compression methods: one file, one frozen dataclass of knobs, pure functions of tensors.

``tokencomp.methods.get("divprune").cls(keep=0.1).select(x)``; ``all_methods()`` lists what there is. Methods
that work between attention and MLP of an encoder's layers follow ``LayerMethod``.
"""

from tokencomp.methods.algm import ALGM
from tokencomp.methods.base import Knob, Method, all_methods, get, register
from tokencomp.methods.diffrate import DiffRate
from tokencomp.methods.divprune import DivPrune
from tokencomp.methods.gtp import GTP
from tokencomp.methods.layers import LayerMethod, LayerView, Reduced
from tokencomp.methods.lexrank import LexRank
from tokencomp.methods.local_merge import LocalMerge
from tokencomp.methods.mctf import MCTF
from tokencomp.methods.mtr import MTR
from tokencomp.methods.pitome import PiToMe
from tokencomp.methods.prumerge import PruMerge
from tokencomp.methods.random import Random
from tokencomp.methods.stride import Stride
from tokencomp.methods.todre import ToDRE
from tokencomp.methods.tofu import ToFu
from tokencomp.methods.tome import ToMe
from tokencomp.methods.tomesd import ToMeSD
from tokencomp.methods.topvim import ToPViM
from tokencomp.methods.vidtldr import VidTLDR
from tokencomp.methods.zerotprune import ZeroTPrune

__all__ = [
    "ALGM",
    "GTP",
    "MCTF",
    "MTR",
    "DiffRate",
    "DivPrune",
    "Knob",
    "LayerMethod",
    "LayerView",
    "LexRank",
    "LocalMerge",
    "Method",
    "PiToMe",
    "PruMerge",
    "Random",
    "Reduced",
    "Stride",
    "ToDRE",
    "ToFu",
    "ToMe",
    "ToMeSD",
    "ToPViM",
    "VidTLDR",
    "ZeroTPrune",
    "all_methods",
    "get",
    "register",
]
