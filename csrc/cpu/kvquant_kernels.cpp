// Quantization on the CPU, compiled once per instruction-set level. A row stays in L1 as floats between its three
// steps: map, fit to the grid, pack.
#include "cpu/kvquant_kernels.h"

#include "core/dispatch.h"
#include "cpu/kvquant_codes.h"
#include "cpu/kvquant_grid.h"
#include "cpu/kvquant_halves.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace kvquant;

constexpr int kMaxD = kMaxHeadDim, kBlock = bitpack::kBlock;
alignas(64) constexpr float kZeros[kMaxD] = {};  // what an empty slot holds

// Codes of y as whole numbers; of fp8 the quotients themselves.
template <bool kAway, bool kFp8>
TC_INLINE Vec fit(Vec y, Vec minimum, const Divisor& by, Vec levels) {
  const Vec t = quotient(sub(y, minimum), by), zero = broadcast(0.0f);
  if constexpr (kFp8) return select_ge(t, t, t, zero);
  const Vec inside = min(max(t, zero), levels), whole = nearest(inside);  // NaN counts as 0
  if constexpr (!kAway) return whole;
  return select_ge(sub(inside, whole), broadcast(0.5f), add(whole, broadcast(1.0f)), whole);
}

template <class T>
class SheetWriter {
 public:
  SheetWriter(const Sheets& sheets, int sheet)
      : s(sheets),
        sheet(sheet),
        place(sheets.place_of(sheet)),
        D(sheets.D),
        first(sheets.sheet_offset(sheet)),
        scale(sheets.scale_of(sheet)),
        bias(sheets.bias_of(sheet)),
        levels(broadcast(float(sheets.format.levels()))) {}

  void write(int begin, int end) {
    if (place < 0) return;
    if constexpr (kHasHalves<T>) {
      const bool by_token = s.format.axis == Axis::token;
      if (HalfRows<T>::fits(s)) return by_token ? half_tokens(begin, end) : half_channels(begin, end);
    }
    if (s.format.axis == Axis::token) return fit_tokens(begin, end);
    int d = 0;
    for (; d + kSlab * kWidth <= D; d += kSlab * kWidth) fit_channels<kSlab>(begin, end, d);
    for (; d < D; d += kWidth) fit_channels<1>(begin, end, d);
    grids.write(params(begin / s.format.group), D);
    for (int t = begin; t < end; ++t) {
      with_mode([&]<bool kAway, bool kFp8>() { code_channels<kAway, kFp8>(t); });
      emit(t, y);
    }
  }

 private:
  static constexpr int kSlab = kWidth == 16 ? 8 : 4;  // vectors of channels whose ranges stay in registers
  static constexpr int kAhead = 16;                   // rows fetched before their turn: packing leaves memory idle
  static constexpr int kLine = 64;                    // bytes

  // Calls f<kAway, kFp8>() for how codes are rounded.
  template <class F>
  TC_INLINE_MEMBER void with_mode(F&& f) const {
    if (s.format.kind == Kind::fp8) return f.template operator()<false, true>();
    if (s.format.away) return f.template operator()<true, false>();
    f.template operator()<false, false>();
  }

  // Null for an empty slot.
  const T* row(int t) const {
    const int64_t offset = s.row_offset(first, sheet, t);
    return offset < 0 ? nullptr : static_cast<const T*>(s.x) + offset;
  }
  f16* params(int row) const { return s.params_at(place) + int64_t(row) * s.groups_per_row() * 2; }

  // Rows in order lie a stride apart; rows of a list, slots of pages, anywhere.
  TC_INLINE_MEMBER void fetch_ahead(int t, const T* x) const {
    const T* later = x ? x + kAhead * s.stride_s : nullptr;
    if (s.index) later = t + kAhead < s.tokens ? row(t + kAhead) : nullptr;
    if (!later) return;
    const char* ahead = reinterpret_cast<const char*>(later);
    for (int i = 0; i < D * int(sizeof(T)); i += kLine) __builtin_prefetch(ahead + i);
  }

  // (x - bias) * scale from channel d on.
  TC_INLINE_MEMBER Vec mapped(const T* x, int d) const {
    const int n = D - d;
    Vec v = load_up_to(x + d, n);
    if (bias) v = sub(v, load_up_to(bias + d, n));
    if (scale) v = mul(v, load_up_to(scale + d, n));
    return v;
  }

