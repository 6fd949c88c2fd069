// Cosine match and energy on CUDA. A block owns 64 rows and meets the columns 64 at a time (pair_tile.h); each tile's
// cosines are folded into what the rows keep, and forgotten: O(Ra Rb C) operations, O(Ra + Rb) memory. Where there are
// too few blocks for a device, the columns are split among several and a last kernel puts their answers together.
// Splits depend on the shape alone, so the same call gives the same bits on every device.
#pragma once

#include "core/merge.h"
#include "core/order.h"
#include "cuda/pair_tile.h"

namespace tokencomp::merge {

constexpr int kThreads = PairTiles::threads, kTile = PairTiles::tile, kWarps = kThreads / 32;
constexpr int kOwned = 4;     // rows, and columns, of a tile that a thread holds
constexpr int kSharers = 16;  // threads that share a row

// What a product is multiplied by, by place; NaN where the place takes no part. Two features have two each.
struct Factors {
  float *a, *b;    // [B, Ra], [B, Rb]
  float *a2, *b2;  // the same, or null
};

__device__ __forceinline__ bool is_number(float v) { return v == v; }

// ---- norms

template <class T>
__device__ __forceinline__ Rows<T> rows_of(const Side& s, int b, int C, bool whole) {
  return {static_cast<const T*>(s.x) + b * s.stride_b, s.stride_n, C, whole};
}
template <class T>
__device__ __forceinline__ Rows<T> rows2_of(const Side& s, int b, int C2, bool whole) {
  return {static_cast<const T*>(s.x2) + b * s.stride2_b, s.stride2_n, C2, whole};
}

struct FactorShape {
  int B, C, C2;
  float share, share2;  // of the two features
  bool whole, whole2;
};

// One warp to a place. `members` counts the places of an item that take part, or is null.
// registers: merge_factors <= 40
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_factors(Side s, FactorShape f, float* factor, float* factor2, int* members) {
  const int64_t at = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  const int lane = int(threadIdx.x) % 32;
  if (at >= int64_t(f.B) * s.R) return;
  const int b = int(at / s.R), i = int(at % s.R), token = s.token(b, i);
  float inverse = NAN, inverse2 = 0.0f;
  if (token >= 0) {
    inverse = inverse_norm(square_sum(rows_of<T>(s, b, f.C, f.whole), token, lane));
    if (f.C2 > 0) inverse2 = inverse_norm(square_sum(rows2_of<T>(s, b, f.C2, f.whole2), token, lane));
  }
  const bool counts = is_number(inverse) && is_number(inverse2);
  if (lane != 0) return;
  const float weight = s.weight_of(b, i);
  factor[at] = counts ? f.share * inverse * weight : NAN;
  if (f.C2 > 0) factor2[at] = counts ? f.share2 * inverse2 * weight : NAN;
  if (members && counts) atomicAdd(members + b, 1);
}

// ---- match

struct MatchShape {
  int splits;          // blocks that share the columns of a row tile
  bool whole, whole2;  // both sides can be read 16 bytes at a time
};

// The cosines of one tile, feature by feature.
template <class T>
struct Similarity {
  float value[kOwned][kOwned];

  __device__ __forceinline__ void compute(TileSmem<T>& smem, PairTile<T>& tile, const MatchArgs& m, const MatchShape& s,
                                          const Factors& f, int b, int row0, int column0) {
    const int64_t rows = int64_t(b) * m.a.R, columns = int64_t(b) * m.b.R;
    const int* a_index = m.a.index ? m.a.index + rows : nullptr;
    const int* b_index = m.b.index ? m.b.index + columns : nullptr;
    tile.compute(smem, {rows_of<T>(m.a, b, m.C, s.whole), a_index, m.a.R, m.a.N, row0},
                 {rows_of<T>(m.b, b, m.C, s.whole), b_index, m.b.R, m.b.N, column0});
    apply<false>(tile, m, f.a + rows, f.b + columns, row0, column0);
    if (m.C2 == 0) return;
    tile.compute(smem, {rows2_of<T>(m.a, b, m.C2, s.whole2), a_index, m.a.R, m.a.N, row0},
                 {rows2_of<T>(m.b, b, m.C2, s.whole2), b_index, m.b.R, m.b.N, column0});
    apply<true>(tile, m, f.a2 + rows, f.b2 + columns, row0, column0);
  }

