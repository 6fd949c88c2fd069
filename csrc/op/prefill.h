// prefill family at the torch boundary: the schema, and the only place where its arguments are checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "core/prefill.h"
#include "op/attention.h"

namespace tokencomp::prefill {

constexpr const char* kSchema =
    "flash_prefill(Tensor q, Tensor k, Tensor v, *, float scale, Tensor? indptr=None, Tensor? indices=None, Tensor? "
    "column_ptr=None, Tensor? columns=None, int block_q=64, int block_k=64, Tensor? key_bias=None, Tensor? "
    "q_position=None, Tensor? lengths=None, Tensor? starts=None, bool causal=True, int? window=None, float? "
    "softcap=None, Tensor? sinks=None, Tensor? block_table=None, Tensor? q_starts=None, Tensor? "
    "q_counts=None, " TOKENCOMP_PAGE_TYPES_SCHEMA ") -> (Tensor out, Tensor lse)";

constexpr const char* kOp = "flash_prefill";

// What chooses keys beside who sees whom.
struct Choice {
  MaybeTensor indptr, indices, column_ptr, columns;
  int64_t block_q, block_k;
};

// Where keys and values lie.
struct Store {
  MaybeTensor block_table;
  PageTypeOptions types;
  bool mma16;  // the layout of quantized pages that this back end reads
};

inline void add_value_pages(PrefillArgs& p, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(has_shape(v, {k.size(0), k.size(1), k.size(2), v.size(3)}), kOp,
                  ": v must have as many pages, heads and slots as k, ", shape_of(k), ", got ", shape_of(v));
  p.v_pages.page_stride = v.stride(0), p.v_pages.slot_stride = v.stride(2);
  p.v_pages.head_stride = v.size(1) == 1 ? 0 : v.stride(1);
}

inline void add_values(PrefillArgs& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  const Geometry& g = p.a.g;
  STD_TORCH_CHECK(v.dim() == 4, kOp, ": v must have shape [B, Hkv, S, Dv], got ", shape_of(v));
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), kOp, ": v must have the dtype of q, ",
                  torch::headeronly::toString(q.scalar_type()), ", got ", torch::headeronly::toString(v.scalar_type()));
  STD_TORCH_CHECK(same_device(q, v), kOp, ": v must be on the device of q, got another device");
  if (p.a.table.entry) {
    add_value_pages(p, k, v);
  } else {
    STD_TORCH_CHECK(v.size(0) == g.B && v.size(1) == g.Hkv && v.size(2) == g.S, kOp, ": v must have shape [B=", g.B,
                    ", Hkv=", g.Hkv, ", S=", g.S, ", Dv], got ", shape_of(v));
    p.v_stride_b = v.stride(0), p.v_stride_h = v.stride(1), p.v_stride_s = v.stride(2);
  }
  p.Dv = in_int(kOp, "value dimension Dv", v.size(3), 1, kMaxHeadDim);
  check_last_contiguous(kOp, "v", v);
  p.v = v.const_data_ptr();
}

inline Lists make_lists(const PrefillArgs& p, const Tensor& q, const char* pointer_name, const MaybeTensor& pointer,
                        const char* entries_name, const MaybeTensor& entries) {
  const Geometry& g = p.a.g;
  STD_TORCH_CHECK(bool(pointer) == bool(entries), kOp, ": ", pointer_name, " and ", entries_name,
                  " must be given together, got one of them");
  if (!pointer) return {};
  STD_TORCH_CHECK(pointer->dim() == 1 && entries->dim() == 1, kOp, ": ", pointer_name, " and ", entries_name,
                  " must be one-dimensional, got ", shape_of(*pointer), " and ", shape_of(*entries));
  const int64_t rows = int64_t(g.B) * p.query_blocks, lists = pointer->size(0) - 1;
  int heads = 0;
  for (const int candidate : {1, g.Hkv, g.Hq}) heads = lists == rows * candidate ? candidate : heads;
  STD_TORCH_CHECK(heads, kOp, ": ", pointer_name, " must have B * H * blocks + 1 = ", g.B, " * H * ", p.query_blocks,
                  " + 1 elements with H one of 1, Hkv=", g.Hkv, ", Hq=", g.Hq, ", got ", pointer->size(0));
  Lists l{};
  l.heads = heads;
  l.capacity = in_int(kOp, "entries of a list array", entries->size(0), 0, 0x7fffffff);
  l.pointer = side_array<int>(kOp, pointer_name, pointer, q, ScalarType::Int, {pointer->size(0)}, "q");
  l.entries = side_array<int>(kOp, entries_name, entries, q, ScalarType::Int, {entries->size(0)}, "q");
  return l;
}

inline PrefillArgs make_prefill_args(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                     const Choice& choice, const MaybeTensor& key_bias, const Sight& sight,
                                     std::optional<double> softcap, const MaybeTensor& sinks, const Store& store) {
  PrefillArgs p{};
  p.a = make_attention(kOp, q, k, scale, softcap, store.block_table);
  add_bias(kOp, p.a, q, key_bias);
  add_sight(kOp, p.a, q, sight);
  add_values(p, q, k, v);
  add_page_types(kOp, p.a, q, store.types, p.Dv, store.mma16);
  for (const auto& [name, size] : {std::pair{"block_q", choice.block_q}, std::pair{"block_k", choice.block_k}}) {
    STD_TORCH_CHECK(size == 64 || size == 128, kOp, ": ", name, " must be 64 or 128, got ", size);
  }
  p.block_q = int(choice.block_q);
  p.block_k = int(choice.block_k);
  p.query_blocks = (p.a.g.T + p.block_q - 1) / p.block_q;
  STD_TORCH_CHECK(choice.indptr || !choice.column_ptr, kOp, ": column_ptr must be None unless indptr is given, got ",
                  "a tensor");
  p.blocks = make_lists(p, q, "indptr", choice.indptr, "indices", choice.indices);
  p.columns = make_lists(p, q, "column_ptr", choice.column_ptr, "columns", choice.columns);
  p.sinks = side_array<float>(kOp, "sinks", sinks, q, ScalarType::Float, {p.a.g.Hq}, "q");
  return p;
}

inline std::tuple<Tensor, Tensor> make_prefill_outputs(PrefillArgs& p, const Tensor& q) {
  const Geometry& g = p.a.g;
  Tensor out = torch::stable::new_empty(q, {g.B, g.Hq, g.T, p.Dv});
  Tensor lse = torch::stable::new_empty(q, {g.B, g.Hq, g.T}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  return {out, lse};
}

}  // namespace tokencomp::prefill
