// Turning keys on CUDA: one thread to a pair of channels. Sines are computed anew for each, which costs less than the
// memory they would be read from.
#pragma once

#include "core/kvcache.h"
#include "core/rope.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::kvcache {

constexpr int kShiftThreads = 256;

// registers: shift_keys <= 48
template <class T>
__global__ void __launch_bounds__(kShiftThreads) shift_keys(ShiftArgs a, int tiles) {
  const int row = int(blockIdx.x / unsigned(tiles)), b = row / a.s.Hkv, h = row % a.s.Hkv;
  const int64_t item = int64_t(blockIdx.x % unsigned(tiles)) * kShiftThreads + int(threadIdx.x);
  const int slot = int(item / a.pairs), pair = int(item % a.pairs);
  if (slot >= a.s.lengths[row]) return;
  const int delta = a.delta(row, slot);
  if (delta == 0) return;
  T* key = slot_of<T>(a.s.k, a.s.table, b, h, slot);
  if (!key) return;
  const Rotation turn = rotation_by_turns(delta * turns_per_position(a.inv_freq[pair]));
  const RopePair at = rope_pair(pair, a.pairs, a.interleaved);
  const float x = to_float(key[at.first]), y = to_float(key[at.second]);
  key[at.first] = from_float<T>(x * turn.cosine - y * turn.sine);
  key[at.second] = from_float<T>(y * turn.cosine + x * turn.sine);
}

}  // namespace tokencomp::kvcache
