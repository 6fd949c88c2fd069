// Selection by score on CUDA: the row kernel of topk_select and topp_select. A team of blocks takes one row, each block
// a slice of it. Five passes over the slice: one for each digit of the threshold, each followed by an exchange of
// histograms; one that counts what is kept, so that every warp knows where it writes; one that writes, ascending. The
// first pass turns scores into slots and, where they fit, keeps them in shared memory for the others. O(S) work, no
// sorting, no atomics but integer ones.
#pragma once

#include "cuda/topk_team.h"

namespace tokencomp::topk {

// A block's part of a row.
template <class T>
struct Slice {
  const T* score;       // of the row
  const uint8_t* keep;  // of the row, or null
  Row row;
  bool by_mass;
  int begin, end;
  uint32_t* slots;  // shared memory for end - begin, or null

  __device__ __forceinline__ uint32_t make(int i) const {
    return slot_of(row, by_mass, to_float(score[i]), i, keep && keep[i]);
  }
  // After the first pass.
  __device__ __forceinline__ uint32_t operator[](int i) const { return slots ? slots[i - begin] : make(i); }

  // The warp's contiguous part, a multiple of 32 long but for the end.
  __device__ __forceinline__ int warp_begin(int warp) const {
    const int part = ((end - begin + CudaTiles::warps - 1) / CudaTiles::warps + 31) / 32 * 32;
    const int at = begin + warp * part;
    return at < end ? at : end;
  }
};

// Counts the slots that begin with `prefix` by their digit at `level`. kForced never counts.
template <class T, bool kMass>
__device__ __forceinline__ void count_slots(const Slice<T>& slice, Tables<kMass>& tables, int level, uint32_t prefix,
                                            const Units& units) {
  const auto add = [&](uint32_t slot) {
    if (slot == kForced || !in_prefix(slot, prefix, level)) return;
    add_slot<kMass>(tables, level & 1, digit(slot, level), kMass ? units.of(mass_of_key(slot)) : 0);
  };
  constexpr int kThreads = CudaTiles::threads, kBatch = CudaTiles::batch;
  const int first = slice.begin + int(threadIdx.x);
#pragma unroll 1
  for (int i = first; i < slice.end; i += kThreads * kBatch) {
    uint32_t slot[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = i + j * kThreads;
      slot[j] = at >= slice.end ? kForced : level == 0 ? slice.make(at) : slice[at];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = i + j * kThreads;
      if (level == 0 && slice.slots && at < slice.end) slice.slots[at - slice.begin] = slot[j];
      if (at < slice.end) add(slot[j]);
    }
  }
}

// Sum of the shares of the threads before this one, and of the whole block.
template <bool kMass>
__device__ __forceinline__ void scan_shares(Exchange& x, const Share& share, Found& before, Found& total) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  uint32_t count = 0;
  Word mass = 0;
#pragma unroll
  for (int j = 0; j < CudaTiles::bins; ++j) {
    count += share.count[j];
    mass += share.mass[j];
  }
  const uint32_t count_to = gpu::warp_inclusive_sum(count);
  const Word mass_to = kMass ? gpu::warp_inclusive_sum(mass) : 0;
  if (lane == 31) {
    x.warp_count[warp] = count_to;
    if (kMass) x.warp_mass[warp] = mass_to;
  }
  __syncthreads();
  before = {0, count_to - count, mass_to - mass};
  total = {0, 0, 0};
  for (int w = 0; w < CudaTiles::warps; ++w) {
    const uint32_t warp_count = x.warp_count[w];
    const Word warp_mass = kMass ? x.warp_mass[w] : 0;
    if (w < warp) before = {0, before.above + warp_count, before.mass + warp_mass};
    total = {0, total.above + warp_count, total.mass + warp_mass};
  }
}

