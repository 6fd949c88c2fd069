// How many parts the keys of a row are cut into on a GPU: a pure function of shapes, tested without one.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace tokencomp::decode {

constexpr int kMaxParts = 64, kPlanTile = 64;  // keys of a tile of the model below

// Blocks run in waves of `resident`; a block costs its tiles and a start, merging costs by the part. The constants are
// in units of the time of a tile, published for a kernel of this kind; they are not measured here.
inline int plan_parts(int64_t units, int64_t keys, int64_t resident) {
  constexpr double kStart = 10.0, kMerge = 0.22;
  const int64_t tiles = (keys + kPlanTile - 1) / kPlanTile;
  int best = 1;
  double least = 1e300;
  for (int parts = 1; parts <= kMaxParts && (parts == 1 || parts <= tiles); ++parts) {
    const double waves = double((units * parts + resident - 1) / resident);
    const double cost = waves * (double((tiles + parts - 1) / parts) + kStart) + kMerge * parts;
    if (cost < least) best = parts, least = cost;
  }
  return best;
}

}  // namespace tokencomp::decode
