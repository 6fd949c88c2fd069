// Attention scores on CUDA: pointwise kernels, a thread to a slot. Parts and heads are added in order.
#pragma once

#include "core/score.h"
#include "cuda/arch/gpu.h"
#include "cuda/score_kernels.h"

namespace tokencomp::score {

__device__ __forceinline__ int64_t thread_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

// One head's score of key j: its parts added, or the largest exponent raised.
__device__ __forceinline__ float head_score(const ColumnArgs& c, const ColumnWorkspace& w, int64_t head, int j) {
  const Geometry& g = c.a.g;
  const int64_t stride = int64_t(g.B) * g.Hq * g.S;
  const float* part = w.partial + head * g.S + j;
  float total = part[0];
  for (int i = 1; i < w.parts; ++i) {
    const float other = part[i * stride];
    total = c.rows == Rows::max ? fmaxf(total, other) : total + other;
  }
  return c.rows == Rows::max ? gpu::exp2_approx(total) : total;
}

// registers: score_heads <= 40
__global__ void __launch_bounds__(kThreads) score_heads(ColumnArgs c, ColumnWorkspace w) {
  const Geometry& g = c.a.g;
  const int out = heads_out(c.heads, g.Hq, g.Hkv), heads = g.Hq / out;
  const int64_t i = thread_index();
  if (i >= int64_t(g.B) * out * g.S) return;
  const int64_t row = i / g.S;
  float total = 0.0f;
  for (int h = 0; h < heads; ++h) {
    total = accumulate_head(c.heads, total, head_score(c, w, row * heads + h, int(i % g.S)));
  }
  c.out[i] = finish_heads(c.heads, total, heads);
}

// registers: score_merge <= 40
__global__ void __launch_bounds__(kThreads) score_merge(LseArgs l, LseWorkspace w) {
  const Geometry& g = l.a.g;
  const int64_t rows = int64_t(g.B) * g.Hq * g.T, r = thread_index();
  if (r >= rows) return;
  float top = -INFINITY, sum = 0.0f;
  for (int i = 0; i < w.parts; ++i) top = fmaxf(top, w.partial[i * rows + r].x);
  for (int i = 0; i < w.parts && is_finite(top); ++i) {
    const float2 part = w.partial[i * rows + r];
    if (part.y > 0.0f) sum += part.y * expf(part.x - top);
  }
  l.lse[r] = is_finite(top) ? top + logf(sum) : top;
}

// e^(z - lse), 0 for a head without a finite lse, and for NaN.
__device__ __forceinline__ float probability(float z, float lse) {
  const float x = z - lse;
  return is_finite(lse) && x >= -87.3f ? expf(x) : 0.0f;  // no results below the normal range, as everywhere
}

// registers: score_vote <= 40
__global__ void __launch_bounds__(kThreads) score_vote(VoteArgs v) {
  const int64_t i = thread_index();
  if (i >= int64_t(v.B) * v.groups * v.S) return;
  const int heads = v.Hq / v.groups;
  const int64_t first = i / v.S * heads;
  float total = 0.0f, top = -INFINITY;
  for (int h = 0; h < heads; ++h) {
    const float z = fmaxf(v.scores[(first + h) * v.S + i % v.S], -INFINITY);  // NaN counts as -inf
    top = fmaxf(top, z);
    total += v.mode == Vote::softmax_sum ? probability(z, v.lse[first + h]) : z;
  }
  if (v.mode == Vote::mean) total /= float(heads);
  v.out[i] = v.mode == Vote::max || top == -INFINITY ? top : total;
}

// registers: score_decay <= 40
__global__ void __launch_bounds__(kThreads) score_decay(DecayArgs d) {
  const int64_t i = thread_index(), row = i / d.S;
  if (i >= int64_t(d.B) * d.H * d.S) return;
  const int j = int(i % d.S), heads = d.Hq / d.H;
  if (d.lengths && j >= d.lengths[row / d.H]) return;
  float received = 0.0f, strongest = 0.0f;
  for (int h = 0; h < heads; ++h) {
    const float z = d.logits[(row * heads + h) * d.S + j];
    const float p = d.lse ? probability(z, d.lse[row * heads + h]) : fmaxf(z, 0.0f);
    strongest = fmaxf(strongest, p);
    received = accumulate_head(d.heads, received, d.power == 2 ? p * p : p);
  }
  d.score[i] = d.gamma * d.score[i] + finish_heads(d.heads, received, heads);
  if (d.count) ++d.count[i];
  if (d.last && strongest >= d.alpha) {
    const int gap = d.step - d.last[i];
    if (d.interval && gap > d.interval[i]) d.interval[i] = gap;
    d.last[i] = d.step;
  }
}

}  // namespace tokencomp::score
