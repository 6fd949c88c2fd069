// Token maps on CUDA, one block to an item. Rows are ranked by a bitonic sort of 64-bit keys in shared memory, which
// leaves nothing to chance: keys are distinct. Output rows are numbered by counting survivors along the output order;
// until a token has its number its place in the map holds what is known of it (kUnlisted, kListed, kGone).
#pragma once

#include "core/merge.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::merge {

struct MapShape {
  static constexpr int threads = 512, warps = threads / 32;
  int keys;  // rows rounded up to a power of two
};

struct MapSmem {
  int warp_count[MapShape::warps];
  alignas(16) OrderKey key[1];  // [keys]
};

// Keys in descending order; all threads of the block call.
__device__ __forceinline__ void sort_descending(OrderKey* key, int count) {
  for (int run = 2; run <= count; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int pair = int(threadIdx.x); pair < count / 2; pair += MapShape::threads) {
        const int low = pair / distance * distance * 2 + pair % distance, high = low + distance;
        const OrderKey a = key[low], b = key[high];
        const bool descending = (low & run) == 0;
        if ((a < b) == descending) {
          key[low] = b;
          key[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Numbers tokens along the output order, a block's width at a time.
class Numbering {
 public:
  __device__ Numbering(int* map, int* warp_count) : map_(map), warp_count_(warp_count) {}

  // token(k), k in [0, count), is the k-th in line, or negative for nobody; all threads of the block call.
  template <class F>
  __device__ __forceinline__ void line(int count, F&& token) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    for (int first = 0; first < count; first += MapShape::threads) {
      const int k = first + int(threadIdx.x), t = k < count ? token(k) : -1;
      const unsigned present = __ballot_sync(~0u, t >= 0);
      if (lane == 0) warp_count_[warp] = __popc(present);
      __syncthreads();
      int before = 0, total = 0;
      for (int w = 0; w < MapShape::warps; ++w) {
        before += w < warp ? warp_count_[w] : 0;
        total += warp_count_[w];
      }
      if (t >= 0) map_[t] = next_ + before + __popc(present & ((1u << lane) - 1));
      next_ += total;
      __syncthreads();  // the counts are read, and the numbers are there for the next line
    }
  }

 private:
  int* map_;
  int* warp_count_;
  int next_ = 0;
};

// registers: merge_map <= 64
__global__ void __launch_bounds__(MapShape::threads) merge_map(MapArgs m, MapShape shape) {
  auto& smem = gpu::dynamic_smem<MapSmem>();
  const int b = int(blockIdx.x), tid = int(threadIdx.x);
  int* map = m.map + int64_t(b) * m.N;
  OrderKey* key = smem.key;

  for (int i = tid; i < shape.keys; i += MapShape::threads) key[i] = i < m.Ra ? m.rank_key(b, i) : 0;
  for (int t = tid; t < m.N; t += MapShape::threads) map[t] = kUnlisted;
  __syncthreads();
  sort_descending(key, shape.keys);
  const auto set = [&](int t, int state) {
    if (m.is_token(t)) map[t] = state;
  };
  for (int i = tid; i < m.Ra; i += MapShape::threads) set(m.a_token(b, i), kListed);
  for (int j = tid; j < m.Rb; j += MapShape::threads) set(m.b_token(b, j), kListed);
  for (int j = tid; j < m.Rr; j += MapShape::threads) set(m.rest_token(b, j), kListed);
  __syncthreads();
  for (int k = tid; k < m.r; k += MapShape::threads) set(m.a_token(b, MapArgs::row_of(key[k])), kGone);
  __syncthreads();

  // A token without a number yet, or nobody.
  const auto unless_numbered = [&](int t) { return m.is_token(t) && map[t] < 0 && map[t] != kGone ? t : -1; };
  Numbering numbering(map, smem.warp_count);
  numbering.line(m.prefix, unless_numbered);
  numbering.line(m.N - m.prefix, [&](int k) {
    const int t = m.prefix + k;
    return m.order == Order::position || map[t] == kUnlisted ? unless_numbered(t) : -1;
  });
  if (m.order != Order::position) {
    numbering.line(m.Rr, [&](int j) { return unless_numbered(m.rest_token(b, j)); });
    if (m.order == Order::similarity) {
      numbering.line(m.Ra - m.r, [&](int k) { return unless_numbered(m.a_token(b, MapArgs::row_of(key[m.r + k]))); });
    } else {
      numbering.line(m.Ra, [&](int i) { return unless_numbered(m.a_token(b, i)); });
    }
    numbering.line(m.Rb, [&](int j) { return unless_numbered(m.b_token(b, j)); });
  }

  for (int k = tid; k < m.r; k += MapShape::threads) {
    const int i = MapArgs::row_of(key[k]), token = m.a_token(b, i), column = m.index[int64_t(b) * m.Ra + i];
    if (!m.is_token(token)) continue;
    const int target = column >= 0 && column < m.Rb ? m.b_token(b, column) : -1;
    const int number = m.is_token(target) ? map[target] : -1;
    map[token] = number >= 0 ? number : -1;
  }
}

}  // namespace tokencomp::merge