  // Up to 16 tokens; their groups are numbered one token after the other. An empty slot is a row of zeros.
  void fit_tokens(int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const T* x = row(t);
      fetch_ahead(t, x);
      float* to = y + (t - begin) * D;
      for (int d = 0; d < D; d += kWidth) store_up_to(to + d, x ? mapped(x, d) : broadcast(0.0f), D - d);
    }
    const int count = (end - begin) * s.groups_per_row(), group = s.format.group;
    for (int first = 0; first < count; first += kWidth) {
      const int groups = at_most(count - first, kWidth);
      Range ranges[kWidth];
      for (int i = 0; i < kWidth; ++i) ranges[i] = i < groups ? range_of(y + (first + i) * group, group) : no_range();
      Grids<kWidth> g;
      g.make(s.format, across_lanes(ranges), 0);
      g.write(params(begin) + 2 * first, groups);
      with_mode([&]<bool kAway, bool kFp8>() {
        for (int i = 0; i < groups; ++i) code_group<kAway, kFp8>(y + (first + i) * group, group, g, i);
      });
    }
    for (int t = begin; t < end; ++t) emit(t, y + (t - begin) * D);
  }

  TC_INLINE_MEMBER static Range range_of(const float* v, int n) {
    Range r = no_range();
    int d = 0;
    for (; d + kWidth <= n; d += kWidth) r = including(r, load(v + d));
    return d < n ? including_some(r, load_some(v + d, n - d), n - d) : r;
  }

  template <bool kAway, bool kFp8>
  TC_INLINE_MEMBER void code_group(float* v, int n, const Grids<kWidth>& g, int i) const {
    const Divisor by{broadcast(g.divisor[i]), broadcast(g.inverse[i])};
    const Vec least = broadcast(g.minimum[i]);
    for (int d = 0; d < n; d += kWidth) {
      store_up_to(v + d, fit<kAway, kFp8>(load_up_to(v + d, n - d), least, by, levels), n - d);
    }
  }

  // The grids of kVecs vectors of channels from d on, over a group of tokens; all zeros where every slot is empty.
  template <int kVecs>
  TC_INLINE_MEMBER void fit_channels(int begin, int end, int d) {
    Range r[kVecs];
    for (int i = 0; i < kVecs; ++i) r[i] = no_range();
    bool any = false;
    for (int t = begin; t < end; ++t) {
      const T* x = row(t);
      if (!x) continue;
      any = true;
      fetch_ahead(t, x);
      for (int i = 0; i < kVecs; ++i) r[i] = including(r[i], mapped(x, d + i * kWidth));
    }
    const Vec zero = broadcast(0.0f);
    for (int i = 0; i < kVecs; ++i) grids.make(s.format, any ? r[i] : Range{zero, zero, zero}, d + i * kWidth);
  }

  // The same for rows that need no memory between the steps.
  void half_tokens(int begin, int end) {
    const int per_row = s.groups_per_row(), count = (end - begin) * per_row;
    const T* rows[kBlock];
    for (int t = begin; t < end; ++t) {
      const T* x = row(t);
      fetch_ahead(t, x);
      rows[t - begin] = x ? x : reinterpret_cast<const T*>(kZeros);
    }
    HalfRows<T>::fit_tokens(s.format, D, count, [&](int t) __attribute__((always_inline)) { return rows[t]; }, grids);
    grids.write(params(begin), count);
    for (int t = begin; t < end; ++t) {
      HalfRows<T>::code_by_groups(s.format, rows[t - begin], D, grids, (t - begin) * per_row, codes(t));
    }
  }
  void half_channels(int begin, int end) {
    const auto ahead = [&](int t) __attribute__((always_inline)) {
      const T* x = row(begin + t);
      fetch_ahead(begin + t, x);
      return x;
    };
    for (int d = 0; d < D; d += 4 * kHalves) {
      HalfRows<T>::template fit_channels<4>(s.format, end - begin, d, ahead, grids);
    }
    grids.write(params(begin / s.format.group), D);
    for (int t = begin; t < end; ++t) {
      const T* x = row(t);
      if (x) {
        HalfRows<T>::code_by_channels(s.format, x, D, grids, codes(t));
      } else {
        __builtin_memset(codes(t), 0, size_t(s.row_bytes()));
      }
    }
  }
  uint8_t* codes(int t) const { return s.codes_at(place) + int64_t(t) * s.row_bytes(); }

  template <bool kAway, bool kFp8>
  TC_INLINE_MEMBER void code_channels(int t) {
    const T* x = row(t);
    for (int d = 0; d < D; d += kWidth) {
      const Divisor by{load(grids.divisor + d), load(grids.inverse + d)};
      const Vec code = x ? fit<kAway, kFp8>(mapped(x, d), load(grids.minimum + d), by, levels) : broadcast(0.0f);
      store(y + d, code);
    }
  }

  TC_INLINE_MEMBER void emit(int t, float* q) {
    const int bits = s.format.bits;
    if (s.format.kind == Kind::fp8) {
      for (int d = 0; d < D; ++d) q[d] = float(bitpack::fp8_from_float(q[d]));
    }
    uint8_t* out = codes(t);
    if (s.format.layout == Layout::linear) return pack_row(q, bits, D, out);
    for (int d = 0; d < D; d += kWidth) store_bytes(block + t % kBlock * D + d, load(q + d));
    if (t % kBlock == kBlock - 1) pack_block(s.format.layout, bits, D, block, out - (kBlock - 1) * s.row_bytes());
  }

  const Sheets& s;
  const int sheet, place, D;
  const int64_t first;
  const float *scale, *bias;
  const Vec levels;
  alignas(64) float y[kBlock * kMaxD + kWidth];
  Grids<kMaxD> grids;
  uint8_t block[kBlock * kMaxD];
};

