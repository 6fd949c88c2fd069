// Selection by score on CUDA: the blocks that work on one row, and what they tell each other. All they exchange are
// integers that are added or compared, so every kind and size of team gives the same answer.
//   ClusterTeam   blocks read their peers' histograms and words in distributed shared memory; a cluster barrier each.
//   GridTeam      blocks add their histograms into global memory; a barrier among the team's blocks each.
// Histograms and words of a block are double-buffered: a buffer is written again two exchanges later, that is after a
// barrier which everybody reaches only when done reading it. So one barrier an exchange is enough.
#pragma once

#include "core/topk_plan.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::topk {

using Word = unsigned long long;  // the type CUDA's 64-bit atomics take

// Histograms of a block. Sums are kept in two halves, because shared memory has no atomic addition of 64 bits.
template <bool kMass>
struct Tables {
  uint32_t count[2][kBins];
};
template <>
struct Tables<true> {
  uint32_t count[2][kBins], low[2][kBins], high[2][kBins];
};

// Where a prefix is found to end: what lies above the digit.
struct Found {
  uint32_t bin, above;
  Word mass;
};

struct alignas(256) Exchange {
  Word word[2][CudaTiles::max_cluster];
  Word scratch[gpu::kMaxWarps];  // of block reductions
  Word warp_mass[CudaTiles::warps];
  uint32_t warp_count[CudaTiles::warps];
  Found found;
};

// Start of the shared memory of the row kernel; the slots of a resident plan follow it.
template <bool kMass>
struct Smem {
  Tables<kMass> tables;
  Exchange exchange;
};
static_assert(sizeof(Smem<false>) == cuda_header_bytes(false) && sizeof(Smem<true>) == cuda_header_bytes(true));

// Working memory of GridTeam in global memory, zero at the launch.
struct Meeting {
  uint32_t* count;    // [R, kLevels, kBins]
  Word* mass;         // [R, kLevels, kBins], or null
  Word* word;         // [R, 2, size]
  uint32_t* counter;  // [R]
};

// A thread's share of the team's histogram: bins from the top, kBins - 1 - threadIdx.x * bins - j.
struct Share {
  uint32_t count[CudaTiles::bins] = {};
  Word mass[CudaTiles::bins] = {};
};

__device__ __forceinline__ int bin_of(int j) { return kBins - 1 - int(threadIdx.x) * CudaTiles::bins - j; }

template <bool kMass>
__device__ __forceinline__ void add_slot(Tables<kMass>& t, int buffer, int bin, Word mass) {
  atomicAdd(&t.count[buffer][bin], 1u);
  if constexpr (kMass) {
    const uint32_t low = uint32_t(mass), before = atomicAdd(&t.low[buffer][bin], low);
    const uint32_t high =
        uint32_t(mass >> 32) + (before + low < before);  // whatever the order, each carry is seen once
    if (high) atomicAdd(&t.high[buffer][bin], high);
  }
}

template <bool kMass>
__device__ __forceinline__ void clear(Tables<kMass>& t, int buffer) {
#pragma unroll
  for (int bin = int(threadIdx.x); bin < kBins; bin += CudaTiles::threads) {
    t.count[buffer][bin] = 0;
    if constexpr (kMass) t.low[buffer][bin] = t.high[buffer][bin] = 0;
  }
  __syncthreads();
}

template <bool kMass>
class ClusterTeam {
 public:
  // A lone block is a team too.
  __device__ ClusterTeam(Smem<kMass>& smem, const Meeting&, int team_size)
      : size(team_size), rank(team_size > 1 ? int(gpu::cluster_rank()) : 0), s_(smem) {
    sync();  // no block reads another that has not started
  }

  __device__ int row() const { return int(blockIdx.x) / size; }

  // Ends the counting of a level; returns the thread's share of the sum over the team.
  __device__ Share merge(int level) {
    sync();
    Share share;
#pragma unroll 1
    for (int r = 0; r < size; ++r) {
      const Tables<kMass>& t = *(size > 1 ? gpu::cluster_map(&s_.tables, unsigned(r)) : &s_.tables);
#pragma unroll
      for (int j = 0; j < CudaTiles::bins; ++j) {
        share.count[j] += t.count[level & 1][bin_of(j)];
        if constexpr (kMass) share.mass[j] += Word(t.high[level & 1][bin_of(j)]) << 32 | t.low[level & 1][bin_of(j)];
      }
    }
    return share;
  }

  // Tells the team a word of this block; thread 0's counts.
  __device__ void tell(Word word) {
    round_ ^= 1;
    if (threadIdx.x == 0) s_.exchange.word[round_][rank] = word;
    sync();
  }

  // The word that block `r` told last.
  __device__ Word told(int r) {
    Word* word = &s_.exchange.word[round_][r];
    return *(size > 1 ? gpu::cluster_map(word, unsigned(r)) : word);
  }

  // After the last exchange: a peer's memory exists until the peer exits.
  __device__ void leave() { sync(); }

  const int size, rank;

 private:
  __device__ void sync() {
    if (size > 1)
      gpu::cluster_sync();
    else
      __syncthreads();
  }

  Smem<kMass>& s_;
  int round_ = 0;
};

template <bool kMass>
class GridTeam {
 public:
  __device__ GridTeam(Smem<kMass>& smem, const Meeting& meeting, int team_size)
      : size(team_size), rank(int(blockIdx.x) % team_size), s_(smem) {
    const int64_t histogram = int64_t(row()) * kLevels * kBins;
    count_ = meeting.count + histogram;
    mass_ = kMass ? meeting.mass + histogram : nullptr;
    word_ = meeting.word + int64_t(row()) * 2 * size;
    counter_ = meeting.counter + row();
  }

  __device__ int row() const { return int(blockIdx.x) / size; }

  __device__ Share merge(int level) {
    __syncthreads();
    uint32_t* count = count_ + level * kBins;
    Word* mass = kMass ? mass_ + level * kBins : nullptr;
    for (int bin = int(threadIdx.x); bin < kBins; bin += CudaTiles::threads) {
      const uint32_t mine = s_.tables.count[level & 1][bin];
      if (mine == 0) continue;
      atomicAdd(count + bin, mine);
      if constexpr (kMass) {
        atomicAdd(mass + bin, Word(s_.tables.high[level & 1][bin]) << 32 | s_.tables.low[level & 1][bin]);
      }
    }
    gpu::grid_barrier(counter_, unsigned(size));
    Share share;
#pragma unroll
    for (int j = 0; j < CudaTiles::bins; ++j) {
      share.count[j] = gpu::atomic_load_relaxed(count + bin_of(j));
      if constexpr (kMass) share.mass[j] = gpu::atomic_load_relaxed(mass + bin_of(j));
    }
    return share;
  }

  __device__ void tell(Word word) {
    round_ ^= 1;
    if (threadIdx.x == 0) word_[round_ * size + rank] = word;
    gpu::grid_barrier(counter_, unsigned(size));
  }

  __device__ Word told(int r) { return gpu::atomic_load_relaxed(word_ + round_ * size + r); }

  __device__ void leave() {}

  const int size, rank;

 private:
  Smem<kMass>& s_;
  uint32_t* count_;
  Word *mass_, *word_;
  uint32_t* counter_;
  int round_ = 0;
};

}  // namespace tokencomp::topk
