"""Published token-compression methods: one file, one frozen dataclass of knobs, pure functions of tensors.

``tokencomp.methods.get("divprune").cls(keep=0.1).select(x)``; ``all_methods()`` lists what there is. Methods
that work between attention and MLP of an encoder's layers follow ``LayerMethod``, those on the KV cache of a
language model ``KVMethod``, those on visual tokens between encoder and language model ``VisualMethod``, and
those between the layers of that language model ``DecoderMethod``.
"""

from tokencomp.methods.a2sf import A2SF
from tokencomp.methods.adakv import AdaKV
from tokencomp.methods.aim import AIM
from tokencomp.methods.aim_merge import AIMMerge
from tokencomp.methods.algm import ALGM
from tokencomp.methods.atp import ATP
from tokencomp.methods.base import Knob, Method, all_methods, get, register
from tokencomp.methods.cam import CaM
from tokencomp.methods.cdpruner import CDPruner
from tokencomp.methods.core_matching import CoreMatching
from tokencomp.methods.critic import CRITIC
from tokencomp.methods.d2o import D2O
from tokencomp.methods.decoder import DecoderKeep, DecoderMethod, DecoderView
from tokencomp.methods.diffrate import DiffRate
from tokencomp.methods.divprune import DivPrune
from tokencomp.methods.duo_attention import DuoAttention
from tokencomp.methods.ems import EMS
from tokencomp.methods.encoder import EncoderKeep, EncoderMethod, EncoderView
from tokencomp.methods.fastervlm import FasterVLM
from tokencomp.methods.fastv import FastV
from tokencomp.methods.flexprefill import FlexPrefill
from tokencomp.methods.flowcut import FlowCut
from tokencomp.methods.flowcut_stage2 import FlowCutStage2
from tokencomp.methods.fopru import FoPru
from tokencomp.methods.globalcom2 import GlobalCom2
from tokencomp.methods.gtp import GTP
from tokencomp.methods.h2o import H2O
from tokencomp.methods.hiprune import HiPrune
from tokencomp.methods.infllm import InfLLM
from tokencomp.methods.keydiff import KeyDiff
from tokencomp.methods.kivi import KIVI
from tokencomp.methods.knorm import KNorm
from tokencomp.methods.kv import ChannelMaps, Keep, KVMethod, KVView, MergeSpec, PageSpec, Side
from tokencomp.methods.kv_compress import KVCompress
from tokencomp.methods.kvcrush import KVCrush
from tokencomp.methods.kvtuner import KVTuner, Sensitivity
from tokencomp.methods.lagkv import LagKV
from tokencomp.methods.layers import LayerMethod, LayerView, Reduced
from tokencomp.methods.lazy_eviction import LazyEviction
from tokencomp.methods.lexrank import LexRank
from tokencomp.methods.local_merge import LocalMerge
from tokencomp.methods.mctf import MCTF
from tokencomp.methods.mikv import MiKV
from tokencomp.methods.minference import MInference
from tokencomp.methods.moba import MoBA
from tokencomp.methods.mtr import MTR
from tokencomp.methods.must_drop import MustDrop
from tokencomp.methods.paged_eviction import PagedEviction
from tokencomp.methods.pitome import PiToMe
from tokencomp.methods.prefixkv import PrefixKV
from tokencomp.methods.probe import Probe, relevance_rollout
from tokencomp.methods.prumerge import PruMerge
from tokencomp.methods.pyramid_drop import PyramidDrop
from tokencomp.methods.pyramidkv import PyramidKV
from tokencomp.methods.qaq import QAQ
from tokencomp.methods.qserve import QServe
from tokencomp.methods.quest import Quest
from tokencomp.methods.quota import QuoTA
from tokencomp.methods.random import Random
from tokencomp.methods.random_kv import RandomKV
from tokencomp.methods.random_visual import RandomVisual
from tokencomp.methods.rkv import RKV
from tokencomp.methods.scope import Scope
from tokencomp.methods.slime import SliME
from tokencomp.methods.snapkv import SnapKV
from tokencomp.methods.sparse import SlotLists, Sparse, SparseMethod, SparseView, Subset
from tokencomp.methods.sparse_vlm import SparseVLM
from tokencomp.methods.spec_kv import SpecKV
from tokencomp.methods.spec_pc import SpecPC
from tokencomp.methods.streaming_llm import StreamingLLM
from tokencomp.methods.stride import Stride
from tokencomp.methods.stride_kv import StrideKV
from tokencomp.methods.stride_visual import StrideVisual
from tokencomp.methods.tcc import TCC
from tokencomp.methods.tidal_decode import TidalDecode
from tokencomp.methods.tiered import Tiered
from tokencomp.methods.todre import ToDRE
from tokencomp.methods.todre_stage2 import ToDREStage2
from tokencomp.methods.tofu import ToFu
from tokencomp.methods.token_select import TokenSelect
from tokencomp.methods.tome import ToMe
from tokencomp.methods.tomesd import ToMeSD
from tokencomp.methods.topvim import ToPViM
from tokencomp.methods.tova import TOVA
from tokencomp.methods.trans_prune import TransPrune
from tokencomp.methods.twilight import Twilight
from tokencomp.methods.uniform import Uniform
from tokencomp.methods.vidtldr import VidTLDR
from tokencomp.methods.visionzip import VisionZip
from tokencomp.methods.vispruner import VisPruner
from tokencomp.methods.visual import VisualKeep, VisualMethod, VisualView
from tokencomp.methods.vscan import VScan
from tokencomp.methods.vscan_stage2 import VScanStage2
from tokencomp.methods.vtc_cls import VTCCLS
from tokencomp.methods.xattention import XAttention
from tokencomp.methods.zerotprune import ZeroTPrune
from tokencomp.methods.zipcache import ZipCache
from tokencomp.methods.zipvl import ZipVL
from tokencomp.methods.zipvl_prompt import ZipVLPrompt
from tokencomp.methods.zoo_prune import ZOOPrune

