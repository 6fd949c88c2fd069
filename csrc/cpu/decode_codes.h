// Chunks of keys with quantized pages. Codes become rows of whole numbers (of the dtype of the queries, exactly) in L1,
// once for all query rows, and are multiplied like working rows; the grid x = step * number + low stays outside:
//
//   keys, by token      <q, x> = step_t <q, number> + low_t sum(q)            on logits, for each group of channels
//   keys, by channel    <q, x> = <q * step, number> + <q, low>                on queries, once a page
//   values, by token    sum p x = sum (p step_t) number + sum p low_t         on weights, for each group of channels
//   values, by channel  sum p x = step * (sum p number) + low * sum p         on sums, once a page
//
// and so do maps per channel: 1 / scale on queries or sums, biases once. Groups that no product step holds, and slots
// of a list, are dequantized to rows of the queries' dtype. Included by decode_kernels.cpp only.
#pragma once

#include "cpu/decode_ahead.h"
#include "cpu/decode_bytes.h"
#include "cpu/decode_rows.h"
#include "cpu/decode_tiles.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

namespace {  // of this level alone

template <class T, int kRows>
class CodedChunk {
  using Tile = Tiles<T, kRows>;
  using W = typename Tile::W;
  using Stored = typename Tile::Stored;  // of folded queries too: floats unless products are of pairs of bf16
  static constexpr int kKeys = Tile::kKeys, kBlocks = kChunkKeys / kBlockKeys, kBlockTiles = kBlockKeys / kKeys;

  static constexpr bool kTwo = sizeof(Stored) < 4;  // queries that are not as they were given are sums of two
  static constexpr bool kBytes = kByteDots && sizeof(T) == 2;  // 16 bits are not enough for floats

  // 16 keys of one page, in one group of tokens.
  struct Block {
    const PageHalf *k = nullptr, *v = nullptr;
    const uint8_t* page = nullptr;  // null: working rows
    Reading keys = Reading::rows, values = Reading::rows;
    const f16 *k_params = nullptr, *v_params = nullptr;  // of the block's channels, where the grid is theirs
    int map = 0;                                         // of scale and bias of the values' sums
    bool key_bytes = false, value_bytes = false;         // codes are multiplied as they are
  };

 public:
  LinesAhead ahead;
  static constexpr int kSteps = 4 * kBlocks;  // in which they are fetched, about as far apart as time goes

  CodedChunk(const DecodeArgs& args, int pair, unsigned char* scratch)
      : a(args),
        b(pair / args.Hkv),
        kv(pair % args.Hkv),
        width(int(padded_values(args))),
        bytes(args, byte_memory(args, scratch)) {
    const auto own = [&](const float* map) { return map ? map + int64_t(pair) * a.D : nullptr; };
    k_maps = {own(a.types.maps.k_scale), own(a.types.maps.k_bias)};
    v_maps = {own(a.types.maps.v_scale), own(a.types.maps.v_bias)};
    float* p = reinterpret_cast<float*>(scratch);
    const auto take = [&](int64_t floats) { return (p += floats) - floats; };
    rows = reinterpret_cast<T*>(take(2 * kChunkKeys * width));
    grids = take(4 * kMaxGroups * kChunkKeys);
    out_scale = take((kBlocks + 1) * width), out_bias = take((kBlocks + 1) * width);
    folded = reinterpret_cast<Stored*>(take(2 * kRowPadding * width));
    sums = take(kRowPadding * width);
    weights = reinterpret_cast<Stored*>(take(kChunkKeys * kRowPadding));
    query = take(padded_rows(a) * width);
    packed = reinterpret_cast<Stored*>(take(2 * padded_rows(a) * width));
    offset = take(round_up(padded_rows(a), 16));
  }

  // The queries of row r: divided by the keys' scales, and times their biases.
  void add_query(int r, const T* row) {
    float* own = query + int64_t(r) * width;
    Vec sum_of = broadcast(0.0f);
    for (int c = 0; c < width; c += kWidth) {
      const int n = a.D - c;
      Vec x = row && n > 0 ? load_up_to(row + c, n) : broadcast(0.0f);
      if (k_maps.bias && n > 0) sum_of = fma(x, load_up_to(k_maps.bias + c, n), sum_of);
      if (k_maps.scale && n >= kWidth) x = div(x, load(k_maps.scale + c));
      store(own + c, x);
      for (int i = 0; k_maps.scale && n < kWidth && i < n; ++i) own[c + i] /= k_maps.scale[c + i];
      put(packed + int64_t(r) * width + c, padded_rows(a) * width, load(own + c));
    }
    offset[r] = sum(sum_of);
    if constexpr (kBytes) bytes.add_query(r, own);
  }

