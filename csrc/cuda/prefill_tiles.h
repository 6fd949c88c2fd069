// Prefill attention on CUDA: shapes, shared memory, and the tiles of keys that a query block meets. Whatever the engine
// (tensor cores for 16-bit types, CUDA cores for fp32), a thread owns the same pairs, those of m16n8 accumulators: rows
// lane / 4 (+ 8), columns 2 (lane % 4) (+ 1).
#pragma once

#include "core/prefill.h"
#include "cuda/attention.h"
#include "cuda/rows.h"

namespace tokencomp::prefill {

// kDim: head dimension of keys and of values, padded. kQueries: rows of a block of threads.
template <class T_, int kDim, int kQueries>
struct Shape {
  using T = T_;
  static constexpr bool kTensor = sizeof(T) == 2;
  static constexpr int kD = kDim, kRows = kQueries;
  static constexpr int kChunks = kD / kVec<T>, kPitch = (kChunks + 7) / 8 * 8;  // 16-byte chunks of a row
  // Two m16 tiles a warp halve the reads of shared memory, which otherwise limit mma.sync; for wide heads their sums do
  // not fit the registers.
  static constexpr int kMTiles = kTensor && kRows == 128 && kD <= 128 ? 2 : 1;
  // Keys of a tile. 64 would need more registers than there are where 32 rows by more than 64 channels are summed.
  static constexpr int kKeys = !kTensor || (kMTiles == 2 && kD > 64) ? 32 : 64;
  static constexpr int kThreads = kRows / (16 * kMTiles) * 32;
  static constexpr int kNTiles = kKeys / 8, kOutTiles = kD / 8;
};

// Where chunk c of row r lies in its row: eight rows then cover all banks.
__device__ __forceinline__ int place_of(int r, int c) { return c ^ (r & 7); }

// The same for chunk c + low, where c is even and known to the compiler and low is 0 or 1: of all c there are four
// different exclusive ors, which it may keep in registers; the rest are offsets of the instruction.
__device__ __forceinline__ int place_of(int r, int c, int low) { return (c & ~7) + ((c & 7) ^ (low ^ (r & 7))); }

// A tile of keys: kKeys in a row from `first` on, or `count` single ones.
struct Tile {
  int first, count;    // count 0: there is none
  const int* entries;  // null: neighbours
};

// The tiles of a query block, one after the other. It lives in shared memory, where it costs no registers; one thread
// walks.
struct Walk {
  int first, last;  // keys that some row of the block sees
  Range blocks, columns;
  int64_t key, run_end;  // the rest of a run: of all keys, or of the block before blocks.begin

  __device__ void start(const PrefillArgs& p, Range some, int b, int h, int block, int tile_keys) {
    const bool nothing = some.begin >= some.end;  // to see, and then nothing to look for
    first = some.begin;
    last = some.end;
    blocks = columns = {0, 0};
    if (!nothing) {
      const Range own_blocks = list_of(p, p.blocks, b, h, block), own_columns = list_of(p, p.columns, b, h, block);
      blocks = {own_blocks.begin, own_blocks.end};
      columns = {own_columns.begin, own_columns.end};
    }
    key = first / tile_keys * tile_keys;
    run_end = nothing || p.blocks.pointer ? key : last;
  }

  __device__ void next(const PrefillArgs& p, int tile_keys, Tile& tile) {
    for (;;) {
      for (; key < run_end; key += tile_keys) {
        if (key >= last || key + tile_keys <= first) continue;
        tile = {int(key), tile_keys, nullptr};
        key += tile_keys;
        return;
      }
      if (blocks.begin >= blocks.end) break;
      key = int64_t(block_of(p.blocks.entries[blocks.begin++])) * p.block_k;
      run_end = key + p.block_k;
    }
    const int left = columns.end - columns.begin;
    tile = {0, left < tile_keys ? left : tile_keys, p.columns.entries + columns.begin};
    columns.begin += tile.count;
  }
};

// Which rows of what a block of threads has, and the keys that each of them sees.
struct Place {
  int b, h, kv, t0;
  Range every;
};

template <class S>
struct Smem {
  alignas(128) uint4 q[S::kRows][S::kPitch];
  uint4 k[S::kKeys][S::kPitch], v[S::kKeys][S::kPitch];
  float bias[2][S::kKeys];    // of the keys of a tile, in units of log2(e)
  int position[2][S::kKeys];  // of the keys of a tile, -1 where there is none
  Range range[S::kRows];      // keys that a row sees
  Place at;                   // here, not in registers: the loop over tiles needs all of them
  Walk walk;
  Tile tile[2];
  int scratch[gpu::kMaxWarps];
};

// How rows are read: n elements each. `whole`: in 16-byte chunks; `base` is any address that may be read.
template <class T>
struct RowFormat {
  const void* base;
  int n;
  bool whole;
};

// kCount rows into shared memory; row(r) is null where there is none: zeros.
template <class S, int kCount, class F>
__device__ __forceinline__ void load_rows(uint4 (&to)[kCount][S::kPitch], const RowFormat<typename S::T>& f, F row) {
  using T = typename S::T;
  const int chunks = chunks_of(f.n, kVec<T>);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kCount * S::kPitch; i += S::kThreads) {  // pitches divide by shifts
    const int r = i / S::kPitch, c = i % S::kPitch;
    if (c >= S::kChunks) continue;
    const T* from = row(r);
    const bool inside = from && c < chunks;
    uint4* target = &to[r][place_of(r, c)];
    if (f.whole) {
      gpu::cp_async16(target, inside ? static_cast<const void*>(from + c * kVec<T>) : f.base, inside);
    } else {
      *target = inside ? load_chunk<T, false>(from, c, f.n) : make_uint4(0, 0, 0, 0);
    }
  }
}

}  // namespace tokencomp::prefill
