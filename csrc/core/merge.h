// Token merging: the arguments every back end receives and the rules they share.
//
//   match    value, index of the most similar columns of each row     top-m of a matrix that is never in memory
//   energy   mean of f(cosine) over a row of the same kind of matrix
//   map      ranks the rows, numbers the output, says where each token goes
//   merge    sums, maxima or copies over the tokens of each output row
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/norm.h"
#include "core/order.h"

namespace tokencomp::merge {

constexpr int kMaxTop = 32;
constexpr int kAnyDistance = 1 << 30;

enum class Energy { elu, paper, gauss };
enum class Order { tome, index, similarity, position };
enum class Mode { mean, sum, amax, drop, mlerp };

// One side of a match: R rows or columns, taken from N tokens.
struct Side {
  const void* x = nullptr;        // [B, N, C], elements of the call's dtype, last dimension contiguous
  const void* x2 = nullptr;       // [B, N, C2], or null
  const int* index = nullptr;     // [B, R] tokens, or null: R = N and place i is token i
  const float* weight = nullptr;  // [B, R], or null
  const bool* mask = nullptr;     // [B, R], or null
  int64_t stride_b = 0, stride_n = 0, stride2_b = 0, stride2_n = 0;
  int N = 0, R = 0;
  int protect = 0;  // the first places take no part

  // Token of place i, -1 where it takes no part.
  TC_HD int token(int b, int i) const {
    const int64_t at = int64_t(b) * R + i;
    if (i < protect || (mask && !mask[at])) return -1;
    const int t = index ? index[at] : i;
    return t >= 0 && t < N ? t : -1;
  }
  TC_HD float weight_of(int b, int i) const { return weight ? weight[int64_t(b) * R + i] : 1.0f; }
};

struct MatchArgs {
  Side a, b;
  float* value = nullptr;  // [B, a.R, top]
  int* index = nullptr;    // [B, a.R, top]
  int B = 0, C = 0, C2 = 0;
  int nearest = 0, farthest = kAnyDistance;  // how far apart the tokens of a pair may be
  int top = 1;
  float alpha = 1, min_similarity = -INFINITY;
  DType dtype = DType::f32;
  int device = -1;

  TC_HD bool limited() const { return nearest > 0 || farthest < kAnyDistance; }
  TC_HD int index_or_none(float similarity, int column) const {
    return similarity > -INFINITY && similarity >= min_similarity ? column : -1;
  }
};

struct EnergyArgs {
  Side x;
  float* energy = nullptr;  // [B, N]
  int B = 0, C = 0;
  float margin = 0, alpha = 1;
  float rate = 0, height = 1;  // Gaussian: height * exp(rate * (1 - cosine)^2)
  Energy kind = Energy::elu;
  DType dtype = DType::f32;
  int device = -1;
};

struct MapArgs {
  const float* value = nullptr;      // [B, Ra]
  const int* index = nullptr;        // [B, Ra]
  const int* a_tokens = nullptr;     // [B, Ra], or null: even tokens
  const int* b_tokens = nullptr;     // [B, Rb], or null: odd tokens
  const int* rest_tokens = nullptr;  // [B, Rr], or null
  int* map = nullptr;                // [B, N]
  int B = 0, N = 0, Ra = 0, Rb = 0, Rr = 0;
  int r = 0, prefix = 0;
  Order order = Order::tome;
  int device = -1;

  TC_HD int a_token(int b, int i) const { return a_tokens ? a_tokens[int64_t(b) * Ra + i] : 2 * i; }
  TC_HD int b_token(int b, int j) const { return b_tokens ? b_tokens[int64_t(b) * Rb + j] : 2 * j + 1; }
  TC_HD int rest_token(int b, int j) const { return rest_tokens[int64_t(b) * Rr + j]; }
  TC_HD bool is_token(int t) const { return t >= 0 && t < N; }

  // Rows in descending order of their keys are ranked: those of prefix tokens last, then larger value first, then
  // lower row.
  TC_HD OrderKey rank_key(int b, int i) const {
    const OrderKey may_move = a_token(b, i) >= prefix;
    return may_move << 63 | OrderKey(sortable(value[int64_t(b) * Ra + i])) << 31 | (0x7fffffffu - uint32_t(i));
  }
  TC_HD static int row_of(OrderKey key) { return int(0x7fffffffu - uint32_t(key & 0x7fffffffu)); }
};

// States of a token while the map of its item is made, in place of its output row.
constexpr int kUnlisted = -2, kListed = -3, kGone = -4;

struct MergeArgs {
  const void* x = nullptr;        // [B, N, C], elements of `dtype`, last dimension contiguous
  const int* map = nullptr;       // [B, N]
  const float* size = nullptr;    // [B, N], or null: ones
  const float* weight = nullptr;  // [B, N], or null: ones
  void* y = nullptr;              // [B, M, C]
  float* out_size = nullptr;      // [B, M]
  int64_t x_stride_b = 0, x_stride_n = 0;
  int B = 0, N = 0, M = 0, C = 0;
  Mode mode = Mode::mean;
  DType dtype = DType::f32;
  int device = -1;

  TC_HD float size_of(int b, int i) const { return size ? size[int64_t(b) * N + i] : 1.0f; }
  TC_HD float weight_of(int b, int i) const { return weight ? weight[int64_t(b) * N + i] : 1.0f; }
  TC_HD float coefficient(int b, int i) const { return size_of(b, i) * weight_of(b, i); }
  // Whether token i, alone in its row, comes out as it went in.
  TC_HD bool keeps_lone(int b, int i) const {
    if (mode == Mode::amax || mode == Mode::drop) return true;
    const float c = coefficient(b, i);
    return mode == Mode::sum ? c == 1 : c < 0 || c > 0;
  }
  // Output row of token i, -1 where it is dropped.
  TC_HD int group(int b, int i) const {
    const int m = map[int64_t(b) * N + i];
    return m >= 0 && m < M ? m : -1;
  }
};

}  // namespace tokencomp::merge
