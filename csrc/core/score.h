// Attention scores: arguments and the rules both back ends share, torch-free. All scores are sums or maxima over pairs
// (query row t, key j) of which a pair counts only where the row sees the key (`visible`).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace tokencomp::score {

enum class Rows { sum, max };
enum class Heads { none, kv_sum, kv_mean, kv_max, mean, rms };
enum class Vote { softmax_sum, sum, max, mean };

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kMaxHeadDim = 256;

// Half-open.
struct Range {
  int begin, end;
};

// Who sees whom.
struct Geometry {
  int B, Hq, Hkv, T, S, D;
  const int* q_position;  // of row (b, t) at b * position_stride + t, or null: S - T + t
  int64_t position_stride;
  const int* lengths;  // [B] or null
  const int* starts;   // [B] or null
  bool causal;
  int window;  // keys that a row sees, itself included; 0: all

  TC_HD int group() const { return Hq / Hkv; }
};

TC_HD int position_of(const Geometry& g, int b, int t) {
  return g.q_position ? g.q_position[b * g.position_stride + t] : g.S - g.T + t;
}

// Keys of sequence b that exist.
TC_HD Range keys_of(const Geometry& g, int b) {
  const int start = g.starts ? g.starts[b] : 0, length = g.lengths ? g.lengths[b] : g.S;
  return {start > 0 ? start : 0, length < g.S ? length : g.S};
}

// Keys that row t of sequence b sees; empty as {0, 0}.
TC_HD Range visible(const Geometry& g, int b, int t) {
  Range r = keys_of(g, b);
  if (g.causal || g.q_position) {
    const int p = position_of(g, b, t);
    if (p < r.begin || p >= r.end) return {0, 0};  // padding
    if (g.causal) {
      r.end = p + 1;
      if (g.window && p - g.window + 1 > r.begin) r.begin = p - g.window + 1;
    }
  }
  if (r.begin >= r.end) return {0, 0};
  return r;
}

// Queries and keys; strides in elements, the last dimension is contiguous.
struct Attention {
  Geometry g;
  const void *q, *k, *k_min;  // [B, Hq, T, D], [B, Hkv, S, D]; k_min: strides of k, or null
  int64_t q_stride_b, q_stride_h, q_stride_t;
  int64_t k_stride_b, k_stride_h, k_stride_s;
  DType dtype;
  float scale, softcap;   // softcap 0: none
  const float* key_bias;  // [B, 1 or Hkv, S] or null
  int64_t bias_stride_b, bias_stride_h;
  int device;
};

struct ColumnArgs {
  Attention a;
  const float* lse;         // [B, Hq, T] natural logarithm
  const float* row_weight;  // strided over B and Hq, rows contiguous, or null: 1
  int64_t weight_stride_b, weight_stride_h;
  Rows rows;
  Heads heads;
  int power;   // 1 or 2
  float* out;  // [B, H*, S]
};

struct LseArgs {
  Attention a;
  float* lse;     // [B, Hq, T]
  float* logits;  // [B, Hq, T, S] or null
};

struct VoteArgs {
  const float *scores, *lse;  // [B, Hq, S], [B, Hq] or null
  int B, Hq, S, groups;
  Vote mode;
  float* out;  // [B, groups, S]
  int device;
};

struct DecayArgs {
  float* score;                  // [B, H, S]
  const float *logits, *lse;     // [B, Hq, S]; [B, Hq] or null: logits are probabilities
  const int* lengths;            // [B] or null
  int *count, *last, *interval;  // [B, H, S] or null
  int B, Hq, H, S, step, power;
  Heads heads;
  float gamma, alpha;
  int device;
};

TC_HD bool is_finite(float x) { return x - x == 0.0f; }

// A row's part of the exponent: every probability is 2^(power * log2e * z - beta), weight included. +inf removes the
// row: weight 0, or an lse that is not finite (a row that saw no key, or overflowed).
TC_HD float beta_of(float lse, float weight, int power) {
  if (!is_finite(lse) || !(weight > 0.0f)) return INFINITY;
  return float(power * 1.4426950408889634 * double(lse) - double(log2f(weight)));  // rounded once
}

TC_HD int heads_out(Heads heads, int Hq, int Hkv) {
  return heads == Heads::none ? Hq : heads == Heads::mean || heads == Heads::rms ? 1 : Hkv;
}

// The reduction over heads, one head after the other: total = accumulate_head(heads, total, value), then finish_heads.
TC_HD float accumulate_head(Heads heads, float total, float value) {
  if (heads == Heads::kv_max) return value > total ? value : total;
  return total + (heads == Heads::rms ? value * value : value);
}

TC_HD float finish_heads(Heads heads, float total, int count) {
  const bool mean = heads == Heads::kv_mean || heads == Heads::mean || heads == Heads::rms;
  if (mean) total /= float(count);
  return heads == Heads::rms ? sqrtf(total) : total;
}

}  // namespace tokencomp::score
