// Selection by score on CUDA, torch side: plan, working memory, launches, registration. topk_select and topp_select are
// one launch of one kernel (topk_kernels.h), with the team of blocks that core/topk_plan.h chooses; topk_budget is a
// fixed series of short launches (topk_budget.h).
#include "op/topk.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <tuple>

#include "core/dispatch.h"
#include "cuda/topk_budget.h"
#include "cuda/topk_kernels.h"
#include "op/stream.h"

namespace tokencomp::topk {
namespace {

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The plan, or the one that TOKENCOMP_TOPK_PLAN names.
CudaPlan choose_plan(const Args& a) {
  const CudaProblem problem{a.R, a.S, int(element_bytes(a.dtype)), a.by_mass};
  const CudaDevice device{gpu::sm_count(), gpu::max_shared_memory_per_block(), int(gpu::max_cluster_size())};
  const char* forced = std::getenv("TOKENCOMP_TOPK_PLAN");
  const CudaPlan plan = forced && *forced ? plan_cuda_named(problem, device, forced) : plan_cuda(problem, device);
  STD_TORCH_CHECK(!plan.refused, "topk: TOKENCOMP_TOPK_PLAN must name a possible plan, got '", forced ? forced : "",
                  "': ", plan.refused);
  return plan;
}

// Working memory of a team that meets in global memory: a tensor that lives until the launch is enqueued.
struct MeetingMemory {
  Tensor memory;
  Meeting arrays{};

  MeetingMemory(const Args& a, const CudaPlan& plan, const Tensor& score)
      : memory(torch::stable::new_zeros(score, {plan.team == CudaTeam::grid ? words(a, plan) : 0}, ScalarType::Int)) {
    if (plan.team != CudaTeam::grid) return;
    const int64_t bins = int64_t(a.R) * kLevels * kBins, told = int64_t(a.R) * 2 * plan.size;
    uint32_t* next = static_cast<uint32_t*>(memory.mutable_data_ptr());
    arrays.mass = reinterpret_cast<Word*>(next);
    if (a.by_mass) next += 2 * bins;
    arrays.word = reinterpret_cast<Word*>(next);
    arrays.count = next + 2 * told;
    arrays.counter = arrays.count + bins;
    gpu::watch(memory.const_data_ptr(), words(a, plan) * 4, "meeting", true);
  }

  static int64_t words(const Args& a, const CudaPlan& plan) {
    const int64_t bins = int64_t(a.R) * kLevels * kBins;
    return bins * (a.by_mass ? 3 : 1) + int64_t(a.R) * (4 * plan.size + 1);
  }
};

void watch_arguments(const Args& a) {
  if (a.R && a.S) gpu::watch(a.score, ((a.R - 1) * a.stride + a.S) * element_bytes(a.dtype), "score", true);
  if (a.k_per_row) gpu::watch(a.k_per_row, int64_t(a.R) * 4, "k_per_row", true);
  if (a.keep) gpu::watch(a.keep, int64_t(a.R) * a.S, "keep", true);
  if (a.lengths) gpu::watch(a.lengths, int64_t(a.R) * 4, "lengths", true);
  gpu::watch(a.index, int64_t(a.R) * a.k * 4, "index", false);
  gpu::watch(a.count, int64_t(a.R) * 4, "count", false);
}

template <class T, bool kMass>
void launch(const Args& a, const CudaPlan& plan, const Meeting& meeting, gpu::Stream stream) {
  gpu::LaunchConfig config{dim3(unsigned(a.R) * unsigned(plan.size)), dim3(CudaTiles::threads), plan.smem};
  config.stream = stream;
  if (plan.team == CudaTeam::cluster) {
    config.cluster = unsigned(plan.size);
    gpu::launch(topk_row<T, kMass, ClusterTeam>, config, a, meeting, plan.size, plan.resident);
  } else {
    config.cooperative = true;
    gpu::launch(topk_row<T, kMass, GridTeam>, config, a, meeting, plan.size, plan.resident);
  }
}

std::tuple<Tensor, Tensor> select(Args& a, const Tensor& score) {
  Outputs out = make_outputs(a, score);
  if (a.R == 0) return {out.index, out.count};
  const gpu::DeviceGuard device(a.device);
  const gpu::WatchScope scope;
  watch_arguments(a);
  const CudaPlan plan = choose_plan(a);
  const MeetingMemory meeting(a, plan, score);
  dispatch_dtype(a.dtype, [&]<class T> {
    if (a.by_mass) {
      launch<T, true>(a, plan, meeting.arrays, gpu::stream_of(a.device));
    } else {
      launch<T, false>(a, plan, meeting.arrays, gpu::stream_of(a.device));
    }
  });
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
  const int64_t heads = int64_t(a.B) * a.H;
  if (heads == 0) return budget;
  const gpu::DeviceGuard device(a.device);
  const gpu::WatchScope scope;
  const int64_t last = (a.B - 1) * a.stride_b + (a.H - 1) * a.stride_h + a.S;
  if (a.S) gpu::watch(a.score, last * element_bytes(a.dtype), "score", true);
  if (a.lengths) gpu::watch(a.lengths, heads * 4, "lengths", true);
  gpu::watch(a.budget, heads * 4, "budget", false);
  const int64_t words = heads * (BudgetTiles::bins + 1) + a.B;
  Tensor memory = torch::stable::new_zeros(score, {words}, ScalarType::Int);
  gpu::watch(memory.const_data_ptr(), words * 4, "workspace", true);
  uint32_t* count = static_cast<uint32_t*>(memory.mutable_data_ptr());
  uint32_t* above = count + heads * BudgetTiles::bins;
  const BudgetWorkspace w{count, above, above + heads};

  const int64_t pieces = most((int64_t(a.S) + BudgetTiles::slots - 1) / BudgetTiles::slots, 1);
  gpu::LaunchConfig each{dim3(unsigned(heads * pieces)), dim3(BudgetTiles::threads), sizeof(CountSmem)};
  gpu::LaunchConfig all{dim3(unsigned(a.B)), dim3(BudgetTiles::threads), sizeof(NarrowSmem)};
  each.stream = all.stream = gpu::stream_of(a.device);
  dispatch_dtype(a.dtype, [&]<class T> {
    for (int level = 0; level < BudgetTiles::levels; ++level) {
      gpu::launch(topk_budget_count<T>, each, a, w, level, int(pieces));
      gpu::launch(topk_budget_narrow, all, a, w, level);
    }
  });
  return budget;
}

}  // namespace
}  // namespace tokencomp::topk

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("topk_select", TORCH_BOX(&tokencomp::topk::topk_select));
  m.impl("topp_select", TORCH_BOX(&tokencomp::topk::topp_select));
  m.impl("topk_budget", TORCH_BOX(&tokencomp::topk::topk_budget));
}
