// Prefill attention on CUDA: a block of threads holds the queries of one block of rows in shared memory and meets tiles
// of keys; while it multiplies with the keys of a tile its values arrive, and while it weighs those the next keys do.
// mma.sync, for sm_80 and newer. Two barriers a tile; the sums never leave the registers.
#pragma once

#include "cuda/prefill_pages.h"
#include "cuda/prefill_tiles.h"

namespace tokencomp::prefill {

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint16_t bits[2];
  memcpy(&bits[0], &pair[0], 2);
  memcpy(&bits[1], &pair[1], 2);
  return uint32_t(bits[1]) << 16 | bits[0];
}

template <class S, bool kPaged>
struct Attend {
  using T = typename S::T;
  static constexpr int kOwnRows = 2 * S::kMTiles;  // of a thread
  const PrefillArgs& p;
  const Geometry& g;
  Smem<S>& s;
  int row_blocks;
  RowFormat<T> q_format, k_format, v_format;
  float out[S::kMTiles][S::kOutTiles][4];
  float top[kOwnRows], sum[kOwnRows];  // sum: of the thread's own columns

  __device__ static int lane() { return int(threadIdx.x) % 32; }
  __device__ static int warp_row() { return int(threadIdx.x) / 32 * 16 * S::kMTiles; }
  // The thread's row i of the block, and its column (n, e) of a tile.
  __device__ static int row(int i) { return warp_row() + i / 2 * 16 + i % 2 * 8 + lane() / 4; }
  __device__ static int column(int n, int e) { return n * 8 + lane() % 4 * 2 + e; }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < S::kMTiles * S::kOutTiles * 4; ++i) out[i / 4 / S::kOutTiles][i / 4 % S::kOutTiles][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) top[i] = -INFINITY, sum[i] = 0.0f;
    see();
    if (threadIdx.x == 0) {
      s.walk.next(p, S::kKeys, s.tile[0]);
    }
    __syncthreads();
    if (s.tile[0].count) {
      const Place at = s.at;
      const T* q = static_cast<const T*>(p.a.q) + at.b * p.a.q_stride_b + at.h * p.a.q_stride_h;
      load_rows<S>(s.q, q_format, [&](int r) { return at.t0 + r < g.T ? q + (at.t0 + r) * p.a.q_stride_t : nullptr; });
      load_keys(0);
      load_quantized_keys(0);
    }
    gpu::cp_async_commit();
