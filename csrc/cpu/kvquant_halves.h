// Rows of two-byte elements to codes of the layout `linear` without a detour through memory: ranges by integers, 32
// elements an instruction, then one pass from elements to packed codes. The same operations on floats as the general
// way, so the same bytes. Included by kvquant_kernels.cpp only.
#pragma once

#include "cpu/kvquant_grid.h"
#include "cpu/simd_halves.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

template <class T>
struct HalfRows;  // where kHasHalves<T>

#if defined(TC_HALVES)

template <class T>
struct HalfRows {
  static bool fits(const kvquant::Sheets& s) {
    const Format& f = s.format;
    if (s.pre_scale || s.pre_bias || f.kind != kvquant::Kind::integer || f.away || f.bits == 3) return false;
    return f.layout == bitpack::Layout::linear && s.D % 128 == 0 &&
           (f.axis == kvquant::Axis::channel || f.group % kHalves == 0);
  }

  // The grids of `count` groups, group after group and row after row; row(t) gives a row.
  template <class Row, int kCount>
  TC_INLINE_MEMBER static void fit_tokens(const Format& f, int D, int count, Row&& row, Grids<kCount>& grids) {
    const int per_row = D / f.group;
    for (int first = 0; first < count; first += kWidth) {
      Vec folded[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        HalfRange r = no_halves();
        const int at = first + i < count ? first + i : first;
        const T* x = row(at / per_row) + at % per_row * f.group;
        for (int d = 0; d < f.group; d += kHalves) r = including_halves(r, x + d);
        folded[i] = fold(r);
      }
      Range r = no_range();
      ranges_across(folded, r.low, r.high, T{});
      grids.make(f, r, first);
    }
  }

  // The grids of kVecs * kHalves channels from d on over `count` rows, which row(i) gives; zeros where all are null.
  template <int kVecs, class Row, int kCount>
  TC_INLINE_MEMBER static void fit_channels(const Format& f, int count, int d, Row&& row, Grids<kCount>& grids) {
    HalfRange r[kVecs];
    for (int i = 0; i < kVecs; ++i) r[i] = no_halves();
    bool any = false;
    for (int t = 0; t < count; ++t) {
      const T* x = row(t);
      if (!x) continue;
      any = true;
      for (int i = 0; i < kVecs; ++i) r[i] = including_halves(r[i], x + d + i * kHalves);
    }
    const Vec zero = broadcast(0.0f);
    for (int i = 0; i < 2 * kVecs; ++i) {
      const HalfRange& h = r[i / 2];
      const Range seen{numbers_of(h.low, i % 2, T{}), numbers_of(h.high, i % 2, T{}), zero};
      grids.make(f, any ? seen : Range{zero, zero, zero}, d + i * kWidth);
    }
  }

  // A row by the grids of its groups, the first of them number `at`.
  template <int kCount>
  TC_INLINE_MEMBER static void code_by_groups(const Format& f, const T* x, int D, const Grids<kCount>& g, int at,
                                              uint8_t* out) {
    const int shift = __builtin_ctz(unsigned(f.group));
    pack(
        f.bits,
        [&](int d) __attribute__((always_inline)) {
          const int i = at + (d >> shift);
          return quotient(sub(load(x + d), broadcast(g.minimum[i])),
                          Divisor{broadcast(g.divisor[i]), broadcast(g.inverse[i])});
        },
        D, out);
  }

  // A row by the grids of its channels.
  template <int kCount>
  TC_INLINE_MEMBER static void code_by_channels(const Format& f, const T* x, int D, const Grids<kCount>& g,
                                                uint8_t* out) {
    pack(
        f.bits,
        [&](int d) __attribute__((always_inline)) {
          return quotient(sub(load(x + d), load(g.minimum + d)), Divisor{load(g.divisor + d), load(g.inverse + d)});
        },
        D, out);
  }

 private:
  template <class F>
  TC_INLINE_MEMBER static void pack(int bits, F&& q, int D, uint8_t* out) {
    if (bits == 8) return pack_quotients<8>(q, D, out);
    if (bits == 4) return pack_quotients<4>(q, D, out);
    pack_quotients<2>(q, D, out);
  }
};

#endif

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
