// Queries against keys, for every family that multiplies them: who sees whom, and where the operands lie. Torch-free.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/page_types.h"

namespace tokencomp::attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kMaxHeadDim = 256;

// Half-open.
struct Range {
  int begin, end;
};

// Who sees whom.
struct Geometry {
  int B, Hq, Hkv, T, S, D;
  const int* q_position;  // of row (b, t) at b * position_stride + t, or null: see position_of
  int64_t position_stride;
  const int *q_starts, *q_counts;  // [B] the rows that are no padding, or null: from 0, all that follow
  bool at_end;                     // whether rows count back from the end of each (b, kv), not from S
  const int* lengths;              // of (b, kv) at b * lengths_b + kv * lengths_h, or null: S
  int64_t lengths_b, lengths_h;
  const int* starts;  // [B] or null
  bool causal;
  int window;  // keys that a row sees, itself included; 0: all

  TC_HD int group() const { return Hq / Hkv; }
};

// Keys of sequence b that kv head `kv` has.
TC_HD Range keys_of(const Geometry& g, int b, int kv) {
  const int start = g.starts ? g.starts[b] : 0;
  const int length = g.lengths ? g.lengths[b * g.lengths_b + kv * g.lengths_h] : g.S;
  return {start > 0 ? start : 0, length < g.S ? length : g.S};
}

// Where row t sits among the keys of (b, kv): the rows are the last ones. -1: padding.
TC_HD int position_of(const Geometry& g, int b, int kv, int t) {
  if (g.q_position) return g.q_position[b * g.position_stride + t];
  if (!g.at_end) return g.S - g.T + t;
  const int start = g.q_starts ? g.q_starts[b] : 0, count = g.q_counts ? g.q_counts[b] : g.T - start;
  return t >= start && t - start < count ? keys_of(g, b, kv).end - count + t - start : -1;
}

// Keys of kv head `kv` that row t of sequence b sees; empty as {0, 0}.
TC_HD Range visible(const Geometry& g, int b, int kv, int t) {
  Range r = keys_of(g, b, kv);
  if (g.causal || g.q_position || g.q_starts || g.q_counts) {
    const int p = position_of(g, b, kv, t);
    if (p < r.begin || p >= r.end) return {0, 0};  // padding
    if (g.causal) {
      r.end = p + 1;
      if (g.window && p - g.window + 1 > r.begin) r.begin = p - g.window + 1;
    }
  }
  if (r.begin >= r.end) return {0, 0};
  return r;
}

// Queries and keys; strides in elements, the last dimension is contiguous.
struct Attention {
  Geometry g;
  const void *q, *k, *k_min;  // [B, Hq, T, D], [B, Hkv, S, D] or a pool of pages; k_min: laid out as k, or null
  int64_t q_stride_b, q_stride_h, q_stride_t;
  int64_t k_stride_b, k_stride_h, k_stride_s;  // unless paged
  Pages pages;                                 // the layout of the pool, where there is a table
  PageTable table;
  int page_count;   // of the working pool
  PageTypes types;  // the other pools
  DType dtype;
  float scale, softcap;   // softcap 0: none
  const float* key_bias;  // [B, 1 or Hkv, S] or null
  int64_t bias_stride_b, bias_stride_h;
  int device;
};

// Where slot `slot` of (b, kv) begins in the pool, in elements; -1 where the table names no working page, so that a
// wild entry is a hole rather than an address.
TC_HD int64_t slot_offset(const Attention& a, int b, int kv, int slot) {
  const int32_t entry = a.table.row(b, kv)[slot >> a.table.shift];
  if (page_type(entry) != 0 || page_number(entry) >= a.page_count) return -1;
  return a.pages.offset(entry, kv, a.table.slot_in_page(slot));
}

// Whether any page holds that slot.
TC_HD bool has_page(const Attention& a, int b, int kv, int slot) {
  return a.types.type_of(a.table.row(b, kv)[slot >> a.table.shift], a.page_count) >= 0;
}

TC_HD bool is_finite(float x) { return x - x == 0.0f; }

}  // namespace tokencomp::attention
