// What operators with queries and keys have in common at the torch boundary: the checks of those arguments.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "core/attention.h"
#include "op/check.h"
#include "op/page_types.h"

namespace tokencomp::attention {

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxBatch = 65535, kMaxHeads = 65535, kMaxTokens = 1 << 28;

// Where a row sits and what it may see, as the operators take it.
struct Sight {
  MaybeTensor q_position, lengths, starts;
  bool causal;
  std::optional<int64_t> window;
  MaybeTensor q_starts = {}, q_counts = {};
};

inline void set_dense_keys(const char* op, Attention& a, const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3), op, ": k must have shape [B=", q.size(0),
                  ", Hkv, S, D=", q.size(3), "], got ", shape_of(k));
  a.g.Hkv = in_int(op, "Hkv", k.size(1), 1, kMaxHeads);
  a.g.S = in_int(op, "S", k.size(2), 0, kMaxTokens);
  a.k_stride_b = k.stride(0), a.k_stride_h = k.stride(1), a.k_stride_s = k.stride(2);
}

// k is a pool [pages, 1 or Hkv, P, D]; the table's entries are values, which the Python layer checks.
inline void set_paged_keys(const char* op, Attention& a, const Tensor& q, const Tensor& k, const Tensor& table) {
  STD_TORCH_CHECK(same_device(table, q), op, ": block_table must be on the device of q, got another device");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int, op, ": block_table must be Int, got ",
                  torch::headeronly::toString(table.scalar_type()));
  STD_TORCH_CHECK(table.dim() == 3 && table.size(0) == q.size(0), op, ": block_table must have shape [B=", q.size(0),
                  ", Hkv, pages], got ", shape_of(table));
  check_last_contiguous(op, "block_table", table);
  const int heads = a.g.Hkv = in_int(op, "Hkv", table.size(1), 1, kMaxHeads);
  STD_TORCH_CHECK((k.size(1) == 1 || k.size(1) == heads) && k.size(3) == q.size(3), op,
                  ": k must have shape [pages, 1 or Hkv=", heads, ", P, D=", q.size(3), "] with block_table, got ",
                  shape_of(k));
  const int64_t P = k.size(2), places = table.size(2);
  STD_TORCH_CHECK(P >= 1 && P <= kMaxTokens && (P & (P - 1)) == 0, op, ": page size P must be a power of two, got ", P);
  a.page_count = in_int(op, "pages", k.size(0), 0, int64_t(1) << kPageNumberBits);
  a.g.S = in_int(op, "S", P * places, 0, kMaxTokens);
  a.pages.page_stride = k.stride(0), a.pages.slot_stride = k.stride(2);
  a.pages.head_stride = k.size(1) == 1 ? 0 : k.stride(1);
  static const int32_t nothing = kNoPage;  // a table without places has no address, but is a table
  a.table.entry = table.numel() ? static_cast<const int*>(table.const_data_ptr()) : &nothing;
  a.table.stride_b = table.stride(0), a.table.stride_h = table.stride(1);
  a.table.places = int(places);
  while (P > a.table.page_size()) ++a.table.shift;
}

// q [B, Hq, T, D] against keys: k [B, Hkv, S, D] or, with a table, pages.
inline Attention make_attention(const char* op, const Tensor& q, const Tensor& k, double scale,
                                std::optional<double> softcap, const MaybeTensor& block_table = {}) {
  STD_TORCH_CHECK(q.dim() == 4, op, ": q must have shape [B, Hq, T, D], got ", shape_of(q));
  STD_TORCH_CHECK(k.dim() == 4, op, ": k must have shape ", block_table ? "[pages, Hkv, P, D]" : "[B, Hkv, S, D]",
                  ", got ", shape_of(k));
  Attention a{};
  a.dtype = dtype_of(op, "q", q);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), op, ": k must have the dtype of q, ",
                  torch::headeronly::toString(q.scalar_type()), ", got ", torch::headeronly::toString(k.scalar_type()));
  STD_TORCH_CHECK(same_device(q, k), op, ": k must be on the device of q, got another device");
  Geometry& g = a.g;
  g.B = in_int(op, "B", q.size(0), 0, kMaxBatch);
  g.Hq = in_int(op, "Hq", q.size(1), 1, kMaxHeads);
  g.T = in_int(op, "T", q.size(2), 0, kMaxTokens);
  block_table ? set_paged_keys(op, a, q, k, *block_table) : set_dense_keys(op, a, q, k);
  g.D = in_int(op, "head dimension D", q.size(3), 1, kMaxHeadDim);
  STD_TORCH_CHECK(g.Hq % g.Hkv == 0, op, ": Hq must be a multiple of Hkv=", g.Hkv, ", got ", g.Hq);
  check_last_contiguous(op, "q", q);
  check_last_contiguous(op, "k", k);
  STD_TORCH_CHECK(std::isfinite(scale) && scale > 0, op, ": scale must be finite and > 0, got ", scale);
  STD_TORCH_CHECK(!softcap || (std::isfinite(*softcap) && *softcap > 0), op, ": softcap must be finite and > 0, got ",
                  softcap.value_or(0));
  a.scale = float(scale);
  a.softcap = float(softcap.value_or(0));
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.q_stride_b = q.stride(0), a.q_stride_h = q.stride(1), a.q_stride_t = q.stride(2);
  a.device = q.get_device_index();
  return a;
}

