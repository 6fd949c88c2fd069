// Cosine match and energy on the CPU, compiled once per instruction-set level. A block of rows meets the panels of
// columns one after the other; each panel's cosines are folded into a running maximum, a short list or a sum, and
// forgotten. Column numbers travel as floats, exact below 2^24.
#include "core/dispatch.h"
#include "core/order.h"
#include "cpu/gram.h"
#include "cpu/merge_kernels.h"
#include "cpu/simd_math.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace merge;
static_assert(kRowBlock == kGramBlock && kColumnPad == kGramPad);

// bf16 pairs hold one feature: two are packed as unit vectors in fp32, which can be added.
template <class F>
TC_INLINE void dispatch_packed(DType dtype, int C2, F&& f) {
  dispatch_dtype(dtype, [&]<class T>() {
    if (C2 > 0) {
      f.template operator()<T, float>();
    } else {
      f.template operator()<T, typename GramElementOf<T>::type>();
    }
  });
}

template <class E>
TC_INLINE int steps_of(int channels) {
  return (channels + kGramStep<E> - 1) / kGramStep<E>;
}

// Place i of one side, ready to be packed.
template <class T>
TC_INLINE GramRow<T> row_of(const Side& s, int b, int i, int C, int C2, float share) {
  const int t = i < s.R ? s.token(b, i) : -1;
  if (t < 0) return {nullptr, nullptr, C, C2, 0, 0};
  const T* x = static_cast<const T*>(s.x) + b * s.stride_b + t * s.stride_n;
  const T* x2 = s.x2 ? static_cast<const T*>(s.x2) + b * s.stride2_b + t * s.stride2_n : nullptr;
  return {x, x2, C, C2, share, 1 - share};
}

// Columns [begin, end): channel-major panels and factors. The shares of two features are the rows' business.
template <class T, class E>
TC_INLINE void pack_panels(const Side& s, int b, int C, int C2, int begin, int end, const Columns& columns) {
  const int64_t steps = steps_of<E>(C + C2);
  for (int j = begin; j < end; j += kWidth) {
    E* panel = reinterpret_cast<E*>(columns.data) + j / kPanel * (steps * kGramStep<E> * kPanel);
    GramRow<T> lanes[kWidth];
    for (int l = 0; l < kWidth; ++l) {
      lanes[l] = row_of<T>(s, b, j + l, C, C2, 1);
      lanes[l].share2 = 1;
    }
    pack_lanes(lanes, panel + j % kPanel * kGramStep<E>, columns.factor + j);
    for (int l = 0; s.weight && l < kWidth && j + l < s.R; ++l) columns.factor[j + l] *= s.weight_of(b, j + l);
  }
}

// Rows [begin, begin + kGramBlock) and their factors; rows past the end are packed as taking no part.
template <class T, class E>
TC_INLINE void pack_block(const Side& s, int b, int C, int C2, float alpha, int begin, int count, E* rows,
                          float* factor) {
  const int64_t width = int64_t(steps_of<E>(C + C2)) * kGramStep<E>;
  for (int r = 0; r < kGramBlock && r < count + kGramRows; ++r) {
    const int i = r < count ? begin + r : s.R;
    factor[r] =
        row_of<T>(s, b, i, C, C2, alpha).template pack<E>(rows + r * width) * (r < count ? s.weight_of(b, i) : 1.0f);
  }
}

TC_INLINE Vec lane_numbers() {
  alignas(64) float lanes[kWidth];
  for (int l = 0; l < kWidth; ++l) lanes[l] = float(l);
  return load(lanes);
}

// ---- match ----------------------------------------------------------------------------------------------------------

// The best column of each row: a running maximum per lane. Columns come in ascending order, so that keeping what is
// not beaten keeps the lowest of several.
struct Best {
  alignas(64) float value[kGramBlock][kWidth], column[kGramBlock][kWidth];

  TC_INLINE_MEMBER void start(int rows, int) {
    for (int r = 0; r < rows; ++r) {
      store(value[r], broadcast(-INFINITY));
      store(column[r], broadcast(-1));
    }
  }
  TC_INLINE_MEMBER void fold(int r, Vec similarity, Vec number) {
    const Vec best = load(value[r]);
    store(column[r], select_gt(similarity, best, number, load(column[r])));
    store(value[r], select_gt(similarity, best, similarity, best));
  }
  TC_INLINE_MEMBER void finish(const MatchArgs& a, int b, int begin, int rows) const {
    for (int r = 0; r < rows; ++r) {
      const Vec values = load(value[r]);
      const float best = maximum(values);
      const Vec winners = select_ge(values, broadcast(best), load(column[r]), broadcast(INFINITY));
      const int64_t at = int64_t(b) * a.a.R + begin + r;
      a.value[at] = best + 0.0f;  // as a key has it: -0 is 0
      a.index[at] = a.index_or_none(best, int(minimum(winners)));
    }
  }
};

