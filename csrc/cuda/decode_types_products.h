// The two products of decode over pages of several types, for one step of a warp. Grids are folded around them:
//
//   keys, token grids       <q, s_t c + m_t> = s_t <q, c> + m_t sum(q), for each group of channels
//   keys, channel grids     <q, s c + m> = <q s, c> + <q, m>: q is scaled once a step, m is one more product
//   values, token grids     sum_t p_t (s_t c_t + m_t): p is scaled, sum p m is one more product, the same for all
//   channels values, channel grids   s sum_t p_t c_t + m sum_t p_t, per step
#pragma once

#include "cuda/decode_types_steps.h"

namespace tokencomp::decode {

// kRows: of queries in a block; 16 would spill.
template <int kDim>
struct TypesShape {
  static constexpr int kD = kDim, kRows = 8;
  static constexpr int kBlocks = kD < 256 ? 2 : 1;      // on a multiprocessor
  static constexpr int kMostBlocks = kD < 256 ? 4 : 1;  // of 16 tokens in a step; with D = 256 more would spill
  // Of a stage: at least a block of working rows; with D = 128 also a page of 64 tokens in four bits with one grid a
  // channel and one a token.
  static constexpr int kStageBytes = kD * (kD == 64 ? 72 : 70);
};

template <class S>
struct TypesSmem {
  union {
    alignas(16) uint8_t ring[kWarps][2][S::kStageBytes];
    Found<S::kRows, S::kD> found;
  };
  // As rows of a stage: for working rows; for codes in fp16, and what fp16 lost of them.
  uint4 q[S::kRows][S::kD / 8], scaled[S::kRows][S::kD / 8], lost[S::kRows][S::kD / 8];
  float sum[S::kD / 16][S::kRows];                   // of 16 channels for codes
  alignas(8) float scale[S::kRows], bias[S::kRows];  // logits of codes: scale * <scaled, codes> + bias
  int end[S::kRows], floor[S::kRows];                // what each row sees: slots below, positions above
  uint32_t last;
};

constexpr uint32_t kOnes = 0x3c003c00;

// Calls f<kTier>() for a quantized tier; steps of four blocks have none of eight bits.
template <int kBlocks, class F>
__device__ __forceinline__ void for_tier(Tier tier, F&& f) {
  if (tier == Tier::int4) return f.template operator()<Tier::int4>();
  if (tier == Tier::int3) return f.template operator()<Tier::int3>();
  if constexpr (kBlocks < kMaxStepBlocks) {
    if (tier == Tier::int8) return f.template operator()<Tier::int8>();
    if (tier == Tier::fp8) return f.template operator()<Tier::fp8>();
  }
  f.template operator()<Tier::int2>();
}

// Chunk c of row r.
template <int kD>
__device__ __forceinline__ const uint8_t* row_chunk(const void* rows, int r, int c) {
  return static_cast<const uint8_t*>(rows) + 16 * (r * (kD / 8) + (c ^ (r & 7)));
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (__is_same(T, f16)) return gpu::pack_f16x2(low, high);
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, pair, 4);
  return word;
}

// ---- keys: S^T = K Q^T

template <class S>
struct KeyProduct {
  static constexpr int kN = S::kRows / 8, kSteps = S::kD / 16;
  const TypesSmem<S>& s;
  const StepHalf& h;
  const uint8_t *codes, *params;
  const int lane;
  // What fp16 loses of queries that meet channel grids, and maps, has products of its own: lost, it would be as much as
  // keys lose in fp16.
  const bool mapped;

