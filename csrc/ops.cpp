// THE list of operators. Compiled into the CPU library, which owns the schemas, and into the emulator library.
#include <torch/csrc/stable/library.h>

#include "op/kcenter.h"

STABLE_TORCH_LIBRARY(TOKENCOMP_NAMESPACE, m) { m.def(tokencomp::kcenter::kSchema); }
