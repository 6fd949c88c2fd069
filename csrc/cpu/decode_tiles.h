// The two products of the decode kernels, over rows of elements wherever they lie: of pages, or unpacked codes.
// Included by decode_kernels.cpp only.
#pragma once

#include "cpu/decode_kernels.h"
#include "cpu/simd_math.h"
#include "cpu/simd_pairs.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace decode;

template <class T>
TC_INLINE void prefetch_row(const T* p, int n) {
  for (int i = 0; i < n; i += 64 / int(sizeof(T))) __builtin_prefetch(p + i);
}

// kRows query rows against tiles of kKeys keys; logits and weights of a tile lie as [row][key] in one vector.
template <class T, int kRows>
struct Tiles {
  using W = Weights<T>;
  using Stored = typename W::Stored;
  static constexpr int kKeys = kWidth / kRows;
  static_assert(kChunkKeys % kKeys == 0 && kKeys % 2 == 0);

  // Over channels [begin, end), begin being where a product step starts; query rows are `stride` elements apart. With
  // kTwo every query is a sum of two, `rest` behind the first: what rounding took from it.
  template <bool kTwo = false, class Q>
  static TC_INLINE_MEMBER Vec products(const T* const* k, const Q* q, int stride, int begin, int end,
                                       int64_t rest = 0) {
    Vec x[kWidth];
    for (int i = 0; i < kWidth; ++i) x[i] = broadcast(0.0f);
    int c = begin;
    for (; c + kPack<T> <= end; c += kPack<T>) {
      typename PackOf<T>::type own[kRows];
      for (int i = 0; i < kRows; ++i) own[i] = load_pack(q + i * stride + c);
      for (int t = 0; t < kKeys; ++t) {
        const auto other = load_pack(k[t] + c);
        for (int i = 0; i < kRows; ++i) x[i * kKeys + t] = multiply_add(own[i], other, x[i * kKeys + t]);
        for (int i = 0; kTwo && i < kRows; ++i) {
          x[i * kKeys + t] = multiply_add(load_pack(q + rest + i * stride + c), other, x[i * kKeys + t]);
        }
      }
    }
    if (c < end) {
      for (int t = 0; t < kKeys; ++t) {
        const auto other = load_pack_some(k[t] + c, end - c);
        for (int i = 0; i < kRows; ++i) {
          x[i * kKeys + t] = multiply_add(load_pack(q + i * stride + c), other, x[i * kKeys + t]);
        }
        for (int i = 0; kTwo && i < kRows; ++i) {
          x[i * kKeys + t] = multiply_add(load_pack(q + rest + i * stride + c), other, x[i * kKeys + t]);
        }
      }
    }
    return sum_each(x);
  }

  // Adds the weighted values of `tiles` tiles, channels [begin, end), to sums [kRows][stride]; `next`, if there is one,
  // are rows to be fetched meanwhile.
  static TC_INLINE_MEMBER void weigh(const T* const* v, const Stored* p, int tiles, int begin, int end, float* sums,
                                     int stride, const T* const* next) {
    constexpr int kStep = W::kSteps * W::kElements;
    int c = begin;
    for (; c + kStep <= end; c += kStep) weigh_columns<W::kSteps>(v, p, tiles, c, end, sums, stride, next);
    for (; c < end; c += W::kElements) weigh_columns<1>(v, p, tiles, c, end, sums, stride, next);
  }

 private:
  template <int kSteps>
  static TC_INLINE_MEMBER void weigh_columns(const T* const* v, const Stored* p, int tiles, int c, int end, float* sums,
                                             int stride, const T* const* next) {
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