inline void add_bias(const char* op, Attention& a, const Tensor& q, const MaybeTensor& key_bias) {
  if (!key_bias) return;
  const int64_t heads = key_bias->dim() == 3 && key_bias->size(1) == 1 ? 1 : a.g.Hkv;
  a.key_bias = side_array<float>(op, "key_bias", key_bias, q, ScalarType::Float, {a.g.B, heads, a.g.S});
  a.bias_stride_b = heads * a.g.S;
  a.bias_stride_h = heads == 1 ? 0 : a.g.S;
}

// Keys of each sequence, or of each (sequence, kv head).
inline void add_lengths(const char* op, Attention& a, const Tensor& q, const MaybeTensor& lengths, bool per_head) {
  Geometry& g = a.g;
  per_head = per_head && lengths && lengths->dim() == 2;
  g.lengths = per_head ? side_array<int>(op, "lengths", lengths, q, ScalarType::Int, {g.B, g.Hkv})
                       : side_array<int>(op, "lengths", lengths, q, ScalarType::Int, {g.B});
  g.lengths_b = per_head ? g.Hkv : 1;
  g.lengths_h = per_head ? 1 : 0;
}

// Pools beside the working one; `Dv` of the values.
inline void add_page_types(const char* op, Attention& a, const Tensor& q, const PageTypeOptions& types, int64_t Dv,
                           bool mma16) {
  const bool any = types.pools && !types.pools->empty();
  STD_TORCH_CHECK(!any || a.table.entry, op, ": pools must be None unless block_table is given, got ",
                  any ? types.pools->size() : 0);
  STD_TORCH_CHECK(!any || page_blob::page_tokens_allowed(a.table.page_size()), op,
                  ": page size P must be 16, 32 or 64 beside quantized pools, got ", a.table.page_size());
  a.types = make_page_types(op, q, types, {a.g.B, a.g.Hkv, a.table.page_size(), a.g.D, Dv, mma16});
}

inline void add_sight(const char* op, Attention& a, const Tensor& q, const Sight& sight) {
  Geometry& g = a.g;
  if (sight.q_position) {
    const int64_t batch = sight.q_position->dim() == 2 && sight.q_position->size(0) == 1 ? 1 : g.B;
    g.q_position = side_array<int>(op, "q_position", sight.q_position, q, ScalarType::Int, {batch, g.T});
    g.position_stride = batch == 1 ? 0 : g.T;
  }
  STD_TORCH_CHECK(!sight.q_position || (!sight.q_starts && !sight.q_counts), op,
                  ": q_starts and q_counts must be None where q_position is given, got a tensor");
  g.q_starts = side_array<int>(op, "q_starts", sight.q_starts, q, ScalarType::Int, {g.B});
  g.q_counts = side_array<int>(op, "q_counts", sight.q_counts, q, ScalarType::Int, {g.B});
  g.at_end = a.table.entry || sight.q_starts || sight.q_counts;
  add_lengths(op, a, q, sight.lengths, a.table.entry);
  g.starts = side_array<int>(op, "starts", sight.starts, q, ScalarType::Int, {g.B});
  g.causal = sight.causal;
  if (sight.window) {
    STD_TORCH_CHECK(sight.causal, op, ": window must be None unless causal, got ", *sight.window);
    g.window = in_int(op, "window", *sight.window, 1, kMaxTokens);
  }
}

}  // namespace tokencomp::attention
