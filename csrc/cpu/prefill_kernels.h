// The boundary between the torch-aware side (prefill.cpp) and the kernels compiled once per instruction set.
#pragma once

#include "core/prefill.h"

namespace tokencomp::prefill {

constexpr int kUnit = 64;      // keys that are packed together, a whole number of tiles at every level
constexpr int kStepUnits = 4;  // units between two updates of the running maxima; measured, see bench/NOTES.md
constexpr int kStepKeys = kUnit * kStepUnits;
constexpr int kDenseRows = 96;    // rows of a task without lists: whole tiles of six
constexpr int kMostRows = 132;    // rows of a task, padded to whole tiles
constexpr int kWordPadding = 16;  // packed rows are a multiple of this many words at every level

// A query block of one head.
struct PrefillTask {
  int b, h, block;
};

struct PrefillWork {
  const PrefillTask* tasks;  // in the order in which threads take them
  int64_t count;
  int rows;            // of a task
  int64_t first_pair;  // (b, kv head) whose keys and values are packed now, with the next ones
  int pairs;
  uint32_t *keys, *values;  // [pairs, units] packed
  uint32_t* scratch;
  int64_t scratch_words;  // of one slot
  int slots;              // tasks that run at a time
};

TC_HD constexpr int units_of(int64_t keys) { return int((keys + kUnit - 1) / kUnit); }
TC_HD constexpr int64_t padded_words(int elements) {
  return (elements + kWordPadding - 1) / kWordPadding * int64_t(kWordPadding);
}
// At most, at any level: one word an element.
TC_HD constexpr int64_t unit_words(int elements) { return kUnit * padded_words(elements); }

// Of one slot: packed queries, outputs, logits, weights, biases, and units of single columns.
TC_HD constexpr int64_t scratch_words(int D, int Dv) {
  return kMostRows * (padded_words(D) + padded_words(Dv) + 2 * kStepKeys) + 2 * kStepKeys +
         kStepUnits * (unit_words(D) + unit_words(Dv));
}

using PrefillKernel = void(const PrefillArgs& args, const PrefillWork& work);

}  // namespace tokencomp::prefill
