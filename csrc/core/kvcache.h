// The KV cache in pages: the arguments every back end receives and the rules they share.
//
//   append   new tokens behind the last slot of each row
//   compact  the kept slots move to the front, in order or into the holes
//   gather   slots to a dense tensor
//   shift    keys turned to new positions
//   assign   the nearest kept slot of every member
//   merge    members mixed into their kept slots
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/pages.h"

namespace tokencomp::kvcache {

enum class Order { stable, holefill };

// Pages and the rows that live in them.
struct Store {
  Pages k, v;
  PageTable table;
  const int* lengths = nullptr;  // [B, Hkv] slots in use
  int B = 0, Hkv = 0;
  DType dtype = DType::f32;
  int device = -1;

  TC_HD int rows() const { return B * Hkv; }
  TC_HD int element_bytes() const { return dtype == DType::f32 ? 4 : 2; }
};

struct AppendArgs {
  Store s;
  const void *k = nullptr, *v = nullptr;  // [B, Hkv, T, channels]
  int64_t k_stride_b = 0, k_stride_h = 0, k_stride_t = 0, v_stride_b = 0, v_stride_h = 0, v_stride_t = 0;
  int T = 0;
  const int *starts = nullptr, *counts = nullptr;  // [B], or null: from 0, T

  TC_HD int start(int b) const { return starts ? starts[b] : 0; }
  TC_HD int count(int b) const { return counts ? counts[b] : T - start(b); }
};

// Of an ascending list of n slots, how many are below `slot`.
TC_HD int slots_below(const int* list, int n, int slot) {
  int low = 0;
  while (n > 0) {
    const int half = n / 2;
    if (list[low + half] < slot) {
      low += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return low;
}

struct CompactArgs {
  Store s;
  PageTable to;                // where the kept slots go: the rows' own pages or others
  const int* index = nullptr;  // [B, Hkv, K] ascending
  const int* count = nullptr;  // [B, Hkv]
  int K = 0;
  Order order = Order::stable;

  // The slot that slot i of the result comes from. holefill: a kept slot below the new length stays, and the holes are
  // filled, lowest first, from the last kept slot backwards. Every slot finds its source alone, without a list of
  // moves.
  TC_HD int source(int row, int i) const {
    const int* list = index + int64_t(row) * K;
    if (order == Order::stable) return list[i];
    const int kept = count[row], below = slots_below(list, kept, i);
    return list[below] == i ? i : list[kept - 1 - (i - below)];
  }
};

// The same sources one after the other, in O(1) each.
class SourceWalk {
 public:
  TC_HD SourceWalk(const CompactArgs& c, int row)
      : list_(c.index + int64_t(row) * c.K), kept_(c.count[row]), stable_(c.order == Order::stable) {}
  TC_HD int next() {
    const int i = at_++;
    if (stable_) return list_[i];
    if (list_[below_] != i) return list_[kept_ - 1 - (i - below_)];
    ++below_;
    return i;
  }

 private:
  const int* list_;
  int kept_, at_ = 0, below_ = 0;
  bool stable_;
};

struct GatherArgs {
  Store s;
  const int *index = nullptr, *count = nullptr;  // [B, Hkv, K], [B, Hkv]; null: slot i, length
  int K = 0, size = 0;
  void *k = nullptr, *v = nullptr;  // [B, Hkv, size, channels]

  // The slot that token i of the result comes from, -1 where there is none.
  TC_HD int source(int row, int i) const {
    const int length = s.lengths[row];
    if (!index) return i < length ? i : -1;
    const int n = count ? count[row] : K;
    if (i >= n || i >= K) return -1;
    const int slot = index[int64_t(row) * K + i];
    return slot < length ? slot : -1;
  }
};

struct ShiftArgs {
  Store s;                                                     // keys alone
  const int *old_position = nullptr, *new_position = nullptr;  // [B, Hkv, S]
  int S = 0;
  const float* inv_freq = nullptr;  // [pairs] radians a position
  int pairs = 0;
  bool interleaved = false;

  TC_HD int delta(int row, int slot) const {
    const int64_t at = int64_t(row) * S + slot;
    return new_position[at] - old_position[at];
  }
};

}  // namespace tokencomp::kvcache
