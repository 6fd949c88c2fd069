// k-center selection: the arguments every back end receives and the arithmetic they share.
//
// Tokens carry a running `state` that folds in one `cost` per chosen centre (both smaller = closer):
//   cost(i, c)  cosine: -<x_i, x_c> / (|x_i| |x_c|)    dot: -<x_i, x_c>    l2: |x_i - x_c|^2
//   max_min     state = min over centres of cost                 start: +inf
//   max_sum     state = sum over centres of cost (l2: of |.|)    start: 0
// The next centre is the token of largest score. Ranking by the state itself (not by 1 + state) keeps the resolution
// that a rounding 1 - cosine would lose; a weight multiplies the distance, so weighted scores rank by weight *
// distance. Rows with a non-finite square sum are `invalid`: score -inf, and as centres they change no state.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/norm.h"

namespace tokencomp::kcenter {

enum class Objective { max_min, max_sum };
enum class Metric { cosine, l2, dot };
enum class First { largest_nn, index0, centroid };

struct Args {
  const void* x = nullptr;        // [B, N, C], elements of `dtype`, last dimension contiguous
  const int* seed = nullptr;      // [B, S], or null: the first S picks
  const float* weight = nullptr;  // [B, N], or null
  const int* lengths = nullptr;   // [B], or null: valid tokens of each item
  int* index = nullptr;           // [B, k], pick order, -1 where an item has no token left
  float* value = nullptr;         // [B, k], distance to the earlier picks at the time of the pick
  int64_t x_stride_b = 0, x_stride_n = 0;
  int B = 0, N = 0, C = 0, k = 0, S = 0;
  DType dtype = DType::f32;
  Objective objective = Objective::max_min;
  Metric metric = Metric::cosine;
  First first = First::largest_nn;
  int device = -1;
};

// Number of valid tokens of item b; a length outside [0, N] is clamped.
TC_HD int length_of(const Args& a, int b) {
  if (!a.lengths) return a.N;
  const int n = a.lengths[b];
  return n < 0 ? 0 : n > a.N ? a.N : n;
}

struct Rule {
  Objective objective;
  Metric metric;
  bool weighted;

  // `product` is the dot product of the two rows, or for l2 the sum of squared differences (formed directly: the
  // expansion |x|^2 - 2<x,c> + |c|^2 cancels for near neighbours). Symmetric in i and c bit by bit.
  TC_HD float cost(float product, float inv_i, float inv_c) const {
    if (metric == Metric::cosine) return -(product * (inv_i * inv_c));
    return metric == Metric::dot ? -product : product;
  }

  TC_HD float start() const { return objective == Objective::max_min ? INFINITY : 0.0f; }

  TC_HD float fold(float state, float cost) const {
    if (objective == Objective::max_min) return cost < state ? cost : state;
    return state + (metric == Metric::l2 ? sqrtf(cost) : cost);
  }

  // Distance to the `centres` folded in so far, in the metric's own unit.
  TC_HD float distance(float state, int centres) const {
    if (metric == Metric::cosine) return (objective == Objective::max_min ? 1.0f : float(centres)) + state;
    if (metric == Metric::l2 && objective == Objective::max_min) return sqrtf(state);
    return state;
  }

  // Before any centre there is no distance to weigh: all scores are equal and the lowest index wins.
  TC_HD float score(float state, float weight, int centres) const {
    return weighted && centres > 0 ? weight * distance(state, centres) : state;
  }

  TC_HD float value(float state, float weight, int centres) const {
    return weighted && centres > 0 ? weight * distance(state, centres) : distance(state, centres);
  }

  // How the first centre is ranked by `largest_nn`: by the distance to the nearest other token, whatever the objective.
  TC_HD Rule nearest_neighbour() const { return {Objective::max_min, metric, weighted}; }
};

TC_HD Rule rule_of(const Args& a) { return {a.objective, a.metric, a.weight != nullptr}; }

}  // namespace tokencomp::kcenter
