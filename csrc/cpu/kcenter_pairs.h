// Products between rows, in register tiles. Included by kcenter_kernels.cpp only.
//
// A tile keeps one accumulator per pair in registers while it walks the channels, so that a loaded row serves several
// pairs; a block of kBlock x kBlock pairs is the unit of all-pairs work.
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

// Product of a row with a row of floats (a mean).
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

constexpr int kChannelsPerPass = 1024;  // 8 rows x 4 KiB of a tile stay in L1

// out[r * stride + c] += product of rows a[r] and b[c] over channels [begin, end), r < kRows, c < kCols.
template <bool kL2, int kRows, int kCols, class T>
TC_INLINE void tile_pass(const T* const* a, const T* const* b, int begin, int end, float* out, int stride) {
  constexpr int step = kL2 ? kWidth : kPack<T>;
  Vec acc[kRows][kCols];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) acc[r][c] = broadcast(0);
  }
  int ch = begin;
  for (; ch + step <= end; ch += step) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kCols; ++c) acc[r][c] = accumulate<kL2>(a[r] + ch, b[c] + ch, acc[r][c]);
    }
  }
  if (ch < end) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kCols; ++c) acc[r][c] = accumulate_some<kL2>(a[r] + ch, b[c] + ch, end - ch, acc[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) out[r * stride + c] += sum(acc[r][c]);
  }
}

// out[r * stride + c] = product of rows a[r] and b[c]: dot product, or sum of squared differences. Every path goes
// through here and a pair is always summed in the same order, whatever tile it falls in: the paths agree bit by bit.
template <bool kL2, int kRows, int kCols, class T>
TC_INLINE void tile(const T* const* a, const T* const* b, int C, float* out, int stride) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) out[r * stride + c] = 0;
  }
  for (int begin = 0; begin < C; begin += kChannelsPerPass) {
    const int end = begin + kChannelsPerPass < C ? begin + kChannelsPerPass : C;
    tile_pass<kL2, kRows, kCols>(a, b, begin, end, out, stride);
  }
}

template <bool kL2, class T>
TC_INLINE float product(const T* a, const T* b, int C) {
  float out;
  tile<kL2, 1, 1>(&a, &b, C, &out, 1);
  return out;
}

constexpr int kBlock = kPairBlock;  // 64 rows x 4 KiB per pass = 256 KiB: the row panel stays in L2

// All products of rows [row0, row0 + rows) with rows [col0, col0 + cols). Tiles at the edge repeat the last row.
template <bool kL2, class T>
TC_INLINE void block(const Rows<T>& x, int row0, int rows, int col0, int cols, float (*products)[kBlock]) {
  for (int r = 0; r < kBlock; ++r) {
    for (int c = 0; c < kBlock; ++c) products[r][c] = 0;
  }
  for (int begin = 0; begin < x.C; begin += kChannelsPerPass) {
    const int end = begin + kChannelsPerPass < x.C ? begin + kChannelsPerPass : x.C;
    for (int c = 0; c < cols; c += kTileCols) {
      const T* b[kTileCols];
      for (int u = 0; u < kTileCols; ++u) b[u] = x[col0 + (c + u < cols ? c + u : cols - 1)];
      for (int r = 0; r < rows; r += kTileRows) {
        const T* a[kTileRows];
        for (int u = 0; u < kTileRows; ++u) a[u] = x[row0 + (r + u < rows ? r + u : rows - 1)];
        tile_pass<kL2, kTileRows, kTileCols>(a, b, begin, end, &products[r][c], kBlock);
      }
    }
  }
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
