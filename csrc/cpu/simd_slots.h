// Integers in memory, kWidth at a time, beside simd.h and under its rules.
//
//   lanes_above, lanes_equal, lanes_set   a bit for each of kWidth integers or bytes at p
//   compress_index(p, first, lanes)       first + the numbers of the lanes, packed; p has room for kWidth elements
#pragma once

#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

#if defined(TOKENCOMP_AVX512)

TC_INLINE uint32_t lanes_above(const uint32_t* p, uint32_t bound) {
  return _mm512_cmpgt_epu32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(int(bound)));
}
TC_INLINE uint32_t lanes_equal(const uint32_t* p, uint32_t value) {
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(int(value)));
}
TC_INLINE uint32_t lanes_set(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(bytes, bytes);
}
// Compressed in a register, then stored whole: the instruction that compresses into memory is slow on some processors.
TC_INLINE void compress_index(int* p, int first, uint32_t lanes) {
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_add_epi32(iota, _mm512_set1_epi32(first));
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(__mmask16(lanes), index));
}

#elif defined(TOKENCOMP_AVX2)

TC_INLINE uint32_t sign_lanes(__m256i a) { return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(a))); }
TC_INLINE uint32_t lanes_above(const uint32_t* p, uint32_t bound) {
  const __m256i sign = _mm256_set1_epi32(int(0x80000000u));  // the comparison is a signed one
  const __m256i a = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), sign);
  return sign_lanes(_mm256_cmpgt_epi32(a, _mm256_set1_epi32(int(bound ^ 0x80000000u))));
}
TC_INLINE uint32_t lanes_equal(const uint32_t* p, uint32_t value) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return sign_lanes(_mm256_cmpeq_epi32(a, _mm256_set1_epi32(int(value))));
}
TC_INLINE uint32_t lanes_set(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return ~uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()))) & 0xff;
}
struct CompressTable {
  uint64_t lanes[256];  // by mask: the numbers of its lanes, one a byte, ascending
};
constexpr CompressTable make_compress_table() {
  CompressTable table{};
  for (int mask = 0; mask < 256; ++mask) {
    int to = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) table.lanes[mask] |= uint64_t(lane) << 8 * to++;
    }
  }
  return table;
}
static constexpr CompressTable kCompress = make_compress_table();
TC_INLINE __m256i compress_order(uint32_t lanes) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kCompress.lanes[lanes])));
}
TC_INLINE void compress_index(int* p, int first, uint32_t lanes) {
  const __m256i index = _mm256_add_epi32(compress_order(lanes), _mm256_set1_epi32(first));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), index);
}

#else

TC_INLINE uint32_t lanes_above(const uint32_t* p, uint32_t bound) {
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= uint32_t(p[i] > bound) << i;
  return mask;
}
TC_INLINE uint32_t lanes_equal(const uint32_t* p, uint32_t value) {
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= uint32_t(p[i] == value) << i;
  return mask;
}
TC_INLINE uint32_t lanes_set(const uint8_t* p) {
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= uint32_t(p[i] != 0) << i;
  return mask;
}
TC_INLINE void compress_index(int* p, int first, uint32_t lanes) {
  for (; lanes; lanes &= lanes - 1) *p++ = first + __builtin_ctz(lanes);
}

#endif

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
