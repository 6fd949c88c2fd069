// The nearest kept slot of every member on the CPU, compiled once per instruction-set level: a block of members meets
// the panels of centres one after the other, and only the running maximum of their similarities is kept.
#include "core/dispatch.h"
#include "core/order.h"
#include "cpu/gram.h"
#include "cpu/kvcache_kernels.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace kvcache;
static_assert(kMemberBlock == kGramBlock && kCenterPad == kGramPad);

template <class E>
TC_INLINE int steps_of(int channels) {
  return (channels + kGramStep<E> - 1) / kGramStep<E>;
}

// Keys or values of one row of the cache.
template <class T>
struct Side {
  const Store& s;
  const Pages& pages;
  int b, h;

  TC_INLINE_MEMBER GramRow<T> row(int slot) const {
    const T* x = slot < 0 ? nullptr : slot_of<const T>(pages, s.table, b, h, slot);
    return {x, nullptr, pages.channels, 0, 1, 0};
  }

  template <class E>
  TC_INLINE_MEMBER void pack_centers(const int* slots, int count, float* data, float* factor) const {
    const int64_t steps = steps_of<E>(pages.channels);
    GramRow<T> column[kWidth];
    for (int j = 0; j < padded_centers(count); j += kWidth) {
      for (int l = 0; l < kWidth; ++l) column[l] = row(j + l < count ? slots[j + l] : -1);
      E* panel = reinterpret_cast<E*>(data) + j / kPanel * (steps * kGramStep<E> * kPanel);
      pack_lanes<T, E>(column, panel + j % kPanel * kGramStep<E>, factor + j);
    }
  }

  template <class E>
  TC_INLINE_MEMBER void pack_members(const int* slots, int count, float* data, float* factor) const {
    const int64_t width = int64_t(steps_of<E>(pages.channels)) * kGramStep<E>;
    for (int r = 0; r < kGramBlock && r < count + kGramRows; ++r) {
      factor[r] = row(r < count ? slots[r] : -1).template pack<E>(reinterpret_cast<E*>(data) + r * width);
    }
  }

  // Cosines of `count` packed members with the panel of centres from j on.
  template <class E>
  TC_INLINE_MEMBER void multiply(const float* rows, int count, const float* centers, int j, float* out) const {
    const int steps = steps_of<E>(pages.channels);
    const E* panel = reinterpret_cast<const E*>(centers) + int64_t(j) * steps * kGramStep<E>;
    gram_panel<E>(reinterpret_cast<const E*>(rows), count, panel, kPanel, steps, out);
  }
};

// The best centre of each member: a running maximum per lane. Centres come in ascending order, so that keeping what is
// not beaten keeps the lowest of several.
struct Best {
  alignas(64) float value[kGramBlock][kWidth], rank[kGramBlock][kWidth];

  TC_INLINE_MEMBER void start(int rows) {
    for (int r = 0; r < rows; ++r) {
      store(value[r], broadcast(-INFINITY));
      store(rank[r], broadcast(-1));
    }
  }
  TC_INLINE_MEMBER void fold(int r, Vec similarity, Vec number) {
    const Vec best = load(value[r]);
    store(rank[r], select_gt(similarity, best, number, load(rank[r])));
    store(value[r], select_gt(similarity, best, similarity, best));
  }
  TC_INLINE_MEMBER void finish(const AssignArgs& a, int64_t at, int rows) const {
    for (int r = 0; r < rows; ++r) {
      OrderKey best = kNobody;
      for (int l = 0; l < kWidth; ++l) {
        const OrderKey key = order_key(value[r][l], rank[r][l] < 0 ? 0x7fffffff : int(rank[r][l]));
        best = key > best ? key : best;
      }
      a.similarity[at + r] = score_of(best);
      a.target[at + r] = a.target_or_none(score_of(best), index_of(best));
    }
  }
};

TC_INLINE Vec lane_numbers() {
  alignas(64) float lanes[kWidth];
  for (int l = 0; l < kWidth; ++l) lanes[l] = float(l);
  return load(lanes);
}

TC_INLINE Vec cosine_of(const AssignArgs& a, Vec product, float row_factor, Vec factor) {
  const Vec cosine = mul(product, mul(broadcast(row_factor), factor));
  return a.clamp ? max(broadcast(0), cosine) : cosine;  // NaN stays NaN
}

template <class T, class E>
TC_INLINE void assign_block(const AssignArgs& a, int b, int h, int64_t at, int count, const Centers& c) {
  alignas(64) float key_product[kGramBlock * kPanel], value_product[kGramBlock * kPanel];
  alignas(64) float key_factor[kGramBlock], value_factor[kGramBlock];
  const Side<T> keys{a.s, a.s.k, b, h}, values{a.s, a.s.v, b, h};
  float* value_rows = c.rows + int64_t(kMemberBlock) * (a.s.k.channels + 1);
  keys.template pack_members<E>(a.lists.member + at, count, c.rows, key_factor);
  if (a.with_values) values.template pack_members<E>(a.lists.member + at, count, value_rows, value_factor);
  const int centers = a.lists.keep_count[b * a.s.Hkv + h];
  const Vec lanes = lane_numbers();
  Best best;
  best.start(count);
  for (int j = 0; j < centers; j += kPanel) {
    keys.template multiply<E>(c.rows, count, c.keys, j, key_product);
    if (a.with_values) values.template multiply<E>(value_rows, count, c.values, j, value_product);
    for (int r = 0; r < count; ++r) {
      for (int half = 0; half < 2; ++half) {
        const int from = j + half * kWidth, place = r * kPanel + half * kWidth;
        Vec similarity = cosine_of(a, load(key_product + place), key_factor[r], load(c.key_factor + from));
        if (a.with_values) {
          similarity =
              mul(similarity, cosine_of(a, load(value_product + place), value_factor[r], load(c.value_factor + from)));
        }
        best.fold(r, similarity, add(lanes, broadcast(float(from))));
      }
    }
  }
  best.finish(a, at, count);
}

}  // namespace

void kv_pack_centers(const AssignArgs& a, int b, int h, const Centers& c) {
  dispatch_dtype(a.s.dtype, [&]<class T>() {
    using E = typename GramElementOf<T>::type;
    const int row = b * a.s.Hkv + h, count = a.lists.keep_count[row];
    const int* slots = a.lists.keep + int64_t(row) * a.lists.K;
    Side<T>{a.s, a.s.k, b, h}.template pack_centers<E>(slots, count, c.keys, c.key_factor);
    if (a.with_values) Side<T>{a.s, a.s.v, b, h}.template pack_centers<E>(slots, count, c.values, c.value_factor);
  });
}

void kv_assign(const AssignArgs& a, int b, int h, int begin, int end, const Centers& centers) {
  dispatch_dtype(a.s.dtype, [&]<class T>() {
    using E = typename GramElementOf<T>::type;
    const int64_t row = int64_t(b * a.s.Hkv + h) * a.lists.M;
    for (int i = begin; i < end; i += kMemberBlock) {
      const int count = end - i < kMemberBlock ? end - i : kMemberBlock;
      assign_block<T, E>(a, b, h, row + i, count, centers);
    }
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
