// Functions of vectors for the CPU kernels, beside simd.h and under its rules. Errors are against the exact value.
#pragma once

#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

#if defined(TOKENCOMP_AVX512)

// a where lane index is in [begin, end), else `other`.
TC_INLINE Vec between(Vec a, int begin, int end, float other) {
  const uint32_t below_end = end >= kWidth ? 0xffffu : end > 0 ? (1u << end) - 1 : 0;
  const uint32_t from_begin = begin <= 0 ? 0xffffu : begin < kWidth ? 0xffffu << begin : 0;
  return {_mm512_mask_blend_ps(__mmask16(below_end & from_begin), _mm512_set1_ps(other), a.v)};
}
TC_INLINE Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for whole n with a in [0.5, 2) and the result in the normal range or above.
TC_INLINE Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

#elif defined(TOKENCOMP_AVX2)

TC_INLINE Vec between(Vec a, int begin, int end, float other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i inside = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                                             _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
  return {_mm256_blendv_ps(_mm256_set1_ps(other), a.v, _mm256_castsi256_ps(inside))};
}
TC_INLINE Vec nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
TC_INLINE Vec scale_by_power(Vec a, Vec n) {
  const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), shift))};
}

#else

TC_INLINE Vec between(Vec a, int begin, int end, float other) {
  return lanewise([&](int i) { return i >= begin && i < end ? a.v[i] : other; });
}
TC_INLINE Vec nearest(Vec a) {  // for |a| < 2^22, which is all that exp2 asks
  return lanewise([&](int i) { return (a.v[i] + 12582912.0f) - 12582912.0f; });
}
TC_INLINE Vec scale_by_power(Vec a, Vec n) {
  return lanewise([&](int i) {
    uint32_t bits;
    __builtin_memcpy(&bits, &a.v[i], 4);
    bits += uint32_t(int(n.v[i])) << 23;
    float out;
    __builtin_memcpy(&out, &bits, 4);
    return out;
  });
}

#endif

// 2^f for f in [-0.5, 0.5], a little more if need be.
TC_INLINE Vec exp2_fraction(Vec f) {
  Vec p = broadcast(0x1.5bba12p-10f);
  p = fma(p, f, broadcast(0x1.3cea88p-7f));
  p = fma(p, f, broadcast(0x1.c6b752p-5f));
  p = fma(p, f, broadcast(0x1.ebf9bcp-3f));
  p = fma(p, f, broadcast(0x1.62e42ap-1f));
  return fma(p, f, broadcast(1.0f));
}

// 2^x, relative error below 2.2e-7 (degree 5, minimax on [-0.5, 0.5], exact at whole numbers). x below -126 or NaN
// gives 0; x above 127.4 counts as 127.4.
TC_INLINE Vec exp2(Vec x) {
  const Vec lowest = broadcast(-126.0f), inside = max(min(x, broadcast(127.4f)), lowest);
  const Vec n = nearest(inside);
  return select_ge(x, lowest, scale_by_power(exp2_fraction(sub(inside, n)), n), broadcast(0.0f));
}

// e^x, relative error below 3e-7 at any size of x: n log(2) is taken off in two parts, of which the first is exact even
// where fma rounds twice. x below -87.3 or NaN gives 0; x above 88.3 counts as 88.3.
TC_INLINE Vec exp(Vec x) {
  const Vec inside = max(min(x, broadcast(88.3f)), broadcast(-87.3f));
  const Vec n = nearest(mul(inside, broadcast(1.44269504f)));
  const Vec rest = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), inside));
  const Vec p = exp2_fraction(mul(rest, broadcast(1.44269504f)));
  return select_ge(x, broadcast(-87.3f), scale_by_power(p, n), broadcast(0.0f));
}

// tanh, relative error below 3e-7: an odd polynomial near 0, 1 - 2 / (e^(2|x|) + 1) elsewhere. NaN stays NaN.
TC_INLINE Vec tanh(Vec x) {
  const Vec zero = broadcast(0.0f), size = max(sub(zero, x), x), square = mul(x, x);
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, square, broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  const Vec small = fma(mul(p, square), x, x);
  const Vec e = exp2(mul(size, broadcast(2.8853900817779268f)));
  const Vec far = sub(broadcast(1.0f), div(broadcast(2.0f), add(e, broadcast(1.0f))));
  const Vec large = select_ge(x, zero, far, sub(zero, far));
  return select_ge(size, broadcast(0.625f), large, small);
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
