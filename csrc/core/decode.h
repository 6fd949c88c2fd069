// Decode attention over pages: arguments and the rules both back ends share, torch-free. All heads of a group and all
// query rows make one list of `rows()` rows that read the same keys; row r is head r / T of the group, query row r % T.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/page_types.h"

namespace tokencomp::decode {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kMaxQueries = 8, kMaxHeadDim = 256;

struct DecodeArgs {
  int B, Hq, Hkv, T, D, Dv;
  DType dtype;
  const void* q;  // [B, Hq, T, D], strides in elements, last dimension contiguous
  int64_t q_stride_b, q_stride_h, q_stride_t;
  Pages k, v;
  PageTable table;         // without places where `dense`
  bool dense;              // k and v are [B, Hkv, S, D]: one page a sequence, whose number is the sequence's
  int capacity;            // slots that a row has room for
  int pages;               // in the working pool
  PageTypes types;         // the other pools
  const int* lengths;      // [B, Hkv] slots in use
  const int* index;        // [B, Hkv, listed] slots to look at, -1: hole; or null: all
  const int* index_count;  // [B, Hkv] entries of a list that count, or null: all
  int listed;
  const float* key_bias;  // of slot s at b * bias_stride_b + kv * bias_stride_h + s, or null
  int64_t bias_stride_b, bias_stride_h;
  const int* position;  // strided likewise, or null: the slot itself
  int64_t position_stride_b, position_stride_h;
  const int* q_position;  // of row t at b * q_position_stride + t, or null: that of the row's own slot
  int64_t q_position_stride;
  const float* sinks;  // [Hq] or null
  int slots;           // that the table, key_bias and position all cover
  int window;          // 0: none
  bool causal;
  float scale, softcap;  // softcap 0: none
  void* out;             // [B, Hq, T, Dv]
  float *lse, *logits;   // [B, Hq, T]; [B, Hq, T, capacity] or null
  int device;

  TC_HD int group() const { return Hq / Hkv; }
  TC_HD int rows() const { return group() * T; }
};

struct MergeArgs {
  const void* out;   // [states, rows, D]
  const float* lse;  // [states, rows]
  int64_t rows;
  int states, D;
  DType dtype;
  void* merged;
  float* merged_lse;
  int device;
};

// The table entry of the page of (b, kv) that holds `slot`, kNoPage where that names no page there is.
TC_HD int32_t entry_of(const DecodeArgs& a, int b, int kv, int slot) {
  if (a.dense) return b;
  const int32_t entry = a.table.row(b, kv)[slot >> a.table.shift];
  return a.types.type_of(entry, a.pages) < 0 ? kNoPage : entry;
}

// The working page of (b, kv) that holds `slot`, or -1: none, or of another type.
TC_HD int page_of(const DecodeArgs& a, int b, int kv, int slot) {
  if (a.dense) return b;
  const int32_t entry = a.table.row(b, kv)[slot >> a.table.shift];
  return uint32_t(entry) < uint32_t(a.pages) ? entry : -1;
}

// Slots of (b, kv) in use. Never more than there is memory for, whatever the length says.
TC_HD int length_of(const DecodeArgs& a, int b, int kv) {
  const int n = a.lengths[b * a.Hkv + kv];
  return n < 0 ? 0 : n < a.slots ? n : a.slots;
}

// Entries of the list of (b, kv), or its slots where there is no list.
TC_HD int candidates_of(const DecodeArgs& a, int b, int kv) {
  if (!a.index) return length_of(a, b, kv);
  if (!a.index_count) return a.listed;
  const int n = a.index_count[b * a.Hkv + kv];
  return n < 0 ? 0 : n < a.listed ? n : a.listed;
}

// Query row t sees slots below this one.
TC_HD int end_of(const DecodeArgs& a, int t, int length) { return a.causal ? length - (a.T - 1 - t) : length; }

TC_HD int position_of(const DecodeArgs& a, int b, int kv, int slot) {
  return a.position ? a.position[b * a.position_stride_b + kv * a.position_stride_h + slot] : slot;
}

// Query row t sees slots whose position is above this. A row without a position of its own sees nothing.
TC_HD int floor_of(const DecodeArgs& a, int b, int kv, int t, int length) {
  constexpr int kLowest = -0x7fffffff - 1, kHighest = 0x7fffffff;
  if (!a.window) return kLowest;
  const int own = length - a.T + t;
  if (a.q_position) {
    const int64_t floor = int64_t(a.q_position[b * a.q_position_stride + t]) - a.window;
    return floor < kLowest ? kLowest : int(floor);
  }
  return own < 0 ? kHighest : position_of(a, b, kv, own) - a.window;
}

// The first slot that a window leaves visible to any row: positions ascend with slots.
TC_HD int first_slot(const DecodeArgs& a, int b, int kv, int length) {
  if (!a.window) return 0;
  int floor = floor_of(a, b, kv, 0, length);
  for (int t = 1; t < a.T; ++t) {
    const int other = floor_of(a, b, kv, t, length);
    floor = other < floor ? other : floor;
  }
  int low = 0, high = length;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (position_of(a, b, kv, middle) > floor) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

TC_HD bool is_finite(float x) { return x - x == 0.0f; }

}  // namespace tokencomp::decode
