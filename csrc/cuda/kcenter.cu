// k-center on CUDA, torch side: plan, working memory, launch, registration. One launch makes the whole selection,
// whatever the plan (core/kcenter_plan.h); the kernels are in kcenter_kernels.h. Working memory is a few floats per
// token, and for the gram plan the N x N products, bounded by kCudaGramLimitBytes.
#include "op/kcenter.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>

#include "core/dispatch.h"
#include "cuda/kcenter_kernels.h"
#include "op/stream.h"

namespace tokencomp::kcenter {
namespace {

CudaDevice current_device() {
  return {gpu::sm_count(), gpu::max_shared_memory_per_block(), int(gpu::max_cluster_size())};
}

// The plan, or the one that TOKENCOMP_KCENTER_PLAN names.
CudaPlan choose_plan(const Args& a) {
  const CudaProblem problem = cuda_problem(a);
  const CudaDevice device = current_device();
  const char* forced = std::getenv("TOKENCOMP_KCENTER_PLAN");
  const CudaPlan plan = forced && *forced ? plan_cuda_named(problem, device, forced) : plan_cuda(problem, device);
  STD_TORCH_CHECK(!plan.refused, "kcenter_greedy: TOKENCOMP_KCENTER_PLAN must name a possible plan, got '",
                  forced ? forced : "", "': ", plan.refused);
  return plan;
}

// Each row starts on a 16-byte boundary and is a whole number of 16-byte chunks.
bool whole_chunks(const Args& a) {
  const int64_t bytes = a.dtype == DType::f32 ? 4 : 2;
  const int64_t step = (a.B > 1 ? a.x_stride_b : 0) | (a.N > 1 ? a.x_stride_n : 0);  // of one row there is no next
  const int64_t bits = int64_t(reinterpret_cast<uintptr_t>(a.x)) | step * bytes;
  return ((bits | a.C * bytes) & 15) == 0;
}

// Working memory: tensors that live until the launch is enqueued, and the arrays cut from them.
struct WorkspaceMemory {
  Tensor memory, counter;
  Workspace arrays;

