// Moving slots on CUDA: rows of channels as units of 16 bytes where everything is aligned, of one element elsewhere.
// Keys and values are the two halves of a grid (blockIdx.y).
#pragma once

#include "core/kvcache.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::kvcache {

constexpr int kCopyThreads = 256;
constexpr int kFlight = 4;                         // units that a thread has in flight
constexpr int kCopyTile = kCopyThreads * kFlight;  // units of a block
constexpr int kColumnBytes = 64;  // of a row, that one block of compact_slots moves: what memory fetches
template <class U>
constexpr int kColumnUnits = kColumnBytes / int(sizeof(U));
template <class U>
constexpr int kCompactTile = kCopyTile / kColumnUnits<U>;  // slots

// One of the two halves of a store.
struct Half {
  Pages pages;
  PageTable table;
  int b, h, element_bytes;

  __device__ __forceinline__ Half(const Store& s, const PageTable& t, int row, bool values)
      : pages(values ? s.v : s.k), table(t), b(row / s.Hkv), h(row % s.Hkv), element_bytes(s.element_bytes()) {}

  // Null where no page is there.
  template <class U>
  __device__ __forceinline__ U* slot(int slot) const {
    const int32_t entry = table.row(b, h)[slot >> table.shift];
    if (entry == kNoPage) return nullptr;
    char* base = static_cast<char*>(pages.base);
    return reinterpret_cast<U*>(base + pages.offset(entry, h, table.slot_in_page(slot)) * element_bytes);
  }
  template <class U>
  __device__ __forceinline__ int units() const {
    return pages.channels * element_bytes / int(sizeof(U));
  }
};

// The units of a block: tokens of a row, one after the other.
struct TokenUnits {
  int64_t token;  // of the first unit
  int rest, units;

  __device__ __forceinline__ TokenUnits(int64_t tile, int per_token) : units(per_token) {
    token = tile * kCopyTile / per_token;
    rest = int(tile * kCopyTile - token * per_token);
  }
  // The u-th unit of this thread.
  __device__ __forceinline__ int64_t token_of(int u) const { return token + local(u) / units; }
  __device__ __forceinline__ int unit_of(int u) const { return local(u) % units; }

 private:
  __device__ __forceinline__ int local(int u) const { return rest + u * kCopyThreads + int(threadIdx.x); }
};

// registers: append_slots <= 64
template <class U>
__global__ void __launch_bounds__(kCopyThreads) append_slots(AppendArgs a, int tiles) {
  const int row = int(blockIdx.x / unsigned(tiles));
  const bool values = blockIdx.y == 1;
  const Half half(a.s, a.s.table, row, values);
  const TokenUnits place(blockIdx.x % unsigned(tiles), half.units<U>());
  const int count = a.count(half.b), start = a.start(half.b), length = a.s.lengths[row];
  const int64_t stride_t = values ? a.v_stride_t : a.k_stride_t;
  const char* token0 = static_cast<const char*>(values ? a.v : a.k) +
                       (half.b * (values ? a.v_stride_b : a.k_stride_b) +
                        half.h * (values ? a.v_stride_h : a.k_stride_h) + start * stride_t) *
                           half.element_bytes;
  U value[kFlight];
#pragma unroll
  for (int u = 0; u < kFlight; ++u) {
    const int64_t token = place.token_of(u);
    if (token >= count) continue;
    value[u] = reinterpret_cast<const U*>(token0 + token * stride_t * half.element_bytes)[place.unit_of(u)];
  }
#pragma unroll
  for (int u = 0; u < kFlight; ++u) {
    const int64_t token = place.token_of(u);
    if (token >= count) continue;
    if (U* slot = half.slot<U>(length + int(token))) slot[place.unit_of(u)] = value[u];
  }
}

template <class U>
__device__ __forceinline__ U zero_unit() {
  if constexpr (sizeof(U) == 16) {
    return make_uint4(0, 0, 0, 0);
  } else {
    return 0;
  }
}

// registers: gather_slots <= 64
template <class U>
__global__ void __launch_bounds__(kCopyThreads) gather_slots(GatherArgs g, int tiles) {
  const int row = int(blockIdx.x / unsigned(tiles));
  const bool values = blockIdx.y == 1;
  const Half half(g.s, g.s.table, row, values);
  const TokenUnits place(blockIdx.x % unsigned(tiles), half.units<U>());
  U* out = static_cast<U*>(values ? g.v : g.k) + int64_t(row) * g.size * place.units;
  U value[kFlight];
#pragma unroll
  for (int u = 0; u < kFlight; ++u) {
    const int64_t token = place.token_of(u);
    const int slot = token < g.size ? g.source(row, int(token)) : -1;
    const U* from = slot >= 0 ? half.slot<const U>(slot) : nullptr;
    value[u] = from ? from[place.unit_of(u)] : zero_unit<U>();
  }
#pragma unroll
  for (int u = 0; u < kFlight; ++u) {
    const int64_t token = place.token_of(u);
    if (token < g.size) out[token * place.units + place.unit_of(u)] = value[u];
  }
}

// A tile of moves: what this thread carries, and where to; null: nothing.
template <class U>
struct Moves {
  U value[kFlight];
  U* to[kFlight];

  __device__ __forceinline__ void load(const CompactArgs& c, const Half& from, const Half& target, int row, int first,
                                       int unit) {
    constexpr int kPass = kCopyThreads / kColumnUnits<U>;  // slots
    const int count = c.count[row];
#pragma unroll
    for (int u = 0; u < kFlight; ++u) {
      const int i = first + u * kPass + int(threadIdx.x) / kColumnUnits<U>;
      to[u] = nullptr;
      if (i >= count || unit >= from.units<U>()) continue;
      U* source = from.slot<U>(c.source(row, i));
      U* place = target.slot<U>(i);
      if (!source || !place || source == place) continue;
      value[u] = source[unit];
      to[u] = place + unit;
    }
  }
  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int u = 0; u < kFlight; ++u) {
      if (to[u]) *to[u] = value[u];
    }
  }
};

// One block moves a column of 64 bytes of all slots of a row, tile after tile. In place it overtakes nobody: slot i
// comes from a slot >= i, and a tile is loaded whole before any of it is stored. The next tile is on its way by then.
// registers: compact_slots <= 104
template <class U>
__global__ void __launch_bounds__(kCopyThreads) compact_slots(CompactArgs c, int columns) {
  const int row = int(blockIdx.x / unsigned(columns)), column = int(blockIdx.x % unsigned(columns));
  const bool values = blockIdx.y == 1;
  const Half from(c.s, c.s.table, row, values), target(c.s, c.to, row, values);
  const int unit = column * kColumnUnits<U> + int(threadIdx.x) % kColumnUnits<U>, count = c.count[row];
  Moves<U> now, next;
  now.load(c, from, target, row, 0, unit);
#pragma unroll 1
  for (int first = 0; first < count; first += kCompactTile<U>) {
    next.load(c, from, target, row, first + kCompactTile<U>, unit);
    __syncthreads();  // everybody has loaded this tile
    now.store();
    now = next;
  }
}

}  // namespace tokencomp::kvcache
