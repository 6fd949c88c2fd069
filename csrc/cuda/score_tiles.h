// Attention scores on CUDA: tiles of products between rows that lie still and rows that stream by. A block of 256
// threads holds kStill rows (tensor cores: as fragments in registers; fp32: in shared memory) and streams tiles of
// kStream rows through a ring of cp.async stages. Whatever the engine, a thread owns the same pairs, those of an
// m16n8 accumulator: still rows lane / 4 (+ 8), streaming rows 2 (lane % 4) (+ 1).
#pragma once

#include "core/score.h"
#include "cuda/attention.h"

namespace tokencomp::score {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// kFew: 16 still rows that all warps share, each with its own part of the stream, for decode steps; otherwise every
// warp has still rows of its own.
template <class T_, int kDim, bool kFew>
struct Shape {
  using T = T_;
  static constexpr int kD = kDim;  // head dimension, padded
  static constexpr bool kTensor = sizeof(T) == 2;
  static constexpr int kVec = 16 / int(sizeof(T)), kChunks = kD / kVec;  // 16-byte chunks of a row
  static constexpr int kPitch = (kChunks + 7) / 8 * 8;
  static constexpr int kWarpsM = kFew ? 1 : kWarps, kWarpsN = kWarps / kWarpsM;
  static constexpr int kMTiles = kTensor && !kFew ? 2 : 1;
  static constexpr int kStill = kWarpsM * kMTiles * 16;
  static constexpr int kStream =
      kTensor ? (kFew && kD <= 128 ? 128 : 64) : (kFew ? (kD <= 128 ? 64 : 32) : (kD <= 128 ? 32 : 16));
  static constexpr int kStages = kTensor ? (kFew ? 3 : 4) : 2;
  // Accumulators of a step: two of m16n8 are in flight at a time; four would need more registers than two blocks on a
  // multiprocessor leave.
  static constexpr int kNTiles = kMTiles == 2 ? 1 : 2, kRows = 8 * kNTiles, kSteps = kStream / kRows;
};

// A row of n elements, or two halves of n each; null: no such row.
template <class T>
struct RowSource {
  const T *first, *second;
};

template <class S>
struct Smem {
  using T = typename S::T;
  static constexpr int kKept = S::kTensor ? 1 : S::kStill;
  // Chunk c of row r lies at position c ^ (r % 8): eight rows then cover all banks.
  alignas(128) uint4 stream[S::kStages][S::kStream][S::kPitch];
  uint4 kept[kKept][S::kTensor ? 1 : S::kPitch];
  alignas(16) float side[S::kStages][S::kStream];
  int64_t offset[2][S::kWarpsM == 1 ? S::kStream : 1];  // of paged keys: the tiles loaded now and next
  float bias[S::kStill];                                // of the still rows, where those are keys
  Range range[S::kStill];                               // of the still rows, where those are queries
  float2 part[kWarps][16];
  int scratch[gpu::kMaxWarps];

  __device__ uint4* chunk(int stage, int row, int c) { return &stream[stage][row][c ^ (row & 7)]; }
  __device__ uint4* kept_chunk(int row, int c) { return &kept[row][c ^ (row & 7)]; }
};

template <class T>
__device__ __forceinline__ void unpack(uint4 raw, float (&out)[16 / sizeof(T)]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int e = 0; e < int(16 / sizeof(T)); ++e) {
    T element;
    if constexpr (sizeof(T) == 4) {
      memcpy(&element, &word[e], 4);
    } else {
      const uint16_t half = uint16_t(word[e / 2] >> (e % 2 * 16));
      memcpy(&element, &half, 2);
    }
    out[e] = to_float(element);
  }
}

// How rows are read: `n` elements a part, `parts` 1 or 2. `split_signs`: the row is one part, whose positive elements
// make the first half and whose other elements the second. `base` is any address that may be read.
struct RowFormat {
  const void* base;
  int n, parts;
  bool whole, split_signs;
};

// Element i of a row; 0 past its end, and where there is no row.
template <class T>
__device__ __forceinline__ T gather(const RowSource<T>& row, const RowFormat& f, int i) {
  const bool second = i >= f.n;
  if (!row.first || i >= f.n * f.parts) return from_float<T>(0.0f);
  const T value = second && !f.split_signs ? row.second[i - f.n] : row.first[second ? i - f.n : i];
  const bool positive = to_float(value) > 0.0f;
  return !f.split_signs || positive != second ? value : from_float<T>(0.0f);
}

