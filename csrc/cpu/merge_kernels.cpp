// Merging on the CPU, compiled once per instruction-set level: one pass over the sources of each output row, in the
// order of the tokens.
#include "cpu/merge_kernels.h"

#include "core/dispatch.h"
#include "core/order.h"
#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace merge;

constexpr int kLine = 64, kAhead = 2;  // bytes of a cache line; tokens
constexpr int kUnroll = 4;             // vectors of a row in flight: hides the latency of the sums

template <class T>
class OutputRow {
 public:
  OutputRow(const MergeArgs& args, int item, const int* tokens, int count, int m)
      : a(args),
        b(item),
        token(tokens),
        n(count),
        y(static_cast<T*>(args.y) + (int64_t(item) * args.M + m) * args.C),
        size(args.out_size[int64_t(item) * args.M + m]) {}

  // Most rows of most merges.
  void copy_lone() {
    size = a.size_of(b, token[0]);
    copy(token[0]);
  }

  void write(float* scratch) {
    size = 0;
    for (int i = 0; i < n; ++i) size += a.size_of(b, token[i]);
    switch (a.mode) {
      case Mode::mean:
        return weighted(total(), y);
      case Mode::sum:
        return weighted(1, y);
      case Mode::amax:
        return maximum_of_rows();
      case Mode::drop:
        return keep_head();
      case Mode::mlerp:
        return rescaled_mean(scratch);
    }
  }

 private:
  const T* x(int i) const { return static_cast<const T*>(a.x) + b * a.x_stride_b + i * a.x_stride_n; }
  float coefficient(int i) const { return a.coefficient(b, i); }

  float total() const {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += coefficient(token[i]);
    return sum;
  }

  void fill_zero() { __builtin_memset(y, 0, a.C * sizeof(T)); }
  void copy(int i) { __builtin_memcpy(y, x(i), a.C * sizeof(T)); }

  // sum(coefficient * x) / divisor, 0 where the divisor is.
  template <class U>
  void weighted(float divisor, U* out) {
    if (divisor == 0) return void(__builtin_memset(out, 0, a.C * sizeof(U)));
    int c = 0;
    for (; c + kUnroll * kWidth <= a.C; c += kUnroll * kWidth) columns<kUnroll>(c, divisor, out);
    for (; c + kWidth <= a.C; c += kWidth) columns<1>(c, divisor, out);
    if (c == a.C) return;
    Vec acc = broadcast(0);
    for (int i = 0; i < n; ++i) {
      acc = fma(broadcast(coefficient(token[i])), load_some(x(token[i]) + c, a.C - c), acc);
    }
    store_some(out + c, div(acc, broadcast(divisor)), a.C - c);
  }

  template <int kCount, class U>
  TC_INLINE_MEMBER void columns(int c, float divisor, U* out) const {
    Vec acc[kCount];
    for (int u = 0; u < kCount; ++u) acc[u] = broadcast(0);
    for (int i = 0; i < n; ++i) {
      const T* row = x(token[i]) + c;
      const Vec factor = broadcast(coefficient(token[i]));
      for (int u = 0; u < kCount; ++u) acc[u] = fma(factor, load(row + u * kWidth), acc[u]);
    }
    const Vec by = broadcast(divisor);
    for (int u = 0; u < kCount; ++u) store(out + c + u * kWidth, div(acc[u], by));
  }

  // Larger of the two, NaN where either is.
  TC_INLINE_MEMBER static Vec larger(Vec v, Vec best) { return select_ge(v, v, select_gt(v, best, v, best), v); }

  void maximum_of_rows() {
    for (int c = 0; c < a.C; c += kWidth) {
      const int lanes = a.C - c < kWidth ? a.C - c : kWidth;
      Vec best = load_up_to(x(token[0]) + c, lanes);
      for (int i = 1; i < n; ++i) best = larger(load_up_to(x(token[i]) + c, lanes), best);
      store_up_to(y + c, best, lanes);
    }
  }

  void keep_head() {
    OrderKey best = kNobody;
    for (int i = 0; i < n; ++i) {
      const OrderKey key = order_key(a.weight_of(b, token[i]), token[i]);
      best = key > best ? key : best;
    }
    size = a.size_of(b, index_of(best));
    copy(index_of(best));
  }

  template <class U>
  float square_sum(const U* row) const {
    Vec acc = broadcast(0);
    for (int c = 0; c < a.C; c += kWidth) {
      const Vec v = load_up_to(row + c, a.C - c);
      acc = fma(v, v, acc);
    }
    return sum(acc);
  }

  void rescaled_mean(float* mean) {
    const float divisor = total();
    if (divisor == 0) return fill_zero();
    weighted(divisor, mean);
    const float length = square_sum(mean);
    if (length == 0) return fill_zero();
    float largest = 0;
    for (int i = 0; i < n; ++i) {
      const float square = square_sum(x(token[i]));
      largest = square > largest || square != square ? square : largest;
    }
    const Vec scale = broadcast(__builtin_sqrtf(largest) / __builtin_sqrtf(length));
    for (int c = 0; c < a.C; c += kWidth) {
      const int lanes = a.C - c < kWidth ? a.C - c : kWidth;
      store_up_to(y + c, mul(load_up_to(mean + c, lanes), scale), lanes);
    }
  }

  const MergeArgs& a;
  const int b;
  const int* token;
  const int n;
  T* y;
  float& size;
};

// Fetches a row before its turn: the processor's own prefetcher starts anew at every copy.
template <class T>
TC_INLINE void fetch(const MergeArgs& a, int b, int i) {
  const T* row = static_cast<const T*>(a.x) + b * a.x_stride_b + i * a.x_stride_n;
  for (int c = 0; c < a.C; c += kLine / int(sizeof(T))) __builtin_prefetch(row + c);
}

}  // namespace

void merge_rows(const MergeArgs& args, int b, int begin, int end, const Groups& groups, float* row) {
  dispatch_dtype(args.dtype, [&]<class T>() {
    for (int i = begin; i < end; ++i) {
      const int m = args.group(b, i);
      if (i + kAhead < end) fetch<T>(args, b, i + kAhead);
      if (m < 0) continue;
      const int* members = groups.token + groups.first[m];
      const int count = groups.first[m + 1] - groups.first[m];
      if (*members != i) continue;
      OutputRow<T> output(args, b, members, count, m);
      if (count == 1 && args.keeps_lone(b, i)) {
        output.copy_lone();
      } else {
        output.write(row);
      }
    }
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
