"""tokencomp: token compression for Transformers, as C++ and CUDA operators for PyTorch.

- ``tokencomp.ops``: the operators, typed wrappers of ``torch.ops.tokencomp.*`` (CPU and CUDA).
- ``tokencomp.methods``: published compression methods, one frozen dataclass each.
- ``tokencomp.compress(model, method)``: a method on a Hugging Face or timm model, and off again.
- ``tokencomp.cache``: a KV cache in pages, whose evicted tokens give real memory back.
- ``tokencomp.scaled_dot_product_attention``: torch's, with log-sum-exps and column sums on request.
- ``tokencomp.register_attention()``: that as ``attn_implementation="tokencomp"`` of Hugging Face models;
  ``tokencomp.attention_scores(model)``: what each key receives in each layer, without eager attention.
- ``tokencomp.recipes``: published scores, budgets and picks of KV caches as pure functions.
- ``tokencomp.reference``: every operator in plain PyTorch; the specification the back ends are held to.
- ``tokencomp.build_info()``: what was compiled into this installation.
"""

__version__ = "0.1.0"

from tokencomp._load import build_info, cpu_features, load_libraries

load_libraries()

# after the load: these need the operators to be registered
from tokencomp import adapters, cache, methods, ops, recipes, reference, scores, token_map  # noqa: E402
from tokencomp.adapters import attention_scores, compress, register_attention  # noqa: E402
from tokencomp.attention import Attention, scaled_dot_product_attention  # noqa: E402
from tokencomp.importance import importance_map  # noqa: E402
from tokencomp.visual import visualize  # noqa: E402

__all__ = [
    "Attention",
    "__version__",
    "adapters",
    "attention_scores",
    "build_info",
    "cache",
    "compress",
    "cpu_features",
    "importance_map",
    "methods",
    "ops",
    "recipes",
    "reference",
    "register_attention",
    "scaled_dot_product_attention",
    "scores",
    "token_map",
    "visualize",
]
