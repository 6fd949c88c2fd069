// Mixing members into their centres on CUDA: one warp to a centre. It looks for its members in the list, 32 at a time,
// and adds them up in the order of the list, the centre first: no atomics, no lists of lists. Where lengths count, a
// kernel before it turns them into weights.
#pragma once

#include "cuda/kvcache_assign.h"

namespace tokencomp::kvcache {

constexpr int kMergeThreads = 128, kMergeWarps = kMergeThreads / 32;
constexpr int kLaneChannels = 4;  // channels that a lane sums at a time

// What members count, [B, Hkv, M]; the last two only where keys are mixed by direction.
struct Weights {
  const float* plain;
  const float* unit;    // times 1/|K|
  const float* length;  // times |K|
};

// |x|^2 of one slot, by one warp.
template <class T>
__device__ __forceinline__ float slot_square(const Store& s, bool values, bool whole, int row, int slot) {
  const SlotOperand<T> x = operand_of<T>(s, values, whole, row, &slot, 1, 0);
  const T* channels = x.row(0);
  return channels ? square_sum(Rows<T>{channels, 0, x.x.C, whole}, 0, int(threadIdx.x) % 32) : NAN;
}

// One warp to a member.
// registers: weigh_members <= 48
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    weigh_members(MergeArgs m, bool whole, float* plain, float* unit, float* length) {
  const int64_t at = int64_t(blockIdx.x) * kMergeWarps + int(threadIdx.x) / 32;
  if (at >= int64_t(m.s.rows()) * m.lists.M) return;
  const int row = int(at / m.lists.M), member = m.lists.member[at], rank = m.target[at];
  if (member < 0 || rank < 0) return;
  float w = m.weight[at];
  if (m.by_norm) {
    const float own = sqrtf(slot_square<T>(m.s, true, whole, row, member));
    w *= norm_share(own, sqrtf(slot_square<T>(m.s, true, whole, row, m.lists.keep[int64_t(row) * m.lists.K + rank])));
  }
  const float square = unit ? slot_square<T>(m.s, false, whole, row, member) : 0.0f;
  if (threadIdx.x % 32 != 0) return;
  plain[at] = w;
  if (!unit) return;
  unit[at] = w * inverse_norm(square);
  length[at] = w * sqrtf(square);
}

template <class T>
class CenterWarp {
 public:
  __device__ __forceinline__ CenterWarp(const MergeArgs& args, const Weights& members_weights, int at_row, int at_rank)
      : m(args), weights(members_weights), row(at_row), rank(at_rank), lane(int(threadIdx.x) % 32) {
    members = int64_t(row) * m.lists.M;
    center = m.lists.keep[int64_t(row) * m.lists.K + rank];
    own = m.center[int64_t(row) * m.lists.K + rank];
  }

  __device__ __forceinline__ void write(bool whole) {
    float total = own, length = 0;
    bool any = false;
    for_each_member([&](int i) {
      total += weights.plain[members + i];
      if (weights.length) length += weights.length[members + i];
      any = true;
    });
    if (!any) return;
    const float share = total > 0 ? 1 / total : 0.0f;
    if (share > 0 && m.keys == Keys::mean) mix(m.s.k, weights.plain, own, share);
    if (share > 0 && m.keys == Keys::direction) {
      const float square = slot_square<T>(m.s, false, whole, row, center);
      __syncwarp();  // all lanes have read the centre, whose channels are others' to write
      mix(m.s.k, weights.unit, own * inverse_norm(square), share * share * fmaf(own, sqrtf(square), length));
    }
    const bool sum = m.values == Values::sum;
    if (sum || share > 0) mix(m.s.v, weights.plain, sum ? 1.0f : own, sum ? 1.0f : share);
  }

 private:
  // f(place in the list), the same for all lanes of the warp.
  template <class F>
  __device__ __forceinline__ void for_each_member(F&& f) const {
#pragma unroll 1
    for (int base = 0; base < m.lists.M; base += 32) {
      const int64_t at = members + base + lane;
      const bool mine = base + lane < m.lists.M && m.target[at] == rank && m.lists.member[at] >= 0;
#pragma unroll 1
      for (unsigned found = __ballot_sync(~0u, mine); found; found &= found - 1) f(base + __ffs(int(found)) - 1);
    }
  }

  // (factor * centre + sum of weights * members) * scale.
  __device__ __forceinline__ void mix(const Pages& pages, const float* weight, float factor, float scale) const {
    const int b = row / m.s.Hkv, h = row % m.s.Hkv;
    T* place = slot_of<T>(pages, m.s.table, b, h, center);
    if (!place) return;
#pragma unroll 1
    for (int base = 0; base < pages.channels; base += 32 * kLaneChannels) {
      float sum[kLaneChannels] = {};
      add(place, factor, base + lane, pages.channels, sum);
      for_each_member([&](int i) {
        const T* x = slot_of<const T>(pages, m.s.table, b, h, m.lists.member[members + i]);
        if (x) add(x, weight[members + i], base + lane, pages.channels, sum);
      });
#pragma unroll
      for (int e = 0; e < kLaneChannels; ++e) {
        const int c = base + lane + 32 * e;
        if (c < pages.channels) place[c] = from_float<T>(sum[e] * scale);
      }
    }
  }

  __device__ __forceinline__ static void add(const T* x, float weight, int first, int channels,
                                             float (&sum)[kLaneChannels]) {
#pragma unroll
    for (int e = 0; e < kLaneChannels; ++e) {
      const int c = first + 32 * e;
      if (c < channels) sum[e] = fmaf(weight, to_float(x[c]), sum[e]);
    }
  }

  const MergeArgs& m;
  const Weights& weights;
  const int row, rank, lane;
  int64_t members;
  int center;
  float own;
};

// registers: merge_members <= 64
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_members(MergeArgs m, Weights weights, bool whole) {
  const int64_t warp = int64_t(blockIdx.x) * kMergeWarps + int(threadIdx.x) / 32;
  if (warp >= int64_t(m.s.rows()) * m.lists.K) return;
  const int row = int(warp / m.lists.K), rank = int(warp % m.lists.K);
  if (rank < m.lists.keep_count[row]) CenterWarp<T>(m, weights, row, rank).write(whole);
}

}  // namespace tokencomp::kvcache
