// Attention scores on CUDA: the two sweeps. score_columns holds keys and streams query rows, a key's sum staying in
// registers; score_lse holds query rows and streams keys. Both write one partial result per part of the stream; parts
// are added in order (score_point.h), so nothing depends on the order in which blocks run.
#pragma once

#include "cuda/score_tiles.h"
#include "cuda/score_work.h"

namespace tokencomp::score {

struct LseWorkspace {
  float2* partial;  // [parts, B, Hq, T] maximum and sum relative to it
  int keys_per_part, parts, blocks;
};

// Exponents, ranges and bounds; one warp a tile. O(Hq T).
// registers: score_rows <= 40
__global__ void __launch_bounds__(kThreads) score_rows(ColumnArgs c, ColumnWorkspace w) {
  const Geometry& g = c.a.g;
  const int64_t tile = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (tile >= int64_t(g.B) * g.Hq * w.tiles) return;
  const int lane = int(threadIdx.x) % 32, head = int(tile / w.tiles), b = head / g.Hq, h = head % g.Hq;
  const float* weight = c.row_weight ? c.row_weight + b * c.weight_stride_b + h * c.weight_stride_h : nullptr;
  TileBounds bounds{g.S, 0, 0, g.S};
  const int first = int(tile % w.tiles) * w.tile_rows;
  for (int t = first + lane; t < first + w.tile_rows; t += 32) {
    const Range range = t < g.T ? visible(g, b, 0, t) : Range{0, 0};
    float beta = INFINITY;
    if (range.begin < range.end) {
      beta = beta_of(c.lse[int64_t(head) * g.T + t], weight ? weight[t] : 1.0f, c.power);
    }
    w.beta[int64_t(head) * w.padded() + t] = beta;
    if (h == 0) w.range[int64_t(b) * w.padded() + t] = range;
    if (beta == INFINITY) continue;
    bounds.first = min(bounds.first, range.begin);
    bounds.last = max(bounds.last, range.end);
    bounds.all_begin = max(bounds.all_begin, range.begin);
    bounds.all_end = min(bounds.all_end, range.end);
  }
  bounds.first = gpu::warp_min(bounds.first);
  bounds.last = gpu::warp_max(bounds.last);
  bounds.all_begin = gpu::warp_max(bounds.all_begin);
  bounds.all_end = gpu::warp_min(bounds.all_end);
  if (lane == 0) w.bounds[tile] = bounds;
}

template <class S, bool kMax>
struct ColumnSweep {
  using T = typename S::T;
  const ColumnArgs& c;
  const ColumnWorkspace& w;
  const Geometry& g;
  Smem<S>& s;
  int b, kv, part, key;
  RowFormat format;

  __device__ void load(const TileCursor& at, int stage) const {
    if (at.head < at.heads) {
      const int h = kv * g.group() + at.head, t0 = at.tile * S::kStream;
      const T* q = static_cast<const T*>(c.a.q) + b * c.a.q_stride_b + h * c.a.q_stride_h;
      load_tile<S>(s, stage, format, [&](int r) {
        return RowSource<T>{t0 + r < g.T ? q + (t0 + r) * c.a.q_stride_t : nullptr, nullptr};
      });
      const float* beta = w.beta + (int64_t(b) * g.Hq + h) * w.padded() + t0;
      if (int(threadIdx.x) < S::kStream / 4) gpu::cp_async16(&s.side[stage][threadIdx.x * 4], beta + threadIdx.x * 4);
    }
    gpu::cp_async_commit();  // empty at the end, so that the number of groups in flight stays constant
  }

  __device__ __forceinline__ void run() {
    for (int r = int(threadIdx.x); r < S::kStill; r += kThreads) {
      s.bias[r] = float(c.power) * kLog2e * bias_of(c.a, b, kv, key + r);
    }
    Still<S> still;
    const T* k = static_cast<const T*>(c.a.k) + b * c.a.k_stride_b + kv * c.a.k_stride_h;
    still.load(s, format,
               [&](int r) { return RowSource<T>{key + r < g.S ? k + (key + r) * c.a.k_stride_s : nullptr, nullptr}; });
    const int begin = part * w.tiles_per_part, end = min(begin + w.tiles_per_part, w.tiles);
    TileCursor now{w.bounds + (int64_t(b) * g.Hq + kv * g.group()) * w.tiles,
                   w.tiles,
                   begin,
                   end,
                   g.group(),
                   key,
                   S::kStill,
                   0,
                   begin};
    TileCursor ahead = now;
    ahead.settle(false);
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) advance(ahead, i);
    int stage = 0;
#pragma unroll 1
    for (; now.head < now.heads; ++now.head, now.tile = begin) {
      float total[S::kMTiles * 2], lost[S::kMTiles * 2];
#pragma unroll
      for (int i = 0; i < S::kMTiles * 2; ++i) {
        total[i] = kMax ? -INFINITY : 0.0f;
        lost[i] = 0.0f;
      }
#pragma unroll 1
      for (now.settle(true); now.tile < end; ++now.tile, now.settle(true)) {
        gpu::cp_async_wait<S::kStages - 2>();
        __syncthreads();  // the tile has arrived for everyone, and everyone is done with the stage refilled next
        advance(ahead, (stage + S::kStages - 1) % S::kStages);
        const TileBounds& t = now.bounds[int64_t(now.head) * w.tiles + now.tile];
        const bool whole = t.all_begin <= key && t.all_end >= key + S::kStill;
        fold(still, stage, now.tile * S::kStream, !whole, total, lost);
        stage = (stage + 1) % S::kStages;
      }
      write(kv * g.group() + now.head, total);
    }
    gpu::cp_async_wait<0>();
  }

