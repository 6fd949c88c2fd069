// The two products of the decode kernels, over rows of elements wherever they lie: of pages, or unpacked codes.
// Included by decode_kernels.cpp only.
#pragma once

#include "cpu/decode_ahead.h"
#include "cpu/decode_kernels.h"
#include "cpu/row_tiles.h"
#include "cpu/simd_math.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace decode;

// kRows query rows against tiles of kKeys keys; logits and weights of a tile lie as [row][key] in one vector.
template <class T, int kRows>
struct Tiles : RowTiles<T, kRows> {
  using W = Weights<T>;
  using Stored = typename W::Stored;
  using RowTiles<T, kRows>::kKeys;
  static_assert(kChunkKeys % kKeys == 0);

  // Times that the tiles are gone through for n channels.
  static int passes(int n) {
    constexpr int kStep = W::kSteps * W::kElements;
    return n / kStep + (n % kStep + W::kElements - 1) / W::kElements;
  }

  // Adds the weighted values of `tiles` tiles, channels [begin, end), to sums [kRows][stride]; Meanwhile are
  // fetched the rows `next` or a step of what is `ahead` a tile, where there are any.
  static TC_INLINE_MEMBER void weigh(const T* const* v, const Stored* p, int tiles, int begin, int end, float* sums,
                                     int stride, const T* const* next, LinesAhead* ahead) {
    constexpr int kStep = W::kSteps * W::kElements;
    int c = begin;
    for (; c + kStep <= end; c += kStep) weigh_columns<W::kSteps>(v, p, tiles, c, end, sums, stride, next, ahead);
    for (; c < end; c += W::kElements) weigh_columns<1>(v, p, tiles, c, end, sums, stride, next, ahead);
  }

 private:
  template <int kSteps>
  static TC_INLINE_MEMBER void weigh_columns(const T* const* v, const Stored* p, int tiles, int c, int end, float* sums,
                                             int stride, const T* const* next, LinesAhead* ahead) {
    Vec x[kRows][kSteps * W::kSums];
    float* out = sums + c;
    for (int i = 0; i < kRows; ++i) {
      for (int n = 0; n < kSteps * W::kSums; ++n) x[i][n] = load(out + int64_t(i) * stride + n * kWidth);
    }
    for (int tile = 0; tile < tiles; ++tile, v += kKeys, p += kWidth) {
      for (int t = 0; t < kKeys; t += 2) {
        typename W::Rows two[kSteps];
        for (int n = 0; n < kSteps; ++n) {
          const int at = c + n * W::kElements;
          two[n] = W::rows(v[t] + at, v[t + 1] + at, kSteps > 1 ? W::kElements : end - at);
        }
        for (int i = 0; i < kRows; ++i) {
          const auto both = W::pair(p + i * kKeys + t);
          for (int n = 0; n < kSteps; ++n) W::add(x[i] + n * W::kSums, two[n], both);
        }
      }
      if (ahead) ahead->fetch();
      if (next) {
        for (int t = 0; t < kKeys; ++t) prefetch_row(next[tile * kKeys + t] + c, kSteps * W::kElements);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int n = 0; n < kSteps * W::kSums; ++n) store(out + int64_t(i) * stride + n * kWidth, x[i][n]);
    }
  }
};

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
