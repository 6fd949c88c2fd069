// Prefill attention on CUDA, sm_90a: which items of work a block of threads takes, and in what order.
#pragma once

#include "cuda/prefill_work.h"

namespace tokencomp::prefill {

// Which rows of what an item has.
struct Item {
  int b, h, kv, t0;

  __device__ __forceinline__ Item(const Geometry& g, const WgmmaWork& w, int number) {
    const int heads = g.B * g.Hq, head = number % heads;
    b = head / g.Hq;
    h = head % g.Hq;
    kv = h / g.group();
    t0 = (w.row_blocks - 1 - number / heads) * kWgmmaRows;
  }
};

// Calls f(item, round) for the items of this block of threads. Blocks take one item in each round, in turns from the
// first and from the last block: each gets about the same total then, and knows its items without asking anybody.
template <class F>
__device__ __forceinline__ void for_items(const Geometry& g, const WgmmaWork& w, F&& f) {
  const unsigned blocks = gridDim.x;
#pragma unroll 1
  for (unsigned round = 0; round * blocks < unsigned(w.items); ++round) {
    const unsigned at = round * blocks + (round % 2 ? blocks - 1 - blockIdx.x : blockIdx.x);
    if (at < unsigned(w.items)) f(Item(g, w, w.order ? w.order[at] : int(at)), round);
  }
}

constexpr int kOrderThreads = 1024;

struct OrderSmem {
  int begin[2][kOrderThreads];  // of each class of lengths
};

// Sorts items by the tiles of 128 keys that their lists make. Within a class the order is that of arrival: it decides
// when an item is computed, not what comes out. One block of threads.
// registers: prefill_order <= 64
__global__ void __launch_bounds__(kOrderThreads) prefill_order(PrefillArgs p, WgmmaWork w) {
  const Geometry& g = p.a.g;
  auto& s = gpu::dynamic_smem<OrderSmem>();
  const int thread = int(threadIdx.x);
  const auto class_of = [&](int number) {
    const Item item(g, w, number);
    const Range blocks = list_of(p, p.blocks, item.b, item.h, item.t0 / kWgmmaRows);
    const Range columns = list_of(p, p.columns, item.b, item.h, item.t0 / kWgmmaRows);
    const int64_t keys = int64_t(blocks.end - blocks.begin) * p.block_k + columns.end - columns.begin;
    const int64_t tiles = (keys + 127) / 128;
    return int(tiles < kOrderThreads ? kOrderThreads - 1 - tiles : 0);
  };
  s.begin[0][thread] = 0;
  __syncthreads();
  for (int i = thread; i < w.items; i += kOrderThreads) atomicAdd(&s.begin[0][class_of(i)], 1);
  __syncthreads();
  int now = 0;
  for (int step = 1; step < kOrderThreads; step *= 2, now ^= 1) {  // inclusive sums
    s.begin[now ^ 1][thread] = s.begin[now][thread] + (thread >= step ? s.begin[now][thread - step] : 0);
    __syncthreads();
  }
  s.begin[now ^ 1][thread] = thread ? s.begin[now][thread - 1] : 0;
  __syncthreads();
  for (int i = thread; i < w.items; i += kOrderThreads) w.order[atomicAdd(&s.begin[now ^ 1][class_of(i)], 1)] = i;
}

}  // namespace tokencomp::prefill
