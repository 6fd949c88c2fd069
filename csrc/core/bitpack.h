// How the codes of a quantized KV cache lie in bytes: the specification, for host, device and tests alike. A code has b
// bits, b in {2, 3, 4, 8}, or is an element of 16 bits. Three bits are two planes: the low two bits of each code as if
// b = 2, then its high bit as if b = 1; so everything below is about fields of 1, 2, 4, 8 or 16 bits.
//
//   linear    Rows of one token. A row has R = D * width / 8 bytes; channel d is field d / R of byte d % R (16 bits:
//   byte
//             2 d). Unpacking is a mask and a shift that leave channels in order. For CPUs and files.
//   mma16_k   Blocks of 16 tokens in the order of the fragments of mma.m16n8k16, rows of keys being its B operand (8
//   mma16_v   tokens) or its A operand (16 tokens); for values the roles of channel and token are swapped. A lane reads
//             what it owns in 16-byte loads; nothing is shuffled. For GPUs.
//
// In a fragment a thread owns pairs of neighbours (e = 0, 1) at distance 8 (h = 0, 1) of every 16 positions along the
// dimension that is multiplied away, and one index of the other dimension:
//
//   keys      d = 16 j + 8 h + 2 c + e, a row of four lanes c per token t % 8 (planes of 1 and 2 bits hold tokens t and
//             t + 8 of a block in one row) or per token t % 16 (wider fields)
//   values    t = 8 h + 2 c + e, d = 8 m + g, a row of 32 lanes 4 g + c
//
// A lane's elements are numbered g = (token half, j, h) or (m, h). Element g with pair index e is a field of the lane's
// word g / per, at bit 16 e + width * (g % per), with per = 16 / width: a mask and a shift give the pair as two halves
// of a register. Fields of 8 bits lie at bit 16 (g % 2) + 8 e instead, the order that byte permutes want. The words of
// a row are stored in chunks of up to four per lane.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace tokencomp::bitpack {

enum class Layout { linear, mma16_k, mma16_v };

constexpr int kBlock = 16;  // tokens of a block of the mma16 layouts

// Where a field starts within its plane: in a row of one token (linear) or in a block of 16 tokens.
struct Place {
  int byte = 0, shift = 0;
};
struct Element {
  int t = 0, d = 0;
};

// The part of a plane that the lanes of one row read.
struct RowShape {
  int lanes, words, chunk;  // words of a lane; words of a lane that lie together
};

TC_HD constexpr int fields_per_half(int width) { return 16 / width; }
TC_HD constexpr bool pairs_tokens(Layout layout, int width) { return layout == Layout::mma16_k && width <= 2; }

TC_HD constexpr RowShape row_shape(Layout layout, int width, int D) {
  const int elements = layout == Layout::mma16_v ? D / 4 : D / 8 * (pairs_tokens(layout, width) ? 2 : 1);
  const int words = elements / fields_per_half(width);
  return {layout == Layout::mma16_v ? 32 : 4, words, words < 4 ? words : 4};
}

TC_HD constexpr int bit_of(int width, int g, int e) {
  return width == 8 ? 16 * (g % 2) + 8 * e : 16 * e + width * (g % fields_per_half(width));
}

TC_HD constexpr Place place(Layout layout, int width, int D, int t, int d) {
  if (layout == Layout::linear) {
    const int bytes = D * width / 8;
    return width == 16 ? Place{2 * d, 0} : Place{d % bytes, d / bytes * width};
  }
  const bool keys = layout == Layout::mma16_k, pairs = pairs_tokens(layout, width);
  const RowShape shape = row_shape(layout, width, D);
  const int row = keys ? (pairs ? t % 8 : t) : 0, lane = keys ? d % 8 / 2 : 4 * (d % 8) + t % 8 / 2;
  const int e = keys ? d % 2 : t % 2, h = keys ? d % 16 / 8 : t / 8;
  const int g = keys ? 2 * (d / 16) + h + (pairs ? t / 8 * (D / 8) : 0) : 2 * (d / 8) + h;
  const int u = g / fields_per_half(width), bit = bit_of(width, g, e);
  const int word = row * shape.lanes * shape.words + u / shape.chunk * shape.lanes * shape.chunk + lane * shape.chunk +
                   u % shape.chunk;
  return {4 * word + bit / 8, bit % 8};
}