 private:
  template <bool kAdd>
  __device__ __forceinline__ void apply(const PairTile<T>& tile, const MatchArgs& m, const float* row_factor,
                                        const float* column_factor, int row0, int column0) {
#pragma unroll
    for (int q = 0; q < kOwned; ++q) {
      const int j = column0 + tile.column(q);
      const float factor = j < m.b.R ? column_factor[j] : NAN;
#pragma unroll
      for (int r = 0; r < kOwned; ++r) {
        const int i = row0 + tile.row(r);
        const float product = tile.product(r, q) * factor * (i < m.a.R ? row_factor[i] : NAN);
        value[r][q] = kAdd ? value[r][q] + product : product;
      }
    }
  }
};

__device__ __forceinline__ int place_token(const Side& s, int b, int i) {
  return s.index ? s.index[int64_t(b) * s.R + i] : i;
}

// Pairs too far apart, or too near, become NaN, which never wins.
template <class T>
__device__ __forceinline__ void keep_distance(Similarity<T>& similarity, const PairTile<T>& tile, const MatchArgs& m,
                                              int b, int row0, int column0) {
#pragma unroll
  for (int q = 0; q < kOwned; ++q) {
    const int j = column0 + tile.column(q), q_token = j < m.b.R ? place_token(m.b, b, j) : 0;
#pragma unroll
    for (int r = 0; r < kOwned; ++r) {
      const int i = row0 + tile.row(r), distance = i < m.a.R ? place_token(m.a, b, i) - q_token : 0;
      const int apart = distance < 0 ? -distance : distance;
      if (apart > m.farthest || apart < m.nearest) similarity.value[r][q] = NAN;
    }
  }
}

// Whether a whole tile is too far off; only without indices does the place say so.
__device__ __forceinline__ bool far_tile(const MatchArgs& m, int row0, int column0) {
  if (m.a.index || m.b.index) return false;
  return column0 - (row0 + kTile - 1) > m.farthest || row0 - (column0 + kTile - 1) > m.farthest;
}

// Key of what nobody beat: no column.
__device__ __forceinline__ OrderKey no_column() { return order_key(-INFINITY, 0x7fffffff); }

__device__ __forceinline__ void write_match(const MatchArgs& m, int64_t at, OrderKey key) {
  const float value = score_of(key);
  m.value[at] = value;
  m.index[at] = m.index_or_none(value, index_of(key));
}

// The best column of each row. With one split the answer is final, else a key per split goes to `partial`.
// registers: merge_match <= 128
template <class T>
__global__ void __launch_bounds__(kThreads, 2) merge_match(MatchArgs m, MatchShape s, Factors f, OrderKey* partial) {
  auto& smem = gpu::dynamic_smem<TileSmem<T>>();
  const int row0 = int(blockIdx.x) * kTile, split = int(blockIdx.y), b = int(blockIdx.z);
  PairTile<T> tile(false);
  Similarity<T> similarity;
  OrderKey best[kOwned];
#pragma unroll
  for (int r = 0; r < kOwned; ++r) best[r] = no_column();
#pragma unroll 1
  for (int column0 = split * kTile; column0 < m.b.R; column0 += s.splits * kTile) {
    if (far_tile(m, row0, column0)) continue;
    similarity.compute(smem, tile, m, s, f, b, row0, column0);
    if (m.limited()) keep_distance(similarity, tile, m, b, row0, column0);
#pragma unroll
    for (int q = 0; q < kOwned; ++q) {
#pragma unroll
      for (int r = 0; r < kOwned; ++r) {
        const float value = similarity.value[r][q];
        const OrderKey key = order_key(value, column0 + tile.column(q));
        if (value > -INFINITY && key > best[r]) best[r] = key;
      }
    }
  }
  auto& shared = reinterpret_cast<OrderKey(&)[kTile][kSharers + 1]>(smem);  // one more column: no bank conflicts
  static_assert(sizeof(shared) <= sizeof(smem));
#pragma unroll
  for (int r = 0; r < kOwned; ++r) shared[tile.row(r)][tile.sharer()] = best[r];
  __syncthreads();
  const int i = row0 + int(threadIdx.x);
  if (int(threadIdx.x) >= kTile || i >= m.a.R) return;
  OrderKey winner = no_column();
  for (int k = 0; k < kSharers; ++k) {
    const OrderKey key = shared[threadIdx.x][k];
    winner = key > winner ? key : winner;
  }
  const int64_t at = int64_t(b) * m.a.R + i;
  if (s.splits == 1) {
    write_match(m, at, winner);
  } else {
    partial[at * s.splits + split] = winner;
  }
}

// registers: merge_match_finish <= 32
__global__ void __launch_bounds__(kThreads) merge_match_finish(MatchArgs m, int splits, const OrderKey* partial) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + int(threadIdx.x);
  if (at >= int64_t(m.B) * m.a.R) return;
  OrderKey winner = no_column();
  for (int k = 0; k < splits; ++k) {
    const OrderKey key = partial[at * splits + k];
    winner = key > winner ? key : winner;
  }
  write_match(m, at, winner);
}

