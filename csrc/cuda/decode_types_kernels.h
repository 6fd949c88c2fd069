// Decode attention over pages of several types on CUDA, in one launch: a warp branches by the type of its step, all
// else is shared. Tokens are in M: S^T = K Q^T and O^T = V^T P^T, so that a block has 8 (or 16) rows of queries rather
// than 16 and every unpacked operand serves all of them. The grids of quantized pages never meet an element (see
// decode_types_products.h).
#pragma once

#include "cuda/decode_types_products.h"

namespace tokencomp::decode {

// Weights are 2^8 times themselves until they are told: fp16 then holds what is 2^-32 of the largest.
constexpr float kWeightLog2 = 8.0f, kWeightUnit = 0x1p-8f;

template <class S>
class TypesWarp {
  static constexpr int kN = S::kRows / 8, kTiles = S::kD / 16;

 public:
  __device__ TypesWarp(const DecodeArgs& args, const Unit& unit, const StepTypes& types, TypesSmem<S>& smem)
      : a(args), u(unit), t(types), s(smem), warp(int(threadIdx.x) / 32), lane(int(threadIdx.x) % 32) {
#pragma unroll
    for (int i = 0; i < kTiles * kN * 4; ++i) out[i / (kN * 4)][i / 4 % kN][i % 4] = 0.0f;
#pragma unroll
    for (int i = 0; i < kN * 2; ++i) top[i / 2][i % 2] = -INFINITY, total[i / 2][i % 2] = 0.0f;
  }

  __device__ __forceinline__ void run() {
    const Copies<S::kD> copies{a, u, t, lane};
    Walk walk(a, u, t, warp);
    int stage = 0;
    Step now = walk.next();
    copies.start(now, s.ring[warp][0], s.floor[0]);
    Step then = walk.next();
    copies.start(then, s.ring[warp][1], s.floor[0]);
#pragma unroll 1
    while (now.slot >= 0) {
      gpu::cp_async_wait<1>();
      __syncwarp();              // the step has arrived for all lanes
      lane = gpu::opaque(lane);  // or the addresses of all tiers are kept in registers throughout
      fold_all(now, s.ring[warp][stage]);
      __syncwarp();  // and all are done with it
      now = then;
      then = walk.next();
      copies.start(then, s.ring[warp][stage], s.floor[0]);
      stage ^= 1;
    }
    gpu::cp_async_wait<0>();
  }

