// Attention scores on CUDA: log-sum-exp of query rows, with or without the logits. The rows of all heads of a group
// form one list that lies still, so a key is read once for all of them; every thread keeps the maximum and the sum of
// the keys it meets, and the threads that share a row are merged once, at the end.
#pragma once

#include "cuda/page_tiles.h"
#include "cuda/score_kernels.h"

namespace tokencomp::score {

__device__ __forceinline__ float2 merge_sums(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  if (!is_finite(top)) return {top, 0.0f};
  return {top, a.y * gpu::exp2_approx((a.x - top) * kLog2e) + b.y * gpu::exp2_approx((b.x - top) * kLog2e)};
}

template <class S>
struct LseSweep {
  using T = typename S::T;
  static constexpr int kRows = S::kMTiles * 2;      // of a thread
  static constexpr bool kLogits = S::kWarpsM == 1;  // only the shape for few rows can write them
  static constexpr int64_t kQuantized = -2;
  // Only these head dimensions have quantized pages.
  static constexpr bool kHasQuantized = kLogits && (S::kD == 64 || S::kD == 128 || S::kD == 256);
  const LseArgs& l;
  const LseWorkspace& w;
  const Geometry& g;
  Smem<S>& s;
  int b, kv, part, row0;
  RowFormat queries, keys;

  __device__ int rows() const { return g.group() * g.T; }
  __device__ int head_of(int r) const { return kv * g.group() + r / g.T; }
  __device__ int64_t at(int r) const { return (int64_t(b) * g.Hq + head_of(r)) * g.T + r % g.T; }

  // Where a slot lies: elements of the working pool, -1 for nowhere, or less: a slot of a quantized page.
  __device__ int64_t place_of(int slot) const {
    const int64_t offset = slot_offset(l.a, b, kv, slot);
    return offset < 0 && l.a.types.count && entry_of(l.a, b, kv, slot) != kNoPage ? kQuantized : offset;
  }

  // Where paged keys [key, key + kStream) begin; to be loaded behind a barrier. One look at the table a key, not one
  // for each 16 bytes of it.
  __device__ void locate(int key, int end) const {
    if constexpr (kLogits) {
      if (!l.a.table.entry || key >= end) return;
      for (int r = int(threadIdx.x); r < S::kStream; r += kThreads) {
        s.offset[key / S::kStream % 2][r] = key + r < g.S ? place_of(key + r) : -1;
      }
    }
  }

  __device__ __forceinline__ int64_t offset_of(int key, int r) const {
    if constexpr (kLogits) {
      if (l.a.table.entry) return s.offset[key / S::kStream % 2][r];
    }
    return key + r < g.S ? b * l.a.k_stride_b + kv * l.a.k_stride_h + int64_t(key + r) * l.a.k_stride_s : -1;
  }

  __device__ void load(int key, int end, int stage) const {
    if (key < end) {
      const auto source = [&](int r) {
        const int64_t offset = offset_of(key, r);
        if (offset < 0) return RowSource<T>{nullptr, nullptr};
        return RowSource<T>{static_cast<const T*>(l.a.k) + offset,
                            l.a.k_min ? static_cast<const T*>(l.a.k_min) + offset : nullptr};
      };
      load_tile<S>(s, stage, keys, source, [&](int r) { return offset_of(key, r) == kQuantized; });
      if constexpr (kHasQuantized) {
        if (l.a.types.count) load_quantized(key, stage);
      }
      for (int r = int(threadIdx.x); r < S::kStream; r += kThreads) {
        s.side[stage][r] = offset_of(key, r) == -1 ? -INFINITY : bias_of(l.a, b, kv, key + r);
      }
    }
    gpu::cp_async_commit();
  }

