// How a selection is carried out on the CPU: a pure function of the problem, tested without running anything.
//
//   lazy    max_min: running minima only shrink, so a stale one is an upper bound; a token meets the centres it has not
//           seen yet only while its stale score could still win. Far fewer than k products per token.
//   stream  max_sum: every pick updates every token with the newest centre, one pass over the tokens.
//   gram    all pairs once through register tiles, then a pick reads one matrix row. Pays when picks are many.
#pragma once

#include <cstdint>

#include "core/kcenter.h"

namespace tokencomp::kcenter {

enum class CpuPath { lazy, stream, gram };

struct CpuPlan {
  CpuPath path;
  bool across_items;  // one thread per item; otherwise all threads share one item
};

// An N x N float matrix per item in flight is never made beyond this.
constexpr int64_t kCpuGramLimitBytes = int64_t(64) << 20;

// Measured break-even (bench/NOTES.md): the matrix costs as much as N / kGramBreakEven* picks. Streaming picks are
// slower, and the matrix pays earlier, where an item does not stay in the last-level cache.
constexpr int kGramBreakEvenStream = 10, kGramBreakEvenStreamFar = 18, kGramBreakEvenLazy = 2;
// Chosen, not fitted: with largest_nn all pairs are computed anyway, and only storing them must pay.
constexpr int kGramBreakEvenPairs = 16;
constexpr int64_t kCpuCacheBytes = int64_t(32) << 20;

inline CpuPlan plan_cpu(Objective objective, bool nonnegative_weights, bool all_pairs, int64_t B, int64_t N, int64_t k,
                        int64_t item_bytes, int threads) {
  const bool across = B >= threads;
  const bool lazy = objective == Objective::max_min && nonnegative_weights;  // stale scores must be upper bounds
  const int64_t matrix = N * N * int64_t(sizeof(float)) * (across ? threads : 1);
  const int stream = item_bytes > kCpuCacheBytes ? kGramBreakEvenStreamFar : kGramBreakEvenStream;
  const int alone = lazy ? kGramBreakEvenLazy : stream;
  const bool many_picks = k * (all_pairs && alone < kGramBreakEvenPairs ? kGramBreakEvenPairs : alone) >= N;
  if (many_picks && matrix <= kCpuGramLimitBytes) return {CpuPath::gram, across};
  return {lazy ? CpuPath::lazy : CpuPath::stream, across};
}

}  // namespace tokencomp::kcenter
