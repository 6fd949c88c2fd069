// Selection by score on the CPU, torch side: working memory, threads over rows or over the chunks of a row,
// registration. The arithmetic is in topk_kernels.cpp and topk_budget_kernels.cpp, once per instruction set.
#include "op/topk.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/topk_kernels.h"

namespace tokencomp::cpu {

#define TOKENCOMP_DECLARE(isa)    \
  namespace isa {                 \
  topk::SelectKernel topk_select; \
  topk::BudgetKernel topk_budget; \
  }
TOKENCOMP_FOR_EACH_ISA(TOKENCOMP_DECLARE)

namespace {

using namespace topk;

constexpr SelectKernel* kSelectKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(topk_select);
constexpr BudgetKernel* kBudgetKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(topk_budget);

// Tokens worth another thread: a few tens of microseconds, what waking one costs under a passive wait policy.
constexpr int64_t kTaskTokens = 1 << 17;

class ScratchMemory {
 public:
  ScratchMemory(const Args& a, int chunks)
      : candidates_(least(candidates_of(a.k), int64_t(a.S) + 64)),
        histogram_(new Histogram[chunks]),
        counts_(new int64_t[2 * chunks]),
        slots_(new uint32_t[kSampleSize + candidates_]),
        index_(new int[chunks * candidates_]),
        scratch_{histogram_.get(),
                 counts_.get(),
                 counts_.get() + chunks,
                 slots_.get(),
                 slots_.get() + kSampleSize,
                 index_.get(),
                 chunks,
                 candidates_} {}

  const CpuScratch& get() const { return scratch_; }

 private:
  int64_t candidates_;
  std::unique_ptr<Histogram[]> histogram_;
  std::unique_ptr<int64_t[]> counts_;
  std::unique_ptr<uint32_t[]> slots_;
  std::unique_ptr<int[]> index_;
  CpuScratch scratch_;
};

std::tuple<Tensor, Tensor> select(Args& a, const Tensor& score) {
  Outputs out = make_outputs(a, score);
  SelectKernel* kernel = select_isa(kSelectKernels);
  const int64_t pieces = most(a.S / kTaskTokens, 1);  // of a row, that threads might take
  if (a.R >= thread_count() || pieces == 1) {
    parallel_for(a.R, kTaskTokens / most(a.S, 1) + 1, [&](int64_t begin, int64_t end) {
      const ScratchMemory memory(a, 1);
      for (int64_t r = begin; r < end; ++r) kernel(a, memory.get(), int(r));
    });
  } else {
    const ScratchMemory memory(a, int(least(pieces, thread_count())));
    for (int r = 0; r < a.R; ++r) kernel(a, memory.get(), r);
  }
  return {out.index, out.count};
}

std::tuple<Tensor, Tensor> topk_select(const Tensor& score, int64_t k, std::optional<Tensor> k_per_row, int64_t head,
                                       int64_t tail, std::optional<Tensor> keep, std::optional<Tensor> lengths) {
  Args a = make_args(score, k, k_per_row, head, tail, keep, lengths);
  return select(a, score);
}

std::tuple<Tensor, Tensor> topp_select(const Tensor& score, double p, int64_t max_k, int64_t min_k, int64_t head,
                                       int64_t tail, std::optional<Tensor> lengths) {
  Args a = make_topp_args(score, p, max_k, min_k, head, tail, lengths);
  return select(a, score);
}

Tensor topk_budget(const Tensor& score, int64_t k, int64_t floor, std::optional<Tensor> lengths) {
  BudgetArgs a = make_budget_args(score, k, floor, lengths);
  Tensor budget = make_budget(a, score);
  BudgetKernel* kernel = select_isa(kBudgetKernels);
  auto run = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint32_t[]> count(new uint32_t[int64_t(a.H) * kBins]);
    const std::unique_ptr<int64_t[]> above(new int64_t[a.H]);
    for (int64_t b = begin; b < end; ++b) kernel(a, {count.get(), above.get()}, int(b));
  };
  if (a.B >= thread_count()) {
    parallel_for(a.B, kTaskTokens / most(int64_t(a.H) * a.S, 1) + 1, run);
  } else {
    run(0, a.B);  // the threads share the heads of one item
  }
  return budget;
}

}  // namespace
}  // namespace tokencomp::cpu

STABLE_TORCH_LIBRARY_IMPL(tokencomp, CPU, m) {
  m.impl("topk_select", TORCH_BOX(&tokencomp::cpu::topk_select));
  m.impl("topp_select", TORCH_BOX(&tokencomp::cpu::topp_select));
  m.impl("topk_budget", TORCH_BOX(&tokencomp::cpu::topk_budget));
}
