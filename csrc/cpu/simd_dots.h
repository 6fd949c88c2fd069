// Products of codes with numbers of 16 bits, beside simd.h and under its rules. A code is a byte of 0 to 255; a number
// is 256 high + low, both bytes with a sign, and is multiplied in these two parts; sums are exact. One instruction
// multiplies four codes in each lane.
//
//   kByteDots                     whether this level does; the rest is there only where it does
//   put_parts(high, low, x)       kWidth numbers of -kMostParts to kMostParts, rounded to the whole ones it returns
//   words_of_keys(rows, R, out)   keys in lanes: word w of R / 4 is channels 4 w .. 4 w + 3 of the 16 rows of R bytes
//   quads_of_values(rows, R, out) channels in lanes, four tokens in a word; R / 32 pairs of registers, which sums_of()
//                                 brings into the order of Weights<T>
//   tiles_of_rows(z, p)           [row][16 keys] as tiles of [row][kWidth / rows keys]
#pragma once

#include "cpu/simd_lanes.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

constexpr int kCodeRows = 16;  // in lanes at a time; rows are of whole kCodeBytes
constexpr int kCodeBytes = 32;
constexpr float kMostParts = 127.0f * 256.0f + 127.0f;

#if defined(TOKENCOMP_AVX512_BF16)

#define TC_BYTE_DOTS
constexpr bool kByteDots = true;

// 16 whole numbers. Not a __m512i, whose elements are of 64 bits: GCC 12 then copies every sum to and fro.
struct Ints {
  __v16si v;
  TC_INLINE_MEMBER operator __m512i() const { return (__m512i)v; }
};
TC_INLINE Ints ints(__m512i x) { return {(__v16si)x}; }

TC_INLINE Ints put_parts(int8_t* high, int8_t* low, Vec x) {
  const __m512i whole = _mm512_cvtps_epi32(x.v);
  const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(upper));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(whole));
  return ints(whole);
}

// The fields at bit `shift` of 64 bytes.
TC_INLINE Ints load_codes(const uint8_t* p, Ints shift, Ints mask) {
  return ints(_mm512_and_si512(_mm512_srlv_epi32(_mm512_loadu_si512(p), shift), mask));
}
TC_INLINE Ints same_ints(int x) { return ints(_mm512_set1_epi32(x)); }
TC_INLINE Ints same_bytes(int x) { return ints(_mm512_set1_epi8(char(x))); }
TC_INLINE Ints four_bytes(const int8_t* p) {
  int word;
  __builtin_memcpy(&word, p, 4);
  return same_ints(word);
}
TC_INLINE Ints dot(Ints sums, Ints codes, Ints parts) { return ints(_mm512_dpbusd_epi32(sums, codes, parts)); }
TC_INLINE Ints both_parts(Ints high, Ints low) { return ints(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low)); }
TC_INLINE Ints add(Ints a, Ints b) { return ints(_mm512_add_epi32(a, b)); }
TC_INLINE Vec to_floats(Ints x) { return {_mm512_cvtepi32_ps(x)}; }

TC_INLINE __m512i two_rows(const uint8_t* low, const uint8_t* high) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// In each quarter, the words of four rows become rows of four words.
TC_INLINE void transpose_quarters(__m512i (&x)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi64(a, c), x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d), x[3] = _mm512_unpackhi_epi64(b, d);
}

TC_INLINE void words_of_keys(const uint8_t* rows, int R, uint8_t* out) {
  int c = 0;
  for (; c + 64 <= R; c += 64, out += 16 * 64) {
    Vec x[kWidth];
    for (int i = 0; i < 16; ++i) x[i].v = _mm512_loadu_ps(rows + i * R + c);
    transpose(x);
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + 64 * i, x[i].v);
  }
  if (c == R) return;
  __m512i x[2][4];
  for (int i = 0; i < 8; ++i) {
    const uint8_t* row = rows + (i / 4 * 8 + i % 4) * R + c;
    x[i / 4][i % 4] = two_rows(row, row + 4 * R);
  }
  transpose_quarters(x[0]), transpose_quarters(x[1]);
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + 64 * i, _mm512_shuffle_i32x4(x[0][i], x[1][i], 0x88));
    _mm512_storeu_si512(out + 64 * (4 + i), _mm512_shuffle_i32x4(x[0][i], x[1][i], 0xdd));
  }
}

