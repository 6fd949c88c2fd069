// The boundary between the torch-aware side (kcenter.cpp) and the kernels compiled once per instruction set.
#pragma once

#include "core/kcenter.h"
#include "cpu/kcenter_plan.h"

namespace tokencomp::kcenter {

constexpr int kPairBlock = 64;  // all-pairs work is cut into blocks of kPairBlock x kPairBlock pairs

constexpr int64_t padded(int64_t n) { return (n + kPairBlock - 1) / kPairBlock * kPairBlock; }

// Working memory of one item in flight; O(N) without the matrix. Arrays of N are padded(N) long: kernels may touch, but
// not use, the lanes behind the last token.
struct CpuScratch {
  float* inverse_norm;  // [N] 1/|x|, NaN = invalid row
  float* state;         // [N] NaN = picked or invalid
  float* score;         // [N] NaN = picked or invalid
  float* cost;          // [N] of the newest centre; of the nearest neighbour while the first pick is sought
  float* mean;          // [C]
  float* nearest;       // [slots, padded(N)] nearest-neighbour costs seen by each task of the all-pairs pass
  int* seen;            // [N] centres folded into the state (lazy)
  int* list;            // [N] tokens a lazy pick looks at
  int* centre;          // [k] valid picks so far
  float* matrix;        // [N, N] costs (gram), or null
  int slots;
};

using CpuKernel = void(const Args& args, const CpuPlan& plan, const CpuScratch& scratch, int b);

}  // namespace tokencomp::kcenter
