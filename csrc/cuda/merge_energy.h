// Energy on CUDA: the tile loop of merge_match.h with a sum in place of the maximum. Every sum is taken in a fixed
// order: a thread adds its columns tile by tile, sixteen threads of a row are added in order, splits last.
#pragma once

#include "cuda/merge_match.h"

namespace tokencomp::merge {

template <Energy kKind>
__device__ __forceinline__ float energy_of(float cosine, const EnergyArgs& e) {
  if constexpr (kKind == Energy::gauss) {
    return expf(e.rate * (1.0f - cosine) * (1.0f - cosine));
  } else {
    const float z = cosine - e.margin;
    if (z >= 0) return kKind == Energy::paper ? cosine : z;
    return e.alpha * (expf(z) - 1.0f);
  }
}

// Sum of a row to its mean; tokens that take no part have energy -inf.
__device__ __forceinline__ void write_energy(const EnergyArgs& e, int64_t at, float sum, float factor, int members) {
  e.energy[at] = is_number(factor) ? sum * e.height / float(members) : -INFINITY;
}

// With one split the answer is final, else a sum per split goes to `partial`.
// registers: merge_energy <= 128
template <class T, Energy kKind>
__global__ void __launch_bounds__(kThreads, 2)
    merge_energy(EnergyArgs e, bool whole, int splits, const float* factor, const int* members, float* partial) {
  auto& smem = gpu::dynamic_smem<TileSmem<T>>();
  const int row0 = int(blockIdx.x) * kTile, split = int(blockIdx.y), b = int(blockIdx.z), N = e.x.N;
  const float* factors = factor + int64_t(b) * N;
  const Rows<T> x = rows_of<T>(e.x, b, e.C, whole);
  PairTile<T> tile(false);
  float total[kOwned] = {};
#pragma unroll 1
  for (int column0 = split * kTile; column0 < N; column0 += splits * kTile) {
    tile.compute(smem, {x, nullptr, N, N, row0}, {x, nullptr, N, N, column0});
#pragma unroll
    for (int q = 0; q < kOwned; ++q) {
      const int j = column0 + tile.column(q);
      const float column_factor = j < N ? factors[j] : NAN;
#pragma unroll
      for (int r = 0; r < kOwned; ++r) {
        const int i = row0 + tile.row(r);
        const float cosine = tile.product(r, q) * column_factor * (i < N ? factors[i] : NAN);
        if (is_number(cosine)) total[r] += energy_of<kKind>(cosine, e);
      }
    }
  }
  auto& shared = reinterpret_cast<float (&)[kTile][kSharers + 1]>(smem);
#pragma unroll
  for (int r = 0; r < kOwned; ++r) shared[tile.row(r)][tile.sharer()] = total[r];
  __syncthreads();
  const int i = row0 + int(threadIdx.x);
  if (int(threadIdx.x) >= kTile || i >= N) return;
  float sum = 0;
  for (int k = 0; k < kSharers; ++k) sum += shared[threadIdx.x][k];
  const int64_t at = int64_t(b) * N + i;
  if (splits == 1) {
    write_energy(e, at, sum, factors[i], members[b]);
  } else {
    partial[at * splits + split] = sum;
  }
}

// registers: merge_energy_finish <= 32
__global__ void __launch_bounds__(kThreads)
    merge_energy_finish(EnergyArgs e, int splits, const float* factor, const int* members, const float* partial) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + int(threadIdx.x);
  if (at >= int64_t(e.B) * e.x.N) return;
  float sum = 0;
  for (int k = 0; k < splits; ++k) sum += partial[at * splits + k];
  write_energy(e, at, sum, factor[at], members[at / e.x.N]);
}

}  // namespace tokencomp::merge
