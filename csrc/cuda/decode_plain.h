// Decode attention on CUDA in float32, which tensor cores have no product for: a warp takes one key at a time, its
// lanes the channels lane, lane + 32, ...; and the merge of partial states.
#pragma once

#include "cuda/decode_parts.h"

namespace tokencomp::decode {

constexpr int kPlainRows = 4;

template <int kD>
struct PlainSmem {
  float q[kPlainRows][kD];
  Found<kPlainRows, kD> found;
  uint32_t last;
};

// Element (t, d) of a page's keys or values, dequantized; `map` is that of the page's channels.
__device__ __forceinline__ float quantized_element(const PageHalf& h, const uint8_t* page, int D, int t, int d,
                                                   const float* scale, const float* bias) {
  const kvquant::Format& f = h.format;
  const int unit = bitpack::unit_bytes(f.layout, f.bits, D), block = t / bitpack::kBlock;
  const int code = bitpack::code_at(f.layout, f.bits, D, page + h.codes + block * unit, t % bitpack::kBlock, d);
  const bool by_channel = f.axis == page_blob::Axis::channel;
  const int grid = by_channel ? t / f.group * D + d : t * (D / f.group) + d / f.group;
  const f16* param = reinterpret_cast<const f16*>(page + h.params) + 2 * grid;
  const float number = f.kind == kvquant::Kind::fp8 ? bitpack::fp8_to_float(uint8_t(code)) : float(code);
  const float y = fmaf(to_float(param[0]), number, to_float(param[1]));
  return (scale ? y / *scale : y) + (bias ? *bias : 0.0f);
}

// kTypes: pages of several types.
template <int kD, bool kTypes>
class PlainWarp {
  static constexpr int kSlices = kD / 32;

 public:
  __device__ PlainWarp(const DecodeArgs& args, const Unit& unit, PlainSmem<kD>& smem)
      : a(args), u(unit), s(smem), warp(int(threadIdx.x) / 32), lane(int(threadIdx.x) % 32) {
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      top[r] = -INFINITY, total[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) out[r][i] = 0.0f;
    }
  }

  __device__ __forceinline__ void run() {
    const int floor = floor_of(a, u.b, u.kv, 0, u.length);
#pragma unroll 1
    for (int key = u.first + warp * 32; key < u.end; key += kThreads) {
      const KeySource own = locate<kTypes>(a, u, candidate(a, u, key + lane), floor);
      const int n = min(32, u.end - key);
#pragma unroll 1
      for (int j = 0; j < n; ++j) {
        const KeySource one{__shfl_sync(~0u, own.slot, j), __shfl_sync(~0u, own.page, j),
                            __shfl_sync(~0u, own.side, j)};
        if (one.page >= 0) fold(one);  // the same for all lanes
      }
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      if (lane == 0) s.found.top[warp][r] = top[r], s.found.total[warp][r] = total[r];
#pragma unroll
      for (int i = 0; i < kSlices; ++i) s.found.values[warp][r][lane + 32 * i] = out[r][i];
    }
  }

 private:
  __device__ __forceinline__ void fold(const KeySource& one) {
    const int in_page = a.table.slot_in_page(one.slot);
    float key[kSlices], value[kSlices];
    if (kTypes && page_type(one.page)) {
      read_quantized(one.page, in_page, key, value);
    } else {
      const float* k = static_cast<const float*>(a.k.base) + a.k.offset(one.page, u.kv, in_page);
      const float* v = static_cast<const float*>(a.v.base) + a.v.offset(one.page, u.kv, in_page);
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        const int c = lane + 32 * i;
        key[i] = c < a.D ? k[c] : 0.0f;
        value[i] = c < a.Dv ? v[c] : 0.0f;
      }
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      float z = 0.0f;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) z = fmaf(s.q[r][lane + 32 * i], key[i], z);
      z = finish_logit(gpu::warp_sum(z), one, r);
      if (!(z > -INFINITY)) continue;
      if (z > top[r]) {
        const float factor = weight_of(top[r], z);
        top[r] = z;
        total[r] *= factor;
#pragma unroll
        for (int i = 0; i < kSlices; ++i) out[r][i] *= factor;
      }
      const float p = gpu::exp2_approx((z - top[r]) * kLog2e);
      total[r] += p;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) out[r][i] = fmaf(p, value[i], out[r][i]);
    }
  }

  __device__ __forceinline__ void read_quantized(int32_t entry, int t, float (&key)[kSlices],
                                                 float (&value)[kSlices]) const {
    const PagePool& pool = a.types.pool_of(page_type(entry));
    const PageMaps& maps = a.types.maps;
    const uint8_t* page = a.types.page(entry);
    const int64_t row = (int64_t(u.b) * a.Hkv + u.kv) * a.D;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) key[i] = value[i] = 0.0f;
    // Once in the code, not once a slice; `key[i]` would then be in memory, so that all are chosen from instead.
