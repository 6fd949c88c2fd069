// Selection by score: the arguments every back end receives and the arithmetic they share.
//
// Tokens of a row become 32-bit slots whose integer order is the order of selection:
//   kForced   protected: kept without looking at the score
//   key       sortable(score), see core/order.h; top-p: of the mass, which is the score where that is above 0, else 0
//   kSkip     not a candidate: beyond the protected tokens, where these alone fill the row
// What is kept is the shortest prefix of the order (protected first, larger key, lower index) that reaches a Goal;
// top-k is the goal of a count, top-p that of a sum. Its last token's key, the threshold, is found digit by digit from
// histograms of the slots, so that nothing is sorted, and one more pass writes the kept indices ascending. Sums are
// integers (Units), so no result depends on the order of summation.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/order.h"

namespace tokencomp::topk {

struct Args {
  const void* score = nullptr;     // [R, S], elements of `dtype`, last dimension contiguous
  const int* k_per_row = nullptr;  // [R], or null: k
  const uint8_t* keep = nullptr;   // [R, S] protected tokens, or null
  const int* lengths = nullptr;    // [R], or null: S
  int* index = nullptr;            // [R, k], ascending, -1 behind the last
  int* count = nullptr;            // [R]
  int64_t stride = 0;              // of a row of scores, in elements
  int R = 0, S = 0, k = 0;         // k is the width of the output, and the most tokens a row may keep
  int head = 0, tail = 0, min_k = 0;
  bool by_mass = false;  // top-p
  double p = 0;
  DType dtype = DType::f32;
  int device = -1;
};

// Budgets of H rows that share one selection of k.
struct BudgetArgs {
  const void* score = nullptr;   // [B, H, S], last dimension contiguous
  const int* lengths = nullptr;  // [B, H], or null: S
  int* budget = nullptr;         // [B, H]
  int64_t stride_b = 0, stride_h = 0;
  int B = 0, H = 0, S = 0, k = 0, floor = 0;
  DType dtype = DType::f32;
  int device = -1;
};

TC_HD int clamped(int value, int low, int high) { return value < low ? low : value > high ? high : value; }
TC_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TC_HD int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- slots

constexpr uint32_t kSkip = 0, kForced = 0xffffffffu;  // no score's key: those lie in [sortable(-inf), sortable(inf)]
constexpr uint32_t kLargestMass = 0x7f7fffffu;        // bits of the largest finite float: infinity counts as this

TC_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

// The mass of a score as the bits of a float: NaN and what is below 0 count as 0.
TC_HD uint32_t mass_bits(float score) {
  const uint32_t u = float_bits(score > 0.0f ? score : 0.0f);
  return u < kLargestMass ? u : kLargestMass;
}
TC_HD uint32_t mass_key(uint32_t bits) { return bits | 0x80000000u; }  // sortable() of a float that is not negative
TC_HD uint32_t mass_of_key(uint32_t key) { return key & 0x7fffffffu; }

// ---- digits: from the top, 11 + 11 + 10 bits

constexpr int kLevels = 3, kDigitBits = 11, kBins = 1 << kDigitBits;

TC_HD int digit_shift(int level) { return level == 0 ? 21 : level == 1 ? 10 : 0; }
TC_HD int digit_bins(int level) { return level == 2 ? kBins / 2 : kBins; }
TC_HD int digit(uint32_t slot, int level) { return int(slot >> digit_shift(level)) & (digit_bins(level) - 1); }
// Whether the digits above `level` are those of `prefix`.
TC_HD bool in_prefix(uint32_t slot, uint32_t prefix, int level) {
  return level == 0 || (slot ^ prefix) >> (level == 1 ? 21 : 10) == 0;
}
// No key has this first digit; kForced has.
constexpr int kForcedBin = kBins - 1;

// ---- masses as integers

// Masses of a row of n tokens in units of 2^-bits of a power of two above the largest: all sums stay below 2^62.
struct Units {
  int top, bits;  // exponent field of the largest mass (1 for subnormal ones), bits of its units

