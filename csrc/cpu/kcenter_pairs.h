// Products between rows: one pair, and all pairs in register tiles. Included by kcenter_kernels.cpp only.
//
// A tile keeps kTileRows x kTileCols accumulators in registers while it walks the channels; a block of kBlock x kBlock
// pairs is the unit that is handed out to threads. Only blocks on or below the diagonal are computed.
#pragma once

#include "core/kcenter.h"
#include "cpu/kcenter_kernels.h"
#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using kcenter::kPairBlock;

template <class T>
struct Rows {
  const T* base;
  int64_t stride;
  int C;
  TC_INLINE_MEMBER const T* operator[](int64_t i) const { return base + i * stride; }
};

template <bool kL2, class T>
constexpr int kStep = kL2 ? kWidth : kPack<T>;

template <bool kL2, class T>
TC_INLINE Vec accumulate(const T* a, const T* b, Vec acc) {
  if constexpr (kL2) {
    const Vec difference = sub(load(a), load(b));
    return fma(difference, difference, acc);
  } else {
    return multiply_add(load_pack(a), load_pack(b), acc);
  }
}

template <bool kL2, class T>
TC_INLINE Vec accumulate_some(const T* a, const T* b, int n, Vec acc) {
  if constexpr (kL2) {
    const Vec difference = sub(load_some(a, n), load_some(b, n));
    return fma(difference, difference, acc);
  } else {
    return multiply_add(load_pack_some(a, n), load_pack_some(b, n), acc);
  }
}

// Dot product, or sum of squared differences, of two rows. Four chains hide the latency of the additions.
template <bool kL2, class T>
TC_INLINE float product(const T* a, const T* b, int C) {
  constexpr int step = kStep<kL2, T>;
  Vec acc[4] = {broadcast(0), broadcast(0), broadcast(0), broadcast(0)};
  int c = 0;
  for (; c + 4 * step <= C; c += 4 * step) {
    for (int u = 0; u < 4; ++u) acc[u] = accumulate<kL2>(a + c + u * step, b + c + u * step, acc[u]);
  }
  for (; c + step <= C; c += step) acc[0] = accumulate<kL2>(a + c, b + c, acc[0]);
  if (c < C) acc[1] = accumulate_some<kL2>(a + c, b + c, C - c, acc[1]);
  return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

// The same against a row of floats (a mean), whatever the type of the first.
template <bool kL2, class T>
TC_INLINE float product_with_floats(const T* a, const float* b, int C) {
  Vec acc = broadcast(0);
  for (int c = 0; c < C; c += kWidth) {
    const int lanes = C - c < kWidth ? C - c : kWidth;
    const Vec left = lanes == kWidth ? load(a + c) : load_some(a + c, lanes);
    const Vec right = lanes == kWidth ? load(b + c) : load_some(b + c, lanes);
    const Vec difference = sub(left, right);
    acc = kL2 ? fma(difference, difference, acc) : fma(left, right, acc);
  }
  return sum(acc);
}

constexpr int kBlock = kPairBlock;      // 64 rows x 1024 channels x 4 B = 256 KiB: the row panel stays in L2
constexpr int kChannelsPerPass = 1024;  // the column tile of a pass (4 x 4 KiB) stays in L1

// products[r][c] += over channels [begin, end) of up to kTileRows x kTileCols pairs. Missing rows repeat the last one,
// so that a pair is summed in the same order wherever it falls in a tile.
template <bool kL2, class T>
TC_INLINE void tile(const Rows<T>& x, int row0, int rows, int col0, int cols, int begin, int end,
                    float (*products)[kBlock]) {
  constexpr int step = kStep<kL2, T>;
  const T *a[kTileRows], *b[kTileCols];
  for (int r = 0; r < kTileRows; ++r) a[r] = x[row0 + (r < rows ? r : rows - 1)];
  for (int c = 0; c < kTileCols; ++c) b[c] = x[col0 + (c < cols ? c : cols - 1)];
  Vec acc[kTileRows][kTileCols];
  for (int r = 0; r < kTileRows; ++r) {
    for (int c = 0; c < kTileCols; ++c) acc[r][c] = broadcast(0);
  }
  int ch = begin;
  for (; ch + step <= end; ch += step) {
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kTileCols; ++c) acc[r][c] = accumulate<kL2>(a[r] + ch, b[c] + ch, acc[r][c]);
    }
  }
  if (ch < end) {
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kTileCols; ++c) acc[r][c] = accumulate_some<kL2>(a[r] + ch, b[c] + ch, end - ch, acc[r][c]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < cols; ++c) products[r][c] += sum(acc[r][c]);
  }
}

// All products of rows [row0, row0 + rows) with rows [col0, col0 + cols).
template <bool kL2, class T>
TC_INLINE void block(const Rows<T>& x, int row0, int rows, int col0, int cols, float (*products)[kBlock]) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < kBlock; ++c) products[r][c] = 0;
  }
  for (int begin = 0; begin < x.C; begin += kChannelsPerPass) {
    const int end = begin + kChannelsPerPass < x.C ? begin + kChannelsPerPass : x.C;
    for (int c = 0; c < cols; c += kTileCols) {
      for (int r = 0; r < rows; r += kTileRows) {
        tile<kL2>(x, row0 + r, rows - r < kTileRows ? rows - r : kTileRows, col0 + c,
                  cols - c < kTileCols ? cols - c : kTileCols, begin, end,
                  reinterpret_cast<float(*)[kBlock]>(&products[r][c]));
      }
    }
  }
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
