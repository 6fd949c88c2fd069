// Decode attention over 16-bit pages on CUDA with tensor cores. Every warp has a ring of two stages of its own, filled
// by cp.async, and works on its tiles without waiting for other warps: logits of 16 rows (the heads of a group times
// the query rows) by mma.sync, softmax in registers, weights repacked as the operand of the second product. Where the
// keys of a tile lie is looked up one tile ahead, by one lane a key, and handed around by shuffles.
#pragma once

#include "cuda/decode_parts.h"

namespace tokencomp::decode {

// kDim: head dimension, padded. kWhole_: rows are whole, aligned 16-byte chunks.
template <class T_, int kDim, bool kWhole_>
struct Shape {
  using T = T_;
  static constexpr int kD = kDim, kRows = 16, kStages = 2;
  static constexpr bool kWhole = kWhole_;
  static constexpr int kKeys = kD <= 64 ? 32 : 16, kTiles = kKeys / 8;  // of a warp's tile; in eights
  static constexpr int kChunks = kD / 8, kPitch = (kChunks + 7) / 8 * 8;
  static constexpr bool kKeepQueries = kD <= 128;    // in registers; otherwise they are read again for every tile
  static constexpr int kBlocks = kD <= 128 ? 3 : 1;  // on a multiprocessor
};

template <class S>
struct Stage {
  // Chunk c of row r lies at position c ^ (r % 8): eight rows then cover all banks.
  uint4 k[S::kKeys][S::kPitch], v[S::kKeys][S::kPitch];
};

template <class S>
struct Smem {
  union {
    Stage<S> ring[kWarps][S::kStages];
    Found<S::kRows, S::kD> found;
  };
  uint4 q[S::kRows][S::kPitch];
  alignas(16) float side[kWarps][S::kStages][S::kKeys];
  int slot[kWarps][S::kStages][S::kKeys];
  int end[S::kRows], floor[S::kRows];  // what each row sees: slots below, positions above
  uint32_t last;
};

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, pair, 4);
  return word;
}

// Eight elements of a row from c on; 0 past its end, and where there is no row.
template <class T>
__device__ __forceinline__ uint4 gather_chunk(const T* row, int c, int n) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T zero = from_float<T>(0.0f);
    const T pair[2] = {row && c + 2 * i < n ? row[c + 2 * i] : zero,
                       row && c + 2 * i + 1 < n ? row[c + 2 * i + 1] : zero};
    memcpy(&word[i], pair, 4);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <class S>
class Warp {
  using T = typename S::T;
  static constexpr int kSteps = S::kD / 16, kOut = S::kD / 8;

