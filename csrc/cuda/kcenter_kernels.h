// k-center on CUDA: the two kernels. kcenter_stream multiplies the tokens with each new centre, O(k N C); kcenter_gram
// multiplies all pairs first, O(N^2 C), and then only reads, O(k N). Either way one launch makes the whole selection,
// and states never leave the block that owns the tokens. See core/kcenter_plan.h for when which is used.
#pragma once

#include "cuda/kcenter_select.h"
#include "cuda/pair_tile.h"

namespace tokencomp::kcenter {

// ---- products from the rows themselves

// What a lazy pass keeps: minima only shrink, so a token's stale score is an upper bound, and as long as it is below a
// score that is up to date, the centres the token has not met yet need not be multiplied with it.
struct Lazy {
  int* seen = nullptr;    // shared memory, by group of tokens: centres folded so far; null: every pass meets all tokens
  int* centre = nullptr;  // [k] valid centres of the item in global memory, written by the block with the first token
  OrderKey* bound = nullptr;       // shared memory: best key of the block that is up to date
  OrderKey* warp_stale = nullptr;  // shared memory, by warp
};

// A block's tokens and where the centre's row is read: both in shared memory, or both in global memory.
template <class T>
struct StreamSource {
  static constexpr int kTokens = CudaTiles::tokens, kWarps = CudaTiles::warps;

  Rows<T> tokens;  // row 0 is the first of the slice
  T* centre;       // shared memory for one row, or null: read the centre where it lies
  Lazy lazy;

  // Whether a round needs a pass: without a new centre, states that are up to date can simply be scored again.
  __device__ bool has_turns(const Round& round) const { return round.folds || lazy.seen; }

  __device__ __forceinline__ OrderKey turns(const Item<T>& item, const Slice& slice, const Round& round) const {
    const T* row = item.x[round.centre];
    if (centre) {
      for (int c = int(threadIdx.x); c < chunks_of(item.x.C, kVec<T>); c += CudaTiles::threads) {
        reinterpret_cast<uint4*>(centre)[c] = load_chunk(item.x, row, c);
      }
      __syncthreads();  // the row is there; the exchange before this call saw everybody done with the row before it
      row = centre;
    }
    const bool l2 = item.rule.metric == Metric::l2;
    if (tokens.whole) {
      return l2 ? pass<true, true>(item, slice, round, row) : pass<true, false>(item, slice, round, row);
    }
    return l2 ? pass<false, true>(item, slice, round, row) : pass<false, false>(item, slice, round, row);
  }

  // One pass over the slice, a warp to a group of tokens. A lazy pass begins with the group of the best stale key,
  // which gives the others a bound to stay under.
  template <bool kWhole, bool kL2>
  __device__ __forceinline__ OrderKey pass(const Item<T>& item, const Slice& slice, const Round& round,
                                           const T* row) const {
    const int warp = int(threadIdx.x) / 32, groups = (slice.end - slice.begin + kTokens - 1) / kTokens;
    Turns turns;
    const int leader = lazy.seen ? begin_lazy(item, slice, round, turns) : -1;
#pragma unroll 1
    for (int n = lazy.seen ? -1 : 0; n * kWarps < groups; ++n) {
      const int group = n < 0 ? leader : n * kWarps + warp;
      if (n < 0 ? group >= 0 && group % kWarps == warp : group < groups && group != leader) {
        meet<kWhole, kL2>(item, slice, round, row, group, turns);
      }
      if (n < 0) __syncthreads();  // the bound is known
    }
    return turns.finish(item, round);
  }

  // What every token does in a lazy round, multiplied or not; returns the group of the best stale key, -1 if none.
  __device__ __forceinline__ int begin_lazy(const Item<T>& item, const Slice& slice, const Round& round,
                                            Turns& turns) const {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    OrderKey stale = kNobody;
#pragma unroll 1
    for (int i = slice.begin + int(threadIdx.x); i < slice.end; i += CudaTiles::threads) {
      TokenState& token = slice.token[i - slice.begin];
      if (is_valid(token.inverse_norm)) stale = later(stale, stale_key(item, round, token, i));
      turns.take_unscored(round, token, i);
    }
    stale = warp_best(stale);
    if (lane == 0) lazy.warp_stale[warp] = stale;
    if (threadIdx.x == 0) {
      *lazy.bound = kNobody;
      if (round.folds && slice.begin == 0) lazy.centre[round.centres] = round.centre;
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) stale = later(stale, lazy.warp_stale[w]);
    return stale == kNobody ? -1 : (index_of(stale) - slice.begin) / kTokens;
  }

