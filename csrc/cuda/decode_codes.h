// Codes of quantized pages as operands of mma.m16n8k16, tokens in M: 16 tokens of keys, or 16 channels of values, are
// an A operand whose fields the layouts of core/bitpack.h keep in the lane that multiplies them. Nothing is shuffled.
//
// A code q in bits [p, p + b) of a half, all other bits zero and p + b <= 10, is the subnormal fp16 number q 2^(p -
// 24): a mask makes an operand of it, exactly, and the powers of two go to the other operand (2^-p) and to the fp32 sum
// (2^24). fp8 e4m3 shifted into place is its value times 2^-8.
#pragma once

#include "core/page_blob.h"
#include "cuda/arch/gpu.h"

namespace tokencomp::decode {

using page_blob::Tier;

template <Tier kTier>
constexpr int kBits = page_blob::tier_bits(kTier);
// What a sum of products of codes of this tier must be multiplied by.
template <Tier kTier>
constexpr float kUnit = kTier == Tier::fp8 ? 0x1p8f : 0x1p24f;

// N words of a lane, at word `u` of its row: the order in which bitpack stores them. A chunk is read by one load.
template <int kLanes, int kRowWords, int N>
__device__ __forceinline__ void load_words(const uint8_t* row, int lane, int u, uint32_t (&out)[N]) {
  constexpr int kChunk = kRowWords < 4 ? kRowWords : 4;
  static_assert(N <= kChunk && kChunk % N == 0);
  const uint8_t* from = row + 4 * (u / kChunk * kLanes * kChunk + lane * kChunk + u % kChunk);
  if constexpr (N == 1) {
    out[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (N == 2) {
    const uint2 w = *reinterpret_cast<const uint2*>(from);
    out[0] = w.x, out[1] = w.y;
  } else {
    const uint4 w = *reinterpret_cast<const uint4*>(from);
    out[0] = w.x, out[1] = w.y, out[2] = w.z, out[3] = w.w;
  }
}

// Both halves moved by a number of bits that is known when compiling, to the left where it is positive.
template <int kDistance>
__device__ __forceinline__ uint32_t moved(uint32_t x) {
  if constexpr (kDistance >= 0) {
    return x << kDistance;
  } else {
    return x >> -kDistance;
  }
}

// A mask in both halves.
TC_HD constexpr uint32_t both(uint32_t half) { return half << 16 | half; }

// Bytes 2 kPair and 2 kPair + 1 of a word as halves: q 2^-24, or an fp8 number times 2^-8.
template <Tier kTier, int kPair>
__device__ __forceinline__ uint32_t bytes_as_halves(uint32_t w) {
  if constexpr (kTier == Tier::int8) return __byte_perm(w, 0, kPair ? 0x4342 : 0x4140);
  const uint32_t x = __byte_perm(w, 0, kPair ? 0x3424 : 0x1404);
  return (x & both(0x8000)) | (x >> 1 & both(0x3f80));
}

// The keys of 16 tokens and a few steps of 16 channels. Lane 4 g + c holds tokens g and g + 8.
template <Tier kTier, int kD>
struct Keys {
  static constexpr bool kBytes = kBits<kTier> == 8, kPairs = kBits<kTier> < 4;
  static constexpr int kSteps = kBytes ? 4 : kD == 64 ? 4 : 8;  // of a load
  static constexpr int kWords = kBytes ? 4 : kPairs ? kSteps / 4 : kSteps / 2;
  static constexpr int kWidth = kPairs ? 2 : kBits<kTier>, kRowWords = kD * kWidth / 128 * (kPairs ? 2 : 1);
  static constexpr int kHighWords = kD / 64;  // of a row of the plane of high bits

  uint32_t low[2][kWords], high[2];

  // `codes` of 16 tokens; steps from `first` on.
  __device__ __forceinline__ void load(const uint8_t* codes, int lane, int first) {
    const int g = lane / 4, c = lane % 4;
    if constexpr (kPairs && kRowWords <= 4) {  // one load for both tokens
      uint32_t words[kRowWords];
      load_words<4, kRowWords>(codes + g * (16 * kRowWords), c, 0, words);
#pragma unroll
      for (int i = 0; i < kRowWords; ++i) low[i / kWords][i % kWords] = words[i];
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint8_t* row = codes + (kPairs ? g : g + 8 * i) * (16 * kRowWords);
        load_words<4, kRowWords>(row, c, first / kSteps * kWords + (kPairs ? i * (kRowWords / 2) : 0), low[i]);
      }
    }
    if constexpr (kTier == Tier::int3) load_high(codes + 4 * kD + g * (16 * kHighWords), c, first);
  }

  // Of step `first + kStep`: channels 2c and 2c + 1 of its 16 (h = 0), and 8 behind (h = 1).
  template <int kStep>
  __device__ __forceinline__ void operand(uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i] = pair<kStep, 0>(i ? low[1] : low[0], i);
      a[2 + i] = pair<kStep, 1>(i ? low[1] : low[0], i);
    }
  }

  // Bits that codes of this step and half lie above bit 0: their power of two belongs to the queries.
  TC_HD static constexpr int lift(int step, int h) {
    return kBytes ? 0 : kBits<kTier> == 4 ? 4 * h : 4 * (step % 2) + 2 * h;
  }

