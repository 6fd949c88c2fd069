// THE list of operators. Compiled into the CPU library, which owns the schemas, and into the emulator library.
#include <torch/csrc/stable/library.h>

#include "op/decode.h"
#include "op/kcenter.h"
#include "op/kvcache.h"
#include "op/kvquant.h"
#include "op/linear.h"
#include "op/merge.h"
#include "op/prefill.h"
#include "op/score.h"
#include "op/topk.h"

STABLE_TORCH_LIBRARY(TOKENCOMP_NAMESPACE, m) {
  m.def(tokencomp::kcenter::kSchema);
  m.def(tokencomp::topk::kSelectSchema);
  m.def(tokencomp::topk::kToppSchema);
  m.def(tokencomp::topk::kBudgetSchema);
  m.def(tokencomp::merge::kMatchSchema);
  m.def(tokencomp::merge::kEnergySchema);
  m.def(tokencomp::merge::kMapSchema);
  m.def(tokencomp::merge::kMergeSchema);
  m.def(tokencomp::merge::kBipartiteSchema);
  m.def(tokencomp::prefill::kSchema);
  m.def(tokencomp::linear::kSchema);
  for (const char* schema : tokencomp::score::kSchemas) m.def(schema);
  for (const char* schema : tokencomp::kvcache::kSchemas) m.def(schema);
  for (const char* schema : tokencomp::decode::kSchemas) m.def(schema);
  for (const char* schema : tokencomp::kvquant::kSchemas) m.def(schema);
}
