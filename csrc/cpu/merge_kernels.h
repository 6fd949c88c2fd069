// The boundary between the torch-aware side (merge.cpp) and the kernels compiled once per instruction set.
#pragma once

#include "core/merge.h"

namespace tokencomp::merge {

constexpr int kRowBlock = 64;   // rows of a match that are worked on together
constexpr int kColumnPad = 32;  // packed columns come in multiples of this

constexpr int64_t padded_columns(int64_t n) { return (n + kColumnPad - 1) / kColumnPad * kColumnPad; }

// The columns of one item, packed. `data` holds padded_columns(R) * channels floats.
struct Columns {
  float* data;
  float* factor;    // [padded] what a product is multiplied by, NaN where the column takes no part
  float* position;  // [padded] token numbers, where distances are limited
};

// Packs columns [begin, end), whole multiples of kColumnPad; what is past the last column takes no part.
using PackKernel = void(const MatchArgs& args, int b, int begin, int end, const Columns& columns);
// Matches rows [begin, end) of item b; `rows` is kRowBlock * channels floats of working memory.
using MatchKernel = void(const MatchArgs& args, int b, int begin, int end, const Columns& columns, float* rows);

// The energies of tokens [begin, end) of item b; `pack_energy` packs the columns, `count` of which take part.
using PackEnergyKernel = void(const EnergyArgs& args, int b, int begin, int end, const Columns& columns);
using EnergyKernel = void(const EnergyArgs& args, int b, int begin, int end, int count, const Columns& columns,
                          float* rows);

// The tokens of each output row of one item, in ascending order: token[first[m]] up to token[first[m + 1]].
struct Groups {
  const int* first;  // [M + 1]
  const int* token;  // [N]
};

// Writes the output rows whose first tokens are in [begin, end); `row` is C floats of working memory. Going by tokens
// reads x from front to back, whatever the order of the output: twice as fast where x comes from memory.
using MergeKernel = void(const MergeArgs& args, int b, int begin, int end, const Groups& groups, float* row);

}  // namespace tokencomp::merge
