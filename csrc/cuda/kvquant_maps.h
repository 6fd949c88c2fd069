// What surrounds quantization on CUDA: other layouts of codes, the Hadamard transform, statistics of channels.
#pragma once

#include "cuda/kvquant_kernels.h"

namespace tokencomp::kvquant {

// ---- layouts: one block for 16 tokens

struct RepackSmem {
  uint16_t elements[kTile * kMaxHeadDim];
  uint8_t codes[kTile * kMaxHeadDim];
};

// Where element (t, d) of 16 bits lies in a block.
__device__ __forceinline__ int element_byte(Layout layout, int D, int t, int d) {
  const int byte = bitpack::place(layout, 16, D, t, d).byte;
  return layout == Layout::linear ? byte + 2 * t * D : byte;
}

template <int kD>
__device__ __forceinline__ void repack_elements(const RepackArgs& r, const uint8_t* in, uint8_t* out,
                                                uint16_t* elements) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kTile * kD; i += kThreads) {
    const uint8_t* p = in + element_byte(r.from, kD, i / kD, i % kD);
    elements[i] = uint16_t(p[0] | p[1] << 8);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kTile * kD; i += kThreads) {
    uint8_t* p = out + element_byte(r.to, kD, i / kD, i % kD);
    p[0] = uint8_t(elements[i]), p[1] = uint8_t(elements[i] >> 8);
  }
}

// registers: kv_repack_blocks <= 64
template <int kD>
__global__ void __launch_bounds__(kThreads, 4) kv_repack_blocks(RepackArgs r) {
  RepackSmem& smem = gpu::dynamic_smem<RepackSmem>();
  const int bytes = kTile * kD * r.bits / 8;
  const uint8_t* in = r.in + int64_t(blockIdx.x) * bytes;
  uint8_t* out = r.out + int64_t(blockIdx.x) * bytes;
  if (r.bits == 16) return repack_elements<kD>(r, in, out, smem.elements);
  Format f;
  f.bits = r.bits, f.layout = r.from;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kTile * kD; i += kThreads) {
    const int t = i / kD, d = i % kD;
    smem.codes[i] = uint8_t(r.from == Layout::linear ? read_code<0>(f, kD, in, t, d) : read_code<kD>(f, kD, in, t, d));
  }
  __syncthreads();
  if (r.to == Layout::linear) return pack_rows(r.bits, kD, kTile, smem.codes, out);
  pack_fragments<kD>(r.bits, r.to, smem.codes, out);
}

// registers: kv_repack_copy <= 24
__global__ void __launch_bounds__(kThreads) kv_repack_copy(RepackArgs r, int64_t bytes) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < bytes) r.out[i] = r.in[i];
}

// ---- Hadamard: a warp a row, channel d in lane d % 32. Strides ascend, as on the CPU: the same bits.

// registers: hadamard_rows <= 48
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) hadamard_rows(HadamardArgs a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.rows()) return;
  const T* x = static_cast<const T*>(a.x) + a.row_offset(row);
  T* out = static_cast<T*>(a.out) + row * a.D;
  float v[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int d = lane + 32 * i;
    v[i] = d < a.D ? to_float(x[d]) : 0.0f;
    if (a.signs && !a.inverse && d < a.D) v[i] = v[i] * a.signs[d];
  }
#pragma unroll 1
  for (int stride = 1; stride < 32 && stride < a.D; stride *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float other = __shfl_xor_sync(~0u, v[i], stride);
      v[i] = lane & stride ? other - v[i] : v[i] + other;
    }
  }
#pragma unroll
  for (int stride = 1; stride < kCount; stride *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i & stride) continue;
      const float p = v[i], q = v[i + stride];
      v[i] = p + q, v[i + stride] = p - q;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int d = lane + 32 * i;
    if (d >= a.D) continue;
    float y = v[i] * a.norm;
    if (a.signs && a.inverse) y = y * a.signs[d];
    out[d] = from_float<T>(y);
  }
}

// ---- statistics: a block for a part of a sequence, its threads over channels and, where D is small, over tokens

struct StatSmem {
  float low[kThreads], high[kThreads], total[kThreads];
};

// NaN where either is.
__device__ __forceinline__ float larger(float v, float best) { return v == v ? (v > best ? v : best) : v; }
__device__ __forceinline__ float smaller(float v, float best) { return v == v ? (best > v ? v : best) : v; }

// registers: channel_stat_parts <= 48
template <class T>
__global__ void __launch_bounds__(kThreads) channel_stat_parts(StatsArgs a) {
  StatSmem& smem = gpu::dynamic_smem<StatSmem>();
  const int64_t sequence = blockIdx.x / unsigned(a.parts());
  const int part = int(blockIdx.x % unsigned(a.parts())), b = int(sequence / a.H), from = part * kStatTokens;
  const int begin = from > a.begin(b) ? from : a.begin(b);
  const int end = from + kStatTokens < a.end(b) ? from + kStatTokens : a.end(b);
  const int tid = int(threadIdx.x), width = kThreads / a.D, lane = tid / a.D, d = tid - lane * a.D;
  const T* x = static_cast<const T*>(a.x) + b * a.stride_b + sequence % a.H * a.stride_h + d;
  float low = kInfinity, high = -kInfinity, total = 0;
#pragma unroll 1
  for (int first = begin + lane; first < end && lane < width; first += kStatRun * width) {
    float few = 0;
#pragma unroll 4
    for (int t = first; t < first + kStatRun * width && t < end; t += width) {
      const float v = to_float(x[t * a.stride_s]);
      low = smaller(v, low), high = larger(v, high), few += v;
    }
    total += few;
  }
  smem.low[tid] = low, smem.high[tid] = high, smem.total[tid] = total;
  __syncthreads();
  if (tid >= a.D) return;
  for (int i = 1; i < width; ++i) {
    const int other = i * a.D + tid;
    low = smaller(smem.low[other], low), high = larger(smem.high[other], high), total += smem.total[other];
  }
  float* out = a.partial + int64_t(blockIdx.x) * 3 * a.D + tid;
  out[0] = low, out[a.D] = high, out[2 * a.D] = total;
}

// One thread a channel: its parts in order.
// registers: channel_stat_sequences <= 48
__global__ void __launch_bounds__(kThreads) channel_stat_sequences(StatsArgs a) {
  const int64_t plane = int64_t(a.B) * a.H * a.D, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= plane) return;
  const int64_t sequence = i / a.D;
  const int b = int(sequence / a.H), count = a.end(b) - a.begin(b);
  const float* in = a.partial + sequence * a.parts() * 3 * a.D + i % a.D;
  float low = kInfinity, high = -kInfinity;
  double total = 0;
#pragma unroll 1
  for (int part = 0; part < a.parts(); ++part, in += 3 * a.D) {
    low = smaller(in[0], low), high = larger(in[a.D], high);
    total += in[2 * a.D];
  }
  const bool any = count > 0;
  const float size = low < 0 ? -low : low;
  a.out[i] = any ? larger(size, high) : 0.0f;
  a.out[plane + i] = any ? low : 0.0f;
  a.out[2 * plane + i] = any ? high : 0.0f;
  a.out[3 * plane + i] = any ? float(total / count) : 0.0f;
}

}  // namespace tokencomp::kvquant