// The digit at which the goal is met, for all threads; one thread finds it. `at` lies above all bins, `before` above
// those of this thread.
template <bool kMass>
__device__ __forceinline__ Found find_digit(Exchange& x, const Share& share, const Found& at, Found before,
                                            const Goal& goal) {
  before = {0, at.above + before.above, at.mass + before.mass};
  if (!goal.met(before.above, before.mass)) {
#pragma unroll
    for (int j = 0; j < CudaTiles::bins; ++j) {
      const uint32_t above = before.above + share.count[j];
      const Word mass = before.mass + share.mass[j];
      if (goal.met(above, mass)) {
        x.found = {uint32_t(bin_of(j)), before.above, before.mass};
        break;
      }
      before.above = above;
      before.mass = mass;
    }
  }
  __syncthreads();
  return x.found;  // written again only after the next level's barriers
}

// Mass of the protected tokens at both ends of the row, which have no mass in any histogram.
template <class T>
__device__ __forceinline__ Word forced_mass(const Slice<T>& slice, const Units& units, Word* scratch) {
  Word sum = 0;
  const auto add = [&](int from, int to) {
    for (int i = from + int(threadIdx.x); i < to; i += CudaTiles::threads) {
      sum += units.of(mass_bits(to_float(slice.score[i])));
    }
  };
  add(0, slice.row.head_end);
  add(slice.row.tail_begin, slice.row.n);
  return gpu::block_sum(sum, scratch);
}

// The largest mass of the row, or the number of tokens that `keep` names between head and tail; 0 if neither matters.
template <class T, bool kMass, class Team>
__device__ __forceinline__ Word survey(const Slice<T>& slice, Team& team, Word* scratch) {
  if (!kMass && !slice.keep) return 0;
  Word mine = 0;
  for (int i = slice.begin + int(threadIdx.x); i < slice.end; i += CudaTiles::threads) {
    if (kMass) {
      const Word mass = mass_bits(to_float(slice.score[i]));
      mine = mass > mine ? mass : mine;
    } else {
      mine += slice.keep[i] && !slice.row.outside(i);
    }
  }
  team.tell(kMass ? gpu::block_max_u64(mine, scratch) : gpu::block_sum(mine, scratch));
  Word all = 0;
  for (int r = 0; r < team.size; ++r) {
    const Word told = team.told(r);
    all = !kMass ? all + told : told > all ? told : all;
  }
  return all;
}

// Narrows the threshold down, digit by digit. The goal is known once the first histogram has given the total.
template <class T, bool kMass, class Team>
__device__ __forceinline__ Threshold find_threshold(const Args& a, Slice<T>& slice, Team& team, Smem<kMass>& smem,
                                                    int64_t forced, const Units& units) {
  const Word guarded = kMass && !slice.row.overfull ? forced_mass(slice, units, smem.exchange.scratch) : 0;
  uint32_t key = 0;
  Found at{0, 0, 0};
  Goal goal{};
#pragma unroll 1
  for (int level = 0; level < kLevels; ++level) {
    clear(smem.tables, level & 1);
    count_slots<T, kMass>(slice, smem.tables, level, key, units);
    const Share share = team.merge(level);
    Found before, total;
    scan_shares<kMass>(smem.exchange, share, before, total);
    if (level == 0) {
      goal = goal_of(a, slice.row, forced, guarded, total.mass + guarded);
      if (goal.met(0, 0)) return {kForced - 1, 0, 0};  // nothing beyond what is forced
    }
    at = find_digit<kMass>(smem.exchange, share, at, before, goal);
    key |= at.bin << digit_shift(level);
  }
  const Word each = kMass ? units.of(mass_of_key(key)) : 0;
  return {key, at.above, goal.missing(at.above, at.mass, each)};
}

// Slots of a warp's part above the threshold, and equal to it.
template <class T>
__device__ __forceinline__ uint2 count_kept(const Slice<T>& slice, int from, int to, uint32_t key) {
  uint32_t above = 0, equal = 0;
  for (int i = from; i < to; i += 32) {
    const int at = i + int(threadIdx.x) % 32;
    const uint32_t slot = at < to ? slice[at] : kSkip;
    above += unsigned(__popc(__ballot_sync(~0u, slot > key)));
    equal += unsigned(__popc(__ballot_sync(~0u, slot == key)));
  }
  return make_uint2(above, equal);
}