// Word by word: an array of elements would go through local memory.
template <class T>
__device__ __forceinline__ uint4 gather_chunk(const RowSource<T>& row, const RowFormat& f, int c) {
  uint32_t word[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      const float value = gather(row, f, c * 4 + w);
      memcpy(&word[w], &value, 4);
    } else {
      const T low = gather(row, f, c * 8 + 2 * w), high = gather(row, f, c * 8 + 2 * w + 1);
      uint16_t bits[2];
      memcpy(&bits[0], &low, 2);
      memcpy(&bits[1], &high, 2);
      word[w] = uint32_t(bits[1]) << 16 | bits[0];
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// One tile of streaming rows, or a piece of the still ones, into a stage; `source(r)` is row r of it, null if there is
// none: zeros. Rows of which `skipped(r)` are left to others.
template <class S, class F, class G>
__device__ __forceinline__ void load_tile(Smem<S>& s, int stage, const RowFormat& f, F source, G skipped) {
  using T = typename S::T;
  const int chunks = f.n / S::kVec;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < S::kStream * S::kPitch; i += kThreads) {  // pitches divide by shifts
    const int r = i / S::kPitch, c = i % S::kPitch;
    if (c >= S::kChunks || skipped(r)) continue;
    const RowSource<T> row = source(r);
    uint4* target = s.chunk(stage, r, c);
    if (f.whole && !f.split_signs) {
      const bool second = c >= chunks;
      const T* part = second ? row.second : row.first;
      const bool inside = row.first && c < chunks * f.parts;
      const void* from = inside ? part + (second ? c - chunks : c) * S::kVec : f.base;
      gpu::cp_async16(target, from, inside);
    } else {
      *target = gather_chunk(row, f, c);
    }
  }
}

template <class S, class F>
__device__ __forceinline__ void load_tile(Smem<S>& s, int stage, const RowFormat& f, F source) {
  load_tile<S>(s, stage, f, source, [](int) { return false; });
}

template <class S>
struct Still {
  static constexpr int kSteps = S::kTensor ? S::kD / 16 : 1;
  uint32_t a[S::kMTiles][kSteps][4];  // tensor cores only

  __device__ static int warp_m() { return int(threadIdx.x) / 32 % S::kWarpsM; }
  __device__ static int warp_n() { return int(threadIdx.x) / 32 / S::kWarpsM; }
  // Of the still rows, the thread's row (m, half); of the streaming rows of a step, its row (n, e).
  __device__ static int row(int m, int half) {
    return (warp_m() * S::kMTiles + m) * 16 + half * 8 + int(threadIdx.x) % 32 / 4;
  }
  __device__ static int column(int n, int e) { return n * 8 + int(threadIdx.x) % 4 * 2 + e; }

  // All still rows through the stages of the ring, before it is used otherwise; ends with a barrier.
  template <class F>
  __device__ __forceinline__ void load(Smem<S>& s, const RowFormat& f, F source) {
    constexpr int kPieces = (S::kStill + S::kStream - 1) / S::kStream;
    static_assert(!S::kTensor || kPieces <= S::kStages, "the still rows must fit the ring");
    if constexpr (S::kTensor) {
#pragma unroll 1
      for (int p = 0; p < kPieces; ++p) {
        load_tile<S>(s, p, f, [&](int r) {
          return p * S::kStream + r < S::kStill ? source(p * S::kStream + r) : RowSource<typename S::T>{};
        });
      }
      gpu::cp_async_commit();
      gpu::cp_async_wait<0>();
      __syncthreads();
      const int lane = int(threadIdx.x) % 32;
#pragma unroll
      for (int m = 0; m < S::kMTiles; ++m) {
        const int r = (warp_m() * S::kMTiles + m) * 16 + lane % 16;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          gpu::ldmatrix_x4(a[m][k], s.chunk(r / S::kStream, r % S::kStream, 2 * k + lane / 16));
        }
      }
    } else {
#pragma unroll 1
      for (int i = int(threadIdx.x); i < S::kStill * S::kChunks; i += kThreads) {
        *s.kept_chunk(i / S::kChunks, i % S::kChunks) = gather_chunk(source(i / S::kChunks), f, i % S::kChunks);
      }
    }
    __syncthreads();
  }

  // Products of the thread's still rows with the kRows streaming rows of a step.
  __device__ __forceinline__ void multiply(Smem<S>& s, int stage, int step,
                                           float (&acc)[S::kMTiles][S::kNTiles][4]) const {
#pragma unroll
    for (int i = 0; i < S::kMTiles * S::kNTiles * 4; ++i) acc[i / 4 / S::kNTiles][i / 4 % S::kNTiles][i % 4] = 0.0f;
    const int lane = int(threadIdx.x) % 32;
    if constexpr (S::kTensor) {
      constexpr int kAtOnce = 2 / S::kNTiles;  // steps of 16 channels that one ldmatrix serves
#pragma unroll
      for (int k = 0; k < kSteps; k += kAtOnce) {
        uint32_t b[4];
        const int row = S::kNTiles == 2 ? lane % 8 + lane / 16 * 8 : lane % 8;
        const int chunk = S::kNTiles == 2 ? lane / 8 % 2 : lane / 8;
        gpu::ldmatrix_x4(b, s.chunk(stage, step * S::kRows + row, 2 * k + chunk));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t fragment[2] = {b[2 * i], b[2 * i + 1]};
#pragma unroll
          for (int m = 0; m < S::kMTiles; ++m) {
            gpu::mma_m16n8k16<typename S::T>(acc[m][i % S::kNTiles], a[m][k + i / S::kNTiles], fragment);
          }
        }
      }
    } else {
#pragma unroll 2
      for (int c = 0; c < S::kChunks; ++c) {
        float own[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) unpack<float>(*s.kept_chunk(row(0, half), c), own[half]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float other[4];
          unpack<float>(*s.chunk(stage, step * S::kRows + column(j / 2, j % 2), c), other);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& sum = acc[0][j / 2][half * 2 + j % 2];
#pragma unroll
            for (int e = 0; e < 4; ++e) sum = fmaf(own[half][e], other[e], sum);
          }
        }
      }
    }
  }
};

}  // namespace tokencomp::score
