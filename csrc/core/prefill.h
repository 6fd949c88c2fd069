// Prefill attention: arguments and the rules both back ends share, torch-free.
#pragma once

#include "core/attention.h"

namespace tokencomp::prefill {

using namespace attention;

// One list for each (sequence, head, query block), one after the other in `entries`: list i holds entries pointer[i]
// ... pointer[i + 1]. Absent where `pointer` is null.
struct Lists {
  const int *pointer, *entries;
  int heads;     // 1, Hkv or Hq: neighbouring query heads share a list
  int capacity;  // entries there are
};

struct PrefillArgs {
  Attention a;
  const void* v;                               // [B, Hkv, S, Dv] or a pool of pages, as the keys
  int64_t v_stride_b, v_stride_h, v_stride_s;  // unless paged
  Pages v_pages;
  int Dv;
  const float* sinks;  // [Hq] or null
  Lists blocks, columns;
  int block_q, block_k, query_blocks;
  void* out;   // [B, Hq, T, Dv]
  float* lse;  // [B, Hq, T]
};

// The part of `entries` that belongs to query block m of head h; within bounds whatever the pointers say.
TC_HD Range list_of(const PrefillArgs& p, const Lists& lists, int b, int h, int m) {
  if (!lists.pointer) return {0, 0};
  const int64_t row = (int64_t(b) * lists.heads + h / (p.a.g.Hq / lists.heads)) * p.query_blocks + m;
  const int begin = lists.pointer[row], end = lists.pointer[row + 1];
  const int from = begin > 0 ? begin : 0, to = end < lists.capacity ? end : lists.capacity;
  return from < to ? Range{from, to} : Range{0, 0};
}

// The key block that an entry names. The highest bit, with which other kernels mark blocks that need a mask, says
// nothing here: a block is masked where the rows' ranges say so.
TC_HD int block_of(int entry) { return entry & 0x7fffffff; }

// What the softmax of a row ends with: its factor and its log-sum-exp. `top` is the largest logit in units of log2(e),
// `sum` that of 2^(logit - top).
struct RowEnd {
  float factor, lse;
};
TC_HD RowEnd finish_row(float top, float sum, const float* sink) {
  if (top == INFINITY) return {NAN, INFINITY};
  const bool empty = top == -INFINITY;
  if (!sink) return empty ? RowEnd{0.0f, -INFINITY} : RowEnd{1.0f / sum, top * kLn2 + logf(sum)};
  if (empty) return {0.0f, *sink};
  const float own = *sink * kLog2e, highest = own > top ? own : top;
  const float scale = exp2f(top - highest), total = sum * scale + exp2f(own - highest);
  return {scale / total, highest * kLn2 + logf(total)};
}

}  // namespace tokencomp::prefill
