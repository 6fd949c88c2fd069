// Quantized pages at the torch boundary: the arguments of kv_page_write_, kv_retier_ and kv_page_read, checked.
#pragma once

#include "op/kvquant.h"
#include "op/pages.h"

namespace tokencomp::kvquant {

using page_blob::Tier;

// How a page type is named by the operators.
struct PageNames {
  std::string tier_k, axis_k;
  int64_t group_k;
  std::string tier_v, axis_v;
  int64_t group_v;
  std::string layout;
};

// Keys and values of a list of pages, as two sets of sheets.
struct PageArgs {
  Sheets k, v;
};

inline Tier tier_of(const char* op, const char* argument, const std::string& tier) {
  STD_TORCH_CHECK(tier != "working", op, ": ", argument,
                  " must be a quantized tier: pages in the working dtype are plain rows, got 'working'");
  return Tier(choice<int>(op, argument, tier, {"fp8", "int8", "int4", "int3", "int2"}) + 1);
}

inline Format page_format(const char* op, Tier tier, const char* kind, const std::string& axis, int64_t group,
                          Layout layout, int64_t D, int64_t tokens) {
  return make_format(op, page_blob::tier_bits(tier), kind, axis, group, layout, D, tokens);
}

inline page_blob::Format blob_format(Tier tier, const Format& f) { return {tier, f.axis, f.group}; }

inline void place_in_pool(Sheets& s, const Tensor& pool, const Tensor& pages, int64_t codes, int64_t params,
                          const char* op) {
  uint8_t* base = const_cast<uint8_t*>(static_cast<const uint8_t*>(pool.const_data_ptr()));
  s.codes = base + codes;
  s.params = reinterpret_cast<f16*>(base + params);
  s.code_stride = s.param_stride = pool.size(1);
  s.places = int(pool.size(0));
  s.sheets = int(pages.size(0));
  s.pages = side_array<int>(op, "pages", pages, pool, ScalarType::Int, {s.sheets}, "pool");
}

// Formats and places of both halves; `k` and `v` know D and tokens.
inline void add_pages(const char* op, PageArgs& a, const PageNames& n, const Tensor& pool, const Tensor& pages) {
  STD_TORCH_CHECK(pool.scalar_type() == ScalarType::Byte && pool.dim() == 2 && pool.is_contiguous(), op,
                  ": pool must be contiguous uint8 of shape [pages, page bytes], got ",
                  torch::headeronly::toString(pool.scalar_type()), " ", shape_of(pool));
  const auto address = reinterpret_cast<uintptr_t>(pool.const_data_ptr());
  STD_TORCH_CHECK(address % page_blob::kSectionAlignment == 0, op, ": pool must start on a 16-byte boundary, got one ",
                  address % page_blob::kSectionAlignment, " bytes behind it");
  STD_TORCH_CHECK(pages.dim() == 1, op, ": pages must have shape [n], got ", shape_of(pages));
  in_range(op, "number of pages", pool.size(0), 0, kMaxPages - 1);
  in_range(op, "number of pages written or read", pages.size(0), 0, kMaxSequences);
  const int tokens = a.k.tokens, D = a.k.D;
  STD_TORCH_CHECK(page_blob::page_tokens_allowed(tokens), op, ": tokens of a page must be 16, 32 or 64, got ", tokens);
  const bool rows = choice<int>(op, "layout", n.layout, {"linear", "mma16"}) == 0;
  const Tier tk = tier_of(op, "tier_k", n.tier_k), tv = tier_of(op, "tier_v", n.tier_v);
  const auto kind = [](Tier tier) { return tier == Tier::fp8 ? "fp8" : "int"; };
  a.k.format = page_format(op, tk, kind(tk), n.axis_k, n.group_k, rows ? Layout::linear : Layout::mma16_k, D, tokens);
  a.v.format = page_format(op, tv, kind(tv), n.axis_v, n.group_v, rows ? Layout::linear : Layout::mma16_v, D, tokens);
  const page_blob::Sections at =
      page_blob::sections({blob_format(tk, a.k.format), blob_format(tv, a.v.format), tokens, D});
  STD_TORCH_CHECK(pool.size(1) == at.bytes, op, ": pool must have pages of ", at.bytes,
                  " bytes for this page type, got ", pool.size(1));
  place_in_pool(a.k, pool, pages, at.k_codes, at.k_params, op);
  place_in_pool(a.v, pool, pages, at.v_codes, at.v_params, op);
}

// Which tokens of which sequence go to which page; `x` is where they come from.
inline void add_lists(const char* op, PageArgs& a, const PageNames& names, const Tensor& pool, const Tensor& x,
                      const char* x_name, const Tensor& sequence, const char* index_name, const Tensor& index,
                      const Tensor& pages) {
  STD_TORCH_CHECK(index.dim() == 2, op, ": ", index_name, " must have shape [n, tokens of a page], got ",
                  shape_of(index));
  a.k.tokens = a.v.tokens = in_range(op, "tokens of a page", index.size(1), 0, kMaxTokens);
  add_pages(op, a, names, pool, pages);
  const int64_t n = a.k.sheets;
  for (Sheets* s : {&a.k, &a.v}) {
    s->sequence = side_array<int>(op, "sequence", sequence, x, ScalarType::Int, {n}, x_name);
    s->index = side_array<int>(op, index_name, index, x, ScalarType::Int, {n, s->tokens}, x_name);
  }
}

inline PageArgs make_page_write_args(const Tensor& pool, const Tensor& k, const Tensor& v, const Tensor& sequence,
                                     const Tensor& index, const Tensor& pages, const PageNames& names,
                                     const MaybeTensor& k_scale, const MaybeTensor& k_bias, const MaybeTensor& v_scale,
                                     const MaybeTensor& v_bias) {
  constexpr const char* op = "kv_page_write_";
  PageArgs a{make_dense(op, "k", k), make_dense(op, "v", v)};
  STD_TORCH_CHECK(has_shape(v, {k.size(0), k.size(1), k.size(2), k.size(3)}), op, ": v must have the shape of k, ",
                  shape_of(k), ", got ", shape_of(v));
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type() && same_device(v, k), op,
                  ": v must have the dtype and device of k, got another");
  STD_TORCH_CHECK(same_device(pool, k), op, ": pool must be on the device of k, got another device");
  add_lists(op, a, names, pool, k, "k", sequence, "index", index, pages);
  add_maps(op, a.k, k, "k", k_scale, k_bias, k.size(0), k.size(1), "k_scale", "k_bias");
  add_maps(op, a.v, k, "k", v_scale, v_bias, k.size(0), k.size(1), "v_scale", "v_bias");
  return a;
}

