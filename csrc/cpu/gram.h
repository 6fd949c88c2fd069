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

// Channels of one row times `scale`, `stride` floats apart.
template <class T>
TC_INLINE void pack_unit(const T* x, int C, float scale, float* out, int stride) {
  alignas(64) float lanes[kWidth];
  for (int c = 0; c < C; c += kWidth) {
    const int n = C - c < kWidth ? C - c : kWidth;
    const Vec v = mul(load_up_to(x + c, n), broadcast(scale));
    if (stride == 1) {
      store_up_to(out + c, v, n);
      continue;
    }
    store(lanes, v);
    for (int i = 0; i < n; ++i) out[int64_t(c + i) * stride] = lanes[i];
  }
}

// Pairs of channels as they are, `stride` pairs apart.
TC_INLINE void pack_pairs(const bf16* x, int C, bf16* out, int stride) {
  for (int c = 0; c + 2 <= C; c += 2) __builtin_memcpy(out + int64_t(c) * stride, x + c, 4);
  if (C % 2) {
    bf16* last = out + int64_t(C - 1) * stride;
    last[0] = x[C - 1];
    last[1] = bf16{};
  }
}

// One row to be packed: up to two features with their weights in the similarity.
template <class T>
struct GramRow {
  const T *x, *x2;  // x null: takes no part; x2 null: one feature
  int C, C2;
  float share, share2;

  // Packs the row and returns its factor: NaN where it takes no part or is not finite.
  template <class E>
  TC_INLINE_MEMBER float pack(E* out, int stride) const {
    const float inverse = x ? inverse_norm(square_sum(x, C)) : NAN;
    const float inverse2 = x && x2 ? inverse_norm(square_sum(x2, C2)) : 0.0f;
    const bool counts = is_valid(inverse) && is_valid(inverse2);
    if constexpr (sizeof(E) == 4) {
      if (counts) {
        pack_unit(x, C, share * inverse, out, stride);
        if (x2) pack_unit(x2, C2, share2 * inverse2, out + int64_t(C) * stride, stride);
      } else {
        for (int c = 0; c < C + C2; ++c) out[int64_t(c) * stride] = 0;
      }
      return counts ? 1.0f : NAN;
    } else {
      if (counts) {
        pack_pairs(x, C, out, stride);
      } else {
        for (int c = 0; c < C; c += 2) out[int64_t(c) * stride] = out[int64_t(c) * stride + 1] = bf16{};
      }
      return inverse;
    }
  }
};

// out[r * kPanel + column] += products of kGramRows rows with a panel over `steps` steps; `fresh` starts from zero.
template <class E>
TC_INLINE void gram_tile(const E* rows, int64_t row_stride, const E* panel, int steps, bool fresh, float* out) {
  constexpr int step = kGramStep<E>;
  Vec acc[kGramRows][2];
  for (int r = 0; r < kGramRows; ++r) {
    for (int h = 0; h < 2; ++h) acc[r][h] = fresh ? broadcast(0) : load(out + r * kPanel + h * kWidth);
  }
  for (int s = 0; s < steps; ++s) {
    const auto left = load_pack(panel + int64_t(s) * step * kPanel);
    const auto right = load_pack(panel + int64_t(s) * step * kPanel + step * kWidth);
    for (int r = 0; r < kGramRows; ++r) {
      const auto row = broadcast_pack(rows + r * row_stride + s * step);
      acc[r][0] = multiply_add(row, left, acc[r][0]);
      acc[r][1] = multiply_add(row, right, acc[r][1]);
    }
  }
  for (int r = 0; r < kGramRows; ++r) {
    for (int h = 0; h < 2; ++h) store(out + r * kPanel + h * kWidth, acc[r][h]);
  }
}

// Products of `count` packed rows, padded to whole register tiles, with one panel; `steps` over all channels.
template <class E>
TC_INLINE void gram_panel(const E* rows, int count, const E* panel, int steps, float* out) {
  constexpr int step = kGramStep<E>, chunk = kChannelsPerTile;
  const int64_t row_stride = int64_t(steps) * step;
  for (int begin = 0; begin < steps; begin += chunk) {
    const int length = steps - begin < chunk ? steps - begin : chunk;
    for (int r = 0; r < count; r += kGramRows) {
      gram_tile(rows + r * row_stride + begin * step, row_stride, panel + int64_t(begin) * step * kPanel, length,
                begin == 0, out + r * kPanel);
    }
  }
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