__all__ = [
    "A2SF",
    "AIM",
    "ALGM",
    "ATP",
    "CRITIC",
    "D2O",
    "EMS",
    "GTP",
    "H2O",
    "KIVI",
    "MCTF",
    "MTR",
    "QAQ",
    "RKV",
    "TCC",
    "TOVA",
    "VTCCLS",
    "AIMMerge",
    "AdaKV",
    "CDPruner",
    "CaM",
    "ChannelMaps",
    "CoreMatching",
    "DecoderKeep",
    "DecoderMethod",
    "DecoderView",
    "DiffRate",
    "DivPrune",
    "DuoAttention",
    "EncoderKeep",
    "EncoderMethod",
    "EncoderView",
    "FarMass",
    "FastV",
    "FasterVLM",
    "FlexPrefill",
    "FlowCut",
    "FlowCutStage2",
    "FoPru",
    "GlobalCom2",
    "HiPrune",
    "InfLLM",
    "KNorm",
    "KVCompress",
    "KVCrush",
    "KVMethod",
    "KVTuner",
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
    "MInference",
    "MergeSpec",
    "Method",
    "MiKV",
    "MoBA",
    "MustDrop",
    "PageSpec",
    "PagedEviction",
    "PiToMe",
    "PrefixKV",
    "Probe",
    "PruMerge",
    "PyramidDrop",
    "PyramidKV",
    "QServe",
    "Quest",
    "QuoTA",
    "Random",
    "RandomKV",
    "RandomVisual",
    "Reduced",
    "Scope",
    "Sensitivity",
    "Side",
    "SliME",
    "SlotLists",
    "SnapKV",
    "Sparse",
    "SparseMethod",
    "SparseVLM",
    "SparseView",
    "SpecKV",
    "SpecPC",
    "StreamingLLM",
    "Stride",
    "StrideKV",
    "StrideVisual",
    "Subset",
    "TidalDecode",
    "Tiered",
    "ToDRE",
    "ToDREStage2",
    "ToFu",
    "ToMe",
    "ToMeSD",
    "ToPViM",
    "TokenSelect",
    "TransPrune",
    "Twilight",
    "Uniform",
    "VScan",
    "VScanStage2",
    "VidTLDR",
    "VisPruner",
    "VisionZip",
    "VisualKeep",
    "VisualMethod",
    "VisualView",
    "XAttention",
    "ZOOPrune",
    "ZeroTPrune",
    "ZipCache",
    "ZipVL",
    "ZipVLPrompt",
    "all_methods",
    "get",
    "register",
    "relevance_rollout",
]
