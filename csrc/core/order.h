// The one ordering rule of the package: larger score first, then smaller index; NaN counts as -inf. A (score, index)
// pair becomes one 64-bit key whose integer maximum is the winner, so that every reduction (SIMD, warp, cluster, grid)
// is an integer maximum and gives the same answer in any order.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace tokencomp {

using OrderKey = unsigned long long;  // the type CUDA's 64-bit atomics take

constexpr OrderKey kNobody = 0;  // below every candidate's key: excluded tokens, padding

// Monotone map of float to uint32: -inf (and NaN) lowest, +inf highest, -0 equal to +0.
TC_HD uint32_t sortable(float score) {
  if (score != score) return 0x007fffffu;  // the image of -inf
  const float canonical = score + 0.0f;    // -0 becomes +0
  uint32_t u;
  memcpy(&u, &canonical, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

TC_HD float unsortable(uint32_t s) {
  const uint32_t u = s & 0x80000000u ? s & 0x7fffffffu : ~s;
  float score;
  memcpy(&score, &u, 4);
  return score;
}

TC_HD OrderKey order_key(float score, int index) {
  return OrderKey(sortable(score)) << 32 | (0xffffffffu - uint32_t(index));
}

TC_HD int index_of(OrderKey key) { return int(0xffffffffu - uint32_t(key)); }
TC_HD float score_of(OrderKey key) { return unsortable(uint32_t(key >> 32)); }

}  // namespace tokencomp