  // After a barrier: the ring is free.
  __device__ __forceinline__ void tell(Found<S::kRows, S::kD>& found) {
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      const int r = i / 2 * 8 + lane % 4 * 2 + i % 2;
      float sum = total[i / 2][i % 2];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (lane < 4) found.top[warp][r] = top[i / 2][i % 2], found.total[warp][r] = sum * kWeightUnit;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          found.values[warp][r][m * 16 + h * 8 + lane / 4] = out[m][i / 2][2 * h + i % 2] * kWeightUnit;
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void fold_all(const Step& step, uint8_t* stage) {
    if constexpr (S::kMostBlocks == 4) {
      if (step.blocks == 4) return fold<4>(step, stage);
      if (step.blocks == 2) return fold<2>(step, stage);
    }
    fold<1>(step, stage);
  }

  template <int kBlocks>
  __device__ __forceinline__ void fold(const Step& step, uint8_t* stage) {
    const StepType& type = t.type[page_type(step.entry)];
    const Sections at = sections_of(type, S::kD, kBlocks * kStepTokens);
    float z[kBlocks][kN][4];
    multiply<kBlocks>(type.k, stage, stage + at.k_params_at(), z);
    finish_logits<kBlocks>(step, z);
    if (!soften<kBlocks>(z)) return;
    uint32_t weights[kBlocks][kN][2];
    if (type.v.tier == Tier::working) {
      if constexpr (kBlocks == 1) {
        if (a.dtype == DType::bf16) {
          weigh_rows<bf16>(stage + kStepTokens * S::kD * 2, z);
        } else {
          weigh_rows<f16>(stage + kStepTokens * S::kD * 2, z);
        }
      }
      return;
    }
    if (type.v.by_channel == false) hide_bad_grids<kBlocks>(type.v, stage + at.v_params_at(), z);
#pragma unroll
    for (int i = 0; i < kBlocks * kN; ++i) {
      const float (&p)[4] = z[i / kN][i % kN];
      weights[i / kN][i % kN][0] = gpu::movmatrix_trans(gpu::pack_f16x2(p[0], p[1]));
      weights[i / kN][i % kN][1] = gpu::movmatrix_trans(gpu::pack_f16x2(p[2], p[3]));
    }
    weigh<kBlocks>(type.v, stage + at.v_codes_at(), stage + at.v_params_at(), weights);
  }

  // z becomes <q, k> of the dequantized keys.
  template <int kBlocks>
  __device__ __forceinline__ void multiply(const StepHalf& h, const uint8_t* codes, const uint8_t* params,
                                           float (&z)[kBlocks][kN][4]) const {
    const KeyProduct<S> product{s, h, codes, params, lane, t.maps.k_scale != nullptr};
    if (h.tier == Tier::working) {
      if constexpr (kBlocks == 1)
        a.dtype == DType::bf16 ? product.template rows<bf16>(z) : product.template rows<f16>(z);
      return;
    }
    for_tier<kBlocks>(h.tier, [&]<Tier kTier> { product.template codes_of<kTier, kBlocks>(z); });
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 scale = *reinterpret_cast<const float2*>(&s.scale[n * 8 + lane % 4 * 2]);
      const float2 bias = *reinterpret_cast<const float2*>(&s.bias[n * 8 + lane % 4 * 2]);
#pragma unroll
      for (int i = 0; i < kBlocks * 4; ++i) {
        float& x = z[i / 4][n][i % 4];
        x = fmaf(x, i % 2 ? scale.y : scale.x, i % 2 ? bias.y : bias.x);
      }
    }
  }

  template <int kBlocks>
  __device__ __forceinline__ void weigh(const StepHalf& h, const uint8_t* codes, const uint8_t* params,
                                        const uint32_t (&weights)[kBlocks][kN][2]) {
    const ValueProduct<S> product{a, u, t.maps, h, codes, params, lane};
    for_tier<kBlocks>(h.tier, [&]<Tier kTier> { product.template add<kTier, kBlocks>(weights, out); });
  }