// The `top` best columns of each row, best first.
struct Several {
  OrderKey list[kGramBlock][kMaxTop];
  int top;

  TC_INLINE_MEMBER void start(int rows, int count) {
    top = count;
    for (int r = 0; r < rows; ++r) {
      for (int k = 0; k < top; ++k) list[r][k] = order_key(-INFINITY, 0x7fffffff);
    }
  }
  TC_INLINE_MEMBER void fold(int r, Vec similarity, Vec number) {
    uint32_t hits = lanes_gt(similarity, broadcast(score_of(list[r][top - 1])));
    if (!hits) return;
    alignas(64) float value[kWidth], column[kWidth];
    store(value, similarity);
    store(column, number);
    for (; hits; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      insert(list[r], order_key(value[lane], int(column[lane])));
    }
  }
  TC_INLINE_MEMBER void insert(OrderKey* keys, OrderKey key) const {
    if (key <= keys[top - 1]) return;
    int k = top - 1;
    for (; k > 0 && keys[k - 1] < key; --k) keys[k] = keys[k - 1];
    keys[k] = key;
  }
  TC_INLINE_MEMBER void finish(const MatchArgs& a, int b, int begin, int rows) const {
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (int64_t(b) * a.a.R + begin + r) * top;
      for (int k = 0; k < top; ++k) {
        const float value = score_of(list[r][k]);
        a.value[at + k] = value;
        a.index[at + k] = a.index_or_none(value, index_of(list[r][k]));
      }
    }
  }
};

struct Range {
  float low, high;
};

// Token numbers of a block of rows or a panel of columns; where distances are limited, far panels are passed over.
TC_INLINE Range range_of(const float* position, int count) {
  Range range{INFINITY, -INFINITY};
  for (int i = 0; i < count; ++i) {
    range.low = position[i] < range.low ? position[i] : range.low;
    range.high = position[i] > range.high ? position[i] : range.high;
  }
  return range;
}

TC_INLINE float position_of(const Side& s, int b, int i) {
  if (i >= s.R) return NAN;  // at no distance from anything
  return float(s.index ? s.index[int64_t(b) * s.R + i] : i);
}

template <class E, class Fold, bool kLimited>
TC_INLINE void match_block(const MatchArgs& a, int b, int begin, int count, const Columns& columns, const E* rows,
                           const float* row_factor) {
  alignas(64) float product[kGramBlock * kPanel], position[kGramBlock];
  const int steps = steps_of<E>(a.C + a.C2);
  const Vec lanes = lane_numbers();
  const float nearest = float(a.nearest), farthest = float(a.farthest);
  Fold fold;
  fold.start(count, a.top);
  for (int r = 0; kLimited && r < count; ++r) position[r] = position_of(a.a, b, begin + r);
  const Range near = range_of(position, kLimited ? count : 0);
  for (int j = 0; j < a.b.R; j += kPanel) {
    if (kLimited) {
      const Range panel = range_of(columns.position + j, kPanel);
      if (panel.low - near.high > farthest || near.low - panel.high > farthest) continue;
    }
    const E* panel = reinterpret_cast<const E*>(columns.data) + int64_t(j) * steps * kGramStep<E>;
    const int wide = a.b.R - j < kPanel ? a.b.R - j : kPanel;
    gram_panel(rows, count, panel, wide, steps, product);
    for (int h = 0; h < wide; h += kWidth) {
      const Vec factor = load(columns.factor + j + h), number = add(lanes, broadcast(float(j + h)));
      for (int r = 0; r < count; ++r) {
        Vec similarity = mul(mul(load(product + r * kPanel + h), factor), broadcast(row_factor[r]));
        if constexpr (kLimited) {
          const Vec distance = abs(sub(load(columns.position + j + h), broadcast(position[r])));
          similarity = select_ge(broadcast(farthest), distance, similarity, broadcast(-INFINITY));
          similarity = select_ge(distance, broadcast(nearest), similarity, broadcast(-INFINITY));
        }
        fold.fold(r, similarity, number);
      }
    }
  }
  fold.finish(a, b, begin, count);
}

// ---- energy ---------------------------------------------------------------------------------------------------------

