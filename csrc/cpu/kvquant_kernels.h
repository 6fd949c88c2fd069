// What the CPU kernels of the kvquant family are called with. Work is cut into units: 16 tokens of a sheet, or one
// group of tokens where a grid spans tokens.
#pragma once

#include <cstdint>

#include "core/kvquant.h"

namespace tokencomp::kvquant {

inline __attribute__((always_inline)) int tokens_per_unit(const Format& f) {
  return f.axis == Axis::channel ? f.group : bitpack::kBlock;
}
inline __attribute__((always_inline)) int64_t units_per_sheet(const Sheets& s) {
  const int unit = tokens_per_unit(s.format);
  return (s.tokens + unit - 1) / unit;
}

// Units [begin, end) of all sheets.
using SheetKernel = void(const Sheets& sheets, int64_t begin, int64_t end);
// Units (blocks of 16 tokens, or rows) [begin, end).
using RepackKernel = void(const RepackArgs& args, int64_t begin, int64_t end);
// Rows [begin, end).
using HadamardKernel = void(const HadamardArgs& args, int64_t begin, int64_t end);
// Parts [begin, end) of all sequences; then the sequences [begin, end) from their parts.
using StatsKernel = void(const StatsArgs& args, int64_t begin, int64_t end);

}  // namespace tokencomp::kvquant
