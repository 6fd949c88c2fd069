// What the CPU kernels of the linear family are called with.
#pragma once

#include <cstdint>

#include "core/linear.h"

namespace tokencomp::linear {

constexpr int kRows = 64;    // of a chunk
constexpr int kPad = 16;     // floats: the widest vector
constexpr int kDecays = 66;  // powers 0 ... kRows of a head's decay, padded

inline __attribute__((always_inline)) int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

// Working memory of a thread, in floats: decays, rows of q, k transposed, rows of v, products, outputs, state.
inline __attribute__((always_inline)) int64_t scratch_floats(const LinearArgs& p) {
  const int64_t D = p.a.g.D, Dv = padded(p.Dv);
  return padded(kDecays) + kRows * (padded(int(D)) + D + Dv + kRows + Dv) + D * Dv;
}

// One head of one sequence, `unit` in [0, B * Hq).
using HeadKernel = void(const LinearArgs& args, int64_t unit, float* scratch);

}  // namespace tokencomp::linear
