// Elements of two bytes as integers, beside simd.h and under its rules: what quantization needs of them, in registers.
// Levels without it have kHasHalves = false and nothing else.
//
//   HalfRange            smallest and largest of kHalves columns, by integers that sort as the numbers do: NaN is
//                        beyond either infinity, so it stays
//   ranges_across(f)     the ranges of kWidth groups, one a lane, from what fold() made of each
//   pack_quotients(...)  a row of codes from quotients, rounded to nearest even and limited; NaN gives 0
#pragma once

#include "cpu/simd_lanes.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

constexpr int kHalves = 2 * kWidth;

#if defined(TOKENCOMP_AVX512)

#define TC_HALVES

template <class T>
constexpr bool kHasHalves = sizeof(T) == 2;

struct HalfRange {
  __m512i low, high;
};

// Its own inverse: negative numbers sort backwards.
TC_INLINE __m512i sortable(__m512i x) {
  return _mm512_ternarylogic_epi32(x, _mm512_srai_epi16(x, 15), _mm512_set1_epi16(0x7fff), 0x78);  // x ^ (sign & m)
}
TC_INLINE HalfRange no_halves() { return {_mm512_set1_epi16(0x7fff), _mm512_set1_epi16(-0x8000)}; }
template <class T>
TC_INLINE HalfRange including_halves(HalfRange r, const T* p) {
  const __m512i x = sortable(_mm512_loadu_si512(p));
  return {_mm512_min_epi16(r.low, x), _mm512_max_epi16(r.high, x)};
}

// Numbers from the first or second half of sortable integers.
template <class T>
TC_INLINE Vec numbers_of(__m512i x, int half, T) {
  x = sortable(x);
  return {widen(half ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x), T{})};
}

// A word holds the largest in its upper and the complement of the smallest in its lower half: then both are maxima.
TC_INLINE Vec fold(HalfRange r) {
  const __m512i high = _mm512_max_epi16(r.high, _mm512_rol_epi32(r.high, 16));
  const __m512i low = _mm512_min_epi16(r.low, _mm512_rol_epi32(r.low, 16));
  const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_xor_si512(low, _mm512_set1_epi32(-1)), high);
  return {_mm512_castsi512_ps(both)};
}
template <class T>
TC_INLINE void ranges_across(Vec (&folded)[kWidth], Vec& low, Vec& high, T) {
  transpose(folded);
  __m512i best = _mm512_castps_si512(folded[0].v);
  for (int i = 1; i < kWidth; ++i) best = _mm512_max_epi16(best, _mm512_castps_si512(folded[i].v));
  const __m512i x = sortable(_mm512_xor_si512(best, _mm512_set1_epi32(0xffff)));
  low.v = widen(_mm512_cvtepi32_epi16(x), T{});
  high.v = widen(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)), T{});
}

// Codes of kHalves channels from a on and of as many from b on, a byte each. q(d) are the quotients from channel d on.
template <class F>
TC_INLINE __m512i codes_of(F&& q, int a, int b, __m512i levels) {
  const auto pair = [&](int d) __attribute__((always_inline)) {
    return _mm512_packs_epi32(_mm512_cvtps_epi32(q(d).v), _mm512_cvtps_epi32(q(d + kWidth).v));
  };
  return _mm512_min_epu8(_mm512_packus_epi16(pair(a), pair(b)), levels);
}
// Packing worked within quarters of a register: brings the channels into order.
TC_INLINE __m512i in_order(__m512i codes) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, codes);
}

// The layout `linear`; D is a multiple of 128. Fields never touch each other, so shifts of wider words do.
template <int kBits, class F>
TC_INLINE void pack_quotients(F&& q, int D, uint8_t* out) {
  const __m512i levels = _mm512_set1_epi8(char((1 << kBits) - 1));
  const int bytes = D * kBits / 8;
  constexpr int kStep = kBits == 2 ? kHalves : 2 * kHalves;
  for (int k = 0; k < bytes; k += kStep) {
    if constexpr (kBits == 8) {
      _mm512_storeu_si512(out + k, in_order(codes_of(q, k, k + kHalves, levels)));
    } else if constexpr (kBits == 4) {
      const __m512i upper = codes_of(q, bytes + k, bytes + k + kHalves, levels);
      const __m512i lower = codes_of(q, k, k + kHalves, levels);
      _mm512_storeu_si512(out + k, in_order(_mm512_or_si512(lower, _mm512_slli_epi16(upper, 4))));
    } else {
      const __m512i upper = codes_of(q, 2 * bytes + k, 3 * bytes + k, levels);
      const __m512i lower = codes_of(q, k, bytes + k, levels);
      const __m512i both = in_order(_mm512_or_si512(lower, _mm512_slli_epi16(upper, 4)));
      const __m256i odd = _mm256_slli_epi16(_mm512_extracti64x4_epi64(both, 1), 2);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), _mm256_or_si256(_mm512_castsi512_si256(both), odd));
    }
  }
}

#else

template <class T>
constexpr bool kHasHalves = false;

#endif

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
