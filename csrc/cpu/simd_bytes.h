// Whole numbers in bytes, and exact quotients, beside simd.h and under its rules.
//
//   load_bytes(p), store_bytes(p, a)   kWidth whole numbers of 0 to 255, a byte each; ..._some: only n of them
//   quotient(a, by)                    a / divisor, correctly rounded, for divisors that fp16 can hold
#pragma once

#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

#if defined(TOKENCOMP_AVX512)

TC_INLINE __m512 numbers(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }
TC_INLINE __m128i bytes_of(Vec a) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)); }
TC_INLINE Vec load_bytes(const uint8_t* p) { return {numbers(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
TC_INLINE Vec load_bytes_some(const uint8_t* p, int n) { return {numbers(_mm_maskz_loadu_epi8(first_lanes(n), p))}; }
TC_INLINE void store_bytes(uint8_t* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes_of(a)); }
TC_INLINE void store_bytes_some(uint8_t* p, Vec a, int n) { _mm_mask_storeu_epi8(p, first_lanes(n), bytes_of(a)); }

#elif defined(TOKENCOMP_AVX2)

TC_INLINE __m128i bytes_of(Vec a) {
  const __m256i words = _mm256_cvtps_epi32(a.v);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  return _mm_packus_epi16(halves, halves);
}
TC_INLINE Vec load_bytes(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
TC_INLINE Vec load_bytes_some(const uint8_t* p, int n) {
  uint8_t padded[kWidth] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load_bytes(padded);
}
TC_INLINE void store_bytes(uint8_t* p, Vec a) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes_of(a)); }
TC_INLINE void store_bytes_some(uint8_t* p, Vec a, int n) {
  uint8_t lanes[kWidth];
  store_bytes(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

#else

TC_INLINE Vec load_bytes_some(const uint8_t* p, int n) {
  return lanewise([&](int i) { return i < n ? float(p[i]) : 0.0f; });
}
TC_INLINE Vec load_bytes(const uint8_t* p) { return load_bytes_some(p, kWidth); }
TC_INLINE void store_bytes_some(uint8_t* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = uint8_t(int(a.v[i]));
}
TC_INLINE void store_bytes(uint8_t* p, Vec a) { store_bytes_some(p, a, kWidth); }

#endif

TC_INLINE void store_bytes_up_to(uint8_t* p, Vec a, int n) {
  if (n >= kWidth) {
    store_bytes(p, a);
  } else {
    store_bytes_some(p, a, n);
  }
}
TC_INLINE Vec load_bytes_up_to(const uint8_t* p, int n) { return n >= kWidth ? load_bytes(p) : load_bytes_some(p, n); }

struct Divisor {
  Vec value, inverse;
};

#if defined(TOKENCOMP_AVX512) || defined(TOKENCOMP_AVX2)
// The remainder of the first guess is exact, and with 11 bits in the divisor no quotient is nearer to the middle of two
// floats than 2^-12 of their distance: one correction gives what a division gives, in a fraction of its time.
TC_INLINE Vec quotient(Vec a, const Divisor& by) {
  const Vec guess = mul(a, by.inverse);
  return fma(fnma(guess, by.value, a), by.inverse, guess);
}
#else
TC_INLINE Vec quotient(Vec a, const Divisor& by) { return div(a, by.value); }
#endif

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