// The element whose field starts at that place: the inverse of place(). For linear rows t is 0.
TC_HD constexpr Element element(Layout layout, int width, int D, Place at) {
  if (layout == Layout::linear) {
    return width == 16 ? Element{0, at.byte / 2} : Element{0, at.shift / width * (D * width / 8) + at.byte};
  }
  const bool keys = layout == Layout::mma16_k, pairs = pairs_tokens(layout, width);
  const RowShape shape = row_shape(layout, width, D);
  const int word = at.byte / 4, bit = at.byte % 4 * 8 + at.shift, row_words = shape.lanes * shape.words;
  const int row = word / row_words, in_row = word % row_words;
  const int u = in_row / (shape.lanes * shape.chunk) * shape.chunk + in_row % shape.chunk;
  const int lane = in_row % (shape.lanes * shape.chunk) / shape.chunk, per = fields_per_half(width);
  const int e = width == 8 ? bit / 8 % 2 : bit / 16;
  const int g = u * per + (width == 8 ? bit / 16 : bit % 16 / width);
  if (!keys) return {8 * (g % 2) + 2 * (lane % 4) + e, 8 * (g / 2) + lane / 4};
  const int half = pairs ? g / (D / 8) : 0, f = g - half * (D / 8);
  return {row + 8 * half, 16 * (f / 2) + 8 * (f % 2) + 2 * lane + e};
}

// ---- codes: one or two planes

TC_HD constexpr int unit_tokens(Layout layout) { return layout == Layout::linear ? 1 : kBlock; }
TC_HD constexpr int unit_bytes(Layout layout, int bits, int D) { return unit_tokens(layout) * (D * bits / 8); }
TC_HD constexpr int low_width(int bits) { return bits == 3 ? 2 : bits; }
// Bytes before the plane of high bits, in a unit.
TC_HD constexpr int low_bytes(Layout layout, int bits, int D) { return unit_bytes(layout, low_width(bits), D); }

// Byte `byte` of a unit; `codes` are its codes, one a byte, [tokens of the unit, D].
TC_HD constexpr uint8_t pack_byte(Layout layout, int bits, int D, const uint8_t* codes, int byte) {
  const int low = low_bytes(layout, bits, D);
  const bool high = byte >= low;
  const int width = high ? 1 : low_width(bits), from = high ? 2 : 0, mask = (1 << width) - 1;
  int packed = 0;
  for (int shift = 0; shift < 8; shift += width) {
    const Element at = element(layout, width, D, {high ? byte - low : byte, shift});
    packed |= (codes[at.t * D + at.d] >> from & mask) << shift;
  }
  return uint8_t(packed);
}

// The code of an element; `unit` points to the bytes of its unit, t is its token there.
TC_HD constexpr int code_at(Layout layout, int bits, int D, const uint8_t* unit, int t, int d) {
  const Place at = place(layout, low_width(bits), D, t, d);
  const int code = unit[at.byte] >> at.shift & ((1 << low_width(bits)) - 1);
  if (bits != 3) return code;
  const Place high = place(layout, 1, D, t, d);
  return code | (unit[low_bytes(layout, bits, D) + high.byte] >> high.shift & 1) << 2;
}

// ---- fp8 e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; 448 is the largest, 0x7f is NaN, no infinities

constexpr float kLargestFp8 = 448.0f;

