// Attention scores on the CPU: keys in lanes, query rows broadcast. Shared by the kernel files of the family.
#pragma once

#include "cpu/parallel.h"
#include "cpu/score_kernels.h"
#include "cpu/simd_lanes.h"
#include "cpu/simd_math.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace score;

static_assert(kKeyBlock % kLaneTile == 0 && kRowBlock % kRowTile == 0 && kWordPadding % kWidth == 0);

template <class T>
struct Operands {
  const Attention& a;
  int words;   // of a row that are multiplied
  int padded;  // of a packed row
  int half;    // words of one of the two parts of a row where there are two

  TC_INLINE_MEMBER explicit Operands(const Attention& attention) : a(attention) {
    const int own = words_of<T>(a.g.D);
    half = (own + kWidth - 1) / kWidth * kWidth;
    padded = a.k_min ? 2 * half : half;
    words = a.k_min ? half + own : own;
  }

  TC_INLINE_MEMBER const T* query(int b, int h, int t) const {
    return static_cast<const T*>(a.q) + b * a.q_stride_b + h * a.q_stride_h + t * a.q_stride_t;
  }

  // Pages score max(q, 0) with their maxima and min(q, 0) with their minima: one product of doubled width.
  TC_INLINE_MEMBER void pack_query(int b, int h, int t, Word* out) const {
    const T* row = query(b, h, t);
    if (!a.k_min) {
      pack_row(row, a.g.D, out);
      return;
    }
    T part[2][kMaxHeadDim];
    for (int c = 0; c < a.g.D; ++c) {
      const bool positive = to_float(row[c]) > 0.0f;
      part[0][c] = positive ? row[c] : T{};
      part[1][c] = positive ? T{} : row[c];  // a NaN too
    }
    pack_row(part[0], a.g.D, out);
    pack_row(part[1], a.g.D, out + half);
  }

  // Keys [first, first + kKeyBlock) of (b, kv): tile after tile of kLaneTile keys. Those past S are zeros.
  TC_INLINE_MEMBER void pack_keys(int b, int kv, int first, Word* out) const {
    const int64_t at = b * a.k_stride_b + kv * a.k_stride_h;
    for (int j = first; j < first + kKeyBlock && j < a.g.S; j += kLaneTile, out += padded * kLaneTile) {
      const int count = a.g.S - j < kLaneTile ? a.g.S - j : kLaneTile;
      pack_lanes(static_cast<const T*>(a.k) + at + j * a.k_stride_s, a.k_stride_s, count, a.g.D, out);
      if (!a.k_min) continue;
      pack_lanes(static_cast<const T*>(a.k_min) + at + j * a.k_stride_s, a.k_stride_s, count, a.g.D,
                 out + half * kLaneTile);
    }
  }
};

// The biases of keys [first, first + kKeyBlock), times `factor`; 0 without a bias. NaN means masked.
static inline void load_bias(const Attention& a, int b, int kv, int first, float factor, float* out) {
  const float* bias = a.key_bias ? a.key_bias + b * a.bias_stride_b + kv * a.bias_stride_h + first : nullptr;
  for (int j = 0; j < kKeyBlock; ++j) {
    const float value = bias && first + j < a.g.S ? factor * bias[j] : 0.0f;
    out[j] = value == value ? value : -INFINITY;
  }
}

// scale * product, capped if asked for; times `factor` in the end.
template <bool kCap>
struct Logit {
  Vec scale, cap;
  TC_INLINE_MEMBER Logit(const Attention& a, float factor)
      : scale(broadcast(kCap ? a.scale / a.softcap : a.scale * factor)), cap(broadcast(a.softcap * factor)) {}
  TC_INLINE_MEMBER Vec operator()(Vec product, Vec bias) const {
    if constexpr (kCap) return fma(tanh(mul(product, scale)), cap, bias);
    return fma(product, scale, bias);
  }
};

template <class F>
TC_INLINE void dispatch_cap(const Attention& a, F&& f) {
  if (a.softcap > 0.0f) {
    f.template operator()<true>();
  } else {
    f.template operator()<false>();
  }
}

// Tasks [0, count) are taken as threads come, so that one that wakes late does not keep the others waiting. What a task
// computes does not depend on who takes it. f(task, slot).
template <class F>
static inline void for_each_task(int64_t count, int slots, F&& f) {
  int64_t next = 0;
  parallel_for(slots < count ? slots : count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) f(task, slot);
    }
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
