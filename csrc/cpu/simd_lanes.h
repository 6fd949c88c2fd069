// Products with one row in each lane, beside simd.h and under its rules. A register holds one word of kWidth rows and
// is multiplied with the same word of another row, broadcast to all lanes; so a tile of products needs no sums across
// lanes. A word is what one step eats of a row: a float, or a pair of bf16 where the processor multiplies those.
#pragma once

#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using Word = uint32_t;

TC_INLINE Vec load_words(const Word* p, Vec) { return load(reinterpret_cast<const float*>(p)); }
TC_INLINE Vec broadcast_word(const Word* p, Vec) { return broadcast(*reinterpret_cast<const float*>(p)); }

template <class T>
struct WordOf {
  using Lanes = Vec;
  static constexpr int elements = 1;
};
// kWidth words of a row that starts at p and has n elements left; the rest is 0.
template <class T>
TC_INLINE Vec load_row_words(const T* p, int n) {
  return n >= kWidth ? load(p) : load_some(p, n);
}
// kWidth words of which each holds an element of one row or, where a word holds two, of `even` and of `odd`; n elements
// are left in either. `odd` may be null: zeros.
template <class T>
TC_INLINE Vec load_column_words(const T* even, const T* /*odd*/, int n) {
  return load_up_to(even, n);
}
// 2 kWidth numbers as words of a row; returns the word behind them.
template <class T>
TC_INLINE Word* store_row_words(Word* p, Vec a, Vec b, T) {
  store(reinterpret_cast<float*>(p), a);
  store(reinterpret_cast<float*>(p) + kWidth, b);
  return p + 2 * kWidth;
}

#if defined(TOKENCOMP_AVX512_BF16)

template <>
struct WordOf<bf16> {
  using Lanes = Bf16Pack;
  static constexpr int elements = 2;
};
TC_INLINE Bf16Pack load_words(const Word* p, Bf16Pack) { return {(__m512bh)_mm512_loadu_si512(p)}; }
TC_INLINE Bf16Pack broadcast_word(const Word* p, Bf16Pack) { return {(__m512bh)_mm512_set1_epi32(int(*p))}; }
TC_INLINE Vec load_row_words(const bf16* p, int n) {
  const Bf16Pack raw = n >= 2 * kWidth ? load_pack(p) : load_pack_some(p, n);
  return {_mm512_castsi512_ps((__m512i)raw.v)};
}
TC_INLINE Vec load_column_words(const bf16* even, const bf16* odd, int n) {
  const __m512i low = _mm512_castps_si512(load_up_to(even, n).v);  // widened: the element is the upper half
  const __m512i high = odd ? _mm512_castps_si512(load_up_to(odd, n).v) : _mm512_setzero_si512();
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(low, 16), high))};
}
TC_INLINE Word* store_row_words(Word* p, Vec a, Vec b, bf16) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
  return p + kWidth;
}

#endif

// ---- transposition of a kWidth x kWidth block of words; moves bits, whatever they mean

#if defined(TOKENCOMP_AVX512)

TC_INLINE void transpose(Vec (&x)[kWidth]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  const auto low = [](__m512 p, __m512 q) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(p), _mm512_castps_pd(q)));
  };
  const auto high = [](__m512 p, __m512 q) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(p), _mm512_castps_pd(q)));
  };
  for (int i = 0; i < 16; i += 4) {
    b[i] = low(a[i], a[i + 2]);
    b[i + 1] = high(a[i], a[i + 2]);
    b[i + 2] = low(a[i + 1], a[i + 3]);
    b[i + 3] = high(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // quarter q of b[4 j + i] holds column 4 q + i of rows 4 j .. 4 j + 3
    const __m512 p = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x44), q = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xee);
    const __m512 r = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x44);
    const __m512 s = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xee);
    x[i].v = _mm512_shuffle_f32x4(p, r, 0x88);
    x[4 + i].v = _mm512_shuffle_f32x4(p, r, 0xdd);
    x[8 + i].v = _mm512_shuffle_f32x4(q, s, 0x88);
    x[12 + i].v = _mm512_shuffle_f32x4(q, s, 0xdd);
  }
}

#elif defined(TOKENCOMP_AVX2)

TC_INLINE void transpose(Vec (&x)[kWidth]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    x[4 + i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}

#else

TC_INLINE void transpose(Vec (&x)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = x[i].v[j];
      x[i].v[j] = x[j].v[i];
      x[j].v[i] = swapped;
    }
  }
}