  __device__ __forceinline__ void advance(TileCursor& ahead, int stage) const {
    load(ahead, stage);
    if (ahead.head < ahead.heads) {
      ++ahead.tile;
      ahead.settle(false);
    }
  }

  // The tile's own sum first, then compensated (Kahan) into the total: a column may be as long as the sequence.
  __device__ __forceinline__ void fold(const Still<S>& still, int stage, int t0, bool masked,
                                       float (&total)[S::kMTiles * 2], float (&lost)[S::kMTiles * 2]) {
    const Logits logits(c.a);
    const float factor = logits.factor() * (float(c.power) * kLog2e);
    float sum[S::kMTiles * 2];
#pragma unroll
    for (int i = 0; i < S::kMTiles * 2; ++i) sum[i] = kMax ? -INFINITY : 0.0f;
#pragma unroll 1
    for (int step = 0; step < S::kSteps; ++step) {
      float acc[S::kMTiles][S::kNTiles][4];
      still.multiply(s, stage, step, acc);
#pragma unroll
      for (int n = 0; n < S::kNTiles; ++n) {
        const int column = step * S::kRows + still.column(n, 0);
        const float2 beta = *reinterpret_cast<const float2*>(&s.side[stage][column]);
        Range range[2] = {{0, g.S}, {0, g.S}};
        if (masked) {
          range[0] = w.range[int64_t(b) * w.padded() + t0 + column];
          range[1] = w.range[int64_t(b) * w.padded() + t0 + column + 1];
        }
#pragma unroll
        for (int m = 0; m < S::kMTiles; ++m) {
          logits.cap(acc[m][n]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = still.row(m, i / 2), j = key + row;
            float x = fmaf(acc[m][n][i], factor, s.bias[row]) - (i % 2 ? beta.y : beta.x);
            if (masked && !(j >= range[i % 2].begin && j < range[i % 2].end)) x = -INFINITY;
            x = fmaxf(x, -INFINITY);  // NaN counts as -inf
            float& at = sum[m * 2 + i / 2];
            at = kMax ? fmaxf(at, x) : at + gpu::exp2_approx(x);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < S::kMTiles * 2; ++i) {
      if constexpr (kMax) {
        total[i] = fmaxf(total[i], sum[i]);
      } else {
        const float x = sum[i] - lost[i], next = total[i] + x;
        lost[i] = (next - total[i]) - x;
        total[i] = next;
      }
    }
  }

  // Four lanes share a key.
  __device__ __forceinline__ void write(int h, float (&total)[S::kMTiles * 2]) const {
    float* out = w.partial + ((int64_t(part) * g.B + b) * g.Hq + h) * g.S;
#pragma unroll
    for (int i = 0; i < S::kMTiles * 2; ++i) {
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        const float other = __shfl_xor_sync(~0u, total[i], lanes);
        total[i] = kMax ? fmaxf(total[i], other) : total[i] + other;
      }
      const int j = key + Still<S>::row(i / 2, i % 2);
      if (threadIdx.x % 4 == 0 && j < g.S) out[j] = total[i];
    }
  }
};

// Blocks: x = (b, kv head), y = keys, z = part of the rows, the last (which see most keys) first.
// registers: score_columns <= 224
template <class S, bool kMax>
__global__ void __launch_bounds__(kThreads, S::kTensor&& S::kD <= 128 ? 2 : 1)
    score_columns(ColumnArgs c, ColumnWorkspace w, bool whole) {
  const Geometry& g = c.a.g;
  const int b = int(blockIdx.x) / g.Hkv, kv = int(blockIdx.x) % g.Hkv, part = w.parts - 1 - int(blockIdx.z);
  ColumnSweep<S, kMax> sweep{
      c, w, g, gpu::dynamic_smem<Smem<S>>(), b, kv, part, int(blockIdx.y) * S::kStill, {c.a.q, g.D, 1, whole, false}};
  sweep.run();
}

}  // namespace tokencomp::score