  template <class T>
  __device__ __forceinline__ void weigh_rows(const uint8_t* rows, const float (&p)[1][kN][4]) {
    uint32_t weights[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      weights[n][0] = gpu::movmatrix_trans(pack_pair<T>(p[0][n][0], p[0][n][1]));
      weights[n][1] = gpu::movmatrix_trans(pack_pair<T>(p[0][n][2], p[0][n][3]));
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      uint32_t operand[4];
      gpu::ldmatrix_x4_trans(operand, row_chunk<S::kD>(rows, lane % 8 + lane / 16 * 8, 2 * m + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kN; ++n) gpu::mma_m16n8k16<T>(out[m][n], operand, weights[n]);
    }
  }

  // Scale, cap, bias; -inf where a row does not see a key, and for NaN.
  template <int kBlocks>
  __device__ __forceinline__ void finish_logits(const Step& step, float (&z)[kBlocks][kN][4]) const {
    const float factor = a.softcap > 0.0f ? a.softcap : a.scale;
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      const int token = i * 8 + lane / 4;
      const float side = side_of(a, u, step, token, s.floor[0]);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = z[i / 2][n][i % 2 * 2 + e];
          if (a.softcap > 0.0f) x = tanhf(x * (a.scale / a.softcap));
          x = fmaxf(fmaf(x, factor, side), -INFINITY);
          const int own = n * 8 + lane % 4 * 2 + e;
          if (a.T > 1 && !sees(own, step.slot + token)) x = -INFINITY;
          if (a.logits) write_logit(own, step.slot + token, x);
        }
      }
    }
  }

  __device__ __forceinline__ void write_logit(int own, int slot, float x) const {
    const int r = Unit::block() * S::kRows + own;
    if (r < a.rows() && x > -INFINITY) a.logits[row_of(a, u, r) * a.capacity + slot] = x;
  }

  // What single query rows do not see: slots after their own, and those that left their window.
  __device__ __forceinline__ bool sees(int own, int slot) const {
    if (slot >= s.end[own]) return false;
    return !a.window || position_of(a, u.b, u.kv, slot) > s.floor[own];
  }

  // Logits become weights relative to the new maxima; what was gathered before is brought to them where they moved.
  // False: no row sees any key.
  template <int kBlocks>
  __device__ __forceinline__ bool soften(float (&z)[kBlocks][kN][4]) {
    float high[kN][2];
    bool moves = false, seen = false;
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      const int n = i / 2, e = i % 2;
      float highest = -INFINITY;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) highest = fmaxf(highest, fmaxf(z[b][n][e], z[b][n][2 + e]));
      seen |= highest > -INFINITY;
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, distance));
      }
      high[n][e] = fmaxf(highest, top[n][e]);
      moves |= highest > top[n][e];
    }
    if (!__any_sync(~0u, seen)) return false;
    if (__any_sync(~0u, moves)) rescale(high);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float base = top[n][e] > -INFINITY ? top[n][e] : 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
          float& x = z[i / 2][n][i % 2 * 2 + e];
          x = gpu::exp2_approx(fmaf(x - base, kLog2e, kWeightLog2));
          total[n][e] += x;
        }
      }
    }
    return true;
  }

  __device__ __forceinline__ void rescale(const float (&high)[kN][2]) {
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      const int n = i / 2, e = i % 2;
      const float factor = weight_of(top[n][e], high[n][e]);
      top[n][e] = high[n][e];
      total[n][e] *= factor;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) out[m][n][e] *= factor, out[m][n][2 + e] *= factor;
    }
  }

  // A token whose grid is NaN weighs nothing if no row sees it; its grid would make NaN of that nothing.
  template <int kBlocks>
  __device__ __forceinline__ void hide_bad_grids(const StepHalf& h, uint8_t* params, const float (&p)[kBlocks][kN][4]) {
    const int count = kBlocks * kStepTokens * S::kD >> h.group_shift;
    if (largest_step(params, count, lane) <= kLargestHalf) return;
    const int per_token = S::kD >> h.group_shift;
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      bool weighs = false;
#pragma unroll
      for (int n = 0; n < kN; ++n) weighs |= p[i / 2][n][i % 2 * 2] > 0.0f || p[i / 2][n][i % 2 * 2 + 1] > 0.0f;
      const uint32_t rows = __ballot_sync(~0u, weighs) >> (lane & ~3) & 15;
      auto* grid = reinterpret_cast<uint32_t*>(params) + (i * 8 + lane / 4) * per_token;
      for (int j = lane % 4; j < per_token && !rows; j += 4) grid[j] = 0;
    }
    __syncwarp();
  }

  const DecodeArgs& a;
  const Unit& u;
  const StepTypes& t;
  TypesSmem<S>& s;
  const int warp;
  int lane;
  float top[kN][2], total[kN][2], out[kTiles][kN][4];
};

// A warp a row in turn: the row as it is, and what multiplies codes, at a power of two of its own; and what each row
// sees. Rows past the last are zeros.
template <class S>
class TypesQueries {
 public:
  const DecodeArgs& a;
  const Unit& u;
  const PageMaps& maps;
  TypesSmem<S>& s;

