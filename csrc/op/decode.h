// decode family at the torch boundary: the schemas, and the only place where their arguments are checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "core/decode.h"
#include "op/check.h"
#include "op/page_types.h"
#include "op/pages.h"

namespace tokencomp::decode {

constexpr const char* kSchemas[] = {
    "paged_decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? block_table, Tensor lengths, *, float scale, "
    "Tensor? index=None, Tensor? index_count=None, Tensor? key_bias=None, Tensor? position=None, Tensor? "
    "q_position=None, int? "
    "window=None, float? softcap=None, Tensor? sinks=None, bool causal=True, bool "
    "logits_out=False, " TOKENCOMP_PAGE_TYPES_SCHEMA ") -> (Tensor out, Tensor lse, Tensor logits)",
    "merge_states(Tensor out, Tensor lse) -> (Tensor out, Tensor lse)",
};

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxBatch = 65535, kMaxHeads = 1024;

// What may be left out of a decode step.
struct Options {
  MaybeTensor index, index_count, key_bias, position, q_position, sinks;
  std::optional<int64_t> window;
  std::optional<double> softcap;
  bool causal, logits_out;
  PageTypeOptions types;
};

inline void check_device(const char* op, const char* argument, const Tensor& t, const Tensor& q) {
  STD_TORCH_CHECK(same_device(t, q), op, ": ", argument, " must be on the device of q, got another device");
}

// Keys and values, of pages or dense: as many of both.
inline void check_stores(const char* op, const DecodeArgs& a, const Tensor& q, const Tensor& k, const Tensor& v) {
  for (const auto& [name, t] : {std::pair{"k_pages", &k}, std::pair{"v_pages", &v}}) {
    STD_TORCH_CHECK(t->dim() == 4, op, ": ", name, " must have shape ", a.dense ? "[B, Hkv, S, D]" : "[N, Hx, P, D]",
                    ", got ", shape_of(*t));
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), op, ": ", name, " must have the dtype of q, ",
                    torch::headeronly::toString(q.scalar_type()), ", got ",
                    torch::headeronly::toString(t->scalar_type()));
    check_device(op, name, *t, q);
    check_last_contiguous(op, name, *t);
  }
  STD_TORCH_CHECK(k.size(3) == a.D, op, ": k_pages must have D=", a.D, " channels, as q, got ", k.size(3));
  STD_TORCH_CHECK(has_shape(v, {k.size(0), k.size(1), k.size(2), v.size(3)}), op, ": v_pages must have the shape of ",
                  "k_pages but for its channels, ", shape_of(k), ", got ", shape_of(v));
}

// Without a table every sequence is one page that holds all of its heads and slots.
inline void set_dense(const char* op, DecodeArgs& a, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(k.size(0) == a.B && k.size(1) == a.Hkv, op, ": k_pages must have shape [B=", a.B, ", Hkv=", a.Hkv,
                  ", S, D=", a.D, "] without block_table, got ", shape_of(k));
  a.capacity = in_int(op, "slots S", k.size(2), 0, kMaxSlots);
  while (a.table.page_size() < a.capacity) ++a.table.shift;
  for (const auto& [pages, t] : {std::pair{&a.k, &k}, std::pair{&a.v, &v}}) {
    *pages = {const_cast<void*>(t->const_data_ptr()), t->stride(0), t->stride(1), t->stride(2), int(t->size(3))};
  }
}

inline void set_pages(const char* op, DecodeArgs& a, const Tensor& k, const Tensor& v, const Tensor& block_table,
                      const Tensor& lengths) {
  a.k = pages_of(op, "k_pages", k, a.Hkv);
  a.v = pages_of(op, "v_pages", v, a.Hkv);
  a.table = table_of(op, "block_table", block_table, lengths, k.size(2));
  a.capacity = a.table.places << a.table.shift;
}

