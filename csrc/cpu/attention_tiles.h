// Products of queries and keys on the CPU: keys in lanes, query rows broadcast. Shared by the kernel files of every
// family that multiplies them.
#pragma once

#include <type_traits>

#include "core/attention.h"
#include "cpu/page_rows.h"
#include "cpu/parallel.h"
#include "cpu/row_tiles.h"
#include "cpu/simd_lanes.h"
#include "cpu/simd_math.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace attention;

constexpr int kOffsetBlock = 256;  // slots whose places in the pool are looked up at a time
static_assert(kOffsetBlock % kLaneTile == 0);

// Where slots [first, first + count) begin, page by page; -1: nowhere.
static inline void page_offsets(const Attention& a, int b, int kv, int first, int count, int64_t* out) {
  for (int i = 0; i < count;) {
    const bool inside = first + i < a.g.S;
    const int rest = a.table.page_size() - a.table.slot_in_page(first + i);
    const int end = inside && rest < count - i ? i + rest : count;
    int64_t at = inside ? slot_offset(a, b, kv, first + i) : -1;
    for (; i < end; ++i, at += at < 0 ? 0 : a.pages.slot_stride) out[i] = at;
  }
}

template <class T>
struct Operands {
  const Attention& a;
  int words;   // of a row that are multiplied
  int padded;  // of a packed row
  int half;    // words of one of the two parts of a row where there are two

  TC_INLINE_MEMBER explicit Operands(const Attention& attention) : a(attention) {
    const int own = words_of<T>(a.g.D);
    half = (own + kWidth - 1) / kWidth * kWidth;
    padded = a.k_min ? 2 * half : half;
    words = a.k_min ? half + own : own;
  }

  TC_INLINE_MEMBER const T* query(int b, int h, int t) const {
    return static_cast<const T*>(a.q) + b * a.q_stride_b + h * a.q_stride_h + t * a.q_stride_t;
  }

  // Pages score max(q, 0) with their maxima and min(q, 0) with their minima: one product of doubled width.
  TC_INLINE_MEMBER void pack_query(int b, int h, int t, Word* out) const {
    const T* row = query(b, h, t);
    if (!a.k_min) {
      pack_row(row, a.g.D, out);
      return;
    }
    T part[2][kMaxHeadDim];
    for (int c = 0; c < a.g.D; ++c) {
      const bool positive = to_float(row[c]) > 0.0f;
      part[0][c] = positive ? row[c] : T{};
      part[1][c] = positive ? T{} : row[c];  // a NaN too
    }
    pack_row(part[0], a.g.D, out);
    pack_row(part[1], a.g.D, out + half);
  }

  // Keys [first, first + keys) of (b, kv): tile after tile of kLaneTile keys. Those that do not exist are zeros.
  TC_INLINE_MEMBER void pack_keys(int b, int kv, int first, int keys, Word* out) const {
    if (a.types.count) return pack_page_rows(b, kv, first, keys, out);
    if (a.table.entry) return pack_pages(b, kv, first, keys, out);
    const int64_t at = b * a.k_stride_b + kv * a.k_stride_h;
    for (int j = first; j < first + keys && j < a.g.S; j += kLaneTile, out += padded * kLaneTile) {
      const int count = a.g.S - j < kLaneTile ? a.g.S - j : kLaneTile;
      pack_lanes(static_cast<const T*>(a.k) + at + j * a.k_stride_s, a.k_stride_s, count, a.g.D, out);
      if (!a.k_min) continue;
      pack_lanes(static_cast<const T*>(a.k_min) + at + j * a.k_stride_s, a.k_stride_s, count, a.g.D,
                 out + half * kLaneTile);
    }
  }

  // Where keys [first, first + keys + ahead) of (b, kv) begin; zeros where there are none. Rows of quantized pages are
  // written to `buffer`, and those of the `ahead` last keys are not looked for where there may be such.
  TC_INLINE_MEMBER void key_rows(int b, int kv, int first, int keys, int ahead, const T** out, T* buffer) const {
    const T* zeros = reinterpret_cast<const T*>(kZeroRow);
    if (a.types.count) {
      PageRows<T> pages({a, a.k, a.pages, a.g.D, false, b, kv});
      for (int i = 0; i < keys + ahead; ++i) {
        const bool inside = i < keys && first + i < a.g.S;
        const T* row = inside ? pages.row(first + i, buffer + int64_t(i) * a.g.D) : nullptr;
        out[i] = row ? row : zeros;
      }
      return;
    }
    const int page = a.table.entry ? a.table.page_size() : keys + ahead;
    const int64_t step = a.table.entry ? a.pages.slot_stride : a.k_stride_s;
    for (int i = 0; i < keys + ahead;) {
      const int s = first + i, last = a.g.S - first < keys + ahead ? a.g.S - first : keys + ahead;
      int64_t at = -1;
      int end = keys + ahead;
      if (i < last) {
        const int rest = a.table.entry ? page - a.table.slot_in_page(s) : end;
        at = a.table.entry ? slot_offset(a, b, kv, s) : b * a.k_stride_b + kv * a.k_stride_h + s * step;
        end = rest < last - i ? i + rest : last;
      }
      const T* row = at < 0 ? zeros : static_cast<const T*>(a.k) + at;
      for (; i < end; ++i, row += at < 0 ? 0 : step) out[i] = row;
    }
  }

