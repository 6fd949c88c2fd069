// Merging on CUDA. merge_groups sorts each item's tokens by output row (a counting sort, one block to an item);
// merge_rows then writes each output row with one warp: one read and one write of the tokens, 16 bytes at a time, no
// atomics on floats. A lone token is copied.
#pragma once

#include "core/merge.h"
#include "core/order.h"
#include "cuda/rows.h"

namespace tokencomp::merge {

constexpr int kGroupThreads = 256, kGroupWarps = kGroupThreads / 32;
constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;
constexpr int kUnroll = 4;  // chunks of a row that a lane has in flight

// Tokens by output row: those of row g are token[first[g]] up to token[first[g + 1]], ascending.
struct Groups {
  int* first;   // [B, M + 1]
  int* token;   // [B, N]
  int* cursor;  // [B, M] where M counters do not fit into shared memory, else null
};

struct GroupSmem {
  int warp_count[kGroupWarps];
  int cursor[1];  // [M], or not there
};

// Each entry of `count` becomes the sum of those before it, which also goes to `first`; all threads call.
__device__ __forceinline__ void exclusive_sums(int* count, int* first, int M, int* warp_count) {
  const int tid = int(threadIdx.x), warp = tid / 32, lane = tid % 32;
  int base = 0;
  for (int begin = 0; begin <= M; begin += kGroupThreads) {
    const int g = begin + tid, own = g < M ? count[g] : 0;
    int sum = own;  // of the lanes up to this one
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, sum, unsigned(distance));
      sum += lane >= distance ? other : 0;
    }
    if (lane == 31) warp_count[warp] = sum;
    __syncthreads();
    int before = base, total = 0;
    for (int w = 0; w < kGroupWarps; ++w) {
      before += w < warp ? warp_count[w] : 0;
      total += warp_count[w];
    }
    if (g <= M) first[g] = before + sum - own;
    if (g < M) count[g] = before + sum - own;
    base += total;
    __syncthreads();  // the counts of the warps are read
  }
}

// registers: merge_groups <= 40
__global__ void __launch_bounds__(kGroupThreads) merge_groups(MergeArgs m, Groups groups) {
  auto& smem = gpu::dynamic_smem<GroupSmem>();
  const int b = int(blockIdx.x), tid = int(threadIdx.x);
  int* cursor = groups.cursor ? groups.cursor + int64_t(b) * m.M : smem.cursor;
  for (int g = tid; g < m.M; g += kGroupThreads) cursor[g] = 0;
  __syncthreads();
  for (int i = tid; i < m.N; i += kGroupThreads) {
    if (const int g = m.group(b, i); g >= 0) atomicAdd(cursor + g, 1);
  }
  __syncthreads();
  exclusive_sums(cursor, groups.first + int64_t(b) * (m.M + 1), m.M, smem.warp_count);
  __syncthreads();
  // One warp places the tokens, 32 at a time: their order within a row is the order of the tokens.
  if (tid >= 32) return;
  int* token = groups.token + int64_t(b) * m.N;
  for (int first = 0; first < m.N; first += 32) {
    const int i = first + tid, g = i < m.N ? m.group(b, i) : -1;
    const unsigned same = __match_any_sync(~0u, g);
    const int rank = __popc(same & ((1u << tid) - 1)), begin = g >= 0 ? cursor[g] : 0;
    if (g >= 0) token[begin + rank] = i;
    __syncwarp();  // all have read the cursors
    if (g >= 0 && rank == 0) cursor[g] = begin + __popc(same);
    __syncwarp();
  }
}