  // Keys [0, keys) of a chunk: their rows, and how they are read. `listed`: not one slot after the other.
  void open(const int* slots, const float* side, int keys, bool listed, const T** key, const T** value) {
    for (int block = 0; block < kBlocks; ++block) blocks[block] = {};
    for (int i = 0; i < keys; i += listed ? 1 : kBlockKeys) {
      const int count = listed ? 1 : keys - i < kBlockKeys ? keys - i : kBlockKeys;
      int any = i;
      while (any < i + count && slots[any] < 0) ++any;
      if (any == i + count) continue;
      const int32_t entry = entry_of(a, b, kv, slots[any]);
      if (entry == kNoPage || page_type(entry) == 0) continue;
      const PagePool& pool = a.types.pool_of(page_type(entry));
      const int first = a.table.slot_in_page(slots[any]) - (any - i);
      Block block{&pool.k, &pool.v, a.types.page(entry)};
      if (!listed) {
        block.keys = reading_of(pool.k.format, a.D);
        block.values = reading_of(pool.v.format, a.D);
        open_grid(pool.k, block.page, first, block.keys, side + i, 0, i, block.k_params);
        open_grid(pool.v, block.page, first, block.values, side + i, 2, i, block.v_params);
        open_map(block, i / kBlockKeys);
        block.key_bytes = kBytes && block.keys != Reading::rows && are_bytes(pool.k.format, a.D);
        block.value_bytes = kBytes && block.values != Reading::rows && are_bytes(pool.v.format, a.D);
        blocks[i / kBlockKeys] = block;
      }
      if (i % (2 * kBlockKeys) == 0) ahead.fetch();
      T *k = rows + int64_t(i) * width, *v = k + int64_t(kChunkKeys) * width;
      if (block.key_bytes) {
        if constexpr (kBytes) bytes.turn_keys(pool.k, block.page, first, k);
      } else {
        open_rows(pool.k, block.page, first, count, block.keys, k_maps, k);
      }
      if (block.value_bytes) {
        if constexpr (kBytes) bytes.turn_values(pool.v, block.page, first, v);
      } else {
        open_rows(pool.v, block.page, first, count, block.values, v_maps, v);
      }
      if (block.key_bytes && block.value_bytes) continue;
      for (int t = i; t < i + count; ++t, k += width, v += width) {
        if (side[t] > -INFINITY) key[t] = k, value[t] = v;
      }
    }
  }

  // Before products() of a chunk of `keys` keys: all that are made in bytes.
  void multiply_bytes(int keys, int r) {
    if constexpr (kBytes) {
      for (int n = 0; n < kBlocks && n * kBlockKeys < keys; ++n) {
        const Block &block = blocks[n], &next = blocks[n + 1 < kBlocks ? n + 1 : n];
        if (!block.key_bytes) continue;
        const bool by_token = block.keys == Reading::token;
        const bool pair = next.key_bytes && next.k == block.k && (by_token || next.k_params == block.k_params);
        ahead.fetch();
        const int at = n * kBlockKeys, other = at + (pair && n + 1 < kBlocks ? kBlockKeys : 0);
        const auto words = [&](int t) { return reinterpret_cast<const uint8_t*>(rows + int64_t(t) * width); };
        const uint8_t* const both[] = {words(at), words(other)};
        if (by_token) {
          bytes.by_token(both, at, other, block.k->format, r, query, offset, grid(0, 0), grid(1, 0), kChunkKeys);
        } else {
          if (!is_folded(block, at)) bytes.fold(*block.k, block.k_params, r, query, offset);
          bytes.by_channel(both, at, other, block.k->format);
        }
        ahead.fetch();
        if (other != at) ++n;
      }
    }
  }

