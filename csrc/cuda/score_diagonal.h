// Attention scores on CUDA: sums along diagonals. A block owns kOffsets offsets of one head, a thread one of them; for
// every tile of rows it visits the keys at these offsets, leaves the probabilities in shared memory, and every thread
// adds its diagonal up in order. Nothing is added across blocks.
#pragma once

#include "cuda/score_kernels.h"

namespace tokencomp::score {

constexpr int kOffsets = kThreads;

// Half the still rows of a column sweep and a shorter ring make room for the probabilities.
template <class T, int kDim>
struct DiagonalShape : Shape<T, kDim, false> {
  static constexpr int kMTiles = 1, kStill = kWarps * 16, kStages = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kNTiles = 2, kRows = 16, kSteps = Shape<T, kDim, false>::kStream / kRows;
};

template <class S>
struct DiagonalSmem {
  Smem<S> tiles;
  float probability[S::kStill][S::kStream + 1];
  int position[S::kStream];
};

template <class S>
struct DiagonalSweep {
  using T = typename S::T;
  const ColumnArgs& c;
  const ColumnWorkspace& w;
  const Geometry& g;
  DiagonalSmem<S>& d;
  int b, h, offset;  // the block's first offset
  RowFormat format;

  __device__ void run() {
    const int64_t head = int64_t(b) * g.Hq + h;
    float total = 0.0f, lost = 0.0f;  // Kahan: a diagonal is as long as there are rows
#pragma unroll 1
    for (int tile = 0; tile < w.tiles; ++tile) {
      const TileBounds bounds = w.bounds[head * w.tiles + tile];
      if (bounds.first >= bounds.last) continue;
      const Range keys = band(tile, bounds);
      if (keys.begin >= keys.end) continue;
      load_rows(tile);
#pragma unroll 1
      for (int key = keys.begin; key < keys.end; key += S::kStill) {
        multiply(tile, key);
        const float x = diagonal(key) - lost, next = total + x;
        lost = (next - total) - x;
        total = next;
        __syncthreads();
      }
    }
    const int o = offset + int(threadIdx.x);
    if (o < g.S) w.partial[head * g.S + o] = total;
  }

 private:
  // Keys at the block's offsets from any row of the tile; also leaves the rows' positions.
  __device__ Range band(int tile, const TileBounds& bounds) {
    int low = g.S, high = 0;
    for (int r = int(threadIdx.x); r < S::kStream; r += kThreads) {
      const int t = tile * S::kStream + r, p = t < g.T ? position_of(g, b, 0, t) : 0;
      d.position[r] = p;
      if (t >= g.T) continue;
      low = min(low, p - offset - kOffsets + 1);
      high = max(high, p - offset + 1);
    }
    low = gpu::block_reduce(low, d.tiles.scratch, g.S, gpu::Min{});
    high = gpu::block_reduce(high, d.tiles.scratch, 0, gpu::Max{});
    return {max(low, bounds.first), min(high, bounds.last)};
  }

  // The tile of rows goes to the last stage; keys pass through the others, or are kept apart (fp32).
  __device__ void load_rows(int tile) {
    const int64_t head = int64_t(b) * g.Hq + h;
    for (int r = int(threadIdx.x); r < S::kStream; r += kThreads) {
      d.tiles.side[0][r] = w.beta[head * w.padded() + tile * S::kStream + r];
    }
  }

  __device__ void multiply(int tile, int key) {
    Still<S> still;
    const T* k = static_cast<const T*>(c.a.k) + b * c.a.k_stride_b + h / g.group() * c.a.k_stride_h;
    still.load(d.tiles, format,
               [&](int r) { return RowSource<T>{key + r < g.S ? k + (key + r) * c.a.k_stride_s : nullptr, nullptr}; });
    const T* q = static_cast<const T*>(c.a.q) + b * c.a.q_stride_b + h * c.a.q_stride_h;
    const int t0 = tile * S::kStream;
    load_tile<S>(d.tiles, 0, format,
                 [&](int r) { return RowSource<T>{t0 + r < g.T ? q + (t0 + r) * c.a.q_stride_t : nullptr, nullptr}; });
    gpu::cp_async_commit();
    gpu::cp_async_wait<0>();
    __syncthreads();
    const Logits logits(c.a);
    const float unit = float(c.power) * kLog2e, factor = logits.factor() * unit;
#pragma unroll 1
    for (int step = 0; step < S::kSteps; ++step) {
      float acc[S::kMTiles][2][4];
      still.multiply(d.tiles, 0, step, acc);
#pragma unroll
      for (int i = 0; i < S::kMTiles * 8; ++i) {
        const int m = i / 8, n = i / 4 % 2, e = i % 4;
        if (e == 0) logits.cap(acc[m][n]);
        const int r = still.row(m, e / 2), column = step * S::kRows + still.column(n, e % 2), j = key + r;
        const Range seen = w.range[int64_t(b) * w.padded() + t0 + column];
        const float bias = unit * bias_of(c.a, b, h / g.group(), j);
        float x = fmaf(acc[m][n][e], factor, bias) - d.tiles.side[0][column];
        if (!(j >= seen.begin && j < seen.end)) x = -INFINITY;
        d.probability[r][column] = gpu::exp2_approx(fmaxf(x, -INFINITY));  // NaN counts as -inf
      }
    }
    __syncthreads();
  }

  // The thread's diagonal over what lies in shared memory.
  __device__ float diagonal(int key) const {
    float sum = 0.0f;
#pragma unroll 1
    for (int r = 0; r < S::kStream; ++r) {
      const int j = d.position[r] - offset - int(threadIdx.x) - key;
      if (j >= 0 && j < S::kStill) sum += d.probability[j][r];
    }
    return sum;
  }
};

// Blocks: x = (b, query head), y = offsets.
// registers: score_diagonals <= 176
template <class S>
__global__ void __launch_bounds__(kThreads, 1) score_diagonals(ColumnArgs c, ColumnWorkspace w, bool whole) {
  const Geometry& g = c.a.g;
  DiagonalSweep<S> sweep{c,
                         w,
                         g,
                         gpu::dynamic_smem<DiagonalSmem<S>>(),
                         int(blockIdx.x) / g.Hq,
                         int(blockIdx.x) % g.Hq,
                         int(blockIdx.y) * kOffsets,
                         {c.a.q, g.D, 1, whole, false}};
  sweep.run();
}

}  // namespace tokencomp::score
