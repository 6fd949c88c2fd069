// Norms of rows, and which rows count: the rule that every family with cosines shares.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/macros.h"

namespace tokencomp {

// 1/|x| from |x|^2: NaN marks an invalid row, 0 a zero row. A square sum below the normal range counts as zero: it has
// lost its digits, and the product of two such inverse norms would overflow.
TC_HD float inverse_norm(float sq) {
  if (!(sq < INFINITY)) return NAN;
  return sq >= FLT_MIN ? 1.0f / sqrtf(sq) : 0.0f;
}

TC_HD bool is_valid(float inverse_norm) { return inverse_norm == inverse_norm; }

}  // namespace tokencomp
