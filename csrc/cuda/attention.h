// Queries against keys on CUDA, for every family that multiplies them: logits, biases, and what a launcher asks of the
// operands.
#pragma once

#include "core/attention.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::attention {

constexpr size_t kSmemOfSm80 = 163 << 10;  // what a block may have there

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// scale * product, capped if asked for.
struct Logits {
  float scale, softcap;
  __device__ explicit Logits(const Attention& a) : scale(a.scale), softcap(a.softcap) {}

  // acc becomes what `factor()` turns into logits.
  template <int kCount>
  __device__ __forceinline__ void cap(float (&acc)[kCount]) const {
    if (softcap > 0.0f) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) acc[i] = tanhf(acc[i] * (scale / softcap));
    }
  }
  __device__ float factor() const { return softcap > 0.0f ? softcap : scale; }
};

// The bias of key j; -inf for NaN, 0 without a bias.
__device__ __forceinline__ float bias_of(const Attention& a, int b, int kv, int j) {
  if (!a.key_bias || j >= a.g.S) return 0.0f;
  const float bias = a.key_bias[b * a.bias_stride_b + kv * a.bias_stride_h + j];
  return bias == bias ? bias : -INFINITY;
}

// ---- host side

// Each row of n elements starts on a 16-byte boundary and is a whole number of 16-byte chunks.
inline bool whole_chunks(DType dtype, int n, const void* p, int64_t stride_b, int64_t stride_h, int64_t stride_row) {
  const int64_t bytes = dtype == DType::f32 ? 4 : 2;
  const int64_t bits = int64_t(reinterpret_cast<uintptr_t>(p)) | (stride_b | stride_h | stride_row | n) * bytes;
  return (bits & 15) == 0;
}
inline bool whole_queries(const Attention& a) {
  return whole_chunks(a.dtype, a.g.D, a.q, a.q_stride_b, a.q_stride_h, a.q_stride_t);
}
inline bool whole_keys(const Attention& a) {
  const auto whole = [&](const void* p) {
    const Pages& pages = a.pages;
    return a.table.entry ? whole_chunks(a.dtype, a.g.D, p, pages.page_stride, pages.head_stride, pages.slot_stride)
                         : whole_chunks(a.dtype, a.g.D, p, a.k_stride_b, a.k_stride_h, a.k_stride_s);
  };
  return whole(a.k) && (!a.k_min || whole(a.k_min));
}

inline void watch_page_types(const Attention& a) {
  for (int i = 0; i < a.types.count; ++i) {
    const PagePool& pool = a.types.pool[i];
    gpu::watch(pool.base, size_t(pool.pages * pool.page_bytes), "pools", true);
  }
  const PageMaps& m = a.types.maps;
  const size_t bytes = size_t(a.g.B) * a.g.Hkv * a.g.D * 4;
  for (const float* map : {m.k_scale, m.k_bias, m.v_scale, m.v_bias}) {
    if (map) gpu::watch(map, bytes, "maps", true);
  }
}

inline void watch_attention(const Attention& a) {
  const Geometry& g = a.g;
  const Pages& p = a.pages;
  const PageTable& t = a.table;
  const int64_t bytes = a.dtype == DType::f32 ? 4 : 2;
  const auto span = [&](int64_t items, int64_t heads, int64_t rows, int64_t b, int64_t h, int64_t r) {
    return items && rows ? ((items - 1) * b + (heads - 1) * h + (rows - 1) * r + g.D) * bytes : 0;
  };
  gpu::watch(a.q, span(g.B, g.Hq, g.T, a.q_stride_b, a.q_stride_h, a.q_stride_t), "q", true);
  const int64_t keys = t.entry ? span(a.page_count, g.Hkv, t.page_size(), p.page_stride, p.head_stride, p.slot_stride)
                               : span(g.B, g.Hkv, g.S, a.k_stride_b, a.k_stride_h, a.k_stride_s);
  if (t.places && g.B) {
    gpu::watch(t.entry, ((g.B - 1) * t.stride_b + (g.Hkv - 1) * t.stride_h + t.places) * 4, "block_table", true);
  }
  gpu::watch(a.k, keys, "k", true);
  if (a.k_min) gpu::watch(a.k_min, keys, "k_min", true);
  if (a.key_bias)
    gpu::watch(a.key_bias, (a.bias_stride_b * (g.B - 1) + a.bias_stride_h * (g.Hkv - 1) + g.S) * 4, "key_bias", true);
  watch_page_types(a);
  if (g.q_position) gpu::watch(g.q_position, (g.position_stride * (g.B - 1) + g.T) * 4, "q_position", true);
  if (g.q_starts) gpu::watch(g.q_starts, g.B * 4, "q_starts", true);
  if (g.q_counts) gpu::watch(g.q_counts, g.B * 4, "q_counts", true);
  if (g.lengths) gpu::watch(g.lengths, g.B * g.lengths_b * 4, "lengths", true);
  if (g.starts) gpu::watch(g.starts, g.B * 4, "starts", true);
}

}  // namespace tokencomp::attention
