// Keys and values of quantized pages on CUDA: codes in the mma16 layouts to the numbers that kv_page_read gives.
// Sixteen tokens at a time a word of codes goes to each thread, neighbours to neighbours; single rows element by
// element.
#pragma once

#include "core/attention.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::attention {

__device__ __forceinline__ int log2_of(int power) { return 31 - __clz(power); }

// The keys or the values of one quantized page.
template <int kD, bool kValues>
struct QuantizedPage {
  static constexpr bitpack::Layout kLayout = kValues ? bitpack::Layout::mma16_v : bitpack::Layout::mma16_k;
  const uint8_t *codes, *params;
  const float *scale, *bias;  // maps of its (b, kv), or null
  int bits, shift;            // shift: log2 of the group
  bool fp8, by_token;

  __device__ QuantizedPage(const Attention& a, int b, int kv, int32_t entry) {
    const PagePool& pool = a.types.pool_of(page_type(entry));
    const PageHalf& half = kValues ? pool.v : pool.k;
    const uint8_t* page = pool.base + page_number(entry) * pool.page_bytes;
    const int64_t at = (int64_t(b) * a.g.Hkv + kv) * kD;
    const PageMaps& maps = a.types.maps;
    codes = page + half.codes;
    params = page + half.params;
    scale = kValues ? maps.v_scale : maps.k_scale;
    bias = kValues ? maps.v_bias : maps.k_bias;
    if (scale) scale += at;
    if (bias) bias += at;
    bits = half.format.bits;
    shift = log2_of(half.format.group);
    fp8 = half.format.kind == kvquant::Kind::fp8;
    by_token = half.format.axis == kvquant::Axis::token;
  }

  // What a code of token t (of the page), channel d stands for.
  __device__ __forceinline__ float number(int t, int d, uint32_t code) const {
    const int at = by_token ? t * (kD >> shift) + (d >> shift) : (t >> shift) * kD + d;
    const uint32_t grid = reinterpret_cast<const uint32_t*>(params)[at];
    const uint16_t half[2] = {uint16_t(grid), uint16_t(grid >> 16)};
    f16 step, minimum;
    memcpy(&step, &half[0], 2);
    memcpy(&minimum, &half[1], 2);
    float x = fmaf(to_float(step), fp8 ? bitpack::fp8_to_float(uint8_t(code)) : float(code), to_float(minimum));
    if (scale) x /= scale[d];
    if (bias) x += bias[d];
    return x;
  }

  // One element; put(x).
  __device__ __forceinline__ float element(int t, int d) const {
    const uint8_t* unit = codes + (t / bitpack::kBlock) * (bitpack::kBlock * kD / 8) * bits;
    const int in_unit = t % bitpack::kBlock;
    int code = 0;
    if (bits == 2) code = bitpack::code_at(kLayout, 2, kD, unit, in_unit, d);
    if (bits == 3) code = bitpack::code_at(kLayout, 3, kD, unit, in_unit, d);
    if (bits == 4) code = bitpack::code_at(kLayout, 4, kD, unit, in_unit, d);
    if (bits == 8) code = bitpack::code_at(kLayout, 8, kD, unit, in_unit, d);
    return number(t, d, uint32_t(code));
  }

  // The sixteen tokens from `begin` on, by all threads of the block: put(token of the sixteen, channel, number).
  template <class F>
  __device__ __forceinline__ void block(int begin, int threads, F put) const {
    const uint8_t* unit = codes + begin * (kD / 8) * bits;
    if (bits == 8) return words<8, false>(unit, begin, threads, put);
    if (bits == 4) return words<4, false>(unit, begin, threads, put);
    if (bits == 2) return words<2, false>(unit, begin, threads, put);
    words<2, true>(unit, begin, threads, put);
  }

 private:
  // Word `u` of a lane: where it lies.
  template <int kWidth>
  __device__ static int place(int row, int lane, int u) {
    constexpr bitpack::RowShape kShape = bitpack::row_shape(kLayout, kWidth, kD);
    return row * kShape.lanes * kShape.words + u / kShape.chunk * kShape.lanes * kShape.chunk + lane * kShape.chunk +
           u % kShape.chunk;
  }

  // kHigh: a plane of third bits follows.
  template <int kWidth, bool kHigh, class F>
  __device__ __forceinline__ void words(const uint8_t* unit, int begin, int threads, F put) const {
    constexpr bitpack::RowShape kShape = bitpack::row_shape(kLayout, kWidth, kD);
    constexpr int kWords = bitpack::kBlock * kD * kWidth / 32, kPer = bitpack::fields_per_half(kWidth);
    constexpr int kChunkWords = kShape.lanes * kShape.chunk, kRowWords = kShape.lanes * kShape.words;
    const uint32_t* low = reinterpret_cast<const uint32_t*>(unit);
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kWords; i += threads) {
      const int row = i / kRowWords, in_row = i % kRowWords;
      const int u = in_row / kChunkWords * kShape.chunk + in_row % kShape.chunk;
      const int lane = in_row % kChunkWords / kShape.chunk;
      const uint32_t word = low[i];
      uint32_t high = 0;
      if constexpr (kHigh) high = low[kWords + place<1>(row, lane, u / 2)] >> (u % 2 * kPer);
#pragma unroll 1  // together they would take the registers that the sums of a caller need
      for (int f = 0; f < kPer; ++f) {
        const int g = u * kPer + f;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t code = word >> bitpack::bit_of(kWidth, f, e) & ((1u << kWidth) - 1);
          if constexpr (kHigh) code |= (high >> (16 * e + f) & 1) << 2;
          int t, d;
          if constexpr (kValues) {
            t = 8 * (g % 2) + 2 * (lane % 4) + e, d = 8 * (g / 2) + lane / 4;
          } else {
            const int half = bitpack::pairs_tokens(kLayout, kWidth) ? g / (kD / 8) : 0;
            t = row + 8 * half, d = 8 * (g - half * (kD / 8)) + 2 * lane + e;
          }
          put(t, d, number(begin + t, d, code));
        }
      }
    }
  }
};

// The page of a slot of (b, kv), kNoPage where there is none.
__device__ __forceinline__ int32_t entry_of(const Attention& a, int b, int kv, int slot) {
  const int32_t entry = a.table.row(b, kv)[slot >> a.table.shift];
  return a.types.type_of(entry, a.page_count) < 0 ? kNoPage : entry;
}

}  // namespace tokencomp::attention