  // Keys of quantized pages as numbers, sixteen at a time.
  __device__ __forceinline__ void load_quantized(int key, int stage) const {
#pragma unroll 1
    for (int first = 0; first < S::kStream; first += bitpack::kBlock) {
      if (offset_of(key, first) != kQuantized) continue;
      const QuantizedPage<S::kD, false> page(l.a, b, kv, entry_of(l.a, b, kv, key + first));
      page.block(l.a.table.slot_in_page(key + first), kThreads, [&](int t, int d, float x) {
        T* chunk = reinterpret_cast<T*>(s.chunk(stage, first + t, d / S::kVec));
        chunk[d % S::kVec] = from_float<T>(x);
      });
    }
  }

  __device__ __forceinline__ void run() {
    const Range part_keys{part * w.keys_per_part, min((part + 1) * w.keys_per_part, g.S)};
    int first = part_keys.end, last = part_keys.begin, all_begin = part_keys.begin, all_end = part_keys.end;
    for (int i = int(threadIdx.x); i < S::kStill; i += kThreads) {
      const bool there = row0 + i < rows();
      Range range = there ? visible(g, b, kv, (row0 + i) % g.T) : Range{0, 0};
      range.begin = max(range.begin, part_keys.begin);
      range.end = min(range.end, part_keys.end);
      s.range[i] = range;
      if (!there) continue;
      all_begin = max(all_begin, range.begin);
      all_end = min(all_end, range.end);
      if (range.begin >= range.end) continue;
      first = min(first, range.begin);
      last = max(last, range.end);
    }
    first = gpu::block_reduce(first, s.scratch, g.S, gpu::Min{});
    last = gpu::block_reduce(last, s.scratch, 0, gpu::Max{});
    all_begin = gpu::block_reduce(all_begin, s.scratch, 0, gpu::Max{});
    all_end = gpu::block_reduce(all_end, s.scratch, g.S, gpu::Min{});
    if constexpr (kLogits) {
      if (l.logits) fill_logits(part_keys);
    }
    float2 state[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) state[i] = {-INFINITY, 0.0f};
    if (first < last) sweep(first / S::kStream * S::kStream, last, all_begin, all_end, state);
    write(state);
  }

  // What no tile reaches; a barrier orders it before the tiles' own writes.
  __device__ void fill_logits(Range part_keys) const {
    const int n = part_keys.end - part_keys.begin;
    for (int r = row0; r < min(row0 + S::kStill, rows()); ++r) {
      for (int j = int(threadIdx.x); j < n; j += kThreads) l.logits[at(r) * g.S + part_keys.begin + j] = -INFINITY;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void sweep(int first, int last, int all_begin, int all_end, float2 (&state)[kRows]) {
    Still<S> still;
    const T* q = static_cast<const T*>(l.a.q) + b * l.a.q_stride_b;
    still.load(s, queries, [&](int i) {
      const int r = row0 + i;
      return RowSource<T>{r < rows() ? q + head_of(r) * l.a.q_stride_h + r % g.T * l.a.q_stride_t : nullptr, nullptr};
    });
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) {
      locate(first + i * S::kStream, last);
      if (l.a.table.entry) __syncthreads();
      load(first + i * S::kStream, last, i);
    }
    locate(first + (S::kStages - 1) * S::kStream, last);
    int stage = 0;
#pragma unroll 1
    for (int key = first; key < last; key += S::kStream) {
      gpu::cp_async_wait<S::kStages - 2>();
      __syncthreads();  // the tile has arrived for everyone, and everyone is done with the stage refilled next
      load(key + (S::kStages - 1) * S::kStream, last, (stage + S::kStages - 1) % S::kStages);
      locate(key + S::kStages * S::kStream, last);
      const bool masked = all_begin > key || all_end < key + S::kStream;
#pragma unroll 1
      for (int step = still.warp_n(); step < S::kSteps; step += S::kWarpsN) {
        fold(still, stage, step, key + step * S::kRows, masked, state);
      }
      stage = (stage + 1) % S::kStages;
    }
    gpu::cp_async_wait<0>();
  }

  __device__ __forceinline__ void fold(const Still<S>& still, int stage, int step, int key, bool masked,
                                       float2 (&state)[kRows]) {
    const Logits logits(l.a);
    const float factor = logits.factor();
    float acc[S::kMTiles][S::kNTiles][4];
    still.multiply(s, stage, step, acc);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = i / 2, half = i % 2;
      const Range range = masked ? s.range[still.row(m, half)] : Range{0, g.S};
      float z[2 * S::kNTiles], top = state[i].x;
#pragma unroll
      for (int e = 0; e < 2 * S::kNTiles; ++e) {
        const int column = still.column(e / 2, e % 2), j = key + column;
        if (half == 0 && e % 2 == 0) logits.cap(acc[m][e / 2]);
        z[e] = fmaf(acc[m][e / 2][half * 2 + e % 2], factor, s.side[stage][step * S::kRows + column]);
        if (masked && !(j >= range.begin && j < range.end)) z[e] = -INFINITY;
        z[e] = fmaxf(z[e], -INFINITY);  // NaN counts as -inf
        top = fmaxf(top, z[e]);
        [[maybe_unused]] const int r = row0 + still.row(m, half);
        if constexpr (kLogits) {
          if (l.logits && r < rows() && z[e] > -INFINITY) l.logits[at(r) * g.S + j] = z[e];
        }
      }
      if (top > state[i].x) {
        state[i].y *= gpu::exp2_approx((state[i].x - top) * kLog2e);
        state[i].x = top;
      }
      if (is_finite(top)) {
#pragma unroll
        for (int e = 0; e < 2 * S::kNTiles; ++e) state[i].y += gpu::exp2_approx((z[e] - top) * kLog2e);
      }
    }
  }

