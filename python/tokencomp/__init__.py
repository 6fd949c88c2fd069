"""tokencomp: token compression for Transformers, as C++ and CUDA operators for PyTorch.

- ``tokencomp.ops``: the operators, typed wrappers of ``torch.ops.tokencomp.*`` (CPU and CUDA).
- ``tokencomp.methods``: published compression methods, one frozen dataclass each.
- ``tokencomp.reference``: every operator in plain PyTorch; the specification the back ends are held to.
- ``tokencomp.build_info()``: what was compiled into this installation.
"""

__version__ = "0.1.0"

from tokencomp._load import build_info, cpu_features, load_libraries

load_libraries()

# after the load: these need the operators to be registered
from tokencomp import methods, ops, reference  # noqa: E402

__all__ = ["__version__", "build_info", "cpu_features", "methods", "ops", "reference"]