  // An upper bound of the key of a token that is valid: kNobody once it has been picked.
  __device__ __forceinline__ static OrderKey stale_key(const Item<T>& item, const Round& round, const TokenState& token,
                                                       int i) {
    if (token.inverse_norm == kPicked || i == round.centre) return kNobody;
    return i == round.wanted ? seed_key(i) : order_key(item.rule.score(token.state, 1.0f, 1), i);
  }

  // One group of tokens meets the new centre; if lazy, all centres it has not met, while one of its tokens could win.
  template <bool kWhole, bool kL2>
  __device__ __forceinline__ void meet(const Item<T>& item, const Slice& slice, const Round& round, const T* row,
                                       int group, Turns& turns) const {
    constexpr int kLanes = 32 / kTokens;
    const int lane = int(threadIdx.x) % 32, count = slice.end - slice.begin;
    const T* rows[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      rows[t] = tokens[group * kTokens + t < count ? group * kTokens + t : count - 1];
    }
    const int t = group * kTokens + lane / kLanes, i = slice.begin + t, now = round.centres + round.folds;
    const bool inside = t < count, owner = inside && lane % kLanes == 0;
    int seen = round.centres;
    TokenState token{0.0f, NAN};
    if (lazy.seen) {
      seen = lazy.seen[group];
      if (inside) token = slice.token[t];
    }
    OrderKey key = kNobody;
#pragma unroll 1
    while (true) {
      if (lazy.seen) {
        key = is_valid(token.inverse_norm) ? stale_key(item, round, token, i) : kNobody;
        if (seen == now || !__any_sync(~0u, key > gpu::atomic_load_relaxed(lazy.bound))) break;
      }
      const int c = seen == round.centres ? round.centre : lazy.centre[seen];
      const T* other = seen == round.centres ? row : item.x[c];
      const float product = products4<T, kWhole, kL2>(other, rows, item.x.C, lane);
      if (!lazy.seen) {
        if (owner) turns.take(item, round, slice.token[t], i, product);
        break;
      }
      token.state = item.rule.fold(token.state, item.rule.cost(product, token.inverse_norm, item.inverse_norm[c]));
      ++seen;
    }
    if (lazy.seen) {
      __syncwarp();  // all lanes have read the states that some now write
      if (owner) slice.token[t].state = token.state;
      if (lane == 0) lazy.seen[group] = seen;
      if (owner && seen == now && key != kNobody) {
        turns.best = later(turns.best, key);
        gpu::atomic_max(lazy.bound, key);
      }
    }
  }
};

// The slice's rows copied to `storage`, padded with zeros to whole chunks, and behind them room for the centre's row.
template <class T>
__device__ __forceinline__ StreamSource<T> resident_source(const Item<T>& item, const Slice& slice, void* storage) {
  const int chunks = chunks_of(item.x.C, kVec<T>), count = slice.end - slice.begin;
  uint4* rows = static_cast<uint4*>(storage);
  for (int i = int(threadIdx.x) / 32; i < count; i += CudaTiles::warps) {
    const T* row = item.x[slice.begin + i];
    for (int c = int(threadIdx.x) % 32; c < chunks; c += 32) {
      uint4* target = rows + int64_t(i) * chunks + c;
      if (item.x.whole)
        gpu::cp_async16(target, row + c * kVec<T>);
      else
        *target = load_chunk<T, false>(row, c, item.x.C);
    }
  }
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();
  T* base = reinterpret_cast<T*>(rows);
  const int64_t stride = int64_t(chunks) * kVec<T>;
  return {{base, stride, item.x.C, true}, base + count * stride, {}};
}

template <class T>
__device__ __forceinline__ Operand<T> tokens_from(const Item<T>& item, int first) {
  return {item.x, nullptr, item.n, item.n, first};
}

// First scores of a block's tokens under the largest_nn rule: the cost to the nearest other valid token, by tiles of
// the slice against all tokens. A thread keeps the minima of its four rows; sixteen threads then share out each row.
template <class T>
__device__ __forceinline__ void nearest_scores(const Item<T>& item, const Slice& slice, TileSmem<T>& s) {
  constexpr int kTile = CudaTiles::tile, kSharers = 16;
  auto& partial = reinterpret_cast<float (&)[kTile][kSharers + 1]>(s);  // one more column: no bank conflicts
  PairTile<T> tile(item.rule.metric == Metric::l2);
  for (int row0 = slice.begin; row0 < slice.end; row0 += kTile) {
    float nearest[4] = {INFINITY, INFINITY, INFINITY, INFINITY};
    for (int column0 = 0; column0 < item.n; column0 += kTile) {
      tile.compute(s, tokens_from(item, row0), tokens_from(item, column0));
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int j = column0 + tile.column(q);
        const float inverse_j = j < item.n ? item.inverse_norm[j] : NAN;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int i = row0 + tile.row(r);
          if (!is_valid(inverse_j) || i == j || i >= slice.end) continue;
          const float cost = item.rule.cost(tile.product(r, q), item.inverse_norm[i], inverse_j);
          nearest[r] = cost < nearest[r] ? cost : nearest[r];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) partial[tile.row(r)][tile.sharer()] = nearest[r];
    __syncthreads();
    for (int r = int(threadIdx.x); r < kTile && row0 + r < slice.end; r += CudaTiles::threads) {
      float least = INFINITY;
      for (int j = 0; j < kSharers; ++j) least = partial[r][j] < least ? partial[r][j] : least;
      const int i = row0 + r;
      item.first[i] = item.rule.nearest_neighbour().score(least, item.weight_of(i), 1);
    }
    __syncthreads();  // the slabs overwrite the partial minima
  }
}

struct StreamShape {
  int size, teams;     // blocks per team, teams of the launch
  int capacity;        // tokens of the longest slice
  bool whole;          // rows of x can be read in 16-byte chunks
  bool state_in_smem;  // else in the workspace
  CudaTokens tokens;
};

// registers: kcenter_stream <= 224
template <class T, class Team>
__global__ void __launch_bounds__(CudaTiles::threads, 1) kcenter_stream(Args a, Workspace w, StreamShape shape) {
  auto& s = gpu::dynamic_smem<Smem>();
  Team team(s, w.meeting, shape.size);
  const int warp = int(threadIdx.x) / 32;
  int* seen = reinterpret_cast<int*>(s.body + size_t(shape.capacity) * sizeof(TokenState));
  unsigned char* storage = s.body + (shape.state_in_smem ? cuda_state_bytes(shape.capacity) : 0);

  for (int b = int(blockIdx.x) / shape.size; b < a.B; b += shape.teams) {
    const Item<T> item(a, w, shape.whole, b);
    const int share = (item.n + team.size - 1) / team.size;
    Slice slice;
    slice.begin = team.rank * share < item.n ? team.rank * share : item.n;
    slice.end = slice.begin + share < item.n ? slice.begin + share : item.n;
    slice.token =
        shape.state_in_smem ? reinterpret_cast<TokenState*>(s.body) : w.token + int64_t(b) * a.N + slice.begin;

    // What every token must know before the first pick.
    norms(item, slice.begin, slice.end, warp, CudaTiles::warps);
    team.sync();
    if (item.has_first) {
      if (a.first == First::centroid)
        centroid_scores(item, team, slice);
      else
        nearest_scores(item, slice, *reinterpret_cast<TileSmem<T>*>(storage));
    }

    StreamSource<T> source{{item.x[slice.begin], item.x.stride, item.x.C, item.x.whole}, nullptr, {}};
    if (shape.tokens == CudaTokens::resident) source = resident_source(item, slice, storage);
    if (shape.tokens == CudaTokens::lazy) {
      source.lazy = {seen, w.centre + int64_t(b) * a.k, &s.bound, s.warp_best};
      for (int group = int(threadIdx.x); group * CudaTiles::tokens < shape.capacity; group += CudaTiles::threads) {
        seen[group] = 0;
      }
    }
    select(item, team, slice, source);
  }
}

// ---- products from the matrix of all pairs

struct GramSource {
  const float* gram;  // [N, N]
  int N;

