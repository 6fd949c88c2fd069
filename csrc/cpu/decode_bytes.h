// Chunks of keys with quantized pages where codes are multiplied as the bytes they are (cpu/simd_dots.h). Queries and
// weights become numbers of 16 bits with a scale of their own row, whose sums with codes are exact; grids stay outside
// as in decode_codes.h, where numbers around the middle are code - middle:
//
//   <q, number> = scale (sum 16-bit q * code - middle * sum 16-bit q)         and so for weights
//
// What rounding takes from a number is at most 1.6e-5 of the row's largest: less than bf16 and fp16 take from the
// largest itself. Keys are turned so that 16 of them lie in the lanes of a register, values so that four tokens lie in
// one; both before their fields are taken apart. Included by decode_codes.h only.
#pragma once

#include "cpu/decode_ahead.h"
#include "cpu/decode_rows.h"
#include "cpu/simd_dots.h"
#include "cpu/simd_math.h"
#include "cpu/simd_pairs.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

namespace {  // of this level alone

// The codes of a half where they may stay bytes.
TC_INLINE bool are_bytes(const kvquant::Format& f, int D) {
  return f.kind == kvquant::Kind::integer && f.bits != 3 && D * f.bits / 8 % kCodeBytes == 0;
}

#if defined(TC_BYTE_DOTS)

template <class T, int kRows>
struct ByteChunk {
  static constexpr int kKeys = kWidth / kRows;  // of a tile of weights

  const DecodeArgs& a;
  const int width;
  int8_t *queries, *folded;                                 // [rows][2][width]: both parts; of a page
  float *scale, *inverse;                                   // [rows]: of a row's numbers
  int8_t* weights;                                          // of a chunk's tiles: [tile][2][row][key]
  float* scaled;                                            // the same before they are rounded
  float sums[kRows][kMaxGroups], whole[kRows][kMaxGroups];  // of queries and their numbers, by group
  float folded_scale[kRows], folded_whole[kRows], constant[kRows];
  int summed_row = -1, summed_group = 0;
  alignas(64) float found[kChunkKeys * kRows];  // products of a chunk, in tiles

  ByteChunk(const DecodeArgs& args, float* p) : a(args), width(int(padded_values(args))) {
    const auto take = [&](int64_t floats) { return (p += floats) - floats; };
    queries = reinterpret_cast<int8_t*>(take(padded_rows(a) * width / 2));
    folded = reinterpret_cast<int8_t*>(take(kRowPadding * width / 2));
    weights = reinterpret_cast<int8_t*>(take(kChunkKeys * kRowPadding / 2));
    scaled = take(kChunkKeys * kRowPadding);
    scale = take(round_up(padded_rows(a), 16)), inverse = take(round_up(padded_rows(a), 16));
  }

  // A row of `width` numbers. The scale is NaN where one of them is not finite.
  float pack(const float* x, int8_t* parts, float& by) {
    Vec most = broadcast(0.0f), bad = broadcast(0.0f);
    for (int c = 0; c < width; c += kWidth) {
      const Vec v = load(x + c);
      most = max(abs(v), most), bad = add(bad, sub(v, v));
    }
    const float largest = maximum(most);
    by = largest > kLeast ? kMostParts / largest : 0.0f;
    for (int c = 0; c < width; c += kWidth) put_parts(parts + c, parts + width + c, mul(load(x + c), broadcast(by)));
    return largest * (1.0f / kMostParts) + sum(bad);
  }

  void add_query(int r, const float* query) { scale[r] = pack(query, queries + int64_t(r) * 2 * width, inverse[r]); }

  // The codes of a block as they are multiplied.
  __attribute__((noinline)) void turn_keys(const PageHalf& half, const uint8_t* page, int first, T* out) {
    const int R = a.D * half.format.bits / 8;
    words_of_keys(page + half.codes + first * R, R, reinterpret_cast<uint8_t*>(out));
  }
  __attribute__((noinline)) void turn_values(const PageHalf& half, const uint8_t* page, int first, T* out) {
    const int R = a.D * half.format.bits / 8;
    for (int t = 0; t < kBlockKeys; t += 4) {
      quads_of_values(page + half.codes + (first + t) * R, R, reinterpret_cast<uint8_t*>(out) + t * R);
    }
  }