  __device__ __forceinline__ void write(float2 (&state)[kRows]) {
    float2* out = w.partial + int64_t(part) * g.B * g.Hq * g.T;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {  // both partners compute the same bits: addition commutes
        state[i] =
            merge_sums(state[i], {__shfl_xor_sync(~0u, state[i].x, lanes), __shfl_xor_sync(~0u, state[i].y, lanes)});
      }
      const int own = Still<S>::row(i / 2, i % 2), r = row0 + own;
      if (threadIdx.x % 4) continue;
      if constexpr (S::kWarpsN > 1) {
        s.part[Still<S>::warp_n()][own] = state[i];
      } else if (r < rows()) {
        out[at(r)] = state[i];
      }
    }
    if constexpr (S::kWarpsN > 1) {
      __syncthreads();
      const int r = row0 + int(threadIdx.x);
      if (int(threadIdx.x) >= S::kStill || r >= rows()) return;
      float2 total = s.part[0][threadIdx.x];
      for (int n = 1; n < S::kWarpsN; ++n) total = merge_sums(total, s.part[n][threadIdx.x]);
      out[at(r)] = total;
    }
  }
};

// Blocks: x = (b, kv head), y = rows, the last (which see most keys) first, z = part of the keys.
// registers: score_lse <= 200
template <class S>
__global__ void __launch_bounds__(kThreads, S::kTensor&& S::kD <= 128 ? 2 : 1)
    score_lse(LseArgs l, LseWorkspace w, bool whole_q, bool whole_k) {
  const Geometry& g = l.a.g;
  const int b = int(blockIdx.x) / g.Hkv, kv = int(blockIdx.x) % g.Hkv, block = w.blocks - 1 - int(blockIdx.y);
  const int parts = l.a.k_min ? 2 : 1;
  LseSweep<S> sweep{l,
                    w,
                    g,
                    gpu::dynamic_smem<Smem<S>>(),
                    b,
                    kv,
                    int(blockIdx.z),
                    block * S::kStill,
                    {l.a.q, g.D, parts, whole_q, parts == 2},
                    {l.a.k, g.D, parts, whole_k, false}};
  sweep.run();
}

}  // namespace tokencomp::score