// Shared memory of the kernel below: slabs, and a tile of similarities beside them.
template <class T>
struct TopSmem {
  TileSmem<T> slabs;
  float similarity[kTile][kTile + 1];
};

// The `top` best columns of each row: a warp keeps the lists of eight rows, lane k the k-th best of each. A tile's
// similarities pass through shared memory; those that beat the last of a list are put in one at a time.
// registers: merge_match_top <= 168
template <class T>
__global__ void __launch_bounds__(kThreads, 1) merge_match_top(MatchArgs m, MatchShape s, Factors f) {
  constexpr int kRows = kTile / kWarps;
  auto& smem = gpu::dynamic_smem<TopSmem<T>>();
  const int row0 = int(blockIdx.x) * kTile, b = int(blockIdx.z);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  PairTile<T> tile(false);
  Similarity<T> similarity;
  OrderKey list[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) list[r] = no_column();
#pragma unroll 1
  for (int column0 = 0; column0 < m.b.R; column0 += kTile) {
    if (far_tile(m, row0, column0)) continue;
    similarity.compute(smem.slabs, tile, m, s, f, b, row0, column0);
    if (m.limited()) keep_distance(similarity, tile, m, b, row0, column0);
#pragma unroll
    for (int q = 0; q < kOwned; ++q) {
#pragma unroll
      for (int r = 0; r < kOwned; ++r) smem.similarity[tile.row(r)][tile.column(q)] = similarity.value[r][q];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll 1
      for (int half = 0; half < kTile; half += 32) {
        const float value = smem.similarity[warp * kRows + r][half + lane];
        const OrderKey mine = value > -INFINITY ? order_key(value, column0 + half + lane) : kNobody;
        unsigned waiting = __ballot_sync(~0u, mine > __shfl_sync(~0u, list[r], m.top - 1));
        while (waiting) {
          const int from = __ffs(int(waiting)) - 1;
          waiting &= waiting - 1;
          const OrderKey key = __shfl_sync(~0u, mine, from), above = __shfl_up_sync(~0u, list[r], 1);
          const int place = __popc(__ballot_sync(~0u, list[r] > key));
          if (lane == place) {
            list[r] = key;
          } else if (lane > place) {
            list[r] = above;
          }
        }
      }
    }
    __syncthreads();  // the next tile's similarities overwrite these
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = row0 + warp * kRows + r;
    if (i < m.a.R && lane < m.top) write_match(m, (int64_t(b) * m.a.R + i) * m.top + lane, list[r]);
  }
}

}  // namespace tokencomp::merge
