// Linear attention with decay: arguments, torch-free. For each sequence and query head, with the state S [D, Dv]:
//   S_t = exp(-slope) S_{t-1} + k_t v_t^T        out_t = scale q_t S_t
// In chunks of m rows, a row i of which is
//   out_i = scale (exp(-slope (i + 1)) q_i S + sum_{j <= i} exp(-slope (i - j)) <q_i, k_j> v_j)
//   S <- exp(-slope m) S + sum_j exp(-slope (m - 1 - j)) k_j v_j^T.
#pragma once

#include "core/attention.h"

namespace tokencomp::linear {

using namespace attention;

struct LinearArgs {
  Attention a;    // S = T: the keys are those of the rows
  const void* v;  // [B, Hkv, T, Dv]
  int64_t v_stride_b, v_stride_h, v_stride_s;
  int Dv;
  const float* slope;     // [Hq]
  const float* state_in;  // [B, Hq, D, Dv] or null: zeros
  const int* lengths;     // [B] or null
  void* out;              // [B, Hq, T, Dv]
  float* state_out;       // [B, Hq, D, Dv]
};

// Rows of sequence b that are tokens; within bounds whatever lengths say.
TC_HD int tokens_of(const LinearArgs& p, int b) {
  if (!p.lengths) return p.a.g.T;
  const int n = p.lengths[b];
  return n < 0 ? 0 : n < p.a.g.T ? n : p.a.g.T;
}

}  // namespace tokencomp::linear
