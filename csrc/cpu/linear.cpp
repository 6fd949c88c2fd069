// Linear attention with decay on the CPU, torch side: threads over heads, registration. The arithmetic is in
// linear_kernels.cpp, once per instruction set.
#include "op/linear.h"

#include <torch/csrc/stable/library.h>

#include "cpu/floats.h"
#include "cpu/isa.h"
#include "cpu/linear_kernels.h"
#include "cpu/parallel.h"

namespace tokencomp::cpu {

#define TOKENCOMP_DECLARE(isa)    \
  namespace isa {                 \
  linear::HeadKernel linear_head; \
  }
TOKENCOMP_FOR_EACH_ISA(TOKENCOMP_DECLARE)

namespace {

using namespace linear;

constexpr HeadKernel* kHead[kIsaCount] = TOKENCOMP_ISA_TABLE(linear_head);

// Multiply-adds that are worth another thread: about 50 us, what waking one costs under a passive wait policy.
constexpr int64_t kTaskWork = 1 << 20;

std::tuple<Tensor, Tensor> decay_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& slope, double scale, MaybeTensor state,
                                                  MaybeTensor lengths) {
  LinearArgs p = make_linear_args(q, k, v, slope, scale, state, lengths);
  std::tuple<Tensor, Tensor> out = make_linear_outputs(p, q);
  const Geometry& g = p.a.g;
  const int64_t units = int64_t(g.B) * g.Hq, each = int64_t(g.T) * (kRows + g.D) * (g.D + p.Dv) / 2 + 1;
  const int64_t worth = units * each / kTaskWork + 1;
  const int slots = int(worth < thread_count() ? worth : thread_count());
  const int64_t floats = scratch_floats(p);
  const Floats scratch(slots * floats);
  HeadKernel* kernel = select_isa(kHead);
  for_each_task(units, slots, [&](int64_t unit, int64_t slot) { kernel(p, unit, scratch.get() + slot * floats); });
  return out;
}

}  // namespace
}  // namespace tokencomp::cpu

STABLE_TORCH_LIBRARY_IMPL(tokencomp, CPU, m) {
  m.impl("decay_linear_attention", TORCH_BOX(&tokencomp::cpu::decay_linear_attention));
}
