// Budgets of heads that share one selection, on the CPU. The threshold of the selection is found digit by digit as for
// a row, but from one histogram a head: with c_h(t) the tokens of head h from key t on, its budget under t is
// max(floor, c_h(t)), and the threshold is the largest t whose budgets sum to k. Three reads of the scores, O(H x
// histogram) memory.
#include "core/dispatch.h"
#include "cpu/topk_radix.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace topk;

template <class T>
class Sharing {
 public:
  Sharing(const BudgetArgs& args, const BudgetScratch& scratch, int b) : a(args), s(scratch), b_(b) {}

  void run() {
    int64_t valid = 0;
    for (int h = 0; h < a.H; ++h) {
      s.above[h] = 0;
      valid += length(h);
    }
    const int64_t wanted = least(a.k, valid);
    uint32_t key = 0;
    key = descend<0>(key, wanted);
    key = descend<1>(key, wanted);
    key = descend<2>(key, wanted);
    share_ties(digit(key, kLevels - 1), wanted);
  }

 private:
  int length(int h) const { return a.lengths ? clamped(a.lengths[int64_t(b_) * a.H + h], 0, a.S) : a.S; }
  int64_t least_of(int h) const { return least(a.floor, length(h)); }
  uint32_t* counts(int h) const { return s.count + int64_t(h) * kBins; }

  // Appends the next digit of the threshold; s.above becomes what each head has above it.
  template <int kLevel>
  uint32_t descend(uint32_t prefix, int64_t wanted) {
    parallel_for(a.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) count_head<kLevel>(int(h), prefix);
    });
    int bin = digit_bins(kLevel) - 1;
    for (; bin > 0; --bin) {
      int64_t total = 0;
      for (int h = 0; h < a.H; ++h) total += most(least_of(h), s.above[h] + counts(h)[bin]);
      if (total >= wanted) break;
      for (int h = 0; h < a.H; ++h) s.above[h] += counts(h)[bin];
    }
    return prefix | uint32_t(bin) << digit_shift(kLevel);
  }

  template <int kLevel>
  void count_head(int h, uint32_t prefix) {
    const T* score = static_cast<const T*>(a.score) + b_ * a.stride_b + h * a.stride_h;
    uint32_t tables[Histogram::kTables][kBins] = {};  // see Histogram
    const int n = length(h);
    for (int i = 0; i < n; ++i) {
      const uint32_t slot = sortable(to_float(score[i]));
      tables[i % Histogram::kTables][digit(slot, kLevel)] += in_prefix(slot, prefix, kLevel);
    }
    for (int bin = 0; bin < kBins; ++bin) {
      uint32_t sum = 0;
      for (const auto& table : tables) sum += table[bin];
      counts(h)[bin] = sum;
    }
  }

  // Tokens equal to the threshold go to the lowest heads, until the budgets sum to `wanted`.
  void share_ties(int bin, int64_t wanted) {
    int64_t left = wanted;
    for (int h = 0; h < a.H; ++h) left -= most(least_of(h), s.above[h]);
    for (int h = 0; h < a.H; ++h) {
      const int64_t sure = most(least_of(h), s.above[h]);
      const int64_t more = least(most(least_of(h), s.above[h] + counts(h)[bin]) - sure, left);
      a.budget[int64_t(b_) * a.H + h] = int(sure + more);
      left -= more;
    }
  }

  const BudgetArgs& a;
  const BudgetScratch& s;
  const int64_t b_;
};

}  // namespace

void topk_budget(const BudgetArgs& args, const BudgetScratch& scratch, int b) {
  dispatch_dtype(args.dtype, [&]<class T>() { Sharing<T>(args, scratch, b).run(); });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
