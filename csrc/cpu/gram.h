// Cosines of a block of rows with panels of columns, for kernels that fold them as they come (maxima, sums) and never
// keep the matrix. Included by *_kernels.cpp only.
//
// Both sides are packed once. Lanes are columns, so that there is nothing to add across lanes however few the channels
// are: a panel holds kPanel columns, channel by channel; a block holds kGramBlock rows, each channel broadcast. fp32
// and fp16 are packed as unit vectors in fp32, two features side by side. bf16 on processors that multiply it is packed
// as it is, two channels a step, and the norms go into the factors of rows and columns. A product is always summed in
// the order of the channels, whatever block it falls in: results do not depend on the number of threads.
#pragma once

#include "core/norm.h"
#include "cpu/simd.h"
#include "cpu/simd_lanes.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

constexpr int kPanel = 2 * kWidth;                    // columns
constexpr int kGramRows = kTileRows * kTileCols / 2;  // rows of a register tile, which is one panel wide
constexpr int kGramBlock = 64;                        // rows that are packed together
constexpr int kGramPad = 32;                          // a multiple of kPanel at every level
constexpr int kChannelsPerTile = 128;                 // a panel's share of L1: 16 KiB
static_assert(kGramPad % kPanel == 0 && kGramBlock % kGramRows == 0);

// What rows of T are packed as.
template <class T>
struct GramElementOf {
  using type = float;
};
#if defined(TOKENCOMP_AVX512_BF16)
template <>
struct GramElementOf<bf16> {
  using type = bf16;
};
#endif
template <class E>
constexpr int kGramStep = kPack<E> / kWidth;  // channels of a step: four bytes of a row

template <class T>
TC_INLINE float square_sum(const T* x, int C) {
  Vec acc = broadcast(0);
  for (int c = 0; c < C; c += kWidth) {
    const Vec v = load_up_to(x + c, C - c);
    acc = fma(v, v, acc);
  }
  return sum(acc);
}

// One row to be packed: up to two features with their weights in the similarity.
template <class T>
struct GramRow {
  const T *x, *x2;  // x null: takes no part; x2 null: one feature
  int C, C2;
  float share, share2;

  // What both features are to be multiplied by; both NaN where the row takes no part or is not finite.
  TC_INLINE_MEMBER void measure(float* scale) const {
    const float inverse = x ? inverse_norm(square_sum(x, C)) : NAN;
    const float inverse2 = x && x2 ? inverse_norm(square_sum(x2, C2)) : 0.0f;
    const bool counts = is_valid(inverse) && is_valid(inverse2);
    scale[0] = counts ? share * inverse : NAN;
    scale[1] = counts ? share2 * inverse2 : NAN;
  }

  // Packs the row channel after channel and returns its factor.
  template <class E>
  TC_INLINE_MEMBER float pack(E* out) const {
    float scale[2];
    measure(scale);
    const bool counts = scale[0] == scale[0];
    if constexpr (sizeof(E) == 4) {
      pack_unit(counts ? x : nullptr, C, scale[0], out);
      if (C2 > 0) pack_unit(counts ? x2 : nullptr, C2, scale[1], out + C);
      return counts ? 1.0f : NAN;
    } else {
      __builtin_memset(out, 0, size_t(C + C % 2) * sizeof(E));
      if (counts) __builtin_memcpy(out, x, size_t(C) * sizeof(E));
      return scale[0];
    }
  }

 private:
  TC_INLINE_MEMBER static void pack_unit(const T* from, int n, float scale, float* out) {
    for (int c = 0; c < n; c += kWidth) {
      const Vec v = from ? mul(load_up_to(from + c, n - c), broadcast(scale)) : broadcast(0);
      store_up_to(out + c, v, n - c);
    }
  }
};

