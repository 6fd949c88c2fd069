// Decode attention on CUDA: what a block works on, where the keys of a lane lie, and how warps, and then blocks, bring
// their parts together. A block takes one part of the keys of a (sequence, kv head) and a few rows of its group; its
// warps take tiles of keys in turn. The block that is last to finish a row merges all parts in their order, so results
// do not depend on which it was.
#pragma once

#include "core/decode.h"
#include "cuda/arch/gpu.h"
#include "cuda/arch/reduce.h"

namespace tokencomp::decode {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct Workspace {
  float* partial;    // [units, parts, block rows, Dv + 2]: values, then maximum and sum
  uint32_t* ticket;  // [units], 0 at the launch
  int parts;         // of the keys
};

// Blocks: x = (b, kv head), y = part of the keys, z = block of rows.
struct Unit {
  int b, kv, length, first, end;

  __device__ Unit(const DecodeArgs& a, const Workspace& w) {
    b = pair() / a.Hkv;
    kv = pair() % a.Hkv;
    length = length_of(a, b, kv);
    constexpr int kStep = 64;  // a whole number of the warps' tiles and of pages
    const int candidates = candidates_of(a, b, kv), begin = a.index ? 0 : first_slot(a, b, kv, length) & -kStep;
    const int steps = (candidates - begin + kStep - 1) / kStep, share = (steps + w.parts - 1) / w.parts * kStep;
    first = min(begin + part() * share, candidates);
    end = min(first + share, candidates);
  }
  __device__ static int pair() { return int(blockIdx.x); }
  __device__ static int part() { return int(blockIdx.y); }
  __device__ static int block() { return int(blockIdx.z); }
  __device__ static int64_t number() { return int64_t(blockIdx.x) * gridDim.z + blockIdx.z; }
};

// One key, seen by the lane that finds it.
struct KeySource {
  int slot;  // -1: none
  int page;
  float side;  // added to its logits; -inf hides it from all rows
};

// Entry i of the list, or slot i; -1 past the end.
__device__ __forceinline__ int candidate(const DecodeArgs& a, const Unit& u, int i) {
  if (i >= u.end) return -1;
  const int slot = a.index ? a.index[int64_t(Unit::pair()) * a.listed + i] : i;
  return slot < u.length ? slot : -1;
}

// `floor` is that of the only query row; with several, rows are told apart later.
// kTypes: `page` may be an entry of any type.
template <bool kTypes = false>
__device__ __forceinline__ KeySource locate(const DecodeArgs& a, const Unit& u, int slot, int floor) {
  if (slot < 0 || slot >= end_of(a, a.T - 1, u.length)) return {-1, -1, -INFINITY};
  KeySource key{slot, kTypes ? entry_of(a, u.b, u.kv, slot) : page_of(a, u.b, u.kv, slot), 0.0f};
  if (a.key_bias) key.side = a.key_bias[u.b * a.bias_stride_b + u.kv * a.bias_stride_h + slot];
  if (a.T == 1 && a.window && !(position_of(a, u.b, u.kv, slot) > floor)) key.side = -INFINITY;
  if (key.page < 0 || !(key.side > -INFINITY)) key.side = -INFINITY, key.page = -1;
  return key;
}

__device__ __forceinline__ int64_t row_of(const DecodeArgs& a, const Unit& u, int r) {
  return (int64_t(u.b) * a.Hq + u.kv * a.group()) * a.T + r;
}

// Parts relative to the largest maximum among them.
__device__ __forceinline__ float weight_of(float top, float highest) {
  return top > -INFINITY ? gpu::exp2_approx((top - highest) * kLog2e) : 0.0f;
}

// What the warps of a block found about its rows, in shared memory.
template <int kRows, int kD>
struct Found {
  float values[kWarps][kRows][kD];
  float top[kWarps][kRows], total[kWarps][kRows];
};

template <class T, int kRows, int kD>
struct Finish {
  const DecodeArgs& a;
  const Workspace& w;
  const Unit& u;
  Found<kRows, kD>& found;

  // All threads; what the warps found is there. `last` is shared memory.
  __device__ void run(uint32_t& last) const {
    const int first = Unit::block() * kRows, rows = min(kRows, a.rows() - first);
    for (int r = 0; r < rows; ++r) {
      float top = -INFINITY, total = 0.0f, weight[kWarps];
#pragma unroll
      for (int i = 0; i < kWarps; ++i) top = fmaxf(top, found.top[i][r]);
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        weight[i] = weight_of(found.top[i][r], top);
        total += weight[i] * found.total[i][r];
      }
      for (int c = int(threadIdx.x); c < a.Dv; c += kThreads) {
        float x = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) x = fmaf(weight[i], found.values[i][r][c], x);
        if (w.parts == 1) {
          write(first + r, c, x, top, total);
        } else {
          part_of(Unit::part(), r)[c] = x;
        }
      }
      if (threadIdx.x != 0) continue;
      if (w.parts == 1) {
        write_lse(first + r, top, total);
      } else {
        part_of(Unit::part(), r)[a.Dv] = top;
        part_of(Unit::part(), r)[a.Dv + 1] = total;
      }
    }
    if (w.parts > 1) merge_if_last(last, first, rows);
  }

 private:
  __device__ float* part_of(int part, int r) const {
    return w.partial + ((Unit::number() * w.parts + part) * kRows + r) * (a.Dv + 2);
  }

  __device__ void merge_if_last(uint32_t& last, int first, int rows) const {
    __threadfence();  // this block's part before its ticket
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(w.ticket + Unit::number(), 1u) == uint32_t(w.parts - 1);
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int r = 0; r < rows; ++r) {
      float top = -INFINITY, total = 0.0f;
      for (int p = 0; p < w.parts; ++p) top = fmaxf(top, part_of(p, r)[a.Dv]);
      for (int p = 0; p < w.parts; ++p) total += weight_of(part_of(p, r)[a.Dv], top) * part_of(p, r)[a.Dv + 1];
      for (int c = int(threadIdx.x); c < a.Dv; c += kThreads) {
        float x = 0.0f;
        for (int p = 0; p < w.parts; ++p) x = fmaf(weight_of(part_of(p, r)[a.Dv], top), part_of(p, r)[c], x);
        write(first + r, c, x, top, total);
      }
      if (threadIdx.x == 0) write_lse(first + r, top, total);
    }
  }

  // The sink has its share of the sum and no value.
  __device__ float sink_of(int r) const { return a.sinks ? a.sinks[u.kv * a.group() + r / a.T] : -INFINITY; }
  __device__ float sum_with_sink(int r, float top, float total) const {
    const float sink = sink_of(r), highest = fmaxf(top, sink);
    return weight_of(top, highest) * total + weight_of(sink, highest);
  }
  __device__ void write(int r, int c, float x, float top, float total) const {
    const float sum = sum_with_sink(r, top, total), share = weight_of(top, fmaxf(top, sink_of(r)));
    static_cast<T*>(a.out)[row_of(a, u, r) * a.Dv + c] = from_float<T>(sum > 0.0f ? x * share / sum : 0.0f);
  }
  __device__ void write_lse(int r, float top, float total) const {
    const float sum = sum_with_sink(r, top, total);
    a.lse[row_of(a, u, r)] = sum > 0.0f ? fmaxf(top, sink_of(r)) + logf(sum) : -INFINITY;
  }
};

}  // namespace tokencomp::decode