// Nearest, ties to even, of a number that is not NaN; saturates.
TC_HD uint8_t fp8_from_float(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  const uint32_t sign = u >> 24 & 0x80, magnitude = u & 0x7fffffff;
  float size;
  __builtin_memcpy(&size, &magnitude, 4);
  size = size < kLargestFp8 ? size : kLargestFp8;
  const float shifted = size + 0x1p14f;  // below 2^-6 codes count steps of 2^-9: the sum rounds to such a step
  uint32_t normal, small;
  __builtin_memcpy(&normal, &size, 4);
  __builtin_memcpy(&small, &shifted, 4);
  normal = (normal + 0x7ffff + (normal >> 20 & 1) - (120u << 23)) >> 20;
  return uint8_t(sign | (size < 0x1p-6f ? small & 0xf : normal));
}

TC_HD float fp8_to_float(uint8_t code) {
  const uint32_t magnitude = code & 0x7f;
  float size;
  if (magnitude < 8) {
    size = float(int(magnitude)) * 0x1p-9f;
  } else {
    const uint32_t u = magnitude == 0x7f ? 0x7fc00000 : (magnitude << 20) + (120u << 23);
    __builtin_memcpy(&size, &u, 4);
  }
  return code & 0x80 ? -size : size;
}

// ---- golden words: if one of these fails, stored caches and kernels no longer agree

namespace golden {

constexpr bool inverse(Layout layout, int width, int D) {
  for (int t = 0; t < unit_tokens(layout); ++t) {
    for (int d = 0; d < D; ++d) {
      const Element back = element(layout, width, D, place(layout, width, D, t, d));
      if (back.t != t || back.d != d) return false;
    }
  }
  return true;
}
// The word that lane `lane` reads first of row 0, all tokens having code(d) at channel d; D = 128.
template <class F>
constexpr uint32_t first_word(Layout layout, int bits, int lane, F code) {
  uint8_t codes[kBlock * 128]{};
  for (int i = 0; i < kBlock * 128; ++i) codes[i] = uint8_t(code(i % 128));
  uint32_t word = 0;
  const int chunk = row_shape(layout, low_width(bits), 128).chunk;
  for (int i = 0; i < 4; ++i) word |= uint32_t(pack_byte(layout, bits, 128, codes, 4 * chunk * lane + i)) << 8 * i;
  return word;
}
constexpr int by_channel(int d) { return d % 16; }
constexpr int by_step(int d) { return d / 16 % 4; }

static_assert(first_word(Layout::mma16_k, 4, 0, by_channel) == 0x91918080);
static_assert(first_word(Layout::mma16_k, 4, 1, by_channel) == 0xb3b3a2a2);
static_assert(first_word(Layout::mma16_k, 4, 2, by_channel) == 0xd5d5c4c4);
static_assert(first_word(Layout::mma16_k, 4, 3, by_channel) == 0xf7f7e6e6);
static_assert(first_word(Layout::mma16_k, 2, 0, by_step) == 0xfa50fa50);
static_assert(first_word(Layout::linear, 4, 0, by_channel) == 0x33221100);
static_assert(first_word(Layout::linear, 2, 0, [](int d) { return d % 4; }) == 0xffaa5500);
static_assert(place(Layout::mma16_k, 8, 128, 3, 16 * 5 + 8 + 2 * 3 + 1).byte == 128 * 3 + 64 + 16 * 3 + 4 + 2 + 1);
static_assert(place(Layout::mma16_v, 8, 128, 8 + 2 * 3 + 1, 8 * 6 + 5).byte == 512 + 16 * (4 * 5 + 3) + 4 * 2 + 2 + 1);
static_assert(inverse(Layout::linear, 2, 128) && inverse(Layout::mma16_k, 2, 64) && inverse(Layout::mma16_k, 1, 64));
static_assert(inverse(Layout::mma16_k, 4, 64) && inverse(Layout::mma16_v, 8, 64) && inverse(Layout::mma16_v, 1, 64));

}  // namespace golden
}  // namespace tokencomp::bitpack