  __device__ static bool has_turns(const Round& round) { return round.folds; }

  template <class T>
  __device__ __forceinline__ OrderKey turns(const Item<T>& item, const Slice& slice, const Round& round) const {
    const float* row = gram + int64_t(round.centre) * N;
    Turns turns;
#pragma unroll 1
    for (int i0 = int(threadIdx.x); i0 < slice.end; i0 += CudaTiles::threads * CudaTiles::batch) {
      float product[CudaTiles::batch];
#pragma unroll
      for (int j = 0; j < CudaTiles::batch; ++j) {
        const int i = i0 + j * CudaTiles::threads;
        product[j] = i < slice.end ? row[i] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < CudaTiles::batch; ++j) {
        const int i = i0 + j * CudaTiles::threads;
        if (i < slice.end) turns.take(item, round, slice.token[i], i, product[j]);
      }
    }
    return turns.finish(item, round);
  }
};

// Tile number u of the lower triangle, counted row by row: row and column of the tile.
__device__ __forceinline__ int2 lower_tile(int u) {
  int row = int((sqrtf(8.0f * float(u) + 1.0f) - 1.0f) * 0.5f);
  while ((row + 1) * (row + 2) / 2 <= u) ++row;  // the square root may be off by one either way
  while (row * (row + 1) / 2 > u) --row;
  return make_int2(row, u - row * (row + 1) / 2);
}

// Products of one tile of the lower triangle and their mirror images into the matrix: symmetric by construction.
template <class T>
__device__ __forceinline__ void store_tile(const PairTile<T>& tile, int2 at, float* gram, int n, int64_t N) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int i = at.x * CudaTiles::tile + tile.row(r), j = at.y * CudaTiles::tile + tile.column(q);
      if (i >= n || j > i) continue;
      gram[i * N + j] = tile.product(r, q);
      gram[j * N + i] = tile.product(r, q);
    }
  }
}