  // The products of rows [r, r + kRows) with a tile of keys, that of the chunk's key `at`, before scale and bias.
  // `own` are the queries as working rows want them.
  TC_INLINE_MEMBER Vec products(const T* const* key, int at, int r, const T* own, int stride) {
    if constexpr (kBytes) {
      if (blocks[at / kBlockKeys].key_bytes) return load(bytes.found + at * kRows);
    }
    return multiply_numbers(key, at, r, own, stride);
  }

  __attribute__((noinline)) Vec multiply_numbers(const T* const* key, int at, int r, const T* own, int stride) {
    const Block& block = blocks[at / kBlockKeys];
    if (at % kBlockKeys == 0) ahead.fetch();
    if (block.keys == Reading::rows) return Tile::products(key + at, own, stride, 0, a.D);
    if (block.keys == Reading::channel) {
      if (at % kBlockKeys == 0) fold_queries(block, at, r);
      return add(Tile::template products<kTwo>(key + at, folded, width, 0, a.D, kRowPadding * width), load(constant));
    }
    const int group = block.k->format.group;
    if (at % kBlockKeys == 0) sum_queries(r, group);
    Vec z = load(constant);
    const Stored* q = packed + int64_t(r) * width;
    for (int g = 0; g * group < a.D; ++g) {
      const int begin = g * group, end = begin + group;
      const Vec x = kTwo && k_maps.scale
                        ? Tile::template products<kTwo>(key + at, q, width, begin, end, padded_rows(a) * width)
                        : Tile::products(key + at, q, width, begin, end);
      z = fma(x, repeat<kKeys>(grid(0, g) + at), z);
      z = fma(load(query_sums + g * kWidth), repeat<kKeys>(grid(1, g) + at), z);
    }
    return z;
  }

  // Adds the weighted values of the chunk's first tiles to out [kRows][width]. `p` are the weights, `rounded` as
  // working rows want them.
  void weigh(const T* const* value, const float* p, const Stored* rounded, int tiles, float* out) {
    for (int first = 0; first < tiles;) {
      const int block = first / kBlockTiles;
      int last = first + kBlockTiles;
      while (last < tiles && same_values(blocks[last / kBlockTiles], blocks[block])) last += kBlockTiles;
      last = last < tiles ? last : tiles;
      const int at = first * kWidth;
      if (blocks[block].values == Reading::rows) {
        Tile::weigh(value + first * kKeys, rounded + at, last - first, 0, a.D, out, width, nullptr, nullptr);
      } else if (blocks[block].value_bytes) {
        if constexpr (kBytes) weigh_bytes(blocks[block], p + at, first * kKeys, last - first, out);
      } else {
        weigh_numbers(blocks[block], value + first * kKeys, p + at, first * kKeys, last - first, out);
      }
      ahead.fetch();
      first = last;
    }
  }

 private:
  static bool same_values(const Block& x, const Block& y) {
    return x.page == y.page && x.values == y.values && x.v_params == y.v_params;
  }

  // Of the keys' steps (0) or lows (1), the values' (2, 3), group g: by key of the chunk.
  float* grid(int which, int g) const { return grids + (which * kMaxGroups + g) * kChunkKeys; }

  static TC_INLINE_MEMBER void put(float* q, int64_t, Vec x) { store(q, x); }
  static TC_INLINE_MEMBER void put(bf16* q, int64_t rest, Vec x) {
    W::store_weights(q, x);
    W::store_weights(q + rest, sub(x, load(q)));
  }

  // A number of each row in the lanes of its keys.
  TC_INLINE_MEMBER static void set_row(float* lanes, int i, float x) {
    for (int t = 0; t < kKeys; ++t) lanes[i * kKeys + t] = x;
  }

  void open_rows(const PageHalf& half, const uint8_t* page, int first, int count, Reading reading, ChannelMaps maps,
                 T* out) {
    if (reading != Reading::rows) return unpack_tokens(half, a.D, page, first, count, width, out);
    for (int t = 0; t < count; ++t) dequantize_token(half, a.D, page, first + t, maps, out + int64_t(t) * width);
  }