// An array by slot, [B, 1 or Hkv, S], last dimension contiguous.
template <class T>
const T* slot_array(const char* op, const char* argument, const MaybeTensor& t, const Tensor& q, ScalarType dtype,
                    DecodeArgs& a, int64_t& stride_b, int64_t& stride_h) {
  if (!t) return nullptr;
  check_device(op, argument, *t, q);
  STD_TORCH_CHECK(t->scalar_type() == dtype, op, ": ", argument, " must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(t->scalar_type()));
  STD_TORCH_CHECK(t->dim() == 3 && t->size(0) == a.B && (t->size(1) == a.Hkv || t->size(1) == 1), op, ": ", argument,
                  " must have shape [B=", a.B, ", Hkv=", a.Hkv, " or 1, S], got ", shape_of(*t));
  check_last_contiguous(op, argument, *t);
  stride_b = t->stride(0), stride_h = t->size(1) == 1 ? 0 : t->stride(1);
  a.slots = int(std::min<int64_t>(a.slots, t->size(2)));
  return static_cast<const T*>(t->const_data_ptr());
}

inline void add_options(const char* op, DecodeArgs& a, const Tensor& q, const Options& o) {
  if (o.index) {
    STD_TORCH_CHECK(o.index->dim() == 3, op, ": index must have shape [B, Hkv, K], got ", shape_of(*o.index));
    a.listed = in_int(op, "entries of index K", o.index->size(2), 0, kMaxSlots);
    a.index = side_array<int>(op, "index", o.index, q, ScalarType::Int, {a.B, a.Hkv, a.listed}, "q");
  }
  STD_TORCH_CHECK(o.index || !o.index_count, op, ": index_count must be None unless index is given, got a tensor");
  a.index_count = side_array<int>(op, "index_count", o.index_count, q, ScalarType::Int, {a.B, a.Hkv}, "q");
  a.key_bias = slot_array<float>(op, "key_bias", o.key_bias, q, ScalarType::Float, a, a.bias_stride_b, a.bias_stride_h);
  a.position =
      slot_array<int>(op, "position", o.position, q, ScalarType::Int, a, a.position_stride_b, a.position_stride_h);
  if (o.q_position) {
    const int64_t batch = o.q_position->dim() == 2 && o.q_position->size(0) == 1 ? 1 : a.B;
    a.q_position = side_array<int>(op, "q_position", o.q_position, q, ScalarType::Int, {batch, a.T}, "q");
    a.q_position_stride = batch == 1 ? 0 : a.T;
  }
  a.sinks = side_array<float>(op, "sinks", o.sinks, q, ScalarType::Float, {a.Hq}, "q");
  if (o.window) a.window = in_int(op, "window", *o.window, 1, kMaxSlots);
  STD_TORCH_CHECK(!o.softcap || (std::isfinite(*o.softcap) && *o.softcap > 0), op,
                  ": softcap must be finite and > 0, got ", o.softcap.value_or(0));
  a.softcap = float(o.softcap.value_or(0));
  a.causal = o.causal;
}

inline DecodeArgs make_decode_args(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                   const MaybeTensor& block_table, const Tensor& lengths, double scale,
                                   const Options& o, bool mma16) {
  constexpr const char* op = "paged_decode";
  STD_TORCH_CHECK(q.dim() == 4, op, ": q must have shape [B, Hq, T, D], got ", shape_of(q));
  DecodeArgs a{};
  a.dtype = dtype_of(op, "q", q);
  a.B = in_int(op, "B", q.size(0), 0, kMaxBatch);
  a.Hq = in_int(op, "Hq", q.size(1), 1, kMaxHeads);
  a.T = in_int(op, "query rows T", q.size(2), 0, kMaxQueries);
  a.D = in_int(op, "head dimension D", q.size(3), 1, kMaxHeadDim);
  check_last_contiguous(op, "q", q);
  STD_TORCH_CHECK(lengths.dim() == 2, op, ": lengths must have shape [B, Hkv], got ", shape_of(lengths));
  a.Hkv = in_int(op, "Hkv", lengths.size(1), 1, kMaxHeads);
  STD_TORCH_CHECK(a.Hq % a.Hkv == 0, op, ": Hq must be a multiple of Hkv=", a.Hkv, ", got ", a.Hq);
  a.lengths = side_array<int>(op, "lengths", lengths, q, ScalarType::Int, {a.B, a.Hkv}, "q");
  a.dense = !block_table;
  check_stores(op, a, q, k_pages, v_pages);
  a.Dv = in_int(op, "head dimension Dv", v_pages.size(3), 1, kMaxHeadDim);
  a.pages = in_int(op, "number of pages N", k_pages.size(0), 0, (1 << kPageNumberBits) - 1);
  a.dense ? set_dense(op, a, k_pages, v_pages) : set_pages(op, a, k_pages, v_pages, *block_table, lengths);
  STD_TORCH_CHECK(!a.dense || !o.types.pools || o.types.pools->empty(), op,
                  ": pools must be None without block_table, got ", o.types.pools ? o.types.pools->size() : 0);
  a.types = make_page_types(op, q, o.types, {a.B, a.Hkv, k_pages.size(2), a.D, a.Dv, mma16});
  a.slots = a.capacity;
  STD_TORCH_CHECK(std::isfinite(scale) && scale > 0, op, ": scale must be finite and > 0, got ", scale);
  a.scale = float(scale);
  a.q = q.const_data_ptr();
  a.q_stride_b = q.stride(0), a.q_stride_h = q.stride(1), a.q_stride_t = q.stride(2);
  a.device = q.get_device_index();
  add_options(op, a, q, o);
  return a;
}

inline std::tuple<Tensor, Tensor, Tensor> make_decode_outputs(DecodeArgs& a, const Tensor& q, bool logits_out) {
  Tensor out = torch::stable::new_empty(q, {a.B, a.Hq, a.T, a.Dv});
  Tensor lse = torch::stable::new_empty(q, {a.B, a.Hq, a.T}, ScalarType::Float);
  const int64_t wide = logits_out ? a.capacity : 0;
  Tensor logits = torch::stable::new_empty(q, {a.B, a.Hq, a.T, wide}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.logits = logits_out ? static_cast<float*>(logits.mutable_data_ptr()) : nullptr;
  return {out, lse, logits};
}

inline MergeArgs make_merge_args(const Tensor& out, const Tensor& lse) {
  constexpr const char* op = "merge_states";
  STD_TORCH_CHECK(out.dim() >= 2, op, ": out must have shape [S, ..., Dv], got ", shape_of(out));
  MergeArgs m{};
  m.dtype = dtype_of(op, "out", out);
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous, got strides that are not");
  STD_TORCH_CHECK(same_device(lse, out), op, ": lse must be on the device of out, got another device");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float, op, ": lse must be Float, got ",
                  torch::headeronly::toString(lse.scalar_type()));
  bool same = lse.dim() == out.dim() - 1;
  for (int64_t i = 0; same && i < lse.dim(); ++i) same = lse.size(i) == out.size(i);
  STD_TORCH_CHECK(same && lse.is_contiguous(), op, ": lse must be contiguous and have the shape of out without its ",
                  "last dimension, ", shape_of(out), ", got ", shape_of(lse));
  m.states = in_int(op, "states S", out.size(0), 0, kMaxSlots);
  m.D = in_int(op, "head dimension Dv", out.size(out.dim() - 1), 0, kMaxSlots);
  m.rows = 1;
  for (int64_t i = 1; i < lse.dim(); ++i) m.rows *= lse.size(i);
  m.out = out.const_data_ptr();
  m.lse = static_cast<const float*>(lse.const_data_ptr());
  m.device = out.get_device_index();
  return m;
}

inline std::tuple<Tensor, Tensor> make_merge_outputs(MergeArgs& m, const Tensor& out, const Tensor& lse) {
  std::vector<int64_t> shape;
  for (int64_t i = 1; i < lse.dim(); ++i) shape.push_back(lse.size(i));
  Tensor merged_lse = torch::stable::new_empty(lse, shape);
  shape.push_back(m.D);
  Tensor merged = torch::stable::new_empty(out, shape);
  m.merged = merged.mutable_data_ptr();
  m.merged_lse = static_cast<float*>(merged_lse.mutable_data_ptr());
  return {merged, merged_lse};
}

}  // namespace tokencomp::decode
