// Mixing members into their centres on the CPU, compiled once per instruction-set level: the centre first, then its
// members in the order of their list, in fp32.
#include "core/dispatch.h"
#include "core/norm.h"
#include "cpu/kvcache_kernels.h"
#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace kvcache;

template <class T>
TC_INLINE float square_sum(const T* x, int C) {
  Vec acc = broadcast(0);
  for (int c = 0; c < C; c += kWidth) {
    const Vec v = load_up_to(x + c, C - c);
    acc = fma(v, v, acc);
  }
  return sum(acc);
}

template <class T>
TC_INLINE void add_scaled(const T* x, int C, float factor, float* out) {
  for (int c = 0; c < C; c += kWidth) {
    store_up_to(out + c, fma(broadcast(factor), load_up_to(x + c, C - c), load_up_to(out + c, C - c)), C - c);
  }
}

// One centre and the members that go to it.
template <class T>
class Center {
 public:
  TC_INLINE_MEMBER Center(const MergeArgs& args, int item, int head, int rank, const int* members, int count)
      : m(args), b(item), h(head), member(members), n(count), row(item * args.s.Hkv + head) {
    center = m.lists.keep[int64_t(row) * m.lists.K + rank];
    own = m.center[int64_t(row) * m.lists.K + rank];
    if (m.by_norm) center_norm = norm(m.s.v, center);
    for (int i = 0; i < n; ++i) total += weight(i);
  }

  TC_INLINE_MEMBER void write(float* out) const {
    const bool mean = own + total > 0;
    if (m.keys != Keys::keep && mean) {
      T* key = at(m.s.k, center);
      const int C = m.s.k.channels;
      if (m.keys == Keys::mean) {
        mix(m.s.k, own, out, [&](int i) { return weight(i); });
        put(out, 1 / (own + total), key, C);
      } else {
        const float mean_length = length() / (own + total);
        mix(m.s.k, own * inverse(center), out, [&](int i) { return weight(i) * inverse(slot(i)); });
        put(out, mean_length / (own + total), key, C);
      }
    }
    if (m.values == Values::sum || mean) {
      mix(m.s.v, m.values == Values::sum ? 1.0f : own, out, [&](int i) { return weight(i); });
      put(out, m.values == Values::sum ? 1.0f : 1 / (own + total), at(m.s.v, center), m.s.v.channels);
    }
  }

 private:
  TC_INLINE_MEMBER T* at(const Pages& pages, int slot) const { return slot_of<T>(pages, m.s.table, b, h, slot); }
  TC_INLINE_MEMBER int slot(int i) const { return m.lists.member[int64_t(row) * m.lists.M + member[i]]; }
  TC_INLINE_MEMBER float norm(const Pages& pages, int slot) const {
    return __builtin_sqrtf(square_sum(at(pages, slot), pages.channels));
  }
  TC_INLINE_MEMBER float inverse(int slot) const { return inverse_norm(square_sum(at(m.s.k, slot), m.s.k.channels)); }
  TC_INLINE_MEMBER float weight(int i) const {
    const float w = m.weight[int64_t(row) * m.lists.M + member[i]];
    return m.by_norm ? w * norm_share(norm(m.s.v, slot(i)), center_norm) : w;
  }
  // Weighted sum of the keys' lengths.
  TC_INLINE_MEMBER float length() const {
    float sum = own * norm(m.s.k, center);
    for (int i = 0; i < n; ++i) sum += weight(i) * norm(m.s.k, slot(i));
    return sum;
  }
  template <class F>
  TC_INLINE_MEMBER void mix(const Pages& pages, float center_factor, float* out, F&& factor) const {
    const int C = pages.channels;
    for (int c = 0; c < C; ++c) out[c] = 0;
    add_scaled(at(pages, center), C, center_factor, out);
    for (int i = 0; i < n; ++i) add_scaled(at(pages, slot(i)), C, factor(i), out);
  }
  TC_INLINE_MEMBER static void put(const float* x, float factor, T* out, int C) {
    for (int c = 0; c < C; c += kWidth) {
      store_up_to(out + c, mul(load_up_to(x + c, C - c), broadcast(factor)), C - c);
    }
  }

  const MergeArgs& m;
  const int b, h;
  const int* member;
  const int n, row;
  int center;
  float own, center_norm = 0, total = 0;
};

}  // namespace

void kv_merge(const MergeArgs& m, int b, int h, int begin, int end, const Groups& groups, float* out) {
  dispatch_dtype(m.s.dtype, [&]<class T>() {
    for (int rank = begin; rank < end; ++rank) {
      const int count = groups.first[rank + 1] - groups.first[rank];
      if (count > 0) Center<T>(m, b, h, rank, groups.member + groups.first[rank], count).write(out);
    }
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