#endif

// ---- tiles

constexpr int kLaneVecs = kWidth == 16 ? 4 : 2;  // registers of rows in lanes; with 6 broadcast rows: 24 or 12 sums
constexpr int kLaneTile = kLaneVecs * kWidth;    // rows in lanes of a tile
constexpr int kRowTile = 6;                      // rows broadcast of a tile

// out[r][v] = products of broadcast row r (at rows + r * stride) with lane rows v * kWidth ...
// (lanes[words][kLaneTile]).
template <class T>
TC_INLINE void lane_products(const Word* rows, int stride, const Word* lanes, int words,
                             Vec (&out)[kRowTile][kLaneVecs]) {
  using Lanes = typename WordOf<T>::Lanes;
  for (int r = 0; r < kRowTile; ++r) {
    for (int v = 0; v < kLaneVecs; ++v) out[r][v] = broadcast(0.0f);
  }
  for (int w = 0; w < words; ++w) {
    Lanes lane[kLaneVecs];
    for (int v = 0; v < kLaneVecs; ++v) lane[v] = load_words(lanes + w * kLaneTile + v * kWidth, Lanes{});
    for (int r = 0; r < kRowTile; ++r) {
      const Lanes row = broadcast_word(rows + r * stride + w, Lanes{});
      for (int v = 0; v < kLaneVecs; ++v) out[r][v] = multiply_add(lane[v], row, out[r][v]);
    }
  }
}

template <class T>
TC_INLINE int words_of(int elements) {
  return (elements + WordOf<T>::elements - 1) / WordOf<T>::elements;
}

// Row p of n elements as words, padded with zeros to a multiple of kWidth words.
template <class T>
TC_INLINE void pack_row(const T* p, int n, Word* out) {
  constexpr int kStep = kWidth * WordOf<T>::elements;
  for (int i = 0; i < n; i += kStep, out += kWidth) {
    store(reinterpret_cast<float*>(out), load_row_words(p + i, n - i));
  }
}

constexpr int kPrefetchRows = 128;  // rows ahead; measured, see bench/NOTES.md

// Rows of n elements into lanes: out[words][kLaneTile], words a multiple of kWidth. load(r, i) gives a register of
// words from element i of row r on.
template <class T, class F>
TC_INLINE void pack_blocks(F&& load, int n, Word* out) {
  constexpr int kStep = kWidth * WordOf<T>::elements;
  for (int v = 0; v < kLaneVecs; ++v) {
    for (int i = 0, w = 0; i < n; i += kStep, w += kWidth) {
      Vec block[kWidth];
      for (int r = 0; r < kWidth; ++r) block[r] = load(v * kWidth + r, i);
      transpose(block);
      for (int r = 0; r < kWidth; ++r) {
        store(reinterpret_cast<float*>(out + (w + r) * kLaneTile + v * kWidth), block[r]);
      }
    }
  }
}

// kLaneTile rows: row(i) is null where there is none, zeros; ahead(i) is an address worth fetching.
template <class T, class F, class P>
TC_INLINE void pack_lane_rows(F&& row, P&& ahead, int n, Word* out) {
  const auto load = [&](int r, int i) {
    const T* p = row(r);
    __builtin_prefetch(ahead(r) + i);  // strided: the processor does not see it coming
    return p ? load_row_words(p + i, n - i) : broadcast(0.0f);
  };
  pack_blocks<T>(load, n, out);
}

// `count` rows, `stride` elements apart; the rest are zeros.
template <class T>
TC_INLINE void pack_lanes(const T* p, int64_t stride, int count, int n, Word* out) {
  const auto load = [=](int r, int i) {
    __builtin_prefetch(p + (r + kPrefetchRows) * stride + i);  // strided: the processor does not see it coming
    return r < count ? load_row_words(p + r * stride + i, n - i) : broadcast(0.0f);
  };
  pack_blocks<T>(load, n, out);
}

// Row r at p + offset[r], zeros where that is negative. Offsets reach kPrefetchRows beyond the tile.
template <class T>
TC_INLINE void pack_lanes(const T* p, const int64_t* offset, int n, Word* out) {
  const auto load = [=](int r, int i) {
    __builtin_prefetch(p + offset[r + kPrefetchRows] + i);
    return offset[r] >= 0 ? load_row_words(p + offset[r] + i, n - i) : broadcast(0.0f);
  };
  pack_blocks<T>(load, n, out);
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
