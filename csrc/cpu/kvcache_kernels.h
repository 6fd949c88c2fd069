// The boundary between the torch-aware side (kvcache.cpp) and the kernels compiled once per instruction set.
#pragma once

#include "core/kvcache_merge.h"

namespace tokencomp::kvcache {

constexpr int kMemberBlock = 64;  // members that meet the centres together
constexpr int kCenterPad = 32;    // packed centres come in multiples of this

constexpr int64_t padded_centers(int64_t n) { return (n + kCenterPad - 1) / kCenterPad * kCenterPad; }

// Slots [begin, end) of a row; `table` is 2 * pairs floats of working memory.
using ShiftKernel = void(const ShiftArgs& args, int b, int h, int begin, int end, float* table);

// The centres of one row, packed for products: keys, and values where they count.
struct Centers {
  float *keys, *values;              // [padded * channels]
  float *key_factor, *value_factor;  // [padded] NaN where a centre takes no part
  float* rows;                       // [kMemberBlock * channels] working memory
};
using PackCentersKernel = void(const AssignArgs& args, int b, int h, const Centers& centers);
// Members [begin, end) of a row.
using AssignKernel = void(const AssignArgs& args, int b, int h, int begin, int end, const Centers& centers);

// The members of a row by the centre they go to, ascending: member[first[c]] up to member[first[c + 1]].
struct Groups {
  const int* first;   // [keep_count + 1]
  const int* member;  // [M] places in the list of members
};
// Centres [begin, end) of a row; `row` is as many floats of working memory as keys or values have channels.
using MergeKernel = void(const MergeArgs& args, int b, int h, int begin, int end, const Groups& groups, float* row);

}  // namespace tokencomp::kvcache