  __device__ __forceinline__ void load() const {
#pragma unroll 1
    for (int own = int(threadIdx.x) / 32; own < S::kRows; own += kWarps) load_row(own, int(threadIdx.x) % 32);
    __syncthreads();
    if (int(threadIdx.x) < S::kRows) limits(int(threadIdx.x));
#pragma unroll 1
    for (int i = int(threadIdx.x); i < S::kD / 16 * S::kRows; i += kThreads) sum_step(i / S::kRows, i % S::kRows);
    __syncthreads();
  }

 private:
  static constexpr int kSlices = S::kD / 32;

  __device__ static uint16_t* element(uint4 (*rows)[S::kD / 8], int own, int c) {
    return reinterpret_cast<uint16_t*>(&rows[own][c / 8 ^ (own & 7)]) + c % 8;
  }

  __device__ __forceinline__ void load_row(int own, int lane) const {
    const int r = Unit::block() * S::kRows + own, head = u.kv * a.group() + r / a.T;
    const int64_t row = u.b * a.q_stride_b + head * a.q_stride_h + r % a.T * a.q_stride_t;
    const int64_t map = (int64_t(u.b) * a.Hkv + u.kv) * S::kD;
    float q[kSlices], largest = 0.0f, bias = 0.0f;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const int c = lane + 32 * i;
      const uint16_t bits = r < a.rows() ? static_cast<const uint16_t*>(a.q)[row + c] : uint16_t(0);
      *element(s.q, own, c) = bits;
      q[i] = half_to_float(bits);
      if (maps.k_bias) bias = fmaf(q[i], maps.k_bias[map + c], bias);
      if (maps.k_scale) q[i] /= maps.k_scale[map + c];
      largest = fmaxf(largest, fabsf(q[i]));
    }
    // Below one, so that no step of a channel (fp16) makes infinity of it.
    const int exponent = int(__float_as_uint(gpu::warp_max(largest)) >> 23), up = min(max(253 - exponent, 1), 253);
    const float factor = __uint_as_float(uint32_t(up) << 23);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const f16 x = from_float<f16>(q[i] * factor), lost = from_float<f16>(fmaf(q[i], factor, -to_float(x)));
      memcpy(element(s.scaled, own, lane + 32 * i), &x, 2);
      memcpy(element(s.lost, own, lane + 32 * i), &lost, 2);
    }
    bias = gpu::warp_sum(bias);
    if (lane == 0) s.scale[own] = __uint_as_float(uint32_t(254 - up) << 23), s.bias[own] = bias;
  }

  __device__ float half_to_float(uint16_t bits) const {
    if (a.dtype == DType::bf16) return __uint_as_float(uint32_t(bits) << 16);
    f16 x;
    memcpy(&x, &bits, 2);
    return to_float(x);
  }

  __device__ void limits(int own) const {
    const int query = (Unit::block() * S::kRows + own) % a.T;
    s.end[own] = end_of(a, query, u.length);
    s.floor[own] = floor_of(a, u.b, u.kv, query, u.length);
  }

  __device__ void sum_step(int step, int own) const {
    float sum = 0.0f;
    for (int c = 0; c < 16; ++c) {
      f16 x, lost;
      memcpy(&x, element(s.scaled, own, 16 * step + c), 2);
      memcpy(&lost, element(s.lost, own, 16 * step + c), 2);
      sum += to_float(x) + to_float(lost);
    }
    s.sum[step][own] = sum;
  }
};

// registers: decode_types <= 255
template <class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks) decode_types(DecodeArgs a, Workspace w, StepTypes t) {
  auto& s = gpu::dynamic_smem<TypesSmem<S>>();
  const Unit u(a, w);
  TypesQueries<S>{a, u, t.maps, s}.load();
  TypesWarp<S> warp(a, u, t, s);
  warp.run();
  __syncthreads();
  warp.tell(s.found);
  __syncthreads();
  if (a.dtype == DType::bf16) {
    Finish<bf16, S::kRows, S::kD>{a, w, u, s.found}.run(s.last);
  } else {
    Finish<f16, S::kRows, S::kD>{a, w, u, s.found}.run(s.last);
  }
}

}  // namespace tokencomp::decode
