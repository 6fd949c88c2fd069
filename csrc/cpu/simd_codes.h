// Numbers from the codes of the layout `linear` (core/bitpack.h), beside simd.h and under its rules. Numbers are those
// around the middle of the codes, code - (2^bits - 1) / 2, which every dtype holds exactly.
//
//   unpack_fields<bits>(in, D, out)   D numbers from a row of codes; of 3 bits: unpack_planes; of e4m3: unpack_fp8
//   load_params(p, n, step, low)      n <= kWidth pairs of step and minimum
#pragma once

#include "core/bitpack.h"
#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

TC_HD constexpr float middle_code(int bits) { return float((1 << bits) - 1) * 0.5f; }

// The fields at bit `shift` of n bytes (at most kWidth are read), as they are; and elements of e4m3.
#if defined(TOKENCOMP_AVX512)

TC_INLINE __m512i bytes_in_lanes(const uint8_t* p, int n) {
  const __m128i bytes =
      n >= kWidth ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : _mm_maskz_loadu_epi8(first_lanes(n), p);
  return _mm512_cvtepu8_epi32(bytes);
}
TC_INLINE Vec load_fields(const uint8_t* p, int n, int shift, int mask) {
  const __m512i field = _mm512_srl_epi32(bytes_in_lanes(p, n), _mm_cvtsi32_si128(shift));
  return {_mm512_cvtepi32_ps(_mm512_and_si512(field, _mm512_set1_epi32(mask)))};
}
TC_INLINE Vec load_fp8(const uint8_t* p, int n) {
  const __m512i code = bytes_in_lanes(p, n), size = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
  const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(size, 20), _mm512_set1_epi32(120 << 23));
  const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(size), _mm512_set1_ps(0x1p-9f));
  const __mmask16 is_small = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(8));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(0x7f));
  __m512i bits = _mm512_mask_blend_epi32(is_small, normal, _mm512_castps_si512(small));
  bits = _mm512_mask_blend_epi32(nan, bits, _mm512_set1_epi32(0x7fc00000));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
  return {_mm512_castsi512_ps(_mm512_or_si512(bits, sign))};
}
TC_INLINE void load_params(const f16* p, int n, Vec& step, Vec& low) {
  const __m512i pair = n >= kWidth ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(first_lanes(n), p);
  step.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pair));
  low.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pair, 16)));
}

#elif defined(TOKENCOMP_AVX2)

TC_INLINE __m256i bytes_in_lanes(const uint8_t* p, int n) {
  uint64_t bytes = 0;
  __builtin_memcpy(&bytes, p, size_t(n < kWidth ? n : kWidth));
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes)));
}
TC_INLINE Vec load_fields(const uint8_t* p, int n, int shift, int mask) {
  const __m256i field = _mm256_srl_epi32(bytes_in_lanes(p, n), _mm_cvtsi32_si128(shift));
  return {_mm256_cvtepi32_ps(_mm256_and_si256(field, _mm256_set1_epi32(mask)))};
}
TC_INLINE Vec load_fp8(const uint8_t* p, int n) {
  const __m256i code = bytes_in_lanes(p, n), size = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
  const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(size, 20), _mm256_set1_epi32(120 << 23));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(size), _mm256_set1_ps(0x1p-9f));
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), size);
  const __m256i nan = _mm256_cmpeq_epi32(size, _mm256_set1_epi32(0x7f));
  __m256i bits = _mm256_blendv_epi8(normal, _mm256_castps_si256(small), is_small);
  bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
  return {_mm256_castsi256_ps(_mm256_or_si256(bits, sign))};
}
TC_INLINE void load_params(const f16* p, int n, Vec& step, Vec& low) {
  uint32_t pairs[kWidth] = {};
  __builtin_memcpy(pairs, p, size_t(n < kWidth ? n : kWidth) * 4);
  const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
  const auto halves = [](__m256i words) {
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  };
  step.v = _mm256_cvtph_ps(halves(_mm256_and_si256(pair, _mm256_set1_epi32(0xffff))));
  low.v = _mm256_cvtph_ps(halves(_mm256_srli_epi32(pair, 16)));
}

#else