TC_INLINE void quads_of_values(const uint8_t* rows, int R, uint8_t* out) {
  int c = 0;
  for (; c + 64 <= R; c += 64, out += 4 * 64) {
    __m512i x[4];
    for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(rows + i * R + c);
    const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
    const __m512i d = _mm512_unpacklo_epi8(x[2], x[3]), e = _mm512_unpackhi_epi8(x[2], x[3]);
    const __m512i quads[4] = {_mm512_unpacklo_epi16(a, d), _mm512_unpackhi_epi16(a, d), _mm512_unpacklo_epi16(b, e),
                              _mm512_unpackhi_epi16(b, e)};
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), _mm512_castsi512_si256(quads[i]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 128 + 32 * i), _mm512_extracti64x4_epi64(quads[i], 1));
    }
  }
  if (c == R) return;
  __m256i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + i * R + c));
  const __m256i a = _mm256_unpacklo_epi8(x[0], x[1]), b = _mm256_unpackhi_epi8(x[0], x[1]);
  const __m256i d = _mm256_unpacklo_epi8(x[2], x[3]), e = _mm256_unpackhi_epi8(x[2], x[3]);
  const __m256i quads[4] = {_mm256_unpacklo_epi16(a, d), _mm256_unpackhi_epi16(a, d), _mm256_unpacklo_epi16(b, e),
                            _mm256_unpackhi_epi16(b, e)};
  for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), quads[i]);
}

// Sums of a pair of registers of quads: 32 channels.
template <class T>
TC_INLINE void sums_of(Ints a, Ints b, Vec& first, Vec& second) {
  if constexpr (__is_same(T, bf16)) {
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    first = to_floats(ints(_mm512_permutex2var_epi64(a, low, b)));
    second = to_floats(ints(_mm512_permutex2var_epi64(a, _mm512_add_epi64(low, _mm512_set1_epi64(4)), b)));
  } else {
    first = to_floats(ints(_mm512_shuffle_i32x4(a, b, 0x88)));
    second = to_floats(ints(_mm512_shuffle_i32x4(a, b, 0xdd)));
  }
}

TC_INLINE void tiles_of_rows(const Vec (&z)[1], float* p) { store(p, z[0]); }
TC_INLINE void tiles_of_rows(const Vec (&z)[2], float* p) {
  store(p, {_mm512_shuffle_f32x4(z[0].v, z[1].v, 0x44)});
  store(p + 16, {_mm512_shuffle_f32x4(z[0].v, z[1].v, 0xee)});
}
TC_INLINE void tiles_of_rows(const Vec (&z)[4], float* p) {
  const __m512 a = _mm512_shuffle_f32x4(z[0].v, z[1].v, 0x44), b = _mm512_shuffle_f32x4(z[2].v, z[3].v, 0x44);
  const __m512 c = _mm512_shuffle_f32x4(z[0].v, z[1].v, 0xee), d = _mm512_shuffle_f32x4(z[2].v, z[3].v, 0xee);
  store(p, {_mm512_shuffle_f32x4(a, b, 0x88)});
  store(p + 16, {_mm512_shuffle_f32x4(a, b, 0xdd)});
  store(p + 32, {_mm512_shuffle_f32x4(c, d, 0x88)});
  store(p + 48, {_mm512_shuffle_f32x4(c, d, 0xdd)});
}

// Of each row of `keys` lanes, in all of them: 4, 8 or 16.
template <int keys, class F>
TC_INLINE Vec of_row(Vec x, F&& f) {
  x = f(x, Vec{_mm512_permute_ps(x.v, 0xb1)});
  x = f(x, Vec{_mm512_permute_ps(x.v, 0x4e)});
  if constexpr (keys >= 8) x = f(x, Vec{_mm512_shuffle_f32x4(x.v, x.v, 0xb1)});
  if constexpr (keys == 16) x = f(x, Vec{_mm512_shuffle_f32x4(x.v, x.v, 0x4e)});
  return x;
}
template <int keys>
TC_INLINE Vec sum_of_row(Vec x) {
  return of_row<keys>(x, [](Vec a, Vec b) __attribute__((always_inline)) { return add(a, b); });
}
template <int keys>
TC_INLINE Vec greatest_of_row(Vec x) {
  return of_row<keys>(x, [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); });
}

#else

constexpr bool kByteDots = false;

#endif

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