  // The grids of a block of tokens; of tokens that nobody sees they may be anything, and count as 0.
  void open_grid(const PageHalf& half, const uint8_t* page, int first, Reading reading, const float* side, int which,
                 int at, const f16*& by_channel) {
    const int group = half.format.group, groups = a.D / group;
    if (reading == Reading::channel) by_channel = params_of(half, page) + 2 * (first / group) * a.D;
    if (reading != Reading::token) return;
    const f16* params = params_of(half, page) + 2 * first * groups;
    const Vec hidden = broadcast(-INFINITY), zero = broadcast(0.0f);
    for (int t = 0; groups == 1 && t < kBlockKeys; t += kWidth) {
      Vec step, low;
      load_grid(half, params + 2 * t, kWidth, step, low);
      store(grid(which, 0) + at + t, select_gt(load(side + t), hidden, step, zero));
      store(grid(which + 1, 0) + at + t, select_gt(load(side + t), hidden, low, zero));
    }
    if (groups == 1) return;
    float found[2][kBlockKeys * kMaxGroups];
    for (int i = 0; i < kBlockKeys * groups; i += kWidth) {
      Vec step, low;
      load_grid(half, params + 2 * i, kWidth, step, low);
      store(found[0] + i, step), store(found[1] + i, low);
    }
    for (int g = 0; g < groups; ++g) {
      float *step = grid(which, g) + at, *low = grid(which + 1, g) + at;
      for (int t = 0; t < kBlockKeys; ++t) {
        const bool seen = side[t] > -INFINITY;
        step[t] = seen ? found[0][t * groups + g] : 0.0f;
        low[t] = seen ? found[1][t * groups + g] : 0.0f;
      }
    }
  }

  // Where the scale and bias of a block's sums are: those of all pages, of the block before, or its own.
  void open_map(Block& own, int block) {
    if (own.values == Reading::rows) return;
    if (own.values == Reading::token) {
      own.map = kBlocks;
      if (!mapped) map_values(own);
      mapped = true;
      return;
    }
    const bool again = block && blocks[block - 1].v_params == own.v_params;
    own.map = again ? blocks[block - 1].map : block;
    if (!again) map_values(own);
  }

  // What the sums over a block's numbers are multiplied with, and their weights' sum, as sums lie.
  void map_values(const Block& own) {
    alignas(64) float scale[kMaxHeadDim + kValuePadding] = {}, bias[kMaxHeadDim + kValuePadding] = {};
    for (int c = 0; c < a.D; c += kWidth) {
      const int n = a.D - c;
      Vec step = broadcast(1.0f), low = broadcast(0.0f);
      if (own.values == Reading::channel) load_grid(*own.v, own.v_params + 2 * c, n, step, low);
      if (v_maps.scale) {
        const Vec by = load_up_to(v_maps.scale + c, n);
        step = div(step, by), low = div(low, by);
      }
      if (v_maps.bias) low = add(low, load_up_to(v_maps.bias + c, n));
      store_up_to(scale + c, step, n), store_up_to(bias + c, low, n);
    }
    constexpr int kStep = W::kElements;
    for (int c = 0; c < width; c += kWidth) {
      store(out_scale + own.map * width + c, W::as_sums(scale + c / kStep * kStep, c % kStep / kWidth));
      store(out_bias + own.map * width + c, W::as_sums(bias + c / kStep * kStep, c % kStep / kWidth));
    }
  }

  // Whether the block before has the same grid of channels.
  bool is_folded(const Block& block, int at) const {
    return at && blocks[at / kBlockKeys - 1].k_params == block.k_params;
  }

  void weigh_bytes(const Block& own, const float* p, int at, int tiles, float* out) {
    const bool by_token = own.values == Reading::token;
    const kvquant::Format& f = own.v->format;
    const auto* quads = reinterpret_cast<const uint8_t*>(rows + int64_t(kChunkKeys + at) * width);
    for (int g = 0, group = by_token ? f.group : a.D; g * group < a.D; ++g) {
      const auto by =
          bytes.round_weights(p, tiles, by_token ? grid(2, g) + at : nullptr, grid(3, g) + at, middle_code(f.bits));
      bytes.weigh(quads, kBlockKeys * width * int64_t(sizeof(T)), f.bits, tiles, by, out_scale + own.map * width,
                  out_bias + own.map * width, g * group, (g + 1) * group, out, ahead);
    }
  }