  template <class T, int kBlocks>
  __device__ __forceinline__ void rows(float (&z)[kBlocks][kN][4]) const {
    clear(z);
#pragma unroll
    for (int j = 0; j < kSteps; j += 2) {
      uint32_t q[kN][4];
      queries(s.q, j, q);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a[4];
        gpu::ldmatrix_x4(a, row_chunk<S::kD>(codes, lane % 16, 2 * (j + i) + lane / 16));
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const uint32_t b[2] = {q[n][2 * i], q[n][2 * i + 1]};
          gpu::mma_m16n8k16<T>(z[0][n], a, b);
        }
      }
    }
  }

  template <Tier kTier, int kBlocks>
  __device__ __forceinline__ void codes_of(float (&z)[kBlocks][kN][4]) const {
    using K = Keys<kTier, S::kD>;
    float acc[kBlocks][kN][4], rest[kN][4];  // rest: <q, minimum> of channel grids, sum(q) of token grids
    clear(acc);
    clear_one(rest);
    if (!h.by_channel) clear(z);
#pragma unroll 1
    for (int first = 0; first < kSteps; first += K::kSteps) {
      K keys[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) keys[b].load(codes + b * 2 * S::kD * kBits<kTier>, lane, first);
      steps<kTier, 0>(keys, first, acc, rest, z);
    }
    if (!h.by_channel) return;
#pragma unroll
    for (int i = 0; i < kBlocks * kN * 4; ++i) {
      float& x = z[i / (kN * 4)][i / 4 % kN][i % 4];
      x = fmaf(acc[i / (kN * 4)][i / 4 % kN][i % 4], kUnit<kTier>, rest[i / 4 % kN][i % 4]);
    }
  }

 private:
  template <int kBlocks>
  __device__ static __forceinline__ void clear(float (&x)[kBlocks][kN][4]) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) clear_one(x[b]);
  }
  __device__ static __forceinline__ void clear_one(float (&x)[kN][4]) {
#pragma unroll
    for (int i = 0; i < kN * 4; ++i) x[i / 4][i % 4] = 0.0f;
  }

  // Operands of steps j and j + 1.
  __device__ __forceinline__ void queries(const uint4 (*rows)[S::kD / 8], int j, uint32_t (&q)[kN][4]) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) gpu::ldmatrix_x4(q[n], row_chunk<S::kD>(rows, n * 8 + lane % 8, 2 * j + lane / 8));
  }

  // Two steps of 16 channels, and those that follow.
  template <Tier kTier, int kStep, int kBlocks>
  __device__ __forceinline__ void steps(const Keys<kTier, S::kD> (&keys)[kBlocks], int first,
                                        float (&acc)[kBlocks][kN][4], float (&rest)[kN][4],
                                        float (&z)[kBlocks][kN][4]) const {
    if constexpr (kStep < Keys<kTier, S::kD>::kSteps) {
      uint32_t q[kN][4], lost[kN][4] = {};
      queries(s.scaled, first + kStep, q);
      if (mapped) queries(s.lost, first + kStep, lost);
      step<kTier, kStep, 0>(keys, first, q, lost, acc, rest, z);
      step<kTier, kStep + 1, 2>(keys, first, q, lost, acc, rest, z);
      steps<kTier, kStep + 2>(keys, first, acc, rest, z);
    }
  }

  template <Tier kTier, int kStep, int kOf, int kBlocks>
  __device__ __forceinline__ void step(const Keys<kTier, S::kD> (&keys)[kBlocks], int first, const uint32_t (&q)[kN][4],
                                       const uint32_t (&r)[kN][4], float (&acc)[kBlocks][kN][4], float (&rest)[kN][4],
                                       float (&z)[kBlocks][kN][4]) const {
    uint32_t b[kN][2], lost[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n) b[n][0] = q[n][kOf], b[n][1] = q[n][kOf + 1];
#pragma unroll
    for (int n = 0; n < kN; ++n) lost[n][0] = r[n][kOf], lost[n][1] = r[n][kOf + 1];
    if (h.by_channel) scale_queries(first + kStep, b, lost, rest);
    multiply<kTier, kStep>(keys, b, acc);
    if (mapped || h.by_channel) multiply<kTier, kStep>(keys, lost, acc);
    if (!h.by_channel) close_step(kUnit<kTier>, first + kStep, acc, rest, z);
  }

  template <int kLift0, int kLift1>
  __device__ static __forceinline__ void lower(uint32_t (&b)[kN][2]) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if constexpr (kLift0 > 0) b[n][0] = gpu::mul_f16x2(b[n][0], power_pair(-kLift0));
      if constexpr (kLift1 > 0) b[n][1] = gpu::mul_f16x2(b[n][1], power_pair(-kLift1));
    }
  }

  // Channel grids: all tokens of the step have the same. Rows of the operand that holds minimums are equal.
  __device__ __forceinline__ void scale_queries(int j, uint32_t (&b)[kN][2], uint32_t (&lost)[kN][2],
                                                float (&rest)[kN][4]) const {
    const uint8_t* at = params + 4 * (16 * j + 2 * (lane % 4));
    const uint2 low = *reinterpret_cast<const uint2*>(at), high = *reinterpret_cast<const uint2*>(at + 32);
    const GridPair grids[2] = {grid_pair(low.x, low.y), grid_pair(high.x, high.y)};
    const uint32_t minimums[4] = {grids[0].minimum, grids[0].minimum, grids[1].minimum, grids[1].minimum};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      gpu::mma_m16n8k16<f16>(rest[n], minimums, b[n]);
      if (mapped) gpu::mma_m16n8k16<f16>(rest[n], minimums, lost[n]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t product = gpu::mul_f16x2(b[n][i], grids[i].step);
        lost[n][i] =
            gpu::fma_f16x2(lost[n][i], grids[i].step, gpu::fma_f16x2(b[n][i], grids[i].step, product ^ both(0x8000)));
        b[n][i] = product;
      }
    }
  }

  template <Tier kTier, int kStep, int kBlocks>
  __device__ static __forceinline__ void multiply(const Keys<kTier, S::kD> (&keys)[kBlocks], uint32_t (&b)[kN][2],
                                                  float (&acc)[kBlocks][kN][4]) {
    using K = Keys<kTier, S::kD>;
    lower<K::lift(kStep, 0), K::lift(kStep, 1)>(b);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t a[4];
      keys[block].template operand<kStep>(a);
#pragma unroll
      for (int n = 0; n < kN; ++n) gpu::mma_m16n8k16<f16>(acc[block][n], a, b[n]);
    }
  }

  // Token grids: at the end of a group of channels its sums join the logits.
  template <int kBlocks>
  __device__ __forceinline__ void close_step(float unit, int j, float (&acc)[kBlocks][kN][4], float (&rest)[kN][4],
                                             float (&z)[kBlocks][kN][4]) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 sum = *reinterpret_cast<const float2*>(&s.sum[j][n * 8 + lane % 4 * 2]);
      rest[n][0] += sum.x, rest[n][1] += sum.y;
    }
    const int channels = 16 * (j + 1);
    if (channels & ((1 << h.group_shift) - 1)) return;
    const int group = (channels >> h.group_shift) - 1, groups = S::kD >> h.group_shift;
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      const float2 grid = grid_of(params, (i * 8 + lane / 4) * groups + group);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float &x = acc[i / 2][n][i % 2 * 2 + e], &sum = z[i / 2][n][i % 2 * 2 + e];
          sum = fmaf(grid.x * unit, x, fmaf(grid.y, rest[n][e], sum));
          x = 0.0f;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) rest[n][0] = rest[n][1] = 0.0f;
  }
};

