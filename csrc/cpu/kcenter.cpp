// k-center on the CPU, torch side: plan, working memory, threads over items, registration. The arithmetic is in
// kcenter_kernels.cpp, once per instruction set.
#include "op/kcenter.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <utility>

#include "cpu/isa.h"
#include "cpu/kcenter_kernels.h"
#include "cpu/parallel.h"

namespace tokencomp::cpu {

#define TOKENCOMP_DECLARE(isa)       \
  namespace isa {                    \
  kcenter::CpuKernel kcenter_select; \
  }
TOKENCOMP_FOR_EACH_ISA(TOKENCOMP_DECLARE)

namespace {

using namespace kcenter;

constexpr CpuKernel* kKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(kcenter_select);

// One block of floats, cut into the arrays of CpuScratch.
class ScratchMemory {
 public:
  ScratchMemory(const Args& a, const CpuPlan& plan, int slots) {
    const int64_t N = padded(a.N);
    const int64_t matrix = plan.path == CpuPath::gram ? int64_t(a.N) * a.N : 0;
    memory_.reset(new float[4 * N + a.C + slots * N + 2 * N + a.k + matrix]);
    float* next = memory_.get();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    scratch_.inverse_norm = take(N);
    scratch_.state = take(N);
    scratch_.score = take(N);
    scratch_.cost = take(N);
    scratch_.mean = take(a.C);
    scratch_.nearest = take(slots * N);
    scratch_.seen = reinterpret_cast<int*>(take(N));
    scratch_.list = reinterpret_cast<int*>(take(N));
    scratch_.centre = reinterpret_cast<int*>(take(a.k));
    scratch_.matrix = matrix ? take(matrix) : nullptr;
    scratch_.slots = slots;
  }
  const CpuScratch& get() const { return scratch_; }

 private:
  std::unique_ptr<float[]> memory_;
  CpuScratch scratch_;
};

bool nonnegative(const Args& a) {
  if (!a.weight) return true;
  for (int64_t i = 0; i < int64_t(a.B) * a.N; ++i) {
    if (!(a.weight[i] >= 0)) return false;
  }
  return true;
}

std::tuple<Tensor, Tensor> kcenter_greedy(const Tensor& x, int64_t k, std::string objective, std::string metric,
                                          std::string first, std::optional<Tensor> seed, std::optional<Tensor> weight,
                                          std::optional<Tensor> lengths) {
  Args a = make_args(x, k, objective, metric, first, seed, weight, lengths);
  Outputs out = make_outputs(a, x);
  CpuKernel* select = select_isa(kKernels);
  const int threads = thread_count();
  const int64_t item_bytes = int64_t(a.N) * a.C * (a.dtype == DType::f32 ? 4 : 2);
  const bool all_pairs = !a.seed && a.first == First::largest_nn;
  const CpuPlan plan = plan_cpu(a.objective, nonnegative(a), all_pairs, a.B, a.N, a.k, item_bytes, threads);
  if (plan.across_items) {
    parallel_for(a.B, 1, [&](int64_t begin, int64_t end) {
      const ScratchMemory memory(a, plan, 1);
      for (int64_t b = begin; b < end; ++b) select(a, plan, memory.get(), int(b));
    });
  } else {
    const ScratchMemory memory(a, plan, threads);
    for (int b = 0; b < a.B; ++b) select(a, plan, memory.get(), b);
  }
  return {out.index, out.value};
}

}  // namespace
}  // namespace tokencomp::cpu

STABLE_TORCH_LIBRARY_IMPL(tokencomp, CPU, m) { m.impl("kcenter_greedy", TORCH_BOX(&tokencomp::cpu::kcenter_greedy)); }
