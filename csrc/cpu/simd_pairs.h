// Sums of products along rows and weighted sums of rows, beside simd.h and under its rules: the two halves of attention
// with few query rows.
//
//   sum_each(x)        lane i is the sum of x[i]
//   repeat<n>(p)       n floats, over and over
//   Weights<T>         weighted sums of rows of T, two rows at a time: what a step eats and how a weight is stored
#pragma once

#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

#if defined(TOKENCOMP_AVX512)

TC_INLINE Vec sum_each(const Vec (&x)[kWidth]) {
  __m512 pair[8], quad[4];
  for (int i = 0; i < 8; ++i) {  // lanes of 128 bits: a b a b
    const __m512 a = x[2 * i].v, b = x[2 * i + 1].v;
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {  // a b c d
    const __m512d p = _mm512_castps_pd(pair[2 * i]), q = _mm512_castps_pd(pair[2 * i + 1]);
    quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  const auto halve = [](__m512 p, __m512 q) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
  };
  return {halve(halve(quad[0], quad[1]), halve(quad[2], quad[3]))};
}

template <int n>
TC_INLINE Vec repeat(const float* p) {
  if constexpr (n == 16) return load(p);
  if constexpr (n == 8) return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))};
  if constexpr (n == 4) return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))};
}

#elif defined(TOKENCOMP_AVX2)

TC_INLINE Vec sum_each(const Vec (&x)[kWidth]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}

template <int n>
TC_INLINE Vec repeat(const float* p) {
  if constexpr (n == 8) return load(p);
  if constexpr (n == 4) return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
  if constexpr (n == 2) return {_mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p)))};
}

#else

TC_INLINE Vec sum_each(const Vec (&x)[kWidth]) {
  return lanewise([&](int i) { return sum(x[i]); });
}

template <int n>
TC_INLINE Vec repeat(const float* p) {
  return lanewise([&](int i) { return p[i % n]; });
}

#endif

// One vector of each row, widened.
template <class T>
struct Weights {
  using Stored = float;
  static constexpr int kElements = kWidth;             // of a row in a step
  static constexpr int kSums = 1;                      // accumulators of a step
  static constexpr int kSteps = kWidth == 16 ? 4 : 2;  // at a time: with four rows of weights they fill the registers
  struct Rows {
    Vec a, b;
  };
  using Pair = Rows;  // the weights of two rows, in all lanes

  static TC_INLINE_MEMBER Rows rows(const T* a, const T* b, int n) {
    return n >= kElements ? Rows{load(a), load(b)} : Rows{load_some(a, n), load_some(b, n)};
  }
  static TC_INLINE_MEMBER Pair pair(const float* p) { return {broadcast(p[0]), broadcast(p[1])}; }
  static TC_INLINE_MEMBER void add(Vec* sums, const Rows& x, const Pair& p) {
    sums[0] = fma(p.b, x.b, fma(p.a, x.a, sums[0]));
  }
  static TC_INLINE_MEMBER void store_weights(float* p, Vec w) { store(p, w); }
  // The sums of a step in the order of the elements, from kElements floats at p.
  static TC_INLINE_MEMBER Vec in_order(const float* p, int i) { return load(p + i * kWidth); }
  // The inverse: vector i of a step's elements at p, in the order of its sums.
  static TC_INLINE_MEMBER Vec as_sums(const float* p, int i) { return load(p + i * kWidth); }
};

#if defined(TOKENCOMP_AVX512_BF16)

// Two rows interleaved, so that one instruction multiplies both. Sums come out as the interleaving leaves them: of
// every eight elements the first four in one vector, the others in the next.
template <>
struct Weights<bf16> {
  using Stored = bf16;
  static constexpr int kElements = 32, kSums = 2, kSteps = 2;
  struct Rows {
    __m512i low, high;
  };
  using Pair = __m512bh;

  static TC_INLINE_MEMBER Rows rows(const bf16* a, const bf16* b, int n) {
    const __m512i x = n >= kElements ? (__m512i)load_pack(a).v : (__m512i)load_pack_some(a, n).v;
    const __m512i y = n >= kElements ? (__m512i)load_pack(b).v : (__m512i)load_pack_some(b, n).v;
    return {_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y)};
  }
  static TC_INLINE_MEMBER Pair pair(const bf16* p) { return broadcast_pack(p).v; }
  static TC_INLINE_MEMBER void add(Vec* sums, const Rows& x, Pair p) {
    sums[0].v = _mm512_dpbf16_ps(sums[0].v, (__m512bh)x.low, p);
    sums[1].v = _mm512_dpbf16_ps(sums[1].v, (__m512bh)x.high, p);
  }
  static TC_INLINE_MEMBER void store_weights(bf16* p, Vec w) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(w.v));
  }
  static TC_INLINE_MEMBER Vec in_order(const float* p, int i) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i order = _mm512_add_epi32(first, _mm512_set1_epi32(8 * i));
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), order, _mm512_loadu_ps(p + kWidth))};
  }
  static TC_INLINE_MEMBER Vec as_sums(const float* p, int i) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i order = _mm512_add_epi32(first, _mm512_set1_epi32(4 * i));
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), order, _mm512_loadu_ps(p + kWidth))};
  }
};

#endif

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
