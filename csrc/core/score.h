// Attention scores: arguments and the rules both back ends share, torch-free. All scores are sums or maxima over pairs
// (query row t, key j) of which a pair counts only where the row sees the key (`visible`).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/attention.h"

namespace tokencomp::score {

using namespace attention;

enum class Rows { sum, max };
enum class Heads { none, kv_sum, kv_mean, kv_max, mean, rms };
enum class Vote { softmax_sum, sum, max, mean };

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
