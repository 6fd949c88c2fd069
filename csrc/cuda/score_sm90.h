// Column scores on CUDA, sm_90a: the sweep of score_kernels.h with warpgroup products. A block of two warpgroups holds
// 256 keys in shared memory, 128 for each warpgroup, and streams tiles of 128 query rows through a ring of cp.async
// stages. A warpgroup multiplies its keys in two halves of 64, in turns: while the tensor cores make the products of
// one half, those of the other go through their exponentials.
#pragma once

#include "cuda/score_tiles.h"
#include "cuda/score_work.h"

namespace tokencomp::score {

template <class T_, int kDim>
struct WgmmaShape {
  using T = T_;
  static constexpr int kD = kDim, kSteps = kD / 16, kPanels = (kD + 63) / 64, kStages = 4;
};

template <class S>
struct WgmmaSmem {
  // Panels of 64 channels. 16-byte chunk c of row r lies at position c ^ (r % 8), the 128-byte swizzle.
  alignas(1024) uint4 keys[S::kPanels][kWgmmaKeys][8];
  alignas(1024) uint4 rows[S::kStages][S::kPanels][kWgmmaRows][8];
  alignas(16) float beta[S::kStages][kWgmmaRows];
  alignas(16) float never[kWgmmaRows];  // +inf
  float bias[kWgmmaKeys];
};

constexpr size_t kSmemOfSm90 = 227 << 10;  // what a block may have there

// `there` rows of `dim` channels, `stride` elements apart, into panels of kRows rows; the rest is zeros.
template <class S, int kRows>
__device__ __forceinline__ void load_panels(uint4 (&panels)[S::kPanels][kRows][8], const typename S::T* rows,
                                            int64_t stride, int there, int dim) {
  constexpr int kChunks = S::kD / 8;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, c = i % kChunks;
    const bool inside = r < there && c * 8 < dim;
    gpu::cp_async16(&panels[c / 8][r][c % 8 ^ (r & 7)], inside ? rows + r * stride + c * 8 : rows, inside);
  }
}

template <class S, bool kMax>
struct WgmmaSweep {
  using T = typename S::T;
  static constexpr int kHalf = 64;  // keys of one product

  // A tile of query rows in the ring, or one that counts nowhere: `beta` is +inf then.
  struct Tile {
    int stage, first;
    bool masked;
    const float* beta;
  };
  // Of the keys that a thread owns in a half: the sum (or maximum) and what rounding took from it.
  struct Totals {
    float sum[2], lost[2];
  };

  const ColumnArgs& c;
  const ColumnWorkspace& w;
  const Geometry& g;
  WgmmaSmem<S>& s;
  int b, kv, part, key;
  int stage = 0;  // of the tile that arrives next

  __device__ static int warpgroup() { return int(threadIdx.x) / 128; }
  // The thread's key (half, e) in the block; its query row (n, e) in a tile.
  __device__ static int key_of(int half, int e) {
    return (warpgroup() * 2 + half) * kHalf + int(threadIdx.x) % 128 / 32 * 16 + int(threadIdx.x) % 32 / 4 + e * 8;
  }
  __device__ static int row_of(int n, int e) { return n * 8 + int(threadIdx.x) % 4 * 2 + e; }

  __device__ __forceinline__ void run() {
    const T* k = static_cast<const T*>(c.a.k) + b * c.a.k_stride_b + kv * c.a.k_stride_h + key * c.a.k_stride_s;
    load_panels<S>(s.keys, k, c.a.k_stride_s, g.S - key, g.D);
    gpu::cp_async_commit();
    for (int r = int(threadIdx.x); r < kWgmmaKeys; r += kThreads) {
      s.bias[r] = float(c.power) * kLog2e * bias_of(c.a, b, kv, key + r);
    }
    if (int(threadIdx.x) < kWgmmaRows) s.never[threadIdx.x] = INFINITY;
    const int begin = part * w.tiles_per_part, end = min(begin + w.tiles_per_part, w.tiles);
    const TileBounds* bounds = w.bounds + (int64_t(b) * g.Hq + kv * g.group()) * w.tiles;
    TileCursor now{bounds, w.tiles, begin, end, g.group(), key, kWgmmaKeys, 0, begin};
    TileCursor ahead = now;
    ahead.settle(false);
#pragma unroll 1
    for (int i = 0; i < S::kStages - 2; ++i) load_next(ahead, i);
#pragma unroll 1
    for (; now.head < now.heads; ++now.head, now.tile = begin) sweep_head(now, ahead);
    gpu::cp_async_wait<0>();
  }

