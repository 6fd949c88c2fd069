// Linear attention with decay on CUDA: one block to 32 value columns of a head, which walks the rows in chunks of 32
// with its part of the state in shared memory. Plain float32 products: no tensor cores.
#pragma once

#include "core/linear.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::linear {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChunk = 32;                  // rows
constexpr int kColumns = 32;                // of v and the state: one to a lane
constexpr int kEach = kChunk / kWarps;      // rows of a chunk, or channels of the state, that a thread has at a time
constexpr size_t kSmemOfSm80 = 163 * 1024;  // of a block

// kD channels, those behind D are zero.
template <int kD>
struct Smem {
  float q[kChunk][kD];
  float k[kChunk][kD + 1];  // a column is read by a warp: neighbouring rows lie in different banks
  float v[kChunk][kColumns];
  float weight[kChunk][kChunk + 1];
  float state[kD][kColumns];
  float decay[kChunk + 1];
};

template <class T, int kD>
__device__ __forceinline__ void read_chunk(const LinearArgs& p, Smem<kD>& s, int b, int h, int first, int m, int e0) {
  const Attention& a = p.a;
  const int kv = h / (a.g.Hq / a.g.Hkv);
  const T* q = static_cast<const T*>(a.q) + b * a.q_stride_b + h * a.q_stride_h;
  const T* k = static_cast<const T*>(a.k) + b * a.k_stride_b + kv * a.k_stride_h;
  const T* v = static_cast<const T*>(p.v) + b * p.v_stride_b + kv * p.v_stride_h;
  for (int at = int(threadIdx.x); at < kChunk * kD; at += kThreads) {
    const int i = at / kD, d = at % kD;
    const bool there = i < m && d < a.g.D;
    s.q[i][d] = there ? to_float(q[(first + i) * a.q_stride_t + d]) : 0.0f;
    s.k[i][d] = there ? to_float(k[(first + i) * a.k_stride_s + d]) : 0.0f;
  }
  for (int at = int(threadIdx.x); at < kChunk * kColumns; at += kThreads) {
    const int i = at / kColumns, e = at % kColumns;
    s.v[i][e] = i < m && e0 + e < p.Dv ? to_float(v[(first + i) * p.v_stride_s + e0 + e]) : 0.0f;
  }
}

// Weights of the chunk's values in its rows: one column to a lane, rows warp, warp + kWarps, ...
template <int kD>
__device__ __forceinline__ void weigh(Smem<kD>& s, int warp, int lane) {
  float sum[kEach] = {};
#pragma unroll 4
  for (int d = 0; d < kD; ++d) {
    const float key = s.k[lane][d];
#pragma unroll
    for (int r = 0; r < kEach; ++r) sum[r] = fmaf(s.q[warp + r * kWarps][d], key, sum[r]);
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int i = warp + r * kWarps;
    s.weight[i][lane] = lane <= i ? sum[r] * s.decay[i - lane] : 0.0f;
  }
}

// out[r]: row warp + r kWarps, column lane.
template <int kD>
__device__ __forceinline__ void attend(const Smem<kD>& s, int m, int warp, int lane, float (&out)[kEach]) {
#pragma unroll
  for (int r = 0; r < kEach; ++r) out[r] = 0.0f;
#pragma unroll 4
  for (int d = 0; d < kD; ++d) {
    const float held = s.state[d][lane];
#pragma unroll
    for (int r = 0; r < kEach; ++r) out[r] = fmaf(s.q[warp + r * kWarps][d], held, out[r]);
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) out[r] *= s.decay[warp + r * kWarps + 1];
  for (int j = 0; j < m; ++j) {
    const float value = s.v[j][lane];
#pragma unroll
    for (int r = 0; r < kEach; ++r) out[r] = fmaf(s.weight[warp + r * kWarps][j], value, out[r]);
  }
}

template <int kD>
__device__ __forceinline__ void update_state(Smem<kD>& s, int m, int warp, int lane) {
  for (int d0 = warp; d0 < kD; d0 += kWarps * kEach) {
    float sum[kEach] = {};
    for (int j = 0; j < m; ++j) {
      const float value = s.decay[m - 1 - j] * s.v[j][lane];
#pragma unroll
      for (int r = 0; r < kEach; ++r) sum[r] = fmaf(s.k[j][d0 + r * kWarps], value, sum[r]);
    }
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      float& held = s.state[d0 + r * kWarps][lane];
      held = fmaf(s.decay[m], held, sum[r]);
    }
  }
}

// registers: linear_attend <= 96
template <class T, int kD>
__global__ void __launch_bounds__(kThreads) linear_attend(LinearArgs p, int parts) {
  Smem<kD>& s = gpu::dynamic_smem<Smem<kD>>();
  const Geometry& g = p.a.g;
  const int unit = int(blockIdx.x) / parts, e0 = int(blockIdx.x) % parts * kColumns, b = unit / g.Hq, h = unit % g.Hq;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, tokens = tokens_of(p, b);
  const bool mine = e0 + lane < p.Dv;
  const int64_t own = int64_t(unit) * g.D * p.Dv + e0 + lane;
  if (threadIdx.x <= kChunk) s.decay[threadIdx.x] = expf(-p.slope[h] * float(threadIdx.x));
  for (int d = warp; d < kD; d += kWarps) {
    s.state[d][lane] = p.state_in && mine && d < g.D ? p.state_in[own + int64_t(d) * p.Dv] : 0.0f;
  }
  T* out = static_cast<T*>(p.out) + int64_t(unit) * g.T * p.Dv + e0 + lane;
  for (int first = 0; first < tokens; first += kChunk) {
    const int m = tokens - first < kChunk ? tokens - first : kChunk;
    read_chunk<T, kD>(p, s, b, h, first, m, e0);
    __syncthreads();
    weigh(s, warp, lane);
    __syncthreads();
    float result[kEach];
    attend(s, m, warp, lane, result);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const int i = warp + r * kWarps;
      if (mine && i < m) out[int64_t(first + i) * p.Dv] = from_float<T>(p.a.scale * result[r]);
    }
    __syncthreads();  // all have read the state
    update_state(s, m, warp, lane);
    __syncthreads();  // and the chunk
  }
  for (int t = tokens + warp; t < g.T; t += kWarps) {
    if (mine) out[int64_t(t) * p.Dv] = from_float<T>(0.0f);
  }
  for (int d = warp; d < g.D; d += kWarps) {
    if (mine) p.state_out[own + int64_t(d) * p.Dv] = s.state[d][lane];
  }
}

}  // namespace tokencomp::linear
