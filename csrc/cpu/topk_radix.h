// Radix search on the CPU: histograms of slots, and the walk that narrows a threshold down digit by digit. Where the
// slots come from is the source's business:
//   source.chunks()                       pieces that threads may take
//   source.visit(chunk, f)                f(slots, n) on blocks of slots, in ascending order, each followed by kSkip up
//                                         to a multiple of kWidth
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd_slots.h"
#include "cpu/topk_kernels.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

constexpr int kBlockSlots = 1024;

// An array of slots.
struct ArraySource {
  const uint32_t* slots;
  int64_t n;

  int chunks() const { return 1; }
  template <class F>
  TC_INLINE_MEMBER void visit(int, F&& f) const {
    f(slots, n);
  }
};

// Where the search stands: the leading digits of the threshold, and what lies above them.
struct Prefix {
  uint32_t key = 0;
  int64_t above = 0;
  uint64_t mass = 0;
};

TC_INLINE void clear(topk::Histogram& h, int tables, bool by_mass) {
  for (int t = 0; t < tables; ++t) __builtin_memset(h.count[t], 0, sizeof h.count[t]);
  if (by_mass) __builtin_memset(h.mass, 0, sizeof h.mass);
}

// All slots by their first digit. In blocks, so that units are computed by vectors; only their sums are not.
template <bool kMass>
TC_INLINE void add_all(topk::Histogram& h, int tables, const uint32_t* slots, int64_t n, topk::Units units) {
  for (int64_t i = 0; i < n; ++i) ++h.count[i & (tables - 1)][topk::digit(slots[i], 0)];
  for (int64_t begin = 0; kMass && begin < n; begin += kBlockSlots) {
    const int block = n - begin < kBlockSlots ? int(n - begin) : kBlockSlots;
    uint64_t mass[kBlockSlots];
    for (int i = 0; i < block; ++i) mass[i] = units.of(topk::mass_of_key(slots[begin + i]));
    for (int i = 0; i < block; ++i) h.mass[topk::digit(slots[begin + i], 0)] += mass[i];
  }
}

// The slots that begin with the prefix, by their digit at `kLevel`; slots are kSkip up to a multiple of kWidth.
template <int kLevel, bool kMass>
TC_INLINE void add_matching(topk::Histogram& h, int tables, const uint32_t* slots, int64_t n, uint32_t prefix,
                            topk::Units units) {
  const uint32_t last = prefix | ((1u << topk::digit_shift(kLevel - 1)) - 1);
  for (int64_t i = 0; i < n; i += kWidth) {
    uint32_t hits = lanes_above(slots + i, prefix - 1) & ~lanes_above(slots + i, last);
    for (int table = 0; hits; hits &= hits - 1, ++table) {
      const uint32_t slot = slots[i + __builtin_ctz(hits)];
      ++h.count[table & (tables - 1)][topk::digit(slot, kLevel)];
      if (kMass) h.mass[topk::digit(slot, kLevel)] += units.of(topk::mass_of_key(slot));
    }
  }
}

template <int kLevel, bool kMass, class Source>
TC_INLINE void fill_histograms(const Source& source, topk::Histogram* histogram, int tables, uint32_t prefix,
                               topk::Units units) {
  parallel_for(source.chunks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      topk::Histogram& h = histogram[c];
      clear(h, tables, kMass);
      source.visit(int(c), [&](const uint32_t* slots, int64_t n) {
        if constexpr (kLevel == 0) {
          add_all<kMass>(h, tables, slots, n, units);
        } else {
          add_matching<kLevel, kMass>(h, tables, slots, n, prefix, units);
        }
      });
    }
  });
  topk::Histogram& sum = histogram[0];  // of all tables of all chunks
  for (int c = 0; c < source.chunks(); ++c) {
    for (int t = c == 0; t < tables; ++t) {
      for (int bin = 0; bin < topk::kBins; ++bin) sum.count[0][bin] += histogram[c].count[t][bin];
    }
    for (int bin = 0; kMass && c > 0 && bin < topk::kBins; ++bin) sum.mass[bin] += histogram[c].mass[bin];
  }
}

// Appends to the prefix the digit at which the goal is met. Above it are fewer than needed, with it enough.
template <int kLevel, bool kMass>
TC_INLINE void descend(const topk::Histogram& h, const topk::Goal& goal, Prefix& at) {
  int bin = kLevel == 0 ? topk::kForcedBin - 1 : topk::digit_bins(kLevel) - 1;
  for (; bin > 0; --bin) {
    const int64_t count = at.above + h.count[0][bin];
    const uint64_t mass = kMass ? at.mass + h.mass[bin] : 0;
    if (goal.met(count, mass)) break;
    at.above = count;
    at.mass = mass;
  }
  at.key |= uint32_t(bin) << topk::digit_shift(kLevel);
}

// Of candidates that can meet the goal. With `counted`, the histograms of the first digit have been made.
template <bool kMass, class Source>
TC_INLINE topk::Threshold search(const Source& source, const topk::Goal& goal, topk::Histogram* histogram, int tables,
                                 topk::Units units, bool counted) {
  if (goal.met(0, 0)) return {topk::kForced - 1, 0, 0};
  Prefix at;
  if (!counted) fill_histograms<0, kMass>(source, histogram, tables, 0, units);
  descend<0, kMass>(*histogram, goal, at);
  fill_histograms<1, kMass>(source, histogram, tables, at.key, units);
  descend<1, kMass>(*histogram, goal, at);
  fill_histograms<2, kMass>(source, histogram, tables, at.key, units);
  descend<2, kMass>(*histogram, goal, at);
  const uint64_t each = kMass ? units.of(topk::mass_of_key(at.key)) : 0;
  return {at.key, at.above, goal.missing(at.above, at.mass, each)};
}

TC_INLINE int tables_for(int64_t n) { return n >= 8192 ? topk::Histogram::kTables : 1; }

// Packs the positions `first` + i of the slots that are kept, and lowers `ties` by those equal to the key among them.
// `out` has room for n + kWidth; slots are kSkip up to a multiple of kWidth.
TC_INLINE int pack_kept(const uint32_t* slots, int n, uint32_t key, int64_t& ties, int first, int* out) {
  int kept = 0;
  for (int i = 0; i < n; i += kWidth) {
    uint32_t hits = lanes_above(slots + i, key);
    if (ties > 0) {
      uint32_t equal = lanes_equal(slots + i, key);
      int64_t take = __builtin_popcount(equal);
      for (; take > ties; --take) equal &= ~(0x80000000u >> __builtin_clz(equal));  // the last ones give way
      ties -= take;
      hits |= equal;
    }
    compress_index(out + kept, first + i, hits);
    kept += __builtin_popcount(hits);
  }
  return kept;
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