  void fold_queries(const Block& block, int at, int r) {
    if (is_folded(block, at)) return;
    Vec x[kRows];
    for (int i = 0; i < kRows; ++i) x[i] = broadcast(0.0f);
    for (int c = 0; c < width; c += kWidth) {  // beyond D: zeros, which the last product step reads too
      Vec step = broadcast(0.0f), low = step;
      if (c < a.D) load_grid(*block.k, block.k_params + 2 * c, a.D - c, step, low);
      for (int i = 0; i < kRows; ++i) {
        const Vec q = load(query + int64_t(r + i) * width + c);
        x[i] = fma(q, low, x[i]);
        put(folded + i * width + c, kRowPadding * width, mul(q, step));
      }
    }
    for (int i = 0; i < kRows; ++i) set_row(constant, i, offset[r + i] + sum(x[i]));
  }

  void sum_queries(int r, int group) {
    for (int i = 0; i < kRows; ++i) set_row(constant, i, offset[r + i]);
    if (summed_row == r && summed_group == group) return;
    summed_row = r, summed_group = group;
    for (int i = 0; i < kRows; ++i) {
      for (int g = 0; g * group < a.D; ++g) {
        Vec x = broadcast(0.0f);
        const float* own = query + int64_t(r + i) * width;
        for (int c = g * group; c < (g + 1) * group; c += kWidth) x = add(x, load(own + c));
        set_row(query_sums + g * kWidth, i, sum(x));
      }
    }
  }

  // `tiles` tiles that share a page and its grid of channels.
  void weigh_numbers(const Block& own, const T* const* value, const float* p, int at, int tiles, float* out) {
    const bool by_token = own.values == Reading::token;
    const int group = by_token ? own.v->format.group : a.D;
    for (int c = 0; c < kRows * width; c += kWidth) store(sums + c, broadcast(0.0f));
    for (int g = 0; g * group < a.D; ++g) {
      Vec all = broadcast(0.0f), lowest = broadcast(0.0f);
      for (int i = 0; i < tiles; ++i) {
        Vec w = load(p + i * kWidth);
        all = add(all, w);
        if (by_token) {
          lowest = fma(w, repeat<kKeys>(grid(3, g) + at + i * kKeys), lowest);
          w = mul(w, repeat<kKeys>(grid(2, g) + at + i * kKeys));
        }
        W::store_weights(weights + i * kWidth, w);
      }
      Tile::weigh(value, weights, tiles, g * group, (g + 1) * group, sums, width, nullptr, nullptr);
      add_sums(own.map, all, lowest, g * group, (g + 1) * group, out);
    }
  }

  // out += (sums + lowest) * scale + bias * all, over the channels of a group.
  void add_sums(int map, Vec all, Vec lowest, int begin, int end, float* out) {
    float total[2][kWidth];
    store(total[0], all), store(total[1], lowest);
    for (int i = 0; i < kRows; ++i) {
      float weight = 0.0f, low = 0.0f;
      for (int t = 0; t < kKeys; ++t) weight += total[0][i * kKeys + t], low += total[1][i * kKeys + t];
      for (int c = begin; c < round_up(end, W::kElements); c += kWidth) {
        const Vec x = add(load(sums + i * width + c), broadcast(low));
        float* to = out + int64_t(i) * width + c;
        const Vec more = fma(load(out_bias + map * width + c), broadcast(weight), load(to));
        store(to, fma(x, load(out_scale + map * width + c), more));
      }
    }
  }

  // Behind what the constructor takes.
  static float* byte_memory(const DecodeArgs& args, unsigned char* scratch) {
    return reinterpret_cast<float*>(scratch) + coded_bytes(args) / 4 - byte_floats(args);
  }

  const DecodeArgs& a;
  const int b, kv, width;
  ByteChunk<T, kRows> bytes;
  ChannelMaps k_maps, v_maps;
  Block blocks[kBlocks];
  T* rows;                                                              // [2][chunk keys][width]: keys, values
  float* grids;                                                         // [4][groups][chunk keys]
  float *out_scale, *out_bias;                                          // [blocks + 1][width]
  Stored *folded, *weights, *packed;                                    // [kRows][width]; of a chunk; [rows][width]
  float *sums, *query, *offset;                                         // [kRows][width]; [rows][width]; [rows]
  alignas(64) float constant[kWidth], query_sums[kMaxGroups * kWidth];  // of logits, as they lie
  int summed_row = -1, summed_group = 0;
  bool mapped = false;  // the scale and bias of all pages
};

}  // namespace
}  // namespace tokencomp::cpu::TOKENCOMP_ISA
