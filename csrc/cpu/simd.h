// One width-agnostic vector of floats for the CPU kernels, and the only place with x86 intrinsics. A
// kernel file is compiled once per instruction-set level into its own namespace `tokencomp::cpu::TOKENCOMP_ISA`;
// everything here is always inlined, so that no function compiled with wide flags can leak into another level.
//
//   Vec            kWidth floats
//   load(p)        kWidth elements of float, bf16 or f16, widened; load_some(p, n) reads only n of them, rest 0
//   lanes_...      a bit for each lane
//   Pack<T>        what one product step eats: kPack<T> elements, in whatever form the level multiplies fastest
#pragma once

#include <cstdint>

#include "core/dtype.h"

#if defined(TOKENCOMP_AVX512) || defined(TOKENCOMP_AVX2)
#include <immintrin.h>
#endif

#define TC_INLINE static inline __attribute__((always_inline))
#define TC_INLINE_MEMBER inline __attribute__((always_inline))

namespace tokencomp::cpu::TOKENCOMP_ISA {

#if defined(TOKENCOMP_AVX512)

constexpr int kWidth = 16;
constexpr int kTileRows = 4, kTileCols = 4;  // 16 accumulators + 5 operands of 32 registers

struct Vec {
  __m512 v;
};

TC_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
TC_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
TC_INLINE __m512 widen(__m256i halves, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
TC_INLINE __m512 widen(__m256i halves, f16) { return _mm512_cvtph_ps(halves); }
template <class T>
TC_INLINE Vec load(const T* p) {
  return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{})};
}
TC_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }
TC_INLINE Vec load_some(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
template <class T>
TC_INLINE Vec load_some(const T* p, int n) {
  return {widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T{})};
}
TC_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
TC_INLINE void store_some(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
TC_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
TC_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
TC_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
TC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TC_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
TC_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where a lane of either is NaN
TC_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
TC_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
TC_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// `yes` in the lanes where the comparison holds; it does not where either is NaN.
TC_INLINE Vec select_gt(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
}
TC_INLINE Vec select_ge(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), no.v, yes.v)};
}
TC_INLINE uint32_t lanes_gt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
// Rounds to nearest even, as from_float does.
TC_INLINE __m256i narrow(Vec a, bf16) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}
TC_INLINE __m256i narrow(Vec a, f16) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
template <class T>
TC_INLINE void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
TC_INLINE void store_some(T* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a, T{}));
}
TC_INLINE uint32_t lanes_ge(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
TC_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
TC_INLINE float maximum(Vec a) { return _mm512_reduce_max_ps(a.v); }
TC_INLINE float minimum(Vec a) { return _mm512_reduce_min_ps(a.v); }

#elif defined(TOKENCOMP_AVX2)

constexpr int kWidth = 8;
constexpr int kTileRows = 4, kTileCols = 2;  // 8 accumulators + 3 operands of 16 registers

struct Vec {
  __m256 v;
};

TC_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
TC_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
TC_INLINE __m256 widen(__m128i halves, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
TC_INLINE __m256 widen(__m128i halves, f16) { return _mm256_cvtph_ps(halves); }
template <class T>
TC_INLINE Vec load(const T* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{})};
}
template <class T>
TC_INLINE Vec load_some(const T* p, int n) {
  T padded[kWidth] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}