// One feature of kWidth columns beside each other, a step every kPanel words; null for a column that takes no part.
template <class T, class E>
TC_INLINE void pack_columns(const T* const* x, const float (*scale)[2], int feature, int C, E* panel) {
  constexpr int step = kGramStep<E>, stretch = kWidth * step;
  Vec block[kWidth];
  for (int c = 0; c < C; c += stretch) {
    for (int l = 0; l < kWidth; ++l) {
      if (!x[l]) {
        block[l] = broadcast(0);
      } else if constexpr (sizeof(E) == 4) {
        block[l] = mul(load_up_to(x[l] + c, C - c), broadcast(scale[l][feature]));
      } else {
        block[l] = load_row_words(x[l] + c, C - c);
      }
    }
    transpose(block);
    const int left = (C - c + step - 1) / step;
    for (int s = 0; s < kWidth && s < left; ++s) {
      store(reinterpret_cast<float*>(panel) + int64_t(c / step + s) * kPanel, block[s]);
    }
  }
}

// Packs kWidth columns of a panel, from lane 0 of `panel` on, and writes their factors.
template <class T, class E>
TC_INLINE void pack_lanes(const GramRow<T> (&columns)[kWidth], E* panel, float* factor) {
  const T *x[kWidth], *x2[kWidth];
  float scale[kWidth][2];
  for (int l = 0; l < kWidth; ++l) {
    columns[l].measure(scale[l]);
    const bool counts = scale[l][0] == scale[l][0];
    factor[l] = counts ? (sizeof(E) == 4 ? 1.0f : scale[l][0]) : NAN;
    x[l] = counts ? columns[l].x : nullptr;
    x2[l] = counts ? columns[l].x2 : nullptr;
  }
  pack_columns<T, E>(x, scale, 0, columns[0].C, panel);
  if (columns[0].C2 > 0) {
    pack_columns<T, E>(x2, scale, 1, columns[0].C2, panel + int64_t(columns[0].C) * kPanel);
  }
}

// out[r * kPanel + column] += products of kGramRows rows with kVecs vectors of a panel over `steps` steps; `fresh`
// starts from zero.
template <int kVecs, class E>
TC_INLINE void gram_tile(const E* rows, int64_t row_stride, const E* panel, int steps, bool fresh, float* out) {
  constexpr int step = kGramStep<E>;
  Vec acc[kGramRows][kVecs];
  for (int r = 0; r < kGramRows; ++r) {
    for (int h = 0; h < kVecs; ++h) acc[r][h] = fresh ? broadcast(0) : load(out + r * kPanel + h * kWidth);
  }
  for (int s = 0; s < steps; ++s) {
    decltype(load_pack(panel)) column[kVecs];
    for (int h = 0; h < kVecs; ++h) column[h] = load_pack(panel + (int64_t(s) * kPanel + h * kWidth) * step);
    for (int r = 0; r < kGramRows; ++r) {
      const auto row = broadcast_pack(rows + r * row_stride + s * step);
      for (int h = 0; h < kVecs; ++h) acc[r][h] = multiply_add(row, column[h], acc[r][h]);
    }
  }
  for (int r = 0; r < kGramRows; ++r) {
    for (int h = 0; h < kVecs; ++h) store(out + r * kPanel + h * kWidth, acc[r][h]);
  }
}

// Products of `count` packed rows, padded to whole register tiles, with one panel, of which the first `columns` are
// wanted; `steps` over all channels.
template <class E>
TC_INLINE void gram_panel(const E* rows, int count, const E* panel, int columns, int steps, float* out) {
  constexpr int step = kGramStep<E>, chunk = kChannelsPerTile;
  const int64_t row_stride = int64_t(steps) * step;
  for (int begin = 0; begin < steps; begin += chunk) {
    const int length = steps - begin < chunk ? steps - begin : chunk;
    const E* part = panel + int64_t(begin) * step * kPanel;
    for (int r = 0; r < count; r += kGramRows) {
      const E* row = rows + r * row_stride + begin * step;
      if (columns > kWidth) {
        gram_tile<2>(row, row_stride, part, length, begin == 0, out + r * kPanel);
      } else {
        gram_tile<1>(row, row_stride, part, length, begin == 0, out + r * kPanel);
      }
    }
  }
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
