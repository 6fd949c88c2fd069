// Column scores on CUDA: what the launches of a call hand on to each other, whichever kernel sweeps.
#pragma once

#include "core/score.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::score {

// Keys that some, and that all, of the counting rows of a tile see.
struct TileBounds {
  int first, last, all_begin, all_end;
};

struct ColumnWorkspace {
  float* beta;         // [B, Hq, padded T], +inf behind T and for rows that do not count; see beta_of
  Range* range;        // [B, padded T]
  TileBounds* bounds;  // [B, Hq, tiles]
  float* partial;      // [parts, B, Hq, S] sums, or maxima of exponents
  int tiles, tiles_per_part, parts, tile_rows;

  __device__ int padded() const { return tiles * tile_rows; }
};

// Walks the tiles of a part, head after head of a group, that have anything to do with keys [key, key + keys).
struct TileCursor {
  const TileBounds* bounds;  // of the group's first head
  int tiles, begin, end, heads, key, keys;
  int head, tile;

  // From (head, tile) on, to the first that counts; head == heads at the end. With `stay` not past this head.
  __device__ __forceinline__ void settle(bool stay) {
    while (head < heads) {
      for (; tile < end; ++tile) {
        const TileBounds& t = bounds[int64_t(head) * tiles + tile];
        if (t.first < key + keys && t.last > key) return;
      }
      if (stay) return;
      ++head;
      tile = begin;
    }
  }
};

// The sweep with warpgroup products (score_sm90.cu), where the build has it; null elsewhere. Takes 16-bit queries and
// keys of whole 16-byte chunks, at most kWgmmaDim channels, no soft cap; the workspace is of tiles of kWgmmaRows rows.
using ColumnSweepLauncher = void(const ColumnArgs& c, const ColumnWorkspace& w, gpu::LaunchConfig config);
extern ColumnSweepLauncher* wgmma_columns;
constexpr int kWgmmaDim = 128, kWgmmaKeys = 256, kWgmmaRows = 128;

}  // namespace tokencomp::score