  WorkspaceMemory(const Args& a, const CudaPlan& plan, const Tensor& x)
      : counter(torch::stable::new_zeros(x, {plan.teams}, ScalarType::Int)) {
    const int64_t tokens = int64_t(a.B) * a.N;
    const bool has_first = !a.seed && a.first != First::index0;
    const bool has_mean = has_first && a.first == First::centroid;
    arrays.mean_stride = has_mean ? chunks_of(a.C, 8) * 8 : 0;  // whole chunks of any element type
    // Layout, in floats; each array is rounded up to a multiple of 32.
    int64_t used = 0;
    const auto reserve = [&](int64_t floats) {
      const int64_t at = used;
      used += (floats + 31) / 32 * 32;
      return at;
    };
    const int64_t inverse_norm = reserve(tokens), first = reserve(has_first ? tokens : 0);
    const int64_t mean = reserve(int64_t(a.B) * arrays.mean_stride);
    const int64_t token = reserve(plan.state_in_smem ? 0 : 2 * tokens);
    const int64_t gram_floats = int64_t(plan.items) * a.N * a.N;
    const int64_t gram = reserve(gram_floats);
    const int64_t box_floats = plan.team == CudaTeam::grid ? int64_t(plan.teams) * 2 * plan.size * 2 : 0;
    const int64_t box = reserve(box_floats);
    const int64_t picks = plan.tokens == CudaTokens::lazy ? int64_t(a.B) * a.k : 0, centre = reserve(picks);
    memory = torch::stable::new_empty(x, {used}, ScalarType::Float);
    float* base = static_cast<float*>(memory.mutable_data_ptr());
    arrays.inverse_norm = base + inverse_norm;
    arrays.first = base + first;
    arrays.mean = base + mean;
    arrays.token = reinterpret_cast<TokenState*>(base + token);
    arrays.gram = base + gram;
    arrays.centre = reinterpret_cast<int*>(base + centre);
    arrays.meeting.box = reinterpret_cast<OrderKey*>(base + box);
    arrays.meeting.counter = static_cast<uint32_t*>(counter.mutable_data_ptr());
    gpu::watch(arrays.inverse_norm, tokens * 4, "inverse_norm", false);
    if (has_first) gpu::watch(arrays.first, tokens * 4, "first", false);
    if (has_mean) gpu::watch(arrays.mean, int64_t(a.B) * arrays.mean_stride * 4, "mean", false);
    if (!plan.state_in_smem) gpu::watch(arrays.token, tokens * 8, "token", false);
    if (gram_floats) gpu::watch(arrays.gram, gram_floats * 4, "gram", false);
    if (picks) gpu::watch(arrays.centre, picks * 4, "centre", false);
    if (box_floats) gpu::watch(arrays.meeting.box, box_floats * 4, "box", false);
    gpu::watch(arrays.meeting.counter, plan.teams * 4, "counter", true);
  }
};

void watch_arguments(const Args& a) {
  const int64_t bytes = a.dtype == DType::f32 ? 4 : 2, tokens = int64_t(a.B) * a.N, picks = int64_t(a.B) * a.k;
  gpu::watch(a.x, ((a.B - 1) * a.x_stride_b + (a.N - 1) * a.x_stride_n + a.C) * bytes, "x", true);
  if (a.seed) gpu::watch(a.seed, int64_t(a.B) * a.S * 4, "seed", true);
  if (a.weight) gpu::watch(a.weight, tokens * 4, "weight", true);
  if (a.lengths) gpu::watch(a.lengths, a.B * 4, "lengths", true);
  gpu::watch(a.index, picks * 4, "index", false);
  gpu::watch(a.value, picks * 4, "value", false);
}

template <class T>
void launch(const Args& a, const CudaPlan& plan, const Workspace& w, gpu::Stream stream) {
  static_assert(sizeof(TileSmem<T>) == kCudaTileBytes && CudaTiles::threads == PairTiles::threads &&
                CudaTiles::tile == PairTiles::tile);
  const bool whole = whole_chunks(a);
  gpu::LaunchConfig config{dim3(unsigned(plan.size) * unsigned(plan.teams)), dim3(CudaTiles::threads), plan.smem};
  config.stream = stream;
  config.cooperative = plan.team != CudaTeam::cluster;
  if (plan.team == CudaTeam::gram) {
    gpu::launch(kcenter_gram<T>, config, a, w, plan.items, whole);
    return;
  }
  const int capacity = (a.N + plan.size - 1) / plan.size;
  const StreamShape shape{plan.size, plan.teams, capacity, whole, plan.state_in_smem, plan.tokens};
  if (plan.team == CudaTeam::cluster) {
    config.cluster = unsigned(plan.size);
    gpu::launch(kcenter_stream<T, ClusterTeam>, config, a, w, shape);
  } else {
    gpu::launch(kcenter_stream<T, GridTeam>, config, a, w, shape);
  }
}

std::tuple<Tensor, Tensor> kcenter_greedy(const Tensor& x, int64_t k, std::string objective, std::string metric,
                                          std::string first, std::optional<Tensor> seed, std::optional<Tensor> weight,
                                          std::optional<Tensor> lengths) {
  Args a = make_args(x, k, objective, metric, first, seed, weight, lengths);
  Outputs out = make_outputs(a, x);
  if (a.B == 0) return {out.index, out.value};
  const gpu::DeviceGuard device(a.device);
  const gpu::WatchScope scope;
  watch_arguments(a);
  const CudaPlan plan = choose_plan(a);
  const WorkspaceMemory workspace(a, plan, x);
  dispatch_dtype(a.dtype, [&]<class T> { launch<T>(a, plan, workspace.arrays, gpu::stream_of(a.device)); });
  return {out.index, out.value};
}

}  // namespace
}  // namespace tokencomp::kcenter

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("kcenter_greedy", TORCH_BOX(&tokencomp::kcenter::kcenter_greedy));
}
