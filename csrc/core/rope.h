// Rotary positions: the sine and cosine that turn a key by a number of positions, by the same polynomials on
// every back end.
#pragma once

#include <cmath>

#include "core/macros.h"

namespace tokencomp {

struct Rotation {
  float cosine, sine;
};

// The rotation by `turns` whole turns. What is left of them after whole quarters is exact in double; two polynomials
// for a quarter turn, to about 1e-8, need no library and no table.
TC_HD Rotation rotation_by_turns(double turns) {
  const double quarters = 4 * (turns - rint(turns)), nearest = rint(quarters);
  const float x = float((quarters - nearest) * 1.5707963267948966);
  const float square = x * x;
  const float sine =
      x + x * square * (-1.6666667e-1f + square * (8.3333333e-3f + square * (-1.9841270e-4f + square * 2.7557319e-6f)));
  const float cosine =
      1 + square * (-0.5f + square * (4.1666668e-2f +
                                      square * (-1.3888889e-3f + square * (2.4801587e-5f + square * -2.7557319e-7f))));
  const int quarter = int(nearest);
  const float c = quarter & 1 ? sine : cosine, d = quarter & 1 ? cosine : sine;
  return {(quarter + 1) & 2 ? -c : c, quarter & 2 ? -d : d};
}

TC_HD double turns_per_position(float inv_freq) { return inv_freq * 0.15915494309189535; }

// The pair `pair` of a key of 2 * `pairs` rotated channels: where its two channels are.
struct RopePair {
  int first, second;
};
TC_HD RopePair rope_pair(int pair, int pairs, bool interleaved) {
  return interleaved ? RopePair{2 * pair, 2 * pair + 1} : RopePair{pair, pair + pairs};
}

}  // namespace tokencomp