 public:
  __device__ Warp(const DecodeArgs& args, const Unit& unit, Smem<S>& smem)
      : a(args), u(unit), s(smem), warp(int(threadIdx.x) / 32), lane(int(threadIdx.x) % 32) {
#pragma unroll
    for (int i = 0; i < kOut; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] = 0.0f;
    }
  }

  __device__ __forceinline__ void run() {
    constexpr int kTurn = kWarps * S::kKeys;
    keep_queries();
    int key = u.first + warp * S::kKeys, stage = 0;
#pragma unroll 1
    for (int i = 0; i < S::kStages; ++i) fill(i, find(candidate(a, u, key + i * kTurn + lane % S::kKeys)));
    // Two dependent loads ahead of the copies: the list's entry, then the page.
    KeySource next = find(candidate(a, u, key + S::kStages * kTurn + lane % S::kKeys));
    int later = candidate(a, u, key + (S::kStages + 1) * kTurn + lane % S::kKeys);
#pragma unroll 1
    for (; key < u.end; key += kTurn) {
      gpu::cp_async_wait<S::kStages - 1>();
      __syncwarp();  // the tile has arrived for all lanes
      fold(stage);
      __syncwarp();  // and all are done with it
      fill(stage, next);
      next = find(later);
      later = candidate(a, u, key + (S::kStages + 2) * kTurn + lane % S::kKeys);
      stage ^= 1;
    }
    gpu::cp_async_wait<0>();
  }

  // After a barrier: the ring is free.
  __device__ __forceinline__ void tell(Found<S::kRows, S::kD>& found) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = lane / 4 + 8 * i;
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) total[i] += __shfl_xor_sync(~0u, total[i], distance);
      if (lane % 4 == 0) found.top[warp][r] = top[i], found.total[warp][r] = total[i];
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
        *reinterpret_cast<float2*>(&found.values[warp][r][n * 8 + lane % 4 * 2]) =
            make_float2(out[n][2 * i], out[n][2 * i + 1]);
      }
    }
  }

 private:
  // Of the group, the thread's row i of two.
  __device__ int row(int i) const { return Unit::block() * S::kRows + lane / 4 + 8 * i; }
  __device__ static uint4* chunk(uint4 (*rows)[S::kPitch], int r, int c) { return &rows[r][c ^ (r & 7)]; }

  __device__ __forceinline__ void keep_queries() {
    if constexpr (S::kKeepQueries) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) gpu::ldmatrix_x4(query[k], chunk(s.q, lane % 16, 2 * k + lane / 16));
    }
  }

  __device__ __forceinline__ KeySource find(int slot) const { return locate(a, u, slot, s.floor[0]); }

  // Starts the copies of a tile, of which every lane has found one key; closes a group, be it an empty one.
  __device__ __forceinline__ void fill(int stage, const KeySource& own) {
    Stage<S>& ring = s.ring[warp][stage];
    if (lane < S::kKeys) {
      s.side[warp][stage][lane] = own.side;
      s.slot[warp][stage][lane] = own.slot;
    }
    copy(ring.k, a.k, own);
    copy(ring.v, a.v, own);
    gpu::cp_async_commit();
  }

  // Lanes know a key each and copy a row together, 16 bytes a lane.
  __device__ __forceinline__ void copy(uint4 (*rows)[S::kPitch], const Pages& pages, const KeySource& own) const {
    constexpr int kCopies = S::kKeys * S::kChunks / 32;
    const T* base = static_cast<const T*>(pages.base);
    const int64_t offset = pages.offset(own.page, u.kv, a.table.slot_in_page(own.slot));
    const uint32_t there = __ballot_sync(~0u, own.page >= 0);
#pragma unroll 2
    for (int i = 0; i < kCopies; ++i) {
      const int at = i * 32 + lane, r = at / S::kChunks, c = at % S::kChunks;
      const int64_t from = __shfl_sync(~0u, (long long)offset, r);
      const bool valid = there >> r & 1;
      if constexpr (S::kWhole) {
        const bool inside = valid && c * 8 < pages.channels;
        gpu::cp_async16(chunk(rows, r, c), inside ? base + from + c * 8 : base, inside);
      } else {
        *chunk(rows, r, c) = gather_chunk<T>(valid ? base + from : nullptr, c * 8, pages.channels);
      }
    }
  }

  __device__ __forceinline__ void fold(int stage) {
    float z[S::kTiles][4];
    multiply(stage, z);
    finish_logits(stage, z);
    soften(z);
    weigh(stage, z);
  }

  __device__ __forceinline__ void multiply(int stage, float (&z)[S::kTiles][4]) {
#pragma unroll
    for (int i = 0; i < S::kTiles * 4; ++i) z[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if constexpr (!S::kKeepQueries) gpu::ldmatrix_x4(query[0], chunk(s.q, lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < S::kTiles; n += 2) {
        uint32_t b[4];
        gpu::ldmatrix_x4(b, chunk(s.ring[warp][stage].k, n * 8 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        gpu::mma_m16n8k16<T>(z[n], query[S::kKeepQueries ? k : 0], low);
        gpu::mma_m16n8k16<T>(z[n + 1], query[S::kKeepQueries ? k : 0], high);
      }
    }
  }

  // Scale, cap, bias; -inf where a row does not see a key, and for NaN.
  __device__ __forceinline__ void finish_logits(int stage, float (&z)[S::kTiles][4]) const {
    if (a.softcap > 0.0f) {
#pragma unroll
      for (int i = 0; i < S::kTiles * 4; ++i) z[i / 4][i % 4] = tanhf(z[i / 4][i % 4] * (a.scale / a.softcap));
    }
    const float factor = a.softcap > 0.0f ? a.softcap : a.scale;
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) {
      const float2 side = *reinterpret_cast<const float2*>(&s.side[warp][stage][n * 8 + lane % 4 * 2]);
#pragma unroll
      for (int e = 0; e < 4; ++e) z[n][e] = fmaxf(fmaf(z[n][e], factor, e % 2 ? side.y : side.x), -INFINITY);
    }
    if (a.T > 1) hide_keys(stage, z);
    if (a.logits) write_logits(stage, z);
  }

  // What single query rows do not see: slots after their own, and those that left their window.
  __device__ __forceinline__ void hide_keys(int stage, float (&z)[S::kTiles][4]) const {
#pragma unroll
    for (int i = 0; i < S::kTiles * 4; ++i) {
      const int slot = s.slot[warp][stage][i / 4 * 8 + lane % 4 * 2 + i % 2];
      if (!sees(i % 4 / 2, slot)) z[i / 4][i % 4] = -INFINITY;
    }
  }

  __device__ __forceinline__ void write_logits(int stage, const float (&z)[S::kTiles][4]) const {
#pragma unroll
    for (int i = 0; i < S::kTiles * 4; ++i) {
      const int r = row(i % 4 / 2), slot = s.slot[warp][stage][i / 4 * 8 + lane % 4 * 2 + i % 2];
      if (r < a.rows() && z[i / 4][i % 4] > -INFINITY) {
        a.logits[row_of(a, u, r) * a.capacity + slot] = z[i / 4][i % 4];
      }
    }
  }

  __device__ __forceinline__ bool sees(int i, int slot) const {
    const int own = lane / 4 + 8 * i;
    if (slot < 0 || slot >= s.end[own]) return false;
    return !a.window || position_of(a, u.b, u.kv, slot) > s.floor[own];
  }

  // Logits become weights relative to the new maxima; what was gathered before is brought to them where they moved.
  __device__ __forceinline__ void soften(float (&z)[S::kTiles][4]) {
    float high[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) high[e / 2] = fmaxf(high[e / 2], z[n][e]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        high[i] = fmaxf(high[i], __shfl_xor_sync(~0u, high[i], distance));
      }
    }
    if (__any_sync(~0u, high[0] > top[0] || high[1] > top[1])) rescale(high);
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        z[n][e] = top[e / 2] > -INFINITY ? gpu::exp2_approx((z[n][e] - top[e / 2]) * kLog2e) : 0.0f;
        total[e / 2] += z[n][e];
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&high)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float factor = weight_of(top[i], high[i]);
      top[i] = high[i];
      total[i] *= factor;
#pragma unroll
      for (int n = 0; n < kOut; ++n) out[n][2 * i] *= factor, out[n][2 * i + 1] *= factor;
    }
  }

  __device__ __forceinline__ void weigh(int stage, const float (&p)[S::kTiles][4]) {
#pragma unroll
    for (int n = 0; n < S::kTiles; n += 2) {
      const uint32_t weights[4] = {pack<T>(p[n][0], p[n][1]), pack<T>(p[n][2], p[n][3]),
                                   pack<T>(p[n + 1][0], p[n + 1][1]), pack<T>(p[n + 1][2], p[n + 1][3])};
#pragma unroll
      for (int c = 0; c < kOut; c += 2) {
        uint32_t b[4];
        gpu::ldmatrix_x4_trans(b, chunk(s.ring[warp][stage].v, n * 8 + lane % 16, c + lane / 16));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        gpu::mma_m16n8k16<T>(out[c], weights, low);
        gpu::mma_m16n8k16<T>(out[c + 1], weights, high);
      }
    }
  }

  const DecodeArgs& a;
  const Unit& u;
  Smem<S>& s;
  const int warp, lane;
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  uint32_t query[S::kKeepQueries ? kSteps : 1][4];
  float out[kOut][4];
};

