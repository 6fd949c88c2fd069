// Budgets of heads that share one selection, on CUDA: for each of four digits, one launch that counts every head's
// slots by the digit, and one that narrows the threshold down. With c_h(t) the tokens of head h from key t on, its
// budget under t is max(floor, c_h(t)), and the threshold is the largest t whose budgets sum to k. It is made once per
// layer after a prefill, so eight short launches are good enough, and need no co-residency.
#pragma once

#include "core/topk.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::topk {

struct BudgetTiles {
  static constexpr int threads = 256, warps = threads / 32;
  static constexpr int levels = 4, bins = 256, lane_bins = bins / 32;
  static constexpr int slots = 8192;  // of a block: 32 a thread
};

// Zero at the first launch.
struct BudgetWorkspace {
  uint32_t* count;   // [B, H, bins] slots by the digit in question
  uint32_t* above;   // [B, H] slots above the prefix
  uint32_t* prefix;  // [B]
};

struct CountSmem {
  uint32_t count[BudgetTiles::bins];
};

struct NarrowSmem {
  int64_t part[BudgetTiles::warps][BudgetTiles::bins];
  int64_t sum[gpu::kMaxWarps];
  int first[gpu::kMaxWarps];
};

__device__ __forceinline__ int head_length(const BudgetArgs& a, int64_t head) {
  return a.lengths ? clamped(a.lengths[head], 0, a.S) : a.S;
}

// Block: one piece of one head.
// registers: topk_budget_count <= 40
template <class T>
__global__ void __launch_bounds__(BudgetTiles::threads)
    topk_budget_count(BudgetArgs a, BudgetWorkspace w, int level, int pieces) {
  auto& smem = gpu::dynamic_smem<CountSmem>();
  smem.count[threadIdx.x] = 0;
  __syncthreads();
  const int64_t head = blockIdx.x / unsigned(pieces);
  const int b = int(head / a.H), h = int(head % a.H), shift = 24 - 8 * level;
  const T* score = static_cast<const T*>(a.score) + b * a.stride_b + h * a.stride_h;
  const int begin = int(blockIdx.x % unsigned(pieces)) * BudgetTiles::slots, n = head_length(a, head);
  const int end = n < begin + BudgetTiles::slots ? n : begin + BudgetTiles::slots;
  const uint32_t prefix = w.prefix[b];
#pragma unroll 4
  for (int i = begin + int(threadIdx.x); i < end; i += BudgetTiles::threads) {
    const uint32_t slot = sortable(to_float(score[i]));
    if (level == 0 || (slot ^ prefix) >> shift >> 8 == 0) atomicAdd(&smem.count[slot >> shift & 255], 1u);
  }
  __syncthreads();
  const uint32_t count = smem.count[threadIdx.x];
  if (count) atomicAdd(w.count + head * BudgetTiles::bins + threadIdx.x, count);
}

// Bins are numbered from the top here: the one of largest keys first.
__device__ __forceinline__ uint32_t* bin_from_top(const BudgetWorkspace& w, int64_t head, int bin) {
  return w.count + head * BudgetTiles::bins + (BudgetTiles::bins - 1 - bin);
}

// Budgets of all heads together, if the threshold were the lowest key of a bin: for each bin, by warp.
__device__ __forceinline__ void sum_budgets(const BudgetArgs& a, const BudgetWorkspace& w, int b, NarrowSmem& smem) {
  constexpr int kLane = BudgetTiles::lane_bins;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int64_t total[kLane] = {};
  for (int h = warp; h < a.H; h += BudgetTiles::warps) {
    const int64_t head = int64_t(b) * a.H + h;
    uint32_t count[kLane], sum = 0;
#pragma unroll
    for (int j = 0; j < kLane; ++j) sum += count[j] = *bin_from_top(w, head, lane * kLane + j);
    uint32_t from = w.above[head] + gpu::warp_inclusive_sum(sum) - sum;
    const int n = head_length(a, head);
    const uint32_t sure = uint32_t(a.floor < n ? a.floor : n);
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      from += count[j];
      total[j] += from > sure ? from : sure;
    }
  }
#pragma unroll
  for (int j = 0; j < kLane; ++j) smem.part[warp][lane * kLane + j] = total[j];
  __syncthreads();
}

// Tokens equal to the threshold go to the lowest heads, until the budgets sum to `wanted`.
__device__ __forceinline__ void share_ties(const BudgetArgs& a, const BudgetWorkspace& w, int b, int bin,
                                           int64_t wanted, NarrowSmem& smem) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const auto budget = [&](int h, bool with_ties) -> int64_t {
    if (h >= a.H) return 0;
    const int64_t head = int64_t(b) * a.H + h;
    const int n = head_length(a, head);
    return most(least(a.floor, n), w.above[head] + (with_ties ? *bin_from_top(w, head, bin) : 0));
  };
  int64_t sure = 0;
  for (int h = int(threadIdx.x); h < a.H; h += BudgetTiles::threads) sure += budget(h, false);
  int64_t left = wanted - gpu::block_sum(sure, smem.sum);
  for (int first = 0; first < a.H; first += BudgetTiles::threads) {
    const int h = first + int(threadIdx.x);
    const int64_t mine = budget(h, false), more = budget(h, true) - mine, to = gpu::warp_inclusive_sum(more);
    if (lane == 31) smem.sum[warp] = to;
    __syncthreads();
    int64_t before = to - more, all = 0;
    for (int v = 0; v < BudgetTiles::warps; ++v) {
      before += v < warp ? smem.sum[v] : 0;
      all += smem.sum[v];
    }
    const int64_t given = least(most(left - before, 0), more);
    if (h < a.H) a.budget[int64_t(b) * a.H + h] = int(mine + given);
    left = most(left - all, 0);
    __syncthreads();
  }
}

// Block: one item.
// registers: topk_budget_narrow <= 80
__global__ void __launch_bounds__(BudgetTiles::threads) topk_budget_narrow(BudgetArgs a, BudgetWorkspace w, int level) {
  auto& smem = gpu::dynamic_smem<NarrowSmem>();
  const int b = int(blockIdx.x), warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int64_t valid = 0;
  for (int h = int(threadIdx.x); h < a.H; h += BudgetTiles::threads) valid += head_length(a, int64_t(b) * a.H + h);
  const int64_t wanted = least(a.k, gpu::block_sum(valid, smem.sum));
  sum_budgets(a, w, b, smem);
  int64_t total = 0;
  for (int v = 0; v < BudgetTiles::warps; ++v) total += smem.part[v][threadIdx.x];
  const int reached = total >= wanted ? int(threadIdx.x) : BudgetTiles::bins - 1;  // the last bin always does
  const int bin = gpu::block_reduce(reached, smem.first, BudgetTiles::bins - 1, gpu::Min{});

  const bool last = level == BudgetTiles::levels - 1;
  for (int h = warp; h < a.H; h += BudgetTiles::warps) {
    const int64_t head = int64_t(b) * a.H + h;
    uint32_t above = 0;
#pragma unroll
    for (int j = 0; j < BudgetTiles::lane_bins; ++j) {
      uint32_t* count = bin_from_top(w, head, j * 32 + lane);
      above += j * 32 + lane < bin ? *count : 0;
      if (!last) *count = 0;  // for the next level
    }
    above = gpu::warp_sum(above);
    if (lane == 0) w.above[head] += above;
  }
  if (threadIdx.x == 0) w.prefix[b] |= uint32_t(BudgetTiles::bins - 1 - bin) << (24 - 8 * level);
  __syncthreads();
  if (last) share_ties(a, w, b, bin, wanted, smem);
}

}  // namespace tokencomp::topk
