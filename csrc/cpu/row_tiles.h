// Products of a few query rows with rows of keys where they lie: for rows that are read once, which packing them into
// lanes (simd_lanes.h) would not repay. Shared by the kernel files of every family that attends with few queries.
#pragma once

#include "core/attention.h"
#include "cpu/simd_pairs.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

// The key and value of a slot that is not there.
alignas(64) static const unsigned char kZeroRow[attention::kMaxHeadDim * 4] = {};

template <class T>
TC_INLINE void prefetch_row(const T* p, int n) {
  for (int i = 0; i < n; i += 64 / int(sizeof(T))) __builtin_prefetch(p + i);
}

// kRows query rows against tiles of kKeys keys; products of a tile lie as [row][key] in one vector, so that no row
// needs sums across lanes.
template <class T, int kRows>
struct RowTiles {
  static constexpr int kKeys = kWidth / kRows;
  static_assert(kKeys % 2 == 0);

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
};

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