  TC_HD uint64_t of(uint32_t mass) const {
    const int field = int(mass >> 23);
    const uint32_t mantissa = (mass & 0x7fffffu) | (field ? 0x800000u : 0u);
    const int shift = (field ? field : 1) - top + bits - 24;
    // & 63: of kForced, whose bin nobody reads, more would be left over than a word has bits
    const int left = shift > 0 ? shift & 63 : 0, right = shift < -31 ? 31 : shift < 0 ? -shift : 0;
    return uint64_t(mantissa >> right) << left;
  }
};

TC_HD int bit_length(uint32_t n) {
  int bits = 0;
  for (; n; n >>= 1) ++bits;
  return bits;
}

TC_HD Units units_of(uint32_t largest_mass, int n) {
  const int field = int(largest_mass >> 23);
  return {field ? field : 1, 62 - bit_length(uint32_t(n))};
}

// p of the total, rounded up. The product is one rounding of a double: the same everywhere.
TC_HD uint64_t share_of(double p, uint64_t total) {
  if (p >= 1.0) return total;
  const double share = ceil(p * double(total));
  return share < double(total) ? uint64_t(share) : total;
}

// ---- what is to be reached

// The shortest prefix of at least `low` and at most `high` tokens, or, from `low` on, of `mass` units.
struct Goal {
  int64_t low, high;
  uint64_t mass;

  TC_HD bool met(int64_t count, uint64_t sum) const { return count >= high || (count >= low && sum >= mass); }

  // Tokens of `each` units to add to what is above, `least_met` of which would meet the goal.
  TC_HD int64_t missing(int64_t above, uint64_t sum, uint64_t each) const {
    int64_t needed = most(low - above, 0);
    if (sum < mass) {
      const uint64_t more = each ? (mass - sum + each - 1) / each : uint64_t(high);
      needed = most(needed, more < uint64_t(high) ? int64_t(more) : high);
    }
    return least(needed, high - above);
  }
};

// Where a prefix ends: all slots above `key`, and the first `ties` of those equal to it.
struct Threshold {
  uint32_t key;
  int64_t above;  // candidates above it
  int64_t ties;
};

// ---- a row and its protected tokens

struct Row {
  int n, k;                  // valid tokens, most tokens to keep
  int head_end, tail_begin;  // protected: [0, head_end), [tail_begin, n), and where `keep` says so
  bool overfull;             // protected tokens alone exceed k: they are the candidates, nothing is forced

  TC_HD bool outside(int i) const { return i < head_end || i >= tail_begin; }
  TC_HD int outside_count() const { return head_end + n - tail_begin; }
};

TC_HD Row row_of(const Args& a, int r) {
  Row row;
  row.n = a.lengths ? clamped(a.lengths[r], 0, a.S) : a.S;
  row.k = a.k_per_row ? clamped(a.k_per_row[r], 0, a.k) : a.k;
  row.head_end = a.head < row.n ? a.head : row.n;
  const int tail = a.tail < row.n - row.head_end ? a.tail : row.n - row.head_end;
  row.tail_begin = row.n - tail;
  row.overfull = false;
  return row;
}

// The slot of token i.
TC_HD uint32_t slot_of(const Row& row, bool by_mass, float score, int i, bool kept) {
  const uint32_t key = by_mass ? mass_key(mass_bits(score)) : sortable(score);
  const bool protected_token = row.outside(i) || kept;
  if (row.overfull) return protected_token ? key : kSkip;
  return protected_token ? kForced : key;
}

// What candidates must reach when `forced` tokens of `forced_mass` units are kept anyway (none, if overfull).
TC_HD Goal goal_of(const Args& a, const Row& row, int64_t forced, uint64_t forced_mass, uint64_t total) {
  const int64_t room = least(row.k, row.n) - forced;
  if (!a.by_mass || row.overfull) return {room, room, 0};
  const uint64_t share = share_of(a.p, total);
  return {least(most(a.min_k - forced, 0), room), room, share > forced_mass ? share - forced_mass : 0};
}

}  // namespace tokencomp::topk
