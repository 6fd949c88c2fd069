"""Published token-compression methods: one file, one frozen dataclass of knobs, pure functions of tensors.

``tokencomp.methods.get("divprune").cls(keep=0.1).select(x)``; ``all_methods()`` lists what there is. Methods
that work between attention and MLP of an encoder's layers follow ``LayerMethod``, those on the KV cache of a
language model ``KVMethod``.
"""

from tokencomp.methods.a2sf import A2SF
from tokencomp.methods.adakv import AdaKV
from tokencomp.methods.algm import ALGM
from tokencomp.methods.base import Knob, Method, all_methods, get, register
from tokencomp.methods.cam import CaM
from tokencomp.methods.critic import CRITIC
from tokencomp.methods.d2o import D2O
from tokencomp.methods.diffrate import DiffRate
from tokencomp.methods.divprune import DivPrune
from tokencomp.methods.ems import EMS
from tokencomp.methods.gtp import GTP
from tokencomp.methods.h2o import H2O
from tokencomp.methods.keydiff import KeyDiff
from tokencomp.methods.knorm import KNorm
from tokencomp.methods.kv import Keep, KVMethod, KVView, MergeSpec, Side
from tokencomp.methods.kv_compress import KVCompress
from tokencomp.methods.kvcrush import KVCrush
from tokencomp.methods.lagkv import LagKV
from tokencomp.methods.layers import LayerMethod, LayerView, Reduced
from tokencomp.methods.lazy_eviction import LazyEviction
from tokencomp.methods.lexrank import LexRank
from tokencomp.methods.local_merge import LocalMerge
from tokencomp.methods.mctf import MCTF
from tokencomp.methods.mtr import MTR
from tokencomp.methods.paged_eviction import PagedEviction
from tokencomp.methods.pitome import PiToMe
from tokencomp.methods.prefixkv import PrefixKV
from tokencomp.methods.prumerge import PruMerge
from tokencomp.methods.pyramidkv import PyramidKV
from tokencomp.methods.random import Random
from tokencomp.methods.random_kv import RandomKV
from tokencomp.methods.rkv import RKV
from tokencomp.methods.snapkv import SnapKV
from tokencomp.methods.streaming_llm import StreamingLLM
from tokencomp.methods.stride import Stride
from tokencomp.methods.stride_kv import StrideKV
from tokencomp.methods.todre import ToDRE
from tokencomp.methods.tofu import ToFu
from tokencomp.methods.tome import ToMe
from tokencomp.methods.tomesd import ToMeSD
from tokencomp.methods.topvim import ToPViM
from tokencomp.methods.tova import TOVA
from tokencomp.methods.vidtldr import VidTLDR
from tokencomp.methods.zerotprune import ZeroTPrune

__all__ = [
    "A2SF",
    "ALGM",
    "CRITIC",
    "D2O",
    "EMS",
    "GTP",
    "H2O",
    "MCTF",
    "MTR",
    "RKV",
    "TOVA",
    "AdaKV",
    "CaM",
    "DiffRate",
    "DivPrune",
    "KNorm",
    "KVCompress",
    "KVCrush",
    "KVMethod",
    "KVView",
    "Keep",
    "KeyDiff",
    "Knob",
    "LagKV",
    "LayerMethod",
    "LayerView",
    "LazyEviction",
    "LexRank",
    "LocalMerge",
    "MergeSpec",
    "Method",
    "PagedEviction",
    "PiToMe",
    "PrefixKV",
    "PruMerge",
    "PyramidKV",
    "Random",
    "RandomKV",
    "Reduced",
    "Side",
    "SnapKV",
    "StreamingLLM",
    "Stride",
    "StrideKV",
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