  // The tile `ahead` into a stage that nobody reads any more.
  __device__ __forceinline__ void load_next(TileCursor& ahead, int into) const {
    if (ahead.head < ahead.heads) {
      const int h = kv * g.group() + ahead.head, t0 = ahead.tile * kWgmmaRows;
      const T* q = static_cast<const T*>(c.a.q) + b * c.a.q_stride_b + h * c.a.q_stride_h + t0 * c.a.q_stride_t;
      load_panels<S>(s.rows[into], q, c.a.q_stride_t, g.T - t0, g.D);
      const float* beta = w.beta + (int64_t(b) * g.Hq + h) * w.padded() + t0;
      if (int(threadIdx.x) < kWgmmaRows / 4) {
        gpu::cp_async16(&s.beta[into][threadIdx.x * 4], beta + threadIdx.x * 4);
      }
      ++ahead.tile;
      ahead.settle(false);
    }
    gpu::cp_async_commit();  // empty at the end, so that the number of groups in flight stays constant
  }

  // Waits for the tile `now` and moves on. The barrier also says that everyone is done with the products and sums of
  // the tile before the last one, whose stage is refilled: the last one's second half may still be under way.
  __device__ __forceinline__ Tile arrive(TileCursor& now, TileCursor& ahead) {
    gpu::cp_async_wait<S::kStages - 3>();
    gpu::fence_proxy_async();
    __syncthreads();
    load_next(ahead, (stage + S::kStages - 2) % S::kStages);
    const TileBounds& t = now.bounds[int64_t(now.head) * w.tiles + now.tile];
    const bool whole = t.all_begin <= key && t.all_end >= key + kWgmmaKeys;
    const Tile tile{stage, now.tile * kWgmmaRows, !whole, s.beta[stage]};
    stage = (stage + 1) % S::kStages;
    ++now.tile;
    now.settle(true);
    return tile;
  }

  __device__ __forceinline__ void sweep_head(TileCursor& now, TileCursor& ahead) {
    Totals totals[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      totals[i / 2].sum[i % 2] = kMax ? -INFINITY : 0.0f;
      totals[i / 2].lost[i % 2] = 0.0f;
    }
    now.settle(true);
    float low[kHalf], high[kHalf];  // products of the two halves, one of them always under way
#pragma unroll 1
    while (now.tile < now.end) {
      const Tile tile = arrive(now, ahead);
      multiply(tile, 0, low);
      multiply(tile, 1, high);
      gpu::wgmma_wait<1>();
      fold(low, tile, 0, totals[0]);
      const Tile next = now.tile < now.end ? arrive(now, ahead) : Tile{tile.stage, 0, false, s.never};
      multiply(next, 0, low);
      gpu::wgmma_wait<1>();
      fold(high, tile, 1, totals[1]);
      multiply(next, 1, high);
      gpu::wgmma_wait<1>();
      fold(low, next, 0, totals[0]);
      gpu::wgmma_wait<0>();
      fold(high, next, 1, totals[1]);
    }
    float* out = w.partial + ((int64_t(part) * g.B + b) * g.Hq + kv * g.group() + now.head) * g.S;
    write(out, 0, totals[0]);
    write(out, 1, totals[1]);
  }