// Working pages of the rows of `table` as what sheets are read from.
inline Sheets make_source(const char* op, const char* argument, const Tensor& t, const Tensor& table) {
  const int64_t B = table.size(0), Hkv = table.size(1);
  const Pages pages = pages_of(op, argument, t, Hkv);
  in_range(op, "head dimension D", t.size(3), 1, kMaxHeadDim);
  Sheets s;
  s.dtype = dtype_of(op, argument, t);
  s.x = pages.base;
  s.stride_b = pages.page_stride, s.stride_h = pages.head_stride, s.stride_s = pages.slot_stride;
  s.table = table_of(op, "block_table", table, table, t.size(2));
  s.source_pages = int(t.size(0));
  s.H = Hkv > 0 ? int(Hkv) : 1, s.S = int(table.size(2) * t.size(2)), s.D = int(t.size(3));
  s.sequences = int(B * Hkv);
  s.device = t.get_device_index();
  return s;
}

inline PageArgs make_retier_args(const Tensor& pool, const Tensor& k_pages, const Tensor& v_pages,
                                 const Tensor& block_table, const Tensor& sequence, const Tensor& slots,
                                 const Tensor& pages, const PageNames& names, const MaybeTensor& k_scale,
                                 const MaybeTensor& k_bias, const MaybeTensor& v_scale, const MaybeTensor& v_bias) {
  constexpr const char* op = "kv_retier_";
  STD_TORCH_CHECK(block_table.dim() == 3, op, ": block_table must have shape [B, Hkv, places], got ",
                  shape_of(block_table));
  const int64_t B = block_table.size(0), Hkv = block_table.size(1);
  STD_TORCH_CHECK(B * Hkv <= kMaxRows, op, ": block_table must have at most ", kMaxRows, " rows, got ", B * Hkv);
  PageArgs a{make_source(op, "k_pages", k_pages, block_table), make_source(op, "v_pages", v_pages, block_table)};
  STD_TORCH_CHECK(has_shape(v_pages, {k_pages.size(0), k_pages.size(1), k_pages.size(2), k_pages.size(3)}), op,
                  ": v_pages must have the shape of k_pages, ", shape_of(k_pages), ", got ", shape_of(v_pages));
  STD_TORCH_CHECK(v_pages.scalar_type() == k_pages.scalar_type() && same_device(v_pages, k_pages), op,
                  ": v_pages must have the dtype and device of k_pages, got another");
  STD_TORCH_CHECK(same_device(block_table, k_pages), op,
                  ": block_table must be on the device of k_pages, got another device");
  STD_TORCH_CHECK(same_device(pool, k_pages), op, ": pool must be on the device of k_pages, got another device");
  add_lists(op, a, names, pool, k_pages, "k_pages", sequence, "slots", slots, pages);
  STD_TORCH_CHECK(a.k.tokens == k_pages.size(2), op, ": slots must have shape [n, P=", k_pages.size(2), "], got ",
                  shape_of(slots));
  add_maps(op, a.k, k_pages, "k_pages", k_scale, k_bias, B, Hkv, "k_scale", "k_bias");
  add_maps(op, a.v, k_pages, "k_pages", v_scale, v_bias, B, Hkv, "v_scale", "v_bias");
  return a;
}