#pragma unroll 1
    for (int i = 0; i < kSlices && lane + 32 * i < a.D; ++i) {
      const int c = lane + 32 * i;
      const auto at = [&](const float* map) { return map ? map + row + c : nullptr; };
      const float k = quantized_element(pool.k, page, a.D, t, c, at(maps.k_scale), at(maps.k_bias));
      const float v = quantized_element(pool.v, page, a.D, t, c, at(maps.v_scale), at(maps.v_bias));
#pragma unroll
      for (int n = 0; n < kSlices; ++n) key[n] = n == i ? k : key[n], value[n] = n == i ? v : value[n];
    }
  }

  // Scale, cap, bias; -inf where the row does not see the key, and for NaN.
  __device__ __forceinline__ float finish_logit(float product, const KeySource& one, int own) const {
    const int r = Unit::block() * kPlainRows + own, t = r % a.T;
    float z = product * a.scale;
    if (a.softcap > 0.0f) z = a.softcap * tanhf(product * (a.scale / a.softcap));
    z = fmaxf(z + one.side, -INFINITY);
    if (r >= a.rows() || one.slot >= end_of(a, t, u.length)) return -INFINITY;
    if (a.window && !(position_of(a, u.b, u.kv, one.slot) > floor_of(a, u.b, u.kv, t, u.length))) return -INFINITY;
    if (a.logits && lane == 0 && z > -INFINITY) a.logits[row_of(a, u, r) * a.capacity + one.slot] = z;
    return z;
  }

  const DecodeArgs& a;
  const Unit& u;
  PlainSmem<kD>& s;
  const int warp, lane;
  float top[kPlainRows], total[kPlainRows], out[kPlainRows][kSlices];
};

// registers: decode_plain <= 128
template <int kD, bool kTypes>
__global__ void __launch_bounds__(kThreads, 4) decode_plain(DecodeArgs a, Workspace w) {
  auto& s = gpu::dynamic_smem<PlainSmem<kD>>();
  const Unit u(a, w);
  for (int i = int(threadIdx.x); i < kPlainRows * kD; i += kThreads) {
    const int own = i / kD, c = i % kD, r = Unit::block() * kPlainRows + own, head = u.kv * a.group() + r / a.T;
    const int64_t at = u.b * a.q_stride_b + head * a.q_stride_h + r % a.T * a.q_stride_t + c;
    s.q[own][c] = r < a.rows() && c < a.D ? static_cast<const float*>(a.q)[at] : 0.0f;
  }
  __syncthreads();
  PlainWarp<kD, kTypes>(a, u, s).run();
  __syncthreads();
  Finish<float, kPlainRows, kD>{a, w, u, s.found}.run(s.last);
}

// -inf for every slot; what is seen is written by the kernel that follows.
// registers: decode_hide <= 32
__global__ void __launch_bounds__(kThreads) decode_hide(float* logits, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    logits[i] = -INFINITY;
  }
}

// A warp takes a row.
// registers: decode_merge <= 64
template <class T>
__global__ void __launch_bounds__(kThreads) decode_merge(MergeArgs m) {
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  if (r >= m.rows) return;
  float top = -INFINITY, total = 0.0f;
  for (int i = 0; i < m.states; ++i) top = fmaxf(top, m.lse[i * m.rows + r]);
  for (int i = 0; i < m.states; ++i) total += weight_of(m.lse[i * m.rows + r], top);
  for (int c = lane; c < m.D; c += 32) {
    float x = 0.0f;
    for (int i = 0; i < m.states; ++i) {
      const float weight = weight_of(m.lse[i * m.rows + r], top);
      if (weight > 0.0f)
        x = fmaf(to_float(static_cast<const T*>(m.out)[(i * m.rows + r) * m.D + c]), weight / total, x);
    }
    static_cast<T*>(m.merged)[r * m.D + c] = from_float<T>(x);
  }
  if (lane == 0) m.merged_lse[r] = total > 0.0f ? top + logf(total) : -INFINITY;
}

}  // namespace tokencomp::decode
