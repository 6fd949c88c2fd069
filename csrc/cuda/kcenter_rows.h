// k-center on CUDA: rows of tokens and their products. Lane l of a warp takes the 16-byte chunks l, l + 32, ... of a
// row and adds its products in order; one butterfly adds the lanes. The order depends on C alone, so a product has the
// same bits whichever warp, block or team computes it, and is symmetric in its two rows. O(C / 32) steps per product,
// four tokens at a time against one centre.
#pragma once

#include "core/dtype.h"
#include "core/kcenter.h"
#include "core/kcenter_plan.h"
#include "cuda/rows.h"

namespace tokencomp::kcenter {

// Butterfly over four sums at once: the first two steps also halve the number of sums a lane holds, so that six
// shuffles do the work of twenty. Lanes 8t..8t+7 return the total of sum[t]; every total is added in the same tree.
__device__ __forceinline__ float butterfly4(const float (&sum)[4], int lane) {
  const bool upper = lane & 16, odd = lane & 8;
  const float first = (upper ? sum[2] : sum[0]) + __shfl_xor_sync(~0u, upper ? sum[0] : sum[2], 16);
  const float second = (upper ? sum[3] : sum[1]) + __shfl_xor_sync(~0u, upper ? sum[1] : sum[3], 16);
  float total = (odd ? second : first) + __shfl_xor_sync(~0u, odd ? first : second, 8);
  total += __shfl_xor_sync(~0u, total, 4);
  total += __shfl_xor_sync(~0u, total, 2);
  total += __shfl_xor_sync(~0u, total, 1);
  return total;
}

// Products of `centre` with four rows, by one warp: lanes 8t..8t+7 return the product with rows[t].
template <class T, bool kWhole, bool kL2>
__device__ __forceinline__ float products4(const T* centre, const T* const (&rows)[4], int C, int lane) {
  static_assert(CudaTiles::tokens == 4);
  float sum[4] = {};
  const int chunks = chunks_of(C, kVec<T>);
#pragma unroll(kWhole ? 2 : 1)
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    const uint4 raw_centre = load_chunk<T, kWhole>(centre, chunk, C);
    uint4 raw[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) raw[t] = load_chunk<T, kWhole>(rows[t], chunk, C);
    float a[kVec<T>];
    unpack<T>(raw_centre, a);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      float b[kVec<T>];
      unpack<T>(raw[t], b);
      sum[t] = accumulate<kVec<T>, kL2>(sum[t], a, b);
    }
  }
  return butterfly4(sum, lane);
}

// Product of row i with a vector of floats that is padded with zeros to whole chunks, by one warp; every lane returns
// it.
template <class T>
__device__ __forceinline__ float product_with_floats(const Rows<T>& x, int i, const float* other, bool l2, int lane) {
  const int chunks = chunks_of(x.C, kVec<T>);
  const T* row = x[i];
  float sum = 0.0f;
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    float a[kVec<T>], b[kVec<T>];
    unpack<T>(load_chunk(x, row, chunk), a);
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) b[e] = other[chunk * kVec<T> + e];
    sum = l2 ? accumulate<kVec<T>, true>(sum, a, b) : accumulate<kVec<T>, false>(sum, a, b);
  }
  return gpu::warp_sum(sum);
}

}  // namespace tokencomp::kcenter