  // out[b][i]: sums of the products of 16 keys with row i of `rows`, channels [begin, end), of two blocks b at a time:
  // with four rows they fill what a processor has under way.
  TC_INLINE_MEMBER void multiply(const uint8_t* const (&words)[2], int bits, const int8_t* rows, int begin, int end,
                                 Vec (&out)[2][kRows]) {
    const int R = a.D * bits / 8;
    const Ints mask = same_bytes((1 << bits) - 1);
    Ints high[2][kRows], low[2][kRows];
    for (int i = 0; i < kRows; ++i) high[0][i] = high[1][i] = low[0][i] = low[1][i] = same_ints(0);
    for (int c = begin; c < end;) {
      const Ints shift = same_ints(c / R * bits);
      const uint8_t *first = words[0] + c % R * kCodeRows, *second = words[1] + c % R * kCodeRows;
      int last = (c / R + 1) * R;
      last = last < end ? last : end;
      for (; c < last; c += 4, first += 4 * kCodeRows, second += 4 * kCodeRows) {
        const Ints x = load_codes(first, shift, mask), y = load_codes(second, shift, mask);
        for (int i = 0; i < kRows; ++i) {
          const Ints h = four_bytes(rows + i * 2 * width + c), l = four_bytes(rows + i * 2 * width + width + c);
          high[0][i] = dot(high[0][i], x, h), high[1][i] = dot(high[1][i], y, h);
          low[0][i] = dot(low[0][i], x, l), low[1][i] = dot(low[1][i], y, l);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int n = 0; n < 2; ++n) out[n][i] = to_floats(both_parts(high[n][i], low[n][i]));
    }
  }

  // Products of rows [r, r + kRows) with two blocks of keys, from key `at` of the chunk and from `other`; steps and
  // lows are `stride` apart by group.
  __attribute__((noinline)) void by_token(const uint8_t* const (&words)[2], int at, int other, const kvquant::Format& f,
                                          int r, const float* query, const float* offset, const float* steps,
                                          const float* lows, int stride) {
    sum_queries(r, query, f.group);
    Vec z[2][kRows], x[2][kRows];
    for (int i = 0; i < kRows; ++i) z[0][i] = z[1][i] = broadcast(offset[r + i]);
    for (int g = 0; g * f.group < a.D; ++g, steps += stride, lows += stride) {
      multiply(words, f.bits, queries + int64_t(r) * 2 * width, g * f.group, (g + 1) * f.group, x);
      for (int n = 0; n < 2; ++n) {
        const Vec step = load(steps + (n ? other : at)), lowest = load(lows + (n ? other : at));
        for (int i = 0; i < kRows; ++i) {
          const Vec number = sub(x[n][i], broadcast(whole[i][g] * middle_code(f.bits)));
          z[n][i] = fma(lowest, broadcast(sums[i][g]), z[n][i]);
          z[n][i] = fma(mul(number, broadcast(scale[r + i])), step, z[n][i]);
        }
      }
    }
    tiles_of_rows(z[0], found + at * kRows);
    if (other != at) tiles_of_rows(z[1], found + other * kRows);
  }

  __attribute__((noinline)) void by_channel(const uint8_t* const (&words)[2], int at, int other,
                                            const kvquant::Format& f) {
    Vec z[2][kRows];
    multiply(words, f.bits, folded, 0, a.D, z);
    for (int i = 0; i < kRows; ++i) {
      for (int n = 0; n < 2; ++n) {
        const Vec x = sub(z[n][i], broadcast(folded_whole[i] * middle_code(f.bits)));
        z[n][i] = fma(x, broadcast(folded_scale[i]), broadcast(constant[i]));
      }
    }
    tiles_of_rows(z[0], found + at * kRows);
    if (other != at) tiles_of_rows(z[1], found + other * kRows);
  }

  void sum_queries(int r, const float* query, int group) {
    if (summed_row == r && summed_group == group) return;
    summed_row = r, summed_group = group;
    for (int i = 0; i < kRows; ++i) {
      const float* own = query + int64_t(r + i) * width;
      for (int g = 0; g * group < a.D; ++g) {
        Vec x = broadcast(0.0f), n = broadcast(0.0f);
        for (int c = g * group; c < (g + 1) * group; c += kWidth) {
          x = add(x, load(own + c)), n = add(n, nearest(mul(load(own + c), broadcast(inverse[r + i]))));
        }
        sums[i][g] = sum(x), whole[i][g] = sum(n);
      }
    }
  }

  // Queries of rows [r, r + kRows) times the steps of their channels; lows go to the constants.
  void fold(const PageHalf& half, const f16* params, int r, const float* query, const float* offset) {
    for (int i = 0; i < kRows; ++i) {
      alignas(64) float x[kMaxHeadDim];
      const float* own = query + int64_t(r + i) * width;
      Vec lowest = broadcast(0.0f), n = broadcast(0.0f);
      for (int c = 0; c < width; c += kWidth) store(x + c, broadcast(0.0f));
      for (int c = 0; c < a.D; c += kWidth) {
        Vec step, low;
        load_grid(half, params + 2 * c, kWidth, step, low);
        lowest = fma(load(own + c), low, lowest);
        store(x + c, mul(load(own + c), step));
      }
      float by;
      folded_scale[i] = pack(x, folded + i * 2 * width, by);
      for (int c = 0; c < a.D; c += kWidth) n = add(n, nearest(mul(load(x + c), broadcast(by))));
      folded_whole[i] = sum(n), constant[i] = offset[r + i] + sum(lowest);
    }
  }

  // The weights of a group of channels, times steps where there are any, rounded; zeros to the end of a block.
  struct Weighed {
    float all[kRows], low[kRows], scale[kRows];
  };
  Weighed round_weights(const float* p, int tiles, const float* steps, const float* lows, float middle) {
    Vec all = broadcast(0.0f), lowest = all, most = all;
    for (int i = 0; i < tiles; ++i) {
      Vec w = load(p + i * kWidth);
      all = add(all, w);
      if (steps) {
        lowest = fma(w, repeat<kKeys>(lows + i * kKeys), lowest);
        w = mul(w, repeat<kKeys>(steps + i * kKeys));
        store(scaled + i * kWidth, w);
      }
      most = max(abs(w), most);
    }
    const Vec largest = greatest_of_row<kKeys>(most), least = broadcast(kLeast), zero = broadcast(0.0f);
    const Vec by = select_gt(largest, least, div(broadcast(kMostParts), max(largest, least)), zero);
    const float* from = steps ? scaled : p;
    Ints whole = same_ints(0);
    int8_t* to = weights;
    for (int i = 0; i < tiles; ++i, to += 2 * kWidth) {
      whole = add(whole, put_parts(to, to + kWidth, mul(load(from + i * kWidth), by)));
    }
    for (int i = tiles; i % (kBlockKeys / kKeys); ++i, to += 2 * kWidth) put_parts(to, to + kWidth, zero);
    const Vec scale = mul(largest, broadcast(1.0f / kMostParts));
    const Vec middles = mul(mul(sum_of_row<kKeys>(to_floats(whole)), scale), broadcast(middle));
    float lanes[3][kWidth];
    store(lanes[0], sum_of_row<kKeys>(all)), store(lanes[1], sub(sum_of_row<kKeys>(lowest), middles));
    store(lanes[2], scale);
    Weighed out;
    for (int i = 0; i < kRows; ++i) {
      out.all[i] = lanes[0][i * kKeys], out.low[i] = lanes[1][i * kKeys], out.scale[i] = lanes[2][i * kKeys];
    }
    return out;
  }

  // out += (sums of weighted numbers + low) * map_scale + all * map_bias, channels [begin, end).
  void weigh(const uint8_t* quads, int64_t block, int bits, int tiles, const Weighed& by, const float* map_scale,
             const float* map_bias, int begin, int end, float* out, LinesAhead& ahead) {
    const int R = a.D * bits / 8;
    for (int c = begin; c < end; c += kCodeBytes) {
      ahead.fetch();
      Ints sums[kRows][2];
      multiply_values(quads + c % R * 4, block, R, c / R * bits, bits, tiles * kKeys, sums);
      for (int i = 0; i < kRows; ++i) {
        Vec x[2];
        sums_of<T>(sums[i][0], sums[i][1], x[0], x[1]);
        for (int n = 0; n < 2; ++n) {
          float* to = out + int64_t(i) * width + c + n * kWidth;
          const Vec more = fma(load(map_bias + c + n * kWidth), broadcast(by.all[i]), load(to));
          x[n] = fma(x[n], broadcast(by.scale[i]), broadcast(by.low[i]));
          store(to, fma(x[n], load(map_scale + c + n * kWidth), more));
        }
      }
    }
  }

  // A pair of registers of channels, of all keys: blocks are `block` bytes apart, tokens of four 4 R.
  TC_INLINE_MEMBER void multiply_values(const uint8_t* pair, int64_t block, int64_t R, int bit, int bits, int keys,
                                        Ints (&out)[kRows][2]) {
    const Ints mask = same_bytes((1 << bits) - 1), shift = same_ints(bit);
    Ints high[kRows][2], low[kRows][2];
    for (int i = 0; i < kRows; ++i) high[i][0] = high[i][1] = low[i][0] = low[i][1] = same_ints(0);
    const int8_t* w = weights;
    for (int t = 0; t < keys; t += kBlockKeys, pair += block, w += kBlockKeys / kKeys * 2 * kWidth) {
      const uint8_t* own = pair;
#pragma GCC unroll 4
      for (int n = 0; n < kBlockKeys; n += 4, own += 4 * R) {
        const int8_t* four = w + n / kKeys * 2 * kWidth + n % kKeys;
        const Ints x = load_codes(own, shift, mask), y = load_codes(own + 64, shift, mask);
        for (int i = 0; i < kRows; ++i) {
          const Ints h = four_bytes(four + i * kKeys), l = four_bytes(four + kWidth + i * kKeys);
          high[i][0] = dot(high[i][0], x, h), high[i][1] = dot(high[i][1], y, h);
          low[i][0] = dot(low[i][0], x, l), low[i][1] = dot(low[i][1], y, l);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int n = 0; n < 2; ++n) out[i][n] = both_parts(high[i][n], low[i][n]);
    }
  }

 private:
  static constexpr float kLeast = 1e-30f;  // smaller numbers count as 0
};

#else

template <class T, int kRows>
struct ByteChunk {
  ByteChunk(const DecodeArgs&, float*) {}
};

#endif

}  // namespace
}  // namespace tokencomp::cpu::TOKENCOMP_ISA
