// The boundary between the torch-aware side (topk.cpp) and the kernels compiled once per instruction set.
#pragma once

#include "core/topk.h"

namespace tokencomp::topk {

// Slots by digit. A bin that many tokens share would make each increment wait for the one before it: counts are spread
// over tables.
struct Histogram {
  static constexpr int kTables = 4;
  uint32_t count[kTables][kBins];
  uint64_t mass[kBins];
};

// Working memory of one row in flight, cut into `chunks` that threads share. O(histogram + k), whatever S.
struct CpuScratch {
  Histogram* histogram;  // [chunks]
  int64_t* above;        // [chunks] slots above the threshold
  int64_t* equal;        // [chunks] slots equal to it
  uint32_t* sample;      // [kSampleSize]
  uint32_t* slots;       // [candidates] of these tokens
  int* index;            // [chunks, candidates] tokens that may be kept
  int chunks;
  int64_t candidates;
};

constexpr int kSampleSize = 4096;

// Memory for the candidates of a chunk: what the sample lets through is at most about three times k, or this where k is
// small. Vectors are stored whole, hence the 64.
constexpr int64_t candidates_of(int k) { return 4 * int64_t(k) + 2048 + 64; }

using SelectKernel = void(const Args& args, const CpuScratch& scratch, int r);

struct BudgetScratch {
  uint32_t* count;  // [H, kBins] of each head
  int64_t* above;   // [H] tokens of a head above the prefix
};

using BudgetKernel = void(const BudgetArgs& args, const BudgetScratch& scratch, int b);

}  // namespace tokencomp::topk
