// Rows of tokens in global memory, 16 bytes at a time, and their square sums. Shared by every family that multiplies
// rows.
#pragma once

#include "core/dtype.h"
#include "cuda/arch/gpu.h"
#include "cuda/arch/reduce.h"

namespace tokencomp {

template <class T>
constexpr int kVec = 16 / int(sizeof(T));  // elements of a chunk

TC_HD int chunks_of(int C, int vec) { return (C + vec - 1) / vec; }

// Rows anywhere in memory. `whole` promises that each row starts on a 16-byte boundary and that its last chunk may be
// read in full (and is zero past C).
template <class T>
struct Rows {
  const T* base;
  int64_t stride;  // elements
  int C;
  bool whole;
  __device__ const T* operator[](int i) const { return base + i * stride; }
};

template <class T, bool kWhole>
__device__ __forceinline__ uint4 load_chunk(const T* row, int chunk, int C) {
  if constexpr (kWhole) {
    return reinterpret_cast<const uint4*>(row)[chunk];
  } else {
    T element[kVec<T>];
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) {
      const int c = chunk * kVec<T> + e;
      element[e] = c < C ? row[c] : from_float<T>(0.0f);
    }
    uint4 raw;
    memcpy(&raw, element, 16);
    return raw;
  }
}

template <class T>
__device__ __forceinline__ uint4 load_chunk(const Rows<T>& x, const T* row, int chunk) {
  return x.whole ? load_chunk<T, true>(row, chunk, x.C) : load_chunk<T, false>(row, chunk, x.C);
}

// From words, not by memcpy of the whole: the compiler may turn a copy out of shared memory into sixteen byte loads.
template <class T>
__device__ __forceinline__ void unpack(uint4 raw, float (&out)[kVec<T>]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int e = 0; e < kVec<T>; ++e) {
    T element;
    if constexpr (sizeof(T) == 4) {
      memcpy(&element, &word[e], 4);
    } else {
      const uint16_t half = uint16_t(word[e / 2] >> (e % 2 * 16));
      memcpy(&element, &half, 2);
    }
    out[e] = to_float(element);
  }
}

template <int kCount, bool kL2>
__device__ __forceinline__ float accumulate(float sum, const float (&a)[kCount], const float (&b)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const float difference = a[e] - b[e];
    sum = kL2 ? fmaf(difference, difference, sum) : fmaf(a[e], b[e], sum);
  }
  return sum;
}

// |row|^2, by one warp; every lane returns it.
template <class T>
__device__ __forceinline__ float square_sum(const Rows<T>& x, int i, int lane) {
  const int chunks = chunks_of(x.C, kVec<T>);
  const T* row = x[i];
  float sum = 0.0f;
#pragma unroll 4
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    float a[kVec<T>];
    unpack<T>(load_chunk(x, row, chunk), a);
    sum = accumulate<kVec<T>, false>(sum, a, a);
  }
  return gpu::warp_sum(sum);
}

}  // namespace tokencomp
