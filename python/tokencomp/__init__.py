"""tokencomp: token compression for Transformers, as C++ and CUDA operators for PyTorch.

- ``tokencomp.ops``: the operators, typed wrappers of ``torch.ops.tokencomp.*`` (CPU and CUDA).
- ``tokencomp.methods``: published compression methods, one frozen dataclass each.
- ``tokencomp.compress(model, method)``: a method on a Hugging Face or timm model, and off again.
- ``tokencomp.reference``: every operator in plain PyTorch; the specification the back ends are held to.
- ``tokencomp.build_info()``: what was compiled into this installation.
"""

__version__ = "0.1.0"

from tokencomp._load import build_info, cpu_features, load_libraries

load_libraries()

# after the load: these need the operators to be registered
from tokencomp import adapters, methods, ops, reference, token_map  # noqa: E402
from tokencomp.adapters import compress  # noqa: E402
from tokencomp.visual import visualize  # noqa: E402

__all__ = [
    "__version__",
    "adapters",
    "build_info",
    "compress",
    "cpu_features",
    "methods",
    "ops",
    "reference",
    "token_map",
    "visualize",
]