// ---- values: O^T = V^T P^T

template <class S>
struct ValueProduct {
  static constexpr int kN = S::kRows / 8, kTiles = S::kD / 16;
  const DecodeArgs& a;
  const Unit& u;
  const PageMaps& maps;
  const StepHalf& h;
  const uint8_t *codes, *params;
  const int lane;

  // out += what the step's values weigh. `p` of a block: tokens 2c and 2c + 1 of row g, and 8 behind.
  template <Tier kTier, int kBlocks>
  __device__ __forceinline__ void add(const uint32_t (&p)[kBlocks][kN][2], float (&out)[kTiles][kN][4]) const {
    using V = Values<kTier, S::kD>;
    Weights<kBlocks> w;
    w.unit = kUnit<kTier>;
    if (h.by_channel) {
#pragma unroll
      for (int i = 0; i < kBlocks * kN; ++i) {
        w.of[i / kN][i % kN][0] = p[i / kN][i % kN][0];
        w.of[i / kN][i % kN][1] = lowered<V::kTokenLift>(p[i / kN][i % kN][1]);
      }
    } else {
      // The largest step becomes one of [64, 128): products with weights (256 at most) are finite and keep small ones.
      const int k = min(21 - int(largest_step(params, kBlocks * kStepTokens * S::kD >> h.group_shift, lane) >> 10), 15);
      w.up[0] = power_pair(k), w.up[1] = power_pair(k - V::kTokenLift);
      w.unit *= __uint_as_float(uint32_t(127 - k) << 23);
    }
#pragma unroll
    for (int i = 0; i < kN * 4; ++i) w.rest[i / 4][i % 4] = w.sum[i / 4][i % 4] = 0.0f;
    if (h.by_channel || maps.v_bias) sum_weights(p, w.sum);
    loads<kTier, 0>(p, w, out);
  }

 private:
  template <int kBlocks>
  struct Weights {
    uint32_t of[kBlocks][kN][2];  // what multiplies codes
    uint32_t up[2];               // token grids: powers of two for steps, of tokens below 8 and of the others
    float unit;                   // of the product
    float rest[kN][4];            // token grids: sum of p * minimum
    float sum[kN][4];             // sum of p
  };

  template <int kLift>
  __device__ static uint32_t lowered(uint32_t x) {
    if constexpr (kLift > 0) return gpu::mul_f16x2(x, power_pair(-kLift));
    return x;
  }