// Rows of the block, zeros past the last, and what they see.
template <class S>
__device__ __forceinline__ void load_queries(const DecodeArgs& a, const Unit& u, Smem<S>& s) {
  using T = typename S::T;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < S::kRows * S::kChunks; i += kThreads) {
    const int own = i / S::kChunks, c = i % S::kChunks, r = Unit::block() * S::kRows + own;
    const int head = u.kv * a.group() + r / a.T;
    const T* row = static_cast<const T*>(a.q) + u.b * a.q_stride_b + head * a.q_stride_h + r % a.T * a.q_stride_t;
    s.q[own][c ^ (own & 7)] = gather_chunk<T>(r < a.rows() ? row : nullptr, c * 8, a.D);
  }
  if (int(threadIdx.x) < S::kRows) {
    const int t = (Unit::block() * S::kRows + int(threadIdx.x)) % a.T;
    s.end[threadIdx.x] = end_of(a, t, u.length);
    s.floor[threadIdx.x] = floor_of(a, u.b, u.kv, t, u.length);
  }
  __syncthreads();
}

// registers: decode_tiles <= 255
template <class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks) decode_tiles(DecodeArgs a, Workspace w) {
  auto& s = gpu::dynamic_smem<Smem<S>>();
  const Unit u(a, w);
  load_queries<S>(a, u, s);
  Warp<S> warp(a, u, s);
  warp.run();
  __syncthreads();
  warp.tell(s.found);
  __syncthreads();
  Finish<typename S::T, S::kRows, S::kD>{a, w, u, s.found}.run(s.last);
}

}  // namespace tokencomp::decode