// Calls f(sheet, first token, token behind the last) for units [begin, end).
template <class F>
TC_INLINE void for_units(const Sheets& s, int64_t begin, int64_t end, F&& f) {
  const int64_t per_sheet = units_per_sheet(s);
  const int unit = tokens_per_unit(s.format);
  for (int64_t u = begin; u < end; ++u) {
    const int first = int(u % per_sheet) * unit;
    f(int(u / per_sheet), first, at_most(first + unit, s.tokens));
  }
}

template <class T>
class SheetReader {
 public:
  SheetReader(const Sheets& sheets, int sheet)
      : s(sheets),
        sheet(sheet),
        place(sheets.place_of(sheet)),
        first(sheets.sheet_offset(sheet)),
        scale(s.scale_of(sheet)),
        bias(s.bias_of(sheet)) {}

  void read(int begin, int end) {
    for (int t = begin; t < end; ++t) {
      if (place >= 0) {
        numbers(t);
        through_grid(t);
      } else {
        for (int d = 0; d < s.D; ++d) y[d] = __builtin_nanf("");  // nowhere to read from
      }
      T* x = static_cast<T*>(s.x) + s.row_offset(first, sheet, t);
      for (int d = 0; d < s.D; d += kWidth) {
        const int n = s.D - d;
        Vec v = load(y + d);
        if (scale) v = div(v, load_up_to(scale + d, n));
        if (bias) v = add(v, load_up_to(bias + d, n));
        store_up_to(x + d, v, n);
      }
    }
  }

 private:
  // The codes of token t as numbers.
  void numbers(int t) {
    const int bits = s.format.bits;
    const uint8_t* row = codes;
    if (s.format.layout == Layout::linear) {
      unpack_row(s.codes_at(place) + int64_t(t) * s.row_bytes(), bits, s.D, codes);
    } else {
      const int begin = t - t % kBlock;
      if (begin != block)
        unpack_block(s.format.layout, bits, s.D, s.codes_at(place) + int64_t(begin) * s.row_bytes(), codes);
      block = begin;
      row = codes + t % kBlock * s.D;
    }
    if (s.format.kind == Kind::fp8) {
      for (int d = 0; d < s.D; ++d) y[d] = bitpack::fp8_to_float(row[d]);
    } else {
      for (int d = 0; d < s.D; d += kWidth) store(y + d, load_bytes(row + d));
    }
  }

  void through_grid(int t) {
    const f16* p = s.params_at(place);
    if (s.format.axis == Axis::token) {
      p += int64_t(t) * s.groups_per_row() * 2;
      for (int begin = 0; begin < s.D; begin += s.format.group, p += 2) {
        const Vec step = broadcast(to_float(p[0])), least = broadcast(to_float(p[1]));
        for (int d = begin; d < begin + s.format.group; d += kWidth) {
          const int n = begin + s.format.group - d;
          store_up_to(y + d, fma(step, load_up_to(y + d, n), least), n);
        }
      }
      return;
    }
    p += int64_t(t / s.format.group) * s.D * 2;
    for (int d = 0; d < s.D; ++d) y[d] = to_float(p[2 * d]) * y[d] + to_float(p[2 * d + 1]);
  }

  const Sheets& s;
  const int sheet, place;
  const int64_t first;
  const float *scale, *bias;
  int block = -1;  // first token of the block in `codes`
  alignas(64) float y[kMaxD + kWidth] = {};
  uint8_t codes[kBlock * kMaxD + kWidth];
};

}  // namespace

void quantize_sheets(const Sheets& s, int64_t begin, int64_t end) {
  dispatch_dtype(s.dtype, [&]<class T>() {
    for_units(s, begin, end, [&](int sheet, int first, int last) {
      SheetWriter<T> writer(s, sheet);
      writer.write(first, last);
    });
  });
}

void dequantize_sheets(const Sheets& s, int64_t begin, int64_t end) {
  dispatch_dtype(s.dtype, [&]<class T>() {
    for_units(s, begin, end, [&](int sheet, int first, int last) { SheetReader<T>(s, sheet).read(first, last); });
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
