// The nearest kept slot of every member on CUDA. A block owns 64 members of a row and meets its centres 64 at a time
// (pair_tile.h): keys, then values where they count; only the best of each member is kept. O(M K D) operations, O(M +
// K) memory.
#pragma once

#include "core/kvcache_merge.h"
#include "core/norm.h"
#include "core/order.h"
#include "cuda/pair_tile.h"

namespace tokencomp::kvcache {

constexpr int kAssignThreads = PairTiles::threads, kAssignTile = PairTiles::tile, kAssignWarps = kAssignThreads / 32;
constexpr int kOwned = 4;     // members, and centres, of a tile that a thread holds
constexpr int kSharers = 16;  // threads that share a member

// 1/|x| of the centres and the members of every row; null: not asked for.
struct Norms {
  float *key_center, *key_member;      // [B, Hkv, K], [B, Hkv, M]
  float *value_center, *value_member;  // the same
};

// Keys or values of one row, place by place: what pair_tile.h calls an operand.
template <class T>
struct SlotOperand {
  Rows<T> x;  // where channels are concerned; slots are found through the table
  Pages pages;
  PageTable table;
  const int* list;
  int b, h, n, first;

  __device__ __forceinline__ const T* row(int r) const {
    const int place = first + r;
    if (place >= n) return nullptr;
    const int slot = list[place];
    return slot < 0 ? nullptr : slot_of<const T>(pages, table, b, h, slot);
  }
};

template <class T>
__device__ __forceinline__ SlotOperand<T> operand_of(const Store& s, bool values, bool whole, int row, const int* list,
                                                     int n, int first) {
  const Pages pages = values ? s.v : s.k;
  const Rows<T> x{static_cast<const T*>(pages.base), 0, pages.channels, whole};
  return {x, pages, s.table, list, row / s.Hkv, row % s.Hkv, n, first};
}

// One warp to a centre or member, all centres first; blockIdx.y: keys or values.
// registers: inverse_norms <= 48
template <class T>
__global__ void __launch_bounds__(kAssignThreads) inverse_norms(Store s, Lists lists, Norms out, bool whole) {
  const int64_t warp = int64_t(blockIdx.x) * kAssignWarps + int(threadIdx.x) / 32;
  const int64_t centers = int64_t(s.rows()) * lists.K, members = int64_t(s.rows()) * lists.M;
  if (warp >= centers + members) return;
  const bool values = blockIdx.y == 1, is_center = warp < centers;
  const int64_t at = is_center ? warp : warp - centers;
  const int width = is_center ? lists.K : lists.M, row = int(at / width), lane = int(threadIdx.x) % 32;
  float* norm =
      values ? (is_center ? out.value_center : out.value_member) : (is_center ? out.key_center : out.key_member);
  const bool there = !is_center || at % width < lists.keep_count[row];
  const SlotOperand<T> x = operand_of<T>(s, values, whole, row, (is_center ? lists.keep : lists.member) + at, 1, 0);
  const T* channels = there ? x.row(0) : nullptr;
  float sum = NAN;
  if (channels) sum = square_sum(Rows<T>{channels, 0, x.x.C, whole}, 0, lane);
  if (norm && lane == 0) norm[at] = inverse_norm(sum);
}

__device__ __forceinline__ OrderKey no_center() { return order_key(-INFINITY, 0x7fffffff); }

// Multiplies what a thread holds of a tile by the cosines of keys or values.
template <class T>
struct Cosines {
  float value[kOwned][kOwned];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < kOwned * kOwned; ++i) value[i / kOwned][i % kOwned] = 1.0f;
  }
  __device__ __forceinline__ void multiply(const PairTile<T>& tile, const float* member, const float* center, int M,
                                           int K, int member0, int center0, bool clamp) {
#pragma unroll
    for (int q = 0; q < kOwned; ++q) {
      const int j = center0 + tile.column(q);
      const float factor = j < K ? center[j] : NAN;
#pragma unroll
      for (int r = 0; r < kOwned; ++r) {
        const int i = member0 + tile.row(r);
        const float cosine = tile.product(r, q) * factor * (i < M ? member[i] : NAN);
        value[r][q] *= clamp && cosine < 0 ? 0.0f : cosine;  // NaN stays NaN
      }
    }
  }
};

// registers: assign_members <= 128
template <class T>
__global__ void __launch_bounds__(kAssignThreads, 2) assign_members(AssignArgs a, Norms norms, bool whole, int tiles) {
  auto& smem = gpu::dynamic_smem<TileSmem<T>>();
  const int row = int(blockIdx.x / unsigned(tiles)), member0 = int(blockIdx.x % unsigned(tiles)) * kAssignTile;
  const int M = a.lists.M, K = a.lists.keep_count[row];
  const int64_t members = int64_t(row) * M, centers = int64_t(row) * a.lists.K;
  PairTile<T> tile(false);
  Cosines<T> cosines;
  OrderKey best[kOwned];
#pragma unroll
  for (int r = 0; r < kOwned; ++r) best[r] = no_center();
#pragma unroll 1
  for (int center0 = 0; center0 < K; center0 += kAssignTile) {
    cosines.start();
#pragma unroll 1
    for (int values = 0; values <= int(a.with_values); ++values) {
      tile.compute(smem, operand_of<T>(a.s, values, whole, row, a.lists.member + members, M, member0),
                   operand_of<T>(a.s, values, whole, row, a.lists.keep + centers, K, center0));
      cosines.multiply(tile, (values ? norms.value_member : norms.key_member) + members,
                       (values ? norms.value_center : norms.key_center) + centers, M, K, member0, center0, a.clamp);
    }
#pragma unroll
    for (int q = 0; q < kOwned; ++q) {
#pragma unroll
      for (int r = 0; r < kOwned; ++r) {
        const float value = cosines.value[r][q];
        const OrderKey key = order_key(value, center0 + tile.column(q));
        if (value > -INFINITY && key > best[r]) best[r] = key;
      }
    }
  }
  auto& shared = reinterpret_cast<OrderKey(&)[kAssignTile][kSharers + 1]>(smem);  // one more: no bank conflicts
  static_assert(sizeof(shared) <= sizeof(smem));
#pragma unroll
  for (int r = 0; r < kOwned; ++r) shared[tile.row(r)][tile.sharer()] = best[r];
  __syncthreads();
  const int i = member0 + int(threadIdx.x);
  if (int(threadIdx.x) >= kAssignTile || i >= M) return;
  OrderKey winner = no_center();
  for (int s = 0; s < kSharers; ++s) winner = shared[threadIdx.x][s] > winner ? shared[threadIdx.x][s] : winner;
  a.similarity[members + i] = score_of(winner);
  a.target[members + i] = a.target_or_none(score_of(winner), index_of(winner));
}

}  // namespace tokencomp::kvcache