TC_INLINE Vec load_fields(const uint8_t* p, int n, int shift, int mask) {
  return lanewise([&](int i) { return i < n ? float(p[i] >> shift & mask) : 0.0f; });
}
TC_INLINE Vec load_fp8(const uint8_t* p, int n) {
  return lanewise([&](int i) { return i < n ? bitpack::fp8_to_float(p[i]) : 0.0f; });
}
TC_INLINE void load_params(const f16* p, int n, Vec& step, Vec& low) {
  step = lanewise([&](int i) { return i < n ? to_float(p[2 * i]) : 0.0f; });
  low = lanewise([&](int i) { return i < n ? to_float(p[2 * i + 1]) : 0.0f; });
}

#endif

template <int kBits, class T>
TC_INLINE void unpack_fields(const uint8_t* in, int D, T* out) {
  constexpr int kFields = 8 / kBits, kMask = (1 << kBits) - 1;
  const int bytes = D / kFields;
  const Vec middle = broadcast(middle_code(kBits));
  for (int f = 0; f < kFields; ++f) {
    for (int k = 0; k < bytes; k += kWidth) {
      store_up_to(out + f * bytes + k, sub(load_fields(in + k, bytes - k, f * kBits, kMask), middle), bytes - k);
    }
  }
}

// Two planes. A field of the second is half as wide as one of the first.
template <class T>
TC_INLINE void unpack_planes(const uint8_t* in, int D, T* out) {
  const int bytes = D / 8;
  const Vec middle = broadcast(middle_code(3)), four = broadcast(4.0f);
  for (int f = 0; f < 8; ++f) {
    const uint8_t *low = in + f % 2 * bytes, *high = in + D / 4;
    for (int k = 0; k < bytes; k += kWidth) {
      const Vec two = sub(load_fields(low + k, bytes - k, f / 2 * 2, 3), middle);
      store_up_to(out + f * bytes + k, fma(load_fields(high + k, bytes - k, f, 1), four, two), bytes - k);
    }
  }
}

template <class T>
TC_INLINE void unpack_fp8(const uint8_t* in, int D, T* out) {
  for (int k = 0; k < D; k += kWidth) store_up_to(out + k, load_fp8(in + k, D - k), D - k);
}

#if defined(TOKENCOMP_AVX512)

// Both bytes of a bf16 number by its code.
template <int kBits>
struct NumberBytes {
  alignas(16) uint8_t low[16], high[16];
  constexpr NumberBytes() : low{}, high{} {
    for (int code = 0; code < 16; ++code) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, float(code) - middle_code(kBits));
      low[code] = uint8_t(bits >> 16), high[code] = uint8_t(bits >> 24);
    }
  }
};

// 32 bytes at a time: two fields of each are side by side in a lane, and looked up; putting the two bytes of a number
// together brings the channels into order.
template <int kBits>
TC_INLINE void unpack_fields(const uint8_t* in, int D, bf16* out) {
  if constexpr (kBits == 8) return unpack_fields<8, bf16>(in, D, out);
  constexpr int kFields = 8 / kBits;
  static constexpr NumberBytes<kBits> kNumbers{};
  const auto table = [](const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  };
  const __m512i low = table(kNumbers.low), high = table(kNumbers.high);
  const __m512i twice = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), mask = _mm512_set1_epi8((1 << kBits) - 1);
  const int bytes = D / kFields;
  const auto step = [&](int k, __m256i packed, auto&& put) __attribute__((always_inline)) {
    const __m512i x = _mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(packed));
    for (int f = 0; f < kFields; f += 2) {
      const int64_t first = f * kBits, second = first + kBits;
      const __m512i by = _mm512_setr_epi64(first, second, first, second, first, second, first, second);
      const __m512i code = _mm512_and_si512(_mm512_srlv_epi64(x, by), mask);
      const __m512i a = _mm512_shuffle_epi8(low, code), b = _mm512_shuffle_epi8(high, code);
      put(out + f * bytes + k, _mm512_unpacklo_epi8(a, b));
      put(out + (f + 1) * bytes + k, _mm512_unpackhi_epi8(a, b));
    }
  };
  int k = 0;
  for (; k + 32 <= bytes; k += 32) {
    step(k, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + k)),
         [](bf16* to, __m512i x) __attribute__((always_inline)) { _mm512_storeu_si512(to, x); });
  }
  if (k < bytes) {
    const __mmask32 some = (__mmask32(1) << (bytes - k)) - 1;
    step(k, _mm256_maskz_loadu_epi8(some, in + k),
         [&](bf16* to, __m512i x) __attribute__((always_inline)) { _mm512_mask_storeu_epi16(to, some, x); });
  }
}

#endif

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