  template <int kBlocks>
  __device__ __forceinline__ void sum_weights(const uint32_t (&p)[kBlocks][kN][2], float (&sum)[kN][4]) const {
    const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int i = 0; i < kBlocks * kN; ++i) gpu::mma_m16n8k16<f16>(sum[i % kN], ones, p[i / kN][i % kN]);
  }

  template <Tier kTier, int kFirst, int kBlocks>
  __device__ __forceinline__ void loads(const uint32_t (&p)[kBlocks][kN][2], Weights<kBlocks>& w,
                                        float (&out)[kTiles][kN][4]) const {
    using V = Values<kTier, S::kD>;
    if constexpr (kFirst < kTiles) {
      V values[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) values[b].load(codes + b * 2 * S::kD * kBits<kTier>, lane, kFirst);
      tiles<kTier, kFirst, 0>(values, p, w, out);
      loads<kTier, kFirst + V::kTiles>(p, w, out);
    }
  }

  template <Tier kTier, int kFirst, int kTile, int kBlocks>
  __device__ __forceinline__ void tiles(const Values<kTier, S::kD> (&values)[kBlocks],
                                        const uint32_t (&p)[kBlocks][kN][2], Weights<kBlocks>& w,
                                        float (&out)[kTiles][kN][4]) const {
    using V = Values<kTier, S::kD>;
    if constexpr (kTile < V::kTiles) {
      constexpr int m = kFirst + kTile;
      if (!h.by_channel && (16 * m & ((1 << h.group_shift) - 1)) == 0) open_group(16 * m >> h.group_shift, p, w);
      float acc[kN][4];
#pragma unroll
      for (int i = 0; i < kN * 4; ++i) acc[i / 4][i % 4] = 0.0f;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t operand[4];
        values[b].template operand<kTile>(operand);
#pragma unroll
        for (int n = 0; n < kN; ++n) gpu::mma_m16n8k16<f16>(acc[n], operand, w.of[b][n]);
      }
      close_tile<V::kChannelLift>(m, acc, w, out[m]);
      tiles<kTier, kFirst, kTile + 1>(values, p, w, out);
    }
  }

  // Token grids: the weights of the next group of channels.
  template <int kBlocks>
  __device__ __forceinline__ void open_group(int group, const uint32_t (&p)[kBlocks][kN][2],
                                             Weights<kBlocks>& w) const {
    const int groups = S::kD >> h.group_shift;
#pragma unroll
    for (int i = 0; i < kN * 4; ++i) w.rest[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const auto* grid = reinterpret_cast<const uint32_t*>(params) + (b * 16 + 2 * (lane % 4)) * groups + group;
      const GridPair low = grid_pair(grid[0], grid[groups]), high = grid_pair(grid[8 * groups], grid[9 * groups]);
      const uint32_t minimums[4] = {low.minimum, low.minimum, high.minimum, high.minimum};
      const uint32_t step[2] = {gpu::mul_f16x2(low.step, w.up[0]), gpu::mul_f16x2(high.step, w.up[1])};
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        gpu::mma_m16n8k16<f16>(w.rest[n], minimums, p[b][n]);
        w.of[b][n][0] = gpu::mul_f16x2(p[b][n][0], step[0]);
        w.of[b][n][1] = gpu::mul_f16x2(p[b][n][1], step[1]);
      }
    }
  }

  // Lane 4 g + c holds channels g (i = 0, 1) and g + 8 (i = 2, 3) of the tile, rows 2c and 2c + 1.
  template <int kLift, int kBlocks>
  __device__ __forceinline__ void close_tile(int m, const float (&acc)[kN][4], const Weights<kBlocks>& w,
                                             float (&out)[kN][4]) const {
    constexpr float kLowered = 1.0f / float(1 << kLift);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int d = 16 * m + 8 * half + lane / 4;
      const int64_t map = (int64_t(u.b) * a.Hkv + u.kv) * S::kD + d;
      const float shrink = maps.v_scale ? __fdividef(1.0f, maps.v_scale[map]) : 1.0f;
      const float bias = maps.v_bias ? maps.v_bias[map] : 0.0f;
      float step = (half ? w.unit * kLowered : w.unit) * shrink, of_sum = bias, of_rest = shrink;
      if (h.by_channel) {
        const float2 grid = grid_of(params, d);
        step *= grid.x, of_sum = fmaf(grid.y, shrink, bias), of_rest = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kN * 2; ++i) {
        const int n = i / 2, e = half * 2 + i % 2;
        out[n][e] += fmaf(step, acc[n][e], fmaf(of_rest, w.rest[n][e], of_sum * w.sum[n][e]));
      }
    }
  }
};

}  // namespace tokencomp::decode
