// Prefill attention on CUDA: tiles of keys or values that lie in pages. Rows of working pages arrive as those of dense
// keys do; quantized ones are written as numbers of the working dtype, by all threads.
#pragma once

#include "cuda/page_tiles.h"
#include "cuda/prefill_tiles.h"

namespace tokencomp::prefill {

// Only these head dimensions have quantized pages.
template <class S>
constexpr bool kHasQuantized = S::kD == 64 || S::kD == 128 || S::kD == 256;

// The slots of a tile: those outside `keys` are not read.
struct TileSlots {
  const Attention& a;
  int b, kv;
  Range keys;
  Tile tile;

  // The slot of row r, -1 where there is none.
  __device__ int operator[](int r) const {
    int at = tile.first + r;
    if (tile.entries) at = r < tile.count ? tile.entries[r] : -1;
    return at >= keys.begin && at < keys.end ? at : -1;
  }
  // The page of row r.
  __device__ int32_t entry(int r) const {
    const int at = (*this)[r];
    return at < 0 ? kNoPage : entry_of(a, b, kv, at);
  }
};

template <class S>
__device__ __forceinline__ void put(uint4 (&to)[S::kKeys][S::kPitch], int r, int d, float x) {
  using T = typename S::T;
  reinterpret_cast<T*>(&to[r][place_of(r, d / kVec<T>)])[d % kVec<T>] = from_float<T>(x);
}

// Rows of working pages, and zeros where there is no page.
template <class S>
__device__ __forceinline__ void load_working(uint4 (&to)[S::kKeys][S::kPitch], const RowFormat<typename S::T>& f,
                                             const Pages& pages, const TileSlots& slots) {
  using T = typename S::T;
  const int chunks = chunks_of(f.n, kVec<T>);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < S::kKeys * S::kPitch; i += S::kThreads) {
    const int r = i / S::kPitch, c = i % S::kPitch;
    if (c >= S::kChunks) continue;
    const int32_t entry = slots.entry(r);
    if (entry != kNoPage && page_type(entry)) continue;  // quantized
    const bool inside = entry != kNoPage && c < chunks;
    const T* from = static_cast<const T*>(f.base);
    if (inside) from += pages.offset(entry, slots.kv, slots.a.table.slot_in_page(slots[r]));
    uint4* target = &to[r][place_of(r, c)];
    if (f.whole) {
      gpu::cp_async16(target, inside ? static_cast<const void*>(from + c * kVec<T>) : f.base, inside);
    } else {
      *target = inside ? load_chunk<T, false>(from, c, f.n) : make_uint4(0, 0, 0, 0);
    }
  }
}

// Rows of quantized pages: sixteen at a time, or one by one where they are single keys.
template <class S, bool kValues>
__device__ __forceinline__ void load_quantized(uint4 (&to)[S::kKeys][S::kPitch], const TileSlots& slots) {
  using Page = QuantizedPage<S::kD, kValues>;
  const PageTable& table = slots.a.table;
  if (!slots.a.types.count) return;
  if (!slots.tile.entries) {
#pragma unroll 1
    for (int first = 0; first < S::kKeys; first += bitpack::kBlock) {
      const int slot = slots.tile.first + first;
      if (slot + bitpack::kBlock <= slots.keys.begin || slot >= slots.keys.end) continue;
      const int32_t entry = entry_of(slots.a, slots.b, slots.kv, slot);
      if (entry == kNoPage || !page_type(entry)) continue;
      const Page page(slots.a, slots.b, slots.kv, entry);
      page.block(table.slot_in_page(slot), S::kThreads, [&](int t, int d, float x) {
        if (slots[first + t] >= 0) put<S>(to, first + t, d, x);  // else zeros are on their way
      });
    }
    return;
  }
#pragma unroll 1
  for (int i = int(threadIdx.x); i < S::kKeys * S::kD; i += S::kThreads) {
    const int r = i / S::kD, d = i % S::kD;
    const int32_t entry = slots.entry(r);
    if (entry == kNoPage || !page_type(entry)) continue;
    put<S>(to, r, d, Page(slots.a, slots.b, slots.kv, entry).element(table.slot_in_page(slots[r]), d));
  }
}

}  // namespace tokencomp::prefill