#pragma unroll 1
    for (int stage = 0; s.tile[stage].count; stage ^= 1) {
      gpu::cp_async_wait<0>();
      __syncthreads();  // the keys are there for everyone, and everyone is done with the values before
      load_values(stage);
      gpu::cp_async_commit();
      if (threadIdx.x == 0) s.walk.next(p, S::kKeys, s.tile[stage ^ 1]);
      float z[S::kMTiles][S::kNTiles][4];
      multiply(z);
      gpu::cp_async_wait<0>();
      __syncthreads();  // the values are there for everyone, and everyone is done with the keys
      if (s.tile[stage ^ 1].count) load_keys(stage ^ 1);
      gpu::cp_async_commit();
      if (p.a.softcap > 0.0f) cap(z);  // apart: woven into the next loop it would cost registers of all heads
      bias(z, stage);
      if (masked(stage)) mask(z, stage);
      soften(z);
      accumulate(z);
      if (s.tile[stage ^ 1].count) load_quantized_keys(stage ^ 1);
    }
    gpu::cp_async_wait<0>();
    finish();
  }

  // What rows see, and with it the tiles to come.
  __device__ __forceinline__ void see() {
    const int heads = g.B * g.Hq, head = int(blockIdx.x % unsigned(heads)), block = int(blockIdx.x / unsigned(heads));
    const int b = head / g.Hq, h = head % g.Hq, t0 = (row_blocks - 1 - block) * S::kRows;
    Range some{g.S, 0}, every{0, g.S};
    for (int r = int(threadIdx.x); r < S::kRows; r += S::kThreads) {
      const bool there = t0 + r < g.T;
      const Range range = there ? visible(g, b, h / g.group(), t0 + r) : Range{0, 0};
      s.range[r] = range;
      if (!there) continue;
      every.begin = max(every.begin, range.begin);
      every.end = min(every.end, range.end);
      if (range.begin >= range.end) continue;
      some.begin = min(some.begin, range.begin);
      some.end = max(some.end, range.end);
    }
    some.begin = gpu::block_reduce(some.begin, s.scratch, g.S, gpu::Min{});
    some.end = gpu::block_reduce(some.end, s.scratch, 0, gpu::Max{});
    every.begin = gpu::block_reduce(every.begin, s.scratch, 0, gpu::Max{});
    every.end = gpu::block_reduce(every.end, s.scratch, g.S, gpu::Min{});
    if (threadIdx.x) return;
    s.at = {b, h, h / g.group(), t0, every};
    s.walk.start(p, some, b, h, t0 / p.block_q, S::kKeys);
  }

  __device__ bool masked(int stage) const {
    const Tile tile = s.tile[stage];
    return tile.entries || s.at.every.begin > tile.first || s.at.every.end < tile.first + S::kKeys;
  }

  // The position of key c of a tile; -1 where there is none.
  __device__ int position(const Tile& tile, int c) const {
    if (!tile.entries) return tile.first + c < g.S ? tile.first + c : -1;
    const int at = c < tile.count ? tile.entries[c] : -1;
    return at < g.S ? at : -1;
  }

  __device__ TileSlots slots_of(const Tile& tile) const {
    return {p.a, s.at.b, s.at.kv, keys_of(g, s.at.b, s.at.kv), tile};
  }

  __device__ __forceinline__ void load_keys(int stage) const {
    const Tile tile = s.tile[stage];
    const int b = s.at.b, kv = s.at.kv;
    if constexpr (kPaged) {
      load_working<S>(s.k, k_format, p.a.pages, slots_of(tile));
    } else {
      const T* k = static_cast<const T*>(p.a.k) + b * p.a.k_stride_b + kv * p.a.k_stride_h;
      load_rows<S>(s.k, k_format, [&](int r) {
        const int at = position(tile, r);
        return at >= 0 ? k + at * p.a.k_stride_s : nullptr;
      });
    }
    for (int c = int(threadIdx.x); c < S::kKeys; c += S::kThreads) {
      const int at = position(tile, c);
      s.position[stage][c] = at;
      float bias = at >= 0 ? bias_of(p.a, b, kv, at) * kLog2e : 0.0f;
      if constexpr (kPaged) {
        if (at >= 0 && slots_of(tile).entry(c) == kNoPage) bias = -INFINITY;
      }
      s.bias[stage][c] = bias;
    }
  }

  // Keys of quantized pages, apart from the others: their numbers pass through registers, which hold weights before.
  __device__ __forceinline__ void load_quantized_keys(int stage) const {
    if constexpr (kPaged && kHasQuantized<S>) load_quantized<S, false>(s.k, slots_of(s.tile[stage]));
  }

  // Zeros for keys that the sequence does not have: their weights are 0, and 0 times NaN would be NaN.
  __device__ __forceinline__ void load_values(int stage) const {
    const Tile tile = s.tile[stage];
    if constexpr (kPaged) {
      load_working<S>(s.v, v_format, p.v_pages, slots_of(tile));
      if constexpr (kHasQuantized<S>) load_quantized<S, true>(s.v, slots_of(tile));
      return;
    }
    const Range keys = keys_of(g, s.at.b, s.at.kv);
    const T* v = static_cast<const T*>(p.v) + s.at.b * p.v_stride_b + s.at.kv * p.v_stride_h;
    load_rows<S>(s.v, v_format, [&](int r) {
      const int at = position(tile, r);
      return at >= keys.begin && at < keys.end ? v + at * p.v_stride_s : nullptr;
    });
  }

  __device__ __forceinline__ void multiply(float (&z)[S::kMTiles][S::kNTiles][4]) {
#pragma unroll
    for (int i = 0; i < S::kMTiles * S::kNTiles * 4; ++i) z[i / 4 / S::kNTiles][i / 4 % S::kNTiles][i % 4] = 0.0f;
    if constexpr (S::kTensor) {
#pragma unroll
      for (int step = 0; step < S::kD / 16; ++step) {
        uint32_t a[S::kMTiles][4];
#pragma unroll
        for (int m = 0; m < S::kMTiles; ++m) {
          const int r = warp_row() + m * 16 + lane() % 16;
          gpu::ldmatrix_x4(a[m], &s.q[r][place_of(r, 2 * step, lane() / 16)]);
        }
#pragma unroll
        for (int n = 0; n < S::kNTiles; n += 2) {
          const int r = n * 8 + lane() % 8 + lane() / 16 * 8;
          uint32_t keys[4];
          gpu::ldmatrix_x4(keys, &s.k[r][place_of(r, 2 * step, lane() / 8 % 2)]);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t fragment[2] = {keys[2 * i], keys[2 * i + 1]};
#pragma unroll
            for (int m = 0; m < S::kMTiles; ++m) gpu::mma_m16n8k16<T>(z[m][n + i], a[m], fragment);
          }
        }
      }
    } else {
#pragma unroll 1
      for (int c = 0; c < S::kChunks; ++c) {
        float own[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) unpack<float>(s.q[row(i)][place_of(row(i), c)], own[i]);
#pragma unroll
        for (int j = 0; j < 2 * S::kNTiles; ++j) {
          const int r = column(j / 2, j % 2);
          float key[4];
          unpack<float>(s.k[r][place_of(r, c)], key);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& total = z[0][j / 2][i * 2 + j % 2];
            total = accumulate_chunk(total, own[i], key);
          }
        }
      }
    }
  }

  __device__ __forceinline__ static float accumulate_chunk(float total, const float (&a)[4], const float (&b)[4]) {
    return tokencomp::accumulate<4, false>(total, a, b);
  }

  // Products to logits in units of log2(e); those of pairs that are not seen to -inf. Column by column: what belongs to
  // a key would otherwise stay in registers for all rows.
  __device__ __forceinline__ void bias(float (&z)[S::kMTiles][S::kNTiles][4], int stage) {
    const Logits logits(p.a);
    const float factor = logits.factor() * kLog2e;
#pragma unroll
    for (int n = 0; n < S::kNTiles; ++n) {
      const float2 own = *reinterpret_cast<const float2*>(&s.bias[stage][column(n, 0)]);
#pragma unroll
      for (int m = 0; m < S::kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) z[m][n][i] = fmaxf(fmaf(z[m][n][i], factor, i % 2 ? own.y : own.x), -INFINITY);
      }
    }
  }

  __device__ __forceinline__ void cap(float (&z)[S::kMTiles][S::kNTiles][4]) {
    const Logits logits(p.a);
#pragma unroll
    for (int i = 0; i < S::kMTiles * S::kNTiles; ++i) logits.cap(z[i / S::kNTiles][i % S::kNTiles]);
  }

  __device__ __forceinline__ void mask(float (&z)[S::kMTiles][S::kNTiles][4], int stage) {
    Range range[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) range[i] = s.range[row(i)];
#pragma unroll
    for (int n = 0; n < 2 * S::kNTiles; ++n) {
      const int at = s.position[stage][column(n / 2, n % 2)];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        if (!(at >= range[i].begin && at < range[i].end)) z[i / 2][n / 2][i % 2 * 2 + n % 2] = -INFINITY;
      }
    }
  }

  // Logits to weights relative to the largest of the row so far; what there was shrinks.
  __device__ __forceinline__ void soften(float (&z)[S::kMTiles][S::kNTiles][4]) {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int m = i / 2, half = i % 2;
      float most = top[i];
#pragma unroll
      for (int n = 0; n < 2 * S::kNTiles; ++n) most = fmaxf(most, z[m][n / 2][half * 2 + n % 2]);
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
      const float origin = most == -INFINITY ? 0.0f : most;
      const float shrink = top[i] == most ? 1.0f : gpu::exp2_approx(top[i] - origin);
      top[i] = most;
      sum[i] *= shrink;
#pragma unroll
      for (int n = 0; n < S::kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = z[m][n][half * 2 + e];
          x = gpu::exp2_approx(x - origin);
          sum[i] += x;
        }
      }
      if (!__any_sync(~0u, shrink != 1.0f)) continue;  // most tiles move no maximum
