// Eviction with merging: the arguments every back end receives. A row keeps `keep_count` slots, its centres; other
// slots of it, its members, are mixed into them before the row is compacted.
#pragma once

#include <cmath>

#include "core/kvcache.h"

namespace tokencomp::kvcache {

enum class Values { mean, sum };
enum class Keys { keep, mean, direction };

// The slots of each row that stay, and others.
struct Lists {
  const int* keep = nullptr;        // [B, Hkv, K] ascending
  const int* keep_count = nullptr;  // [B, Hkv]
  const int* member = nullptr;      // [B, Hkv, M], -1: none
  int K = 0, M = 0;
};

struct AssignArgs {
  Store s;
  Lists lists;
  bool with_values = false;  // cosine of keys times cosine of values
  bool clamp = true;         // each cosine at least 0
  float min_similarity = -INFINITY;
  int* target = nullptr;        // [B, Hkv, M] ranks in `keep`, -1: none
  float* similarity = nullptr;  // [B, Hkv, M]

  TC_HD int target_or_none(float value, int rank) const {
    return value > -INFINITY && value >= min_similarity ? rank : -1;
  }
};

struct MergeArgs {
  Store s;
  Lists lists;
  const int* target = nullptr;    // [B, Hkv, M] ranks in `keep`, -1: goes into nothing
  const float* weight = nullptr;  // [B, Hkv, M] >= 0
  const float* center = nullptr;  // [B, Hkv, K] >= 0: the centres' own weights
  Values values = Values::mean;
  Keys keys = Keys::keep;
  bool by_norm = false;  // weights times |V_i| / (|V_i| + |V_c|)
};

// What `by_norm` makes of a weight; 0 for a member without a value beside a centre without one.
TC_HD float norm_share(float member, float center) {
  const float both = member + center;
  return both > 0 ? member / both : 0.0f;
}

}  // namespace tokencomp::kvcache