  // Products of half of the warpgroup's keys with a tile's rows: under way when it returns, one group.
  __device__ __forceinline__ void multiply(const Tile& tile, int half, float (&acc)[kHalf]) {
    constexpr uint64_t kKeyPanel = sizeof(s.keys[0]) >> 4, kRowPanel = sizeof(s.rows[0][0]) >> 4;
    const uint64_t keys = gpu::wgmma_descriptor_128b(s.keys[0][(warpgroup() * 2 + half) * kHalf]);
    const uint64_t rows = gpu::wgmma_descriptor_128b(s.rows[tile.stage][0][0]);
    gpu::wgmma_hold(acc);
    gpu::wgmma_fence();
#pragma unroll
    for (int k = 0; k < S::kSteps; ++k) {
      gpu::wgmma_m64n128k16<T>(acc, keys + k / 4 * kKeyPanel + k % 4 * 2, rows + k / 4 * kRowPanel + k % 4 * 2, k > 0);
    }
    gpu::wgmma_commit();
  }

  __device__ __forceinline__ void fold(float (&acc)[kHalf], const Tile& tile, int half, Totals& totals) const {
    gpu::wgmma_hold(acc);
    tile.masked ? fold_as<true>(acc, tile, half, totals) : fold_as<false>(acc, tile, half, totals);
  }

  // The tile's own sum first, then compensated (Kahan) into the total: a column may be as long as the sequence.
  template <bool kMask>
  __device__ __forceinline__ void fold_as(const float (&acc)[kHalf], const Tile& tile, int half, Totals& totals) const {
    const float factor = c.a.scale * (float(c.power) * kLog2e);
    const float bias[2] = {s.bias[key_of(half, 0)], s.bias[key_of(half, 1)]};
    const Range* ranges = w.range + int64_t(b) * w.padded() + tile.first;
    float sum[2] = {kMax ? -INFINITY : 0.0f, kMax ? -INFINITY : 0.0f};
#pragma unroll
    for (int n = 0; n < kWgmmaRows / 8; ++n) {
      const float2 beta = *reinterpret_cast<const float2*>(&tile.beta[row_of(n, 0)]);
      Range range[2] = {{0, g.S}, {0, g.S}};
      if constexpr (kMask) {
        range[0] = ranges[row_of(n, 0)];
        range[1] = ranges[row_of(n, 1)];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = key + key_of(half, i / 2);
        float x = fmaf(acc[n * 4 + i], factor, bias[i / 2]) - (i % 2 ? beta.y : beta.x);
        if (kMask && !(j >= range[i % 2].begin && j < range[i % 2].end)) x = -INFINITY;
        x = fmaxf(x, -INFINITY);  // NaN counts as -inf
        sum[i / 2] = kMax ? fmaxf(sum[i / 2], x) : sum[i / 2] + gpu::exp2_approx(x);
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if constexpr (kMax) {
        totals.sum[e] = fmaxf(totals.sum[e], sum[e]);
      } else {
        const float x = sum[e] - totals.lost[e], next = totals.sum[e] + x;
        totals.lost[e] = (next - totals.sum[e]) - x;
        totals.sum[e] = next;
      }
    }
  }

  // Four lanes share a key.
  __device__ __forceinline__ void write(float* out, int half, const Totals& totals) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = totals.sum[e];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        const float other = __shfl_xor_sync(~0u, total, lanes);
        total = kMax ? fmaxf(total, other) : total + other;
      }
      const int j = key + key_of(half, e);
      if (threadIdx.x % 4 == 0 && j < g.S) out[j] = total;
    }
  }
};

// Blocks: x = (b, kv head), y = keys, z = part of the rows, the last (which see most keys) first.
// registers: score_columns_wgmma <= 255
template <class S, bool kMax>
__global__ void __launch_bounds__(kThreads, 1) score_columns_wgmma(ColumnArgs c, ColumnWorkspace w) {
  const Geometry& g = c.a.g;
  const int b = int(blockIdx.x) / g.Hkv, kv = int(blockIdx.x) % g.Hkv, part = w.parts - 1 - int(blockIdx.z);
  WgmmaSweep<S, kMax> sweep{c, w, g, gpu::dynamic_smem<WgmmaSmem<S>>(), b, kv, part, int(blockIdx.y) * kWgmmaKeys};
  sweep.run();
}

}  // namespace tokencomp::score