#pragma unroll
      for (int n = 0; n < S::kOutTiles; ++n) {
        out[m][n][half * 2] *= shrink;
        out[m][n][half * 2 + 1] *= shrink;
      }
    }
  }

  __device__ __forceinline__ void accumulate(const float (&weight)[S::kMTiles][S::kNTiles][4]) {
    if constexpr (S::kTensor) {
#pragma unroll
      for (int step = 0; step < S::kKeys / 16; ++step) {
        uint32_t a[S::kMTiles][4];
#pragma unroll
        for (int m = 0; m < S::kMTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* pair = &weight[m][2 * step + i / 2][i % 2 * 2];
            a[m][i] = pack_pair<T>(pair[0], pair[1]);
          }
        }
#pragma unroll
        for (int n = 0; n < S::kOutTiles; n += 2) {
          const int r = step * 16 + lane() % 16;
          uint32_t values[4];
          gpu::ldmatrix_x4_trans(values, &s.v[r][place_of(r, n, lane() / 16)]);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t fragment[2] = {values[2 * i], values[2 * i + 1]};
#pragma unroll
            for (int m = 0; m < S::kMTiles; ++m) gpu::mma_m16n8k16<T>(out[m][n + i], a[m], fragment);
          }
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < S::kKeys; ++j) {  // the weight of key j belongs to one lane of each quad
        const int owner = (lane() & ~3) + j % 8 / 2;
        const float upper = __shfl_sync(~0u, weight[0][j / 8][j % 2], owner);
        const float lower = __shfl_sync(~0u, weight[0][j / 8][2 + j % 2], owner);
#pragma unroll
        for (int n = 0; n < S::kOutTiles; ++n) {
          const int low = lane() % 4 / 2, half = lane() % 2;  // of the 16-byte chunks 2 n and 2 n + 1
          const float2 value = reinterpret_cast<const float2*>(&s.v[j][place_of(j, 2 * n, low)])[half];
          out[0][n][0] = fmaf(upper, value.x, out[0][n][0]);
          out[0][n][1] = fmaf(upper, value.y, out[0][n][1]);
          out[0][n][2] = fmaf(lower, value.x, out[0][n][2]);
          out[0][n][3] = fmaf(lower, value.y, out[0][n][3]);
        }
      }
    }
  }

  __device__ __forceinline__ void finish() {
    const int b = s.at.b, h = s.at.h, t0 = s.at.t0;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], lanes);
      const int t = t0 + row(i);
      if (t >= g.T) continue;
      const RowEnd end = finish_row(top[i], sum[i], p.sinks ? p.sinks + h : nullptr);
      const int64_t at = (int64_t(b) * g.Hq + h) * g.T + t;
      if (lane() % 4 == 0) p.lse[at] = end.lse;
      T* to = static_cast<T*>(p.out) + at * p.Dv;
#pragma unroll
      for (int n = 0; n < S::kOutTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = column(n, e);
          if (c < p.Dv) to[c] = from_float<T>(out[i / 2][n][i % 2 * 2 + e] * end.factor);
        }
      }
    }
  }
};

// Blocks of threads: late rows, which see most keys, first; the heads of a group side by side, so that they share keys
// in L2.
// At least one block of fp32 over pages (0 says nothing): left to itself, ptxas took 80 registers and spilled.
// registers: prefill_attend <= 255
template <class S, bool kPaged>
__global__ void __launch_bounds__(S::kThreads, kPaged && !S::kTensor ? 1 : 0)
    prefill_attend(PrefillArgs p, int row_blocks, bool whole_q, bool whole_k, bool whole_v) {
  using T = typename S::T;
  const Geometry& g = p.a.g;
  Attend<S, kPaged> attend{p,
                           g,
                           gpu::dynamic_smem<Smem<S>>(),
                           row_blocks,
                           RowFormat<T>{p.a.q, g.D, whole_q},
                           RowFormat<T>{p.a.k, g.D, whole_k},
                           RowFormat<T>{p.v, p.Dv, whole_v},
                           {},
                           {},
                           {}};
  attend.run();
}

}  // namespace tokencomp::prefill