  // Products of kRows packed queries with a tile of such rows.
  template <int kRows>
  TC_INLINE_MEMBER Vec products(const T* const* key, const Word* query) const {
    using Tile = RowTiles<T, kRows>;
    using Packed = std::conditional_t<WordOf<T>::elements == 2, T, float>;
    const Packed* q = reinterpret_cast<const Packed*>(query);
    const int stride = padded * WordOf<T>::elements;
    const Vec x = Tile::products(key, q, stride, 0, a.g.D);
    if (!a.k_min) return x;
    const T* low[Tile::kKeys];
    for (int t = 0; t < Tile::kKeys; ++t) low[t] = minima_of(key[t]);
    return add(x, Tile::products(low, q + half * WordOf<T>::elements, stride, 0, a.g.D));
  }

  TC_INLINE_MEMBER void fetch(const T* key) const {
    prefetch_row(key, a.g.D);
    if (a.k_min) prefetch_row(minima_of(key), a.g.D);
  }

  // One tile of the keys at position(0), position(1), ..., of which negative ones are zeros.
  template <class F>
  TC_INLINE_MEMBER void gather_keys(int b, int kv, F&& position, Word* out) const {
    if (a.table.entry) return pack_rows_at(b, kv, position, out);
    const T* base = static_cast<const T*>(a.k) + b * a.k_stride_b + kv * a.k_stride_h;
    const auto row = [&](int i) { return position(i) < 0 ? nullptr : base + position(i) * a.k_stride_s; };
    pack_lane_rows<T>(row, [&](int) { return base; }, a.g.D, out);
  }

 private:
  // The minima beside the maxima `key`, which are laid out alike.
  TC_INLINE_MEMBER const T* minima_of(const T* key) const {
    if (key == reinterpret_cast<const T*>(kZeroRow)) return key;
    return static_cast<const T*>(a.k_min) + (key - static_cast<const T*>(a.k));
  }

  // Pages of several types, row by row.
  TC_INLINE_MEMBER void pack_page_rows(int b, int kv, int first, int keys, Word* out) const {
    for (int j = first; j < first + keys && j < a.g.S; j += kLaneTile, out += padded * kLaneTile) {
      pack_rows_at(b, kv, [&](int i) { return j + i < a.g.S ? j + i : -1; }, out);
    }
  }

  template <class F>
  TC_INLINE_MEMBER void pack_rows_at(int b, int kv, F&& position, Word* out) const {
    alignas(64) T buffer[kLaneTile * kMaxHeadDim];
    const T* rows[kLaneTile];
    PageRows<T> pages({a, a.k, a.pages, a.g.D, false, b, kv});
    for (int i = 0; i < kLaneTile; ++i) {
      rows[i] = position(i) < 0 ? nullptr : pages.row(position(i), buffer + i * a.g.D);
    }
    pack_lane_rows<T>([&](int i) { return rows[i]; }, [&](int i) { return buffer + i * a.g.D; }, a.g.D, out);
  }

  TC_INLINE_MEMBER void pack_pages(int b, int kv, int first, int keys, Word* out) const {
    const int end = first + keys < a.g.S ? first + keys : a.g.S;
    int64_t offset[kOffsetBlock + kPrefetchRows];
    for (; first < end; first += kOffsetBlock) {
      page_offsets(a, b, kv, first, kOffsetBlock + kPrefetchRows, offset);
      for (int j = 0; j < kOffsetBlock && first + j < end; j += kLaneTile, out += padded * kLaneTile) {
        pack_lanes(static_cast<const T*>(a.k), offset + j, a.g.D, out);
        if (a.k_min) pack_lanes(static_cast<const T*>(a.k_min), offset + j, a.g.D, out + half * kLaneTile);
      }
    }
  }
};

// The biases of keys [first, first + keys), times `factor`; 0 without a bias. NaN means masked, and so is a key
// that no page holds.
static inline void load_bias(const Attention& a, int b, int kv, int first, int keys, float factor, float* out) {
  const float* bias = a.key_bias ? a.key_bias + b * a.bias_stride_b + kv * a.bias_stride_h + first : nullptr;
  for (int j = 0; j < keys; ++j) {
    const float value = bias && first + j < a.g.S ? factor * bias[j] : 0.0f;
    out[j] = value == value ? value : -INFINITY;
  }
  for (int j = 0; a.table.entry && j < keys;) {  // page by page
    const bool there = first + j < a.g.S && has_page(a, b, kv, first + j);
    const int end = j + a.table.page_size() - a.table.slot_in_page(first + j);
    for (; j < end && j < keys; ++j) out[j] = there ? out[j] : -INFINITY;
  }
}

// scale * product, capped if asked for; times `factor` in the end.
template <bool kCap>
struct Logit {
  Vec scale, cap;
  TC_INLINE_MEMBER Logit(const Attention& a, float factor)
      : scale(broadcast(kCap ? a.scale / a.softcap : a.scale * factor)), cap(broadcast(a.softcap * factor)) {}
  TC_INLINE_MEMBER Vec operator()(Vec product, Vec bias) const {
    if constexpr (kCap) return fma(tanh(mul(product, scale)), cap, bias);
    return fma(product, scale, bias);
  }
};

template <class F>
TC_INLINE void dispatch_cap(const Attention& a, F&& f) {
  if (a.softcap > 0.0f) {
    f.template operator()<true>();
  } else {
    f.template operator()<false>();
  }
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