inline PageArgs make_page_read_args(const Tensor& pool, const Tensor& pages, int64_t tokens, int64_t D,
                                    const PageNames& names, const MaybeTensor& sequence, const MaybeTensor& k_scale,
                                    const MaybeTensor& k_bias, const MaybeTensor& v_scale, const MaybeTensor& v_bias,
                                    ScalarType dtype) {
  constexpr const char* op = "kv_page_read";
  PageArgs a;
  const Tensor* map = nullptr;
  for (const MaybeTensor* m : {&k_scale, &k_bias, &v_scale, &v_bias}) {
    if (*m) map = &**m;
  }
  STD_TORCH_CHECK(!map || sequence, op, ": sequence must be given with per-channel maps, got None");
  STD_TORCH_CHECK(!map || map->dim() == 3, op, ": per-channel maps must have shape [B, H, D], got ",
                  map ? shape_of(*map) : "");
  for (Sheets* s : {&a.k, &a.v}) {
    s->tokens = in_range(op, "tokens", tokens, 0, kMaxTokens);
    s->D = in_range(op, "D", D, 1, kMaxHeadDim);
    s->dtype = float_dtype(op, dtype);
    s->x_by_sheet = true;
    s->device = pool.get_device_index();
    s->H = map ? int(map->size(1)) : 1;
    s->sequences = map ? int(map->size(0) * map->size(1)) : int(kMaxSequences);
  }
  add_pages(op, a, names, pool, pages);
  for (Sheets* s : {&a.k, &a.v}) {
    s->sequence = side_array<int>(op, "sequence", sequence, pool, ScalarType::Int, {s->sheets}, "pool");
  }
  const int64_t B = map ? map->size(0) : 1, H = map ? map->size(1) : 1;
  add_maps(op, a.k, pool, "pool", k_scale, k_bias, B, H, "k_scale", "k_bias");
  add_maps(op, a.v, pool, "pool", v_scale, v_bias, B, H, "v_scale", "v_bias");
  return a;
}

inline std::tuple<Tensor, Tensor> make_page_read_outputs(PageArgs& a, const Tensor& pool, ScalarType dtype) {
  Tensor k = torch::stable::new_empty(pool, {a.k.sheets, a.k.tokens, a.k.D}, dtype);
  Tensor v = torch::stable::new_empty(pool, {a.v.sheets, a.v.tokens, a.v.D}, dtype);
  a.k.x = k.mutable_data_ptr();
  a.v.x = v.mutable_data_ptr();
  return {k, v};
}

}  // namespace tokencomp::kvquant
