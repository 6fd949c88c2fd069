// Grids of many groups at once on the CPU: one group in each lane. Included by kvquant*_kernels.cpp only.
#pragma once

#include "core/kvquant.h"
#include "cpu/simd_bytes.h"
#include "cpu/simd_lanes.h"
#include "cpu/simd_math.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using kvquant::Format;

// Smallest, largest, and 0 or NaN where a number is not finite.
struct Range {
  Vec low, high, poison;
};

TC_INLINE Range no_range() { return {broadcast(kvquant::kInfinity), broadcast(-kvquant::kInfinity), broadcast(0.0f)}; }
TC_INLINE Range including(Range r, Vec v) { return {min(r.low, v), max(r.high, v), fma(v, broadcast(0.0f), r.poison)}; }
// The first n lanes only.
TC_INLINE Range including_some(Range r, Vec v, int n) {
  const float end = kvquant::kInfinity;
  return {min(r.low, between(v, 0, n, end)), max(r.high, between(v, 0, n, -end)),
          fma(between(v, 0, n, 0.0f), broadcast(0.0f), r.poison)};
}

// The ranges of kWidth groups, each spread over the lanes of its vectors, one group a lane.
TC_INLINE Range across_lanes(Range (&ranges)[kWidth]) {
  constexpr uint32_t kAll = (1u << kWidth) - 1;
  Vec low[kWidth], high[kWidth];
  alignas(64) float poison[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    low[i] = ranges[i].low, high[i] = ranges[i].high;
    poison[i] = lanes_ge(ranges[i].poison, ranges[i].poison) == kAll ? 0.0f : __builtin_nanf("");
  }
  transpose(low), transpose(high);
  Range r{low[0], high[0], load(poison)};
  for (int i = 1; i < kWidth; ++i) r.low = min(r.low, low[i]), r.high = max(r.high, high[i]);
  return r;
}

// What codes are fitted to and what is stored, of `kCount` groups.
template <int kCount>
struct Grids {
  alignas(64) float minimum[kCount];
  alignas(64) float divisor[kCount];  // NaN where there is no step: quotients are NaN then, and codes 0
  alignas(64) float inverse[kCount];
  alignas(64) f16 steps[kCount];
  alignas(64) f16 minima[kCount];

  // Groups [at, at + kWidth), by the rules of kvquant::make_grid.
  TC_INLINE_MEMBER void make(const Format& f, const Range& r, int at) {
    const bool fp8 = f.kind == kvquant::Kind::fp8;
    const Vec zero = broadcast(0.0f), nan = broadcast(__builtin_nanf(""));
    const Vec extent = fp8 ? max(r.high, sub(zero, r.low)) : sub(r.high, r.low);
    store(steps + at, div(extent, broadcast(fp8 ? bitpack::kLargestFp8 : float(f.levels()))));
    store(minima + at, fp8 ? zero : r.low);
    const Vec rounded = add(load(steps + at), zero), low = add(load(minima + at), zero);
    const Vec held = add(r.poison, add(sub(rounded, rounded), sub(low, low)));  // 0 or NaN
    const Vec step = select_ge(held, held, rounded, nan), least = select_ge(held, held, low, nan);
    const Vec by = select_gt(step, zero, step, nan);
    store(steps + at, step), store(minima + at, least);
    store(minimum + at, least), store(divisor + at, by), store(inverse + at, div(broadcast(1.0f), by));
  }
  void write(f16* params, int count) const {
    for (int i = 0; i < count; ++i) params[2 * i] = steps[i], params[2 * i + 1] = minima[i];
  }
};

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