TC_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
TC_INLINE void store_some(float* p, Vec a, int n) {
  alignas(32) float lanes[kWidth];
  _mm256_store_ps(lanes, a.v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
TC_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
TC_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
TC_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
TC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
TC_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
TC_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
TC_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
TC_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
TC_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
TC_INLINE Vec select_gt(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
TC_INLINE Vec select_ge(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ))};
}
TC_INLINE uint32_t lanes_gt(Vec a, Vec b) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))); }
TC_INLINE __m128i narrow(Vec a, bf16) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
TC_INLINE __m128i narrow(Vec a, f16) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
template <class T>
TC_INLINE void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}
template <class T>
TC_INLINE void store_some(T* p, Vec a, int n) {
  T lanes[kWidth];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
TC_INLINE uint32_t lanes_ge(Vec a, Vec b) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ))); }
TC_INLINE float sum(Vec a) {
  const __m128 quad = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
TC_INLINE float maximum(Vec a) {
  const __m128 quad = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_max_ps(quad, _mm_movehl_ps(quad, quad));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
TC_INLINE float minimum(Vec a) { return -maximum({_mm256_sub_ps(_mm256_setzero_ps(), a.v)}); }

#else

constexpr int kWidth = 8;  // arrays of eight: the compiler vectorises them with whatever the baseline has
constexpr int kTileRows = 2, kTileCols = 2;

struct Vec {
  float v[kWidth];
};

template <class F>
TC_INLINE Vec lanewise(F&& f) {
  Vec out;
  for (int i = 0; i < kWidth; ++i) out.v[i] = f(i);
  return out;
}
TC_INLINE Vec broadcast(float x) {
  return lanewise([&](int) { return x; });
}
template <class T>
TC_INLINE Vec load(const T* p) {
  return lanewise([&](int i) { return to_float(p[i]); });
}
template <class T>
TC_INLINE Vec load_some(const T* p, int n) {
  return lanewise([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
TC_INLINE Vec add(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] + b.v[i]; });
}
TC_INLINE Vec sub(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] - b.v[i]; });
}
TC_INLINE Vec mul(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] * b.v[i]; });
}
TC_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return lanewise([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
TC_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  return lanewise([&](int i) { return c.v[i] - a.v[i] * b.v[i]; });
}
TC_INLINE Vec max(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
TC_INLINE Vec div(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] / b.v[i]; });
}
TC_INLINE Vec abs(Vec a) {
  return lanewise([&](int i) { return a.v[i] < 0 ? -a.v[i] : a.v[i]; });
}
TC_INLINE Vec select_gt(Vec a, Vec b, Vec yes, Vec no) {
  return lanewise([&](int i) { return a.v[i] > b.v[i] ? yes.v[i] : no.v[i]; });
}
TC_INLINE Vec select_ge(Vec a, Vec b, Vec yes, Vec no) {
  return lanewise([&](int i) { return a.v[i] >= b.v[i] ? yes.v[i] : no.v[i]; });
}
TC_INLINE uint32_t lanes_gt(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= uint32_t(a.v[i] > b.v[i]) << i;
  return mask;
}
template <class T>
TC_INLINE void store_some(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(a.v[i]);
}
template <class T>
TC_INLINE void store(T* p, Vec a) {
  store_some(p, a, kWidth);
}
TC_INLINE Vec min(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
TC_INLINE uint32_t lanes_ge(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= uint32_t(a.v[i] >= b.v[i]) << i;
  return mask;
}
TC_INLINE float sum(Vec a) { return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7])); }
TC_INLINE float maximum(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < kWidth; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
TC_INLINE float minimum(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < kWidth; ++i) m = a.v[i] < m ? a.v[i] : m;
  return m;
}

#endif

// Whole vectors where there are that many elements, the rest of a row otherwise.
template <class T>
TC_INLINE Vec load_up_to(const T* p, int n) {
  return n >= kWidth ? load(p) : load_some(p, n);
}
template <class T>
TC_INLINE void store_up_to(T* p, Vec a, int n) {
  if (n >= kWidth) {
    store(p, a);
  } else {
    store_some(p, a, n);
  }
}

// ---- product steps

template <class T>
struct PackOf {
  using type = Vec;
  static constexpr int elements = kWidth;
};
TC_INLINE Vec multiply_add(Vec a, Vec b, Vec accumulator) { return fma(a, b, accumulator); }
template <class T>
TC_INLINE Vec load_pack(const T* p) {
  return load(p);
}
template <class T>
TC_INLINE Vec load_pack_some(const T* p, int n) {
  return load_some(p, n);
}
// The elements of one lane, in all lanes.
TC_INLINE Vec broadcast_pack(const float* p) { return broadcast(*p); }

#if defined(TOKENCOMP_AVX512_BF16)

struct Bf16Pack {
  __m512bh v;
};
template <>
struct PackOf<bf16> {
  using type = Bf16Pack;
  static constexpr int elements = 32;
};
// Two products per lane and step, summed in fp32: half the loads and half the instructions of widening.
TC_INLINE Vec multiply_add(Bf16Pack a, Bf16Pack b, Vec accumulator) {
  return {_mm512_dpbf16_ps(accumulator.v, a.v, b.v)};
}
TC_INLINE Bf16Pack load_pack(const bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
TC_INLINE Bf16Pack load_pack_some(const bf16* p, int n) {
  return {(__m512bh)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p)};
}
TC_INLINE Bf16Pack broadcast_pack(const bf16* p) {
  int pair;
  __builtin_memcpy(&pair, p, 4);
  return {(__m512bh)_mm512_set1_epi32(pair)};
}

#endif

template <class T>
constexpr int kPack = PackOf<T>::elements;

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