 private:
  __device__ __forceinline__ void load_high(const uint8_t* row, int c, int first) {
    if constexpr (kHighWords == 2) {
      load_words<4, 2>(row, c, 0, high);
    } else {
      uint32_t word[1];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_words<4, kHighWords>(row, c, kD == 64 ? 0 : i * (kHighWords / 2) + first / 8, word);
        high[i] = word[0];
      }
    }
  }

  template <int kStep, int kHalf>
  __device__ __forceinline__ uint32_t pair(const uint32_t (&words)[kWords], int i) const {
    if constexpr (kBytes) {
      return bytes_as_halves<kTier, kHalf>(words[kStep]);
    } else if constexpr (kBits<kTier> == 4) {
      return words[kStep / 2] >> 8 * (kStep % 2) & both(0xf << 4 * kHalf);
    } else {
      constexpr int kLift = lift(kStep, kHalf), kTo = kLift + 2;
      const uint32_t code = words[kStep / 4] >> 8 * (kStep % 4 / 2) & both(3 << kLift);
      if constexpr (kTier == Tier::int2) return code;
      constexpr int kOfToken = kD == 64 ? 8 : 0;  // both tokens share a word there
      constexpr int kFrom = 2 * (kStep % 8) + kHalf;
      const uint32_t bits = i ? moved<kTo - kFrom - kOfToken>(high[1]) : moved<kTo - kFrom>(high[0]);
      return code | (bits & both(1 << kTo));
    }
  }
};

// The values of 16 tokens and a few tiles of 16 channels. Lane 4 g + c holds channels g and g + 8 of a tile.
template <Tier kTier, int kD>
struct Values {
  static constexpr bool kBytes = kBits<kTier> == 8;
  static constexpr int kTiles = kBytes ? 2 : kBits<kTier> == 4 || kD == 64 ? 4 : 8;  // of a load
  static constexpr int kWords = kBytes ? 4 : kBits<kTier> == 4 ? kTiles : kTiles / 2;
  static constexpr int kWidth = kBits<kTier> == 3 ? 2 : kBits<kTier>, kRowWords = kD * kWidth / 64;
  // Bits that codes lie above bit 0, of tokens 8 to 15 and of channels 8 to 15.
  static constexpr int kTokenLift = kBytes ? 0 : kBits<kTier> == 4 ? 4 : 2;
  static constexpr int kChannelLift = kBits<kTier> < 4 ? 4 : 0;

  uint32_t low[kWords], high[kTiles / 4 ? kTiles / 4 : 1];

  // `codes` of 16 tokens; tiles from `first` on.
  __device__ __forceinline__ void load(const uint8_t* codes, int lane, int first) {
    load_words<32, kRowWords>(codes, lane, first / kTiles * kWords, low);
    if constexpr (kTier == Tier::int3) load_words<32, kD / 64>(codes + 4 * kD, lane, first / 4, high);
  }

  // Of tile `first + kTile`.
  template <int kTile>
  __device__ __forceinline__ void operand(uint32_t (&a)[4]) const {
    a[0] = pair<kTile, 0, 0>(), a[1] = pair<kTile, 1, 0>();
    a[2] = pair<kTile, 0, 1>(), a[3] = pair<kTile, 1, 1>();
  }

 private:
  // Channels 8 kUpper + g, tokens 8 kHalf + 2c and the next.
  template <int kTile, int kUpper, int kHalf>
  __device__ __forceinline__ uint32_t pair() const {
    if constexpr (kBytes) {
      return bytes_as_halves<kTier, kHalf>(low[2 * kTile + kUpper]);
    } else if constexpr (kBits<kTier> == 4) {
      return low[kTile] >> 8 * kUpper & both(0xf << 4 * kHalf);
    } else {
      constexpr int kLift = 4 * kUpper + 2 * kHalf, kTo = kLift + 2, kFrom = kTile % 4 * 4 + 2 * kUpper + kHalf;
      const uint32_t code = low[kTile / 2] >> 8 * (kTile % 2) & both(3 << kLift);
      if constexpr (kTier == Tier::int2) return code;
      return code | (moved<kTo - kFrom>(high[kTile / 4]) & both(1 << kTo));
    }
  }
};

// ---- grids: a step in the low half of a word, a minimum in its high half, both fp16

constexpr uint32_t kLargestHalf = 0x7bff;

// Step and minimum of a grid.
__device__ __forceinline__ float2 grid_of(const uint8_t* params, int i) {
  f16 grid[2];
  const uint32_t word = *reinterpret_cast<const uint32_t*>(params + 4 * i);
  memcpy(grid, &word, 4);
  return make_float2(to_float(grid[0]), to_float(grid[1]));
}

// Steps and minimums of two grids that follow each other.
struct GridPair {
  uint32_t step, minimum;
};

__device__ __forceinline__ GridPair grid_pair(uint32_t first, uint32_t second) {
  return {__byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632)};
}

// The largest step of `count` grids, as bits of fp16, which order as integers; NaN is above all numbers.
__device__ __forceinline__ uint32_t largest_step(const uint8_t* params, int count, int lane) {
  uint32_t largest = 0;
  for (int i = lane; i < count; i += 32) {
    largest = max(largest, reinterpret_cast<const uint32_t*>(params)[i] & 0x7fffu);
  }
  return __reduce_max_sync(~0u, largest);
}

// 2^exponent in both halves of a word.
__device__ __forceinline__ uint32_t power_pair(int exponent) { return uint32_t(exponent + 15) * 0x04000400u; }

}  // namespace tokencomp::decode