template <Energy kKind>
TC_INLINE Vec energy_of(Vec cosine, Vec margin, Vec alpha, Vec rate) {
  if constexpr (kKind == Energy::gauss) {
    const Vec below = sub(broadcast(1), cosine);
    return exp(mul(rate, mul(below, below)));
  } else {
    const Vec z = sub(cosine, margin);
    const Vec above = kKind == Energy::paper ? cosine : z;
    return select_ge(z, broadcast(0), above, mul(alpha, sub(exp(z), broadcast(1))));
  }
}

template <class E, Energy kKind>
TC_INLINE void energy_block(const EnergyArgs& e, int b, int begin, int count, int members, const Columns& columns,
                            const E* rows, const float* row_factor) {
  alignas(64) float product[kGramBlock * kPanel], total[kGramBlock][kWidth];
  const int steps = steps_of<E>(e.C);
  const Vec margin = broadcast(e.margin), alpha = broadcast(e.alpha), rate = broadcast(e.rate);
  for (int r = 0; r < count; ++r) store(total[r], broadcast(0));
  for (int j = 0; j < e.x.R; j += kPanel) {
    const E* panel = reinterpret_cast<const E*>(columns.data) + int64_t(j) * steps * kGramStep<E>;
    const int wide = e.x.R - j < kPanel ? e.x.R - j : kPanel;
    gram_panel(rows, count, panel, wide, steps, product);
    for (int h = 0; h < wide; h += kWidth) {
      const Vec factor = load(columns.factor + j + h);
      for (int r = 0; r < count; ++r) {
        const Vec cosine = mul(mul(load(product + r * kPanel + h), factor), broadcast(row_factor[r]));
        const Vec energy = energy_of<kKind>(cosine, margin, alpha, rate);
        store(total[r], add(load(total[r]), select_ge(cosine, cosine, energy, broadcast(0))));  // NaN: no part
      }
    }
  }
  for (int r = 0; r < count; ++r) {
    const bool takes_part = row_factor[r] == row_factor[r];
    e.energy[int64_t(b) * e.x.N + begin + r] = takes_part ? sum(load(total[r])) * e.height / float(members) : -INFINITY;
  }
}

}  // namespace

void pack_match(const MatchArgs& a, int b, int begin, int end, const Columns& columns) {
  dispatch_packed(a.dtype, a.C2,
                  [&]<class T, class E>() { pack_panels<T, E>(a.b, b, a.C, a.C2, begin, end, columns); });
  for (int j = begin; a.limited() && j < end; ++j) columns.position[j] = position_of(a.b, b, j);
}

void match_rows(const MatchArgs& a, int b, int begin, int end, const Columns& columns, float* scratch) {
  dispatch_packed(a.dtype, a.C2, [&]<class T, class E>() {
    E* rows = reinterpret_cast<E*>(scratch);
    alignas(64) float factor[kGramBlock];
    for (int i = begin; i < end; i += kGramBlock) {
      const int count = end - i < kGramBlock ? end - i : kGramBlock;
      pack_block<T>(a.a, b, a.C, a.C2, a.alpha, i, count, rows, factor);
      if (a.limited() && a.top == 1) {
        match_block<E, Best, true>(a, b, i, count, columns, rows, factor);
      } else if (a.limited()) {
        match_block<E, Several, true>(a, b, i, count, columns, rows, factor);
      } else if (a.top == 1) {
        match_block<E, Best, false>(a, b, i, count, columns, rows, factor);
      } else {
        match_block<E, Several, false>(a, b, i, count, columns, rows, factor);
      }
    }
  });
}

void pack_energy(const EnergyArgs& e, int b, int begin, int end, const Columns& columns) {
  dispatch_packed(e.dtype, 0, [&]<class T, class E>() { pack_panels<T, E>(e.x, b, e.C, 0, begin, end, columns); });
}

void energy_rows(const EnergyArgs& e, int b, int begin, int end, int count, const Columns& columns, float* scratch) {
  dispatch_packed(e.dtype, 0, [&]<class T, class E>() {
    E* rows = reinterpret_cast<E*>(scratch);
    alignas(64) float factor[kGramBlock];
    for (int i = begin; i < end; i += kGramBlock) {
      const int block = end - i < kGramBlock ? end - i : kGramBlock;
      pack_block<T>(e.x, b, e.C, 0, 1, i, block, rows, factor);
      if (e.kind == Energy::elu) {
        energy_block<E, Energy::elu>(e, b, i, block, count, columns, rows, factor);
      } else if (e.kind == Energy::paper) {
        energy_block<E, Energy::paper>(e, b, i, block, count, columns, rows, factor);
      } else {
        energy_block<E, Energy::gauss>(e, b, i, block, count, columns, rows, factor);
      }
    }
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