// First score of token i under the largest_nn rule, by one warp, from the matrix.
template <class T>
__device__ __forceinline__ void nearest_score(const Item<T>& item, const float* gram, int64_t N, int i) {
  const int lane = int(threadIdx.x) % 32;
  const float inverse_i = item.inverse_norm[i];
  float least = INFINITY;
  for (int j = lane; j < item.n; j += 32) {
    const float inverse_j = item.inverse_norm[j], cost = item.rule.cost(gram[i * N + j], inverse_i, inverse_j);
    if (is_valid(inverse_j) && i != j && cost < least) least = cost;
  }
  least = gpu::warp_min(least);
  if (lane == 0) item.first[i] = item.rule.nearest_neighbour().score(least, item.weight_of(i), 1);
}

// registers: kcenter_gram <= 168
template <class T>
__global__ void __launch_bounds__(CudaTiles::threads, 1) kcenter_gram(Args a, Workspace w, int items, bool whole) {
  auto& s = gpu::dynamic_smem<Smem>();
  ClusterTeam team(s, w.meeting, 1);
  const int blocks = int(gridDim.x);
  const int warp = int(blockIdx.x) * CudaTiles::warps + int(threadIdx.x) / 32, warps = blocks * CudaTiles::warps;
  const int side = (a.N + CudaTiles::tile - 1) / CudaTiles::tile, tiles = side * (side + 1) / 2;
  const int64_t matrix = int64_t(a.N) * a.N;

  for (int first_item = 0; first_item < a.B; first_item += items) {
    const int count = a.B - first_item < items ? a.B - first_item : items;

    // Norms and all products, spread over the grid.
    for (int i = warp; i < count * a.N; i += warps) {
      const Item<T> item(a, w, whole, first_item + i / a.N);
      norms(item, i % a.N, i % a.N < item.n ? i % a.N + 1 : 0, 0, 1);
    }
    auto& slabs = *reinterpret_cast<TileSmem<T>*>(s.body);
    PairTile<T> tile(a.metric == Metric::l2);
    for (int u = int(blockIdx.x); u < count * tiles; u += blocks) {
      const Item<T> item(a, w, whole, first_item + u / tiles);
      const int2 at = lower_tile(u % tiles);
      if (at.x * CudaTiles::tile >= item.n) continue;  // the whole block agrees
      tile.compute(slabs, tokens_from(item, at.x * CudaTiles::tile), tokens_from(item, at.y * CudaTiles::tile));
      store_tile(tile, at, w.gram + u / tiles * matrix, item.n, a.N);
    }
    gpu::grid_barrier(w.meeting.counter, unsigned(blocks));

    if (!a.seed && a.first == First::largest_nn) {
      for (int i = warp; i < count * a.N; i += warps) {
        const Item<T> item(a, w, whole, first_item + i / a.N);
        if (i % a.N < item.n) nearest_score(item, w.gram + i / a.N * matrix, a.N, i % a.N);
      }
      gpu::grid_barrier(w.meeting.counter, unsigned(blocks));
    }

    // One block per item picks.
    for (int b = int(blockIdx.x); b < count; b += blocks) {
      const Item<T> item(a, w, whole, first_item + b);
      const Slice slice{0, item.n, reinterpret_cast<TokenState*>(s.body)};
      __syncthreads();  // done with the states of the item before
      if (item.has_first && a.first == First::centroid) centroid_scores(item, team, slice);
      select(item, team, slice, GramSource{w.gram + b * matrix, a.N});
    }
    if (first_item + items < a.B) gpu::grid_barrier(w.meeting.counter, unsigned(blocks));  // matrices are overwritten
  }
}

}  // namespace tokencomp::kcenter