// Writes the kept tokens of the slice where they belong: behind those of the blocks and warps before.
template <class T, class Team>
__device__ __forceinline__ void write_kept(const Slice<T>& slice, Team& team, Exchange& x, const Threshold& threshold,
                                           int* index) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int from = slice.warp_begin(warp), to = slice.warp_begin(warp + 1);
  const uint2 mine = count_kept(slice, from, to, threshold.key);
  if (lane == 0) x.scratch[warp] = Word(mine.x) << 32 | mine.y;
  __syncthreads();
  uint32_t above = 0, equal = 0;  // before this warp
  Word block = 0;
  for (int w = 0; w < CudaTiles::warps; ++w) {
    const Word counts = x.scratch[w];
    block += counts;
    above += w < warp ? uint32_t(counts >> 32) : 0;
    equal += w < warp ? uint32_t(counts) : 0;
  }
  team.tell(block);
  for (int r = 0; r < team.rank; ++r) {
    const Word counts = team.told(r);
    above += uint32_t(counts >> 32);
    equal += uint32_t(counts);
  }
  const uint32_t ties = uint32_t(threshold.ties);
  uint32_t next = above + (equal < ties ? equal : ties);
  uint32_t left = equal < ties ? ties - equal : 0;  // slots equal to the threshold that may still be kept
  for (int i = from; i < to; i += 32) {
    const int token = i + lane;
    const uint32_t slot = token < to ? slice[token] : kSkip;
    const uint32_t before = (1u << lane) - 1;
    const uint32_t equals = __ballot_sync(~0u, slot == threshold.key);
    const bool tie = slot == threshold.key && uint32_t(__popc(equals & before)) < left;
    const uint32_t kept = __ballot_sync(~0u, slot > threshold.key || tie);
    if (kept >> lane & 1) index[next + __popc(kept & before)] = token;
    next += __popc(kept);
    const uint32_t taken = __popc(equals);
    left = taken < left ? left - taken : 0;
  }
}

// The 1 is not idle: without it the compiler aims at two blocks an SM, 64 registers, and spills.
// registers: topk_row <= 112
template <class T, bool kMass, template <bool> class Team>
__global__ void __launch_bounds__(CudaTiles::threads, 1) topk_row(Args a, Meeting meeting, int size, bool resident) {
  auto& smem = gpu::dynamic_smem<Smem<kMass>>();
  Team<kMass> team(smem, meeting, size);
  const int r = team.row();
  Slice<T> slice;
  slice.score = static_cast<const T*>(a.score) + r * a.stride;
  slice.keep = a.keep ? a.keep + int64_t(r) * a.S : nullptr;
  slice.row = row_of(a, r);
  slice.by_mass = kMass;
  const int part = (slice.row.n + team.size - 1) / team.size;
  slice.begin = int(least(int64_t(part) * team.rank, slice.row.n));
  slice.end = int(least(int64_t(slice.begin) + part, slice.row.n));
  slice.slots = resident ? reinterpret_cast<uint32_t*>(&smem + 1) : nullptr;

  const Word surveyed = survey<T, kMass>(slice, team, smem.exchange.scratch);
  const int64_t guarded = slice.row.outside_count() + (kMass ? 0 : int64_t(surveyed));
  slice.row.overfull = guarded > slice.row.k;
  const int64_t forced = slice.row.overfull ? 0 : guarded;
  const Units units = units_of(uint32_t(surveyed), slice.row.n);
  const Threshold threshold = find_threshold<T, kMass>(a, slice, team, smem, forced, units);

  int* index = a.index + int64_t(r) * a.k;
  write_kept(slice, team, smem.exchange, threshold, index);
  const int64_t kept = forced + threshold.above + threshold.ties;
  if (team.rank == 0 && threadIdx.x == 0) a.count[r] = int(kept);
  const int64_t thread = int64_t(team.rank) * CudaTiles::threads + threadIdx.x;
  for (int64_t j = kept + thread; j < a.k; j += int64_t(team.size) * CudaTiles::threads) index[j] = -1;
  team.leave();
}

}  // namespace tokencomp::topk
