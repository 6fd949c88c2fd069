// The boundary between the torch-aware side (score.cpp) and the kernels compiled once per instruction set.
#pragma once

#include "core/score.h"

namespace tokencomp::score {

constexpr int kRowBlock = 96;     // broadcast rows packed at a time: they stay in L1 or L2 while keys go by
constexpr int kKeyBlock = 256;    // keys packed at a time, a whole number of tiles at every level
constexpr int kWordPadding = 16;  // packed rows are a multiple of this many words at every level

// Keys that at least one of the kRowBlock rows of a block sees; first >= last: none of its rows counts.
struct Bounds {
  int first, last;
};

// Working memory of column and diagonal scores, O(rows + keys).
struct ColumnWork {
  float* beta;      // [B, Hq, T] see beta_of
  Range* range;     // [B, T]
  Bounds* bounds;   // [B, Hq, row blocks]
  float* per_head;  // [B, Hq, S]; `out` itself where heads are not reduced
  uint32_t* scratch;
  int64_t scratch_words;  // of one slot
  int slots;              // tasks that run at a time
};

struct LseWork {
  float* partial;  // [splits, B, Hq, T, 2] maximum and sum of exponentials relative to it
  int splits, keys_per_split;
  uint32_t* scratch;
  int64_t scratch_words;
  int slots;
};

TC_HD constexpr int row_blocks(int64_t rows) { return int((rows + kRowBlock - 1) / kRowBlock); }
TC_HD constexpr int key_blocks(int64_t keys) { return int((keys + kKeyBlock - 1) / kKeyBlock); }

// Words of one packed row, at most: one a channel, twice that for pages of maxima and minima.
TC_HD constexpr int64_t packed_words(const Attention& a) {
  const int64_t words = (a.g.D + kWordPadding - 1) / kWordPadding * kWordPadding;
  return a.k_min ? 2 * words : words;
}

// Per slot: packed keys, packed rows, and kFloatRows arrays of a key block.
constexpr int kFloatRows = 10;
TC_HD constexpr int64_t scratch_words(const Attention& a) {
  return (kKeyBlock + kRowBlock) * packed_words(a) + int64_t(kFloatRows) * 2 * kKeyBlock;
}

// Keys are split by shape alone, so that results do not depend on the number of threads.
inline LseWork plan_lse(const Geometry& g) {
  constexpr int64_t kTasks = 64, kFewestKeys = 4 * kKeyBlock;
  const int64_t rows = int64_t(g.group()) * g.T, blocks = int64_t(g.B) * g.Hkv * row_blocks(rows);
  const int64_t wanted = blocks < kTasks ? (kTasks + blocks - 1) / (blocks ? blocks : 1) : 1;
  int64_t keys = (g.S + wanted - 1) / wanted;
  keys = keys < kFewestKeys ? kFewestKeys : int64_t(key_blocks(keys)) * kKeyBlock;
  LseWork work{};
  work.keys_per_split = int(keys);
  work.splits = g.S ? int((g.S + keys - 1) / keys) : 1;
  return work;
}

using ColumnKernel = void(const ColumnArgs& args, const ColumnWork& work);
using LseKernel = void(const LseArgs& args, const LseWork& work);
using VoteKernel = void(const VoteArgs& args);
using DecayKernel = void(const DecayArgs& args);

}  // namespace tokencomp::score