// Eight or four floats to 16 bytes of T.
template <class T>
__device__ __forceinline__ uint4 pack(const float (&v)[kVec<T>]) {
  uint32_t word[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      memcpy(&word[w], &v[w], 4);
    } else {
      const T low = from_float<T>(v[2 * w]), high = from_float<T>(v[2 * w + 1]);
      uint16_t bits[2];
      memcpy(&bits[0], &low, 2);
      memcpy(&bits[1], &high, 2);
      word[w] = uint32_t(bits[0]) | uint32_t(bits[1]) << 16;
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Larger of the two, NaN where either is.
__device__ __forceinline__ float larger(float v, float best) { return v != v || v > best ? v : best; }

// One output row, by one warp.
template <class T, bool kWhole>
class OutputRow {
 public:
  __device__ __forceinline__ OutputRow(const MergeArgs& args, const Groups& groups, int item, int row)
      : m(args), b(item), lane(int(threadIdx.x) % 32) {
    const int* first = groups.first + int64_t(b) * (m.M + 1) + row;
    token = groups.token + int64_t(b) * m.N + first[0];
    n = first[1] - first[0];
    at = int64_t(b) * m.M + row;
    x = {static_cast<const T*>(m.x) + b * m.x_stride_b, m.x_stride_n, m.C, kWhole};
    y = static_cast<T*>(m.y) + at * m.C;
  }

  __device__ __forceinline__ void write() {
    if (m.mode == Mode::drop) return keep_head();
    float size = 0, total = 0;
    for (int k = lane; k < n; k += 32) {
      size += m.size_of(b, token[k]);
      total += coefficient(token[k]);
    }
    size = gpu::warp_sum(size);
    total = gpu::warp_sum(total);
    if (lane == 0) m.out_size[at] = size;
    const float divisor = m.mode == Mode::sum ? 1.0f : total;
    if (n == 0 || (m.mode != Mode::amax && divisor == 0)) return fill_zero();
    if (n == 1 && m.keeps_lone(b, token[0])) return copy(token[0]);
    if (m.mode == Mode::amax) return reduce<true>(1.0f, 1.0f);
    reduce<false>(divisor, m.mode == Mode::mlerp ? stretch(divisor) : 1.0f);
  }

 private:
  __device__ __forceinline__ float coefficient(int i) const { return m.coefficient(b, i); }
  __device__ __forceinline__ int chunks() const { return chunks_of(m.C, kVec<T>); }

  __device__ __forceinline__ void store(int chunk, uint4 raw) {
    if constexpr (kWhole) {
      reinterpret_cast<uint4*>(y)[chunk] = raw;
    } else {
      T element[kVec<T>];
      memcpy(element, &raw, 16);
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) {
        if (chunk * kVec<T> + e < m.C) y[chunk * kVec<T> + e] = element[e];
      }
    }
  }
  __device__ __forceinline__ uint4 load(int i, int chunk) const { return load_chunk<T, kWhole>(x[i], chunk, m.C); }

  __device__ __forceinline__ void fill_zero() {
    for (int chunk = lane; chunk < chunks(); chunk += 32) store(chunk, make_uint4(0, 0, 0, 0));
  }

  __device__ __forceinline__ void copy(int i) {
    constexpr int kFlight = kWhole ? kUnroll : 1;  // of single elements there are enough
#pragma unroll 1
    for (int base = lane; base < chunks(); base += 32 * kFlight) {
      uint4 raw[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (base + 32 * u < chunks()) raw[u] = load(i, base + 32 * u);
      }
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (base + 32 * u < chunks()) store(base + 32 * u, raw[u]);
      }
    }
  }

  // One chunk of the mean, or of the maximum, over the group; the same bits wherever it is needed.
  template <bool kMaximum>
  __device__ __forceinline__ void gather(int chunk, float divisor, float (&out)[kVec<T>]) const {
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) out[e] = kMaximum ? -INFINITY : 0.0f;
#pragma unroll 2
    for (int k = 0; k < n; ++k) {
      float v[kVec<T>];
      unpack<T>(load(token[k], chunk), v);
      const float factor = kMaximum ? 1.0f : coefficient(token[k]);
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) out[e] = kMaximum ? larger(v[e], out[e]) : fmaf(factor, v[e], out[e]);
    }
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) out[e] = kMaximum ? out[e] : out[e] / divisor;
  }

  template <bool kMaximum>
  __device__ __forceinline__ void reduce(float divisor, float scale) {
#pragma unroll 1
    for (int chunk = lane; chunk < chunks(); chunk += 32) {
      float v[kVec<T>];
      gather<kMaximum>(chunk, divisor, v);
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) v[e] *= scale;
      store(chunk, pack<T>(v));
    }
  }

  // What stretches the mean to the largest norm of the group; 0 for a mean of length 0.
  __device__ __forceinline__ float stretch(float divisor) const {
    float length = 0, largest = 0;
    for (int chunk = lane; chunk < chunks(); chunk += 32) {
      float v[kVec<T>];
      gather<false>(chunk, divisor, v);
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) length = fmaf(v[e], v[e], length);
    }
    length = gpu::warp_sum(length);
    for (int k = 0; k < n; ++k) largest = larger(square_sum(x, token[k], lane), largest);
    return length == 0 ? 0.0f : sqrtf(largest) / sqrtf(length);
  }

  __device__ __forceinline__ void keep_head() {
    OrderKey best = kNobody;
    for (int k = lane; k < n; k += 32) {
      const OrderKey key = order_key(m.weight_of(b, token[k]), token[k]);
      best = key > best ? key : best;
    }
    best = gpu::warp_max_u64(best);
    if (lane == 0) m.out_size[at] = n > 0 ? m.size_of(b, index_of(best)) : 0.0f;
    if (n == 0) return fill_zero();
    copy(index_of(best));
  }

  const MergeArgs& m;
  const int b, lane;
  const int* token;
  int n;
  int64_t at;
  Rows<T> x;
  T* y;
};

// registers: merge_rows <= 104
template <class T, bool kWhole>
__global__ void __launch_bounds__(kRowThreads, kWhole ? 4 : 2) merge_rows(MergeArgs m, Groups groups) {
  const int row = int(blockIdx.x) * kRowWarps + int(threadIdx.x) / 32, b = int(blockIdx.y);
  if (row < m.M) OutputRow<T, kWhole>(m, groups, b, row).write();
}

}  // namespace tokencomp::merge
