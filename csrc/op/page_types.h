// Quantized pools beside the working pages at the torch boundary: `Tensor[]? pools, int[]? formats` and the maps,
// checked.
#pragma once

#include <vector>

#include "core/page_types.h"
#include "op/kvquant_pages.h"

namespace tokencomp {

// Of every schema that takes pages of several types.
#define TOKENCOMP_PAGE_TYPES_SCHEMA                                                                              \
  "Tensor[]? pools=None, int[]? formats=None, Tensor? k_scale=None, Tensor? k_bias=None, Tensor? v_scale=None, " \
  "Tensor? "                                                                                                     \
  "v_bias=None"

constexpr int64_t kNumbersPerFormat = 7;  // tier, axis and group of k, of v, layout

using MaybePools = std::optional<std::vector<Tensor>>;
using MaybeFormats = std::optional<std::vector<int64_t>>;

struct PageTypeOptions {
  MaybePools pools;
  MaybeFormats formats;
  std::optional<Tensor> k_scale, k_bias, v_scale, v_bias;
};

// What the working pages and the back end say about all pages.
struct PageRules {
  int64_t B, Hkv, P, D, Dv;
  bool mma16;  // the layout this back end reads
};

inline PageHalf half_of(const char* op, const char* tier_name, int64_t tier, int64_t axis, int64_t group,
                        kvquant::Layout layout, const PageRules& r) {
  using page_blob::Tier;
  STD_TORCH_CHECK(tier >= 1 && tier < page_blob::kTiers, op, ": ", tier_name,
                  " of formats must be 1 (fp8) to 5 (int2), got ", tier);
  STD_TORCH_CHECK(axis == 0 || axis == 1, op, ": axis of formats must be 0 (token) or 1 (channel), got ", axis);
  const char* kind = Tier(tier) == Tier::fp8 ? "fp8" : "int";
  PageHalf half{kvquant::page_format(op, Tier(tier), kind, axis ? "channel" : "token", group, layout, r.D, r.P)};
  STD_TORCH_CHECK(layout == kvquant::Layout::linear || half.format.group % bitpack::kBlock == 0, op,
                  ": group of formats must be a multiple of ", bitpack::kBlock, " for the mma16 layouts, got ",
                  half.format.group);
  return half;
}

inline PagePool make_page_pool(const char* op, const Tensor& pool, const int64_t* f, const Tensor& q,
                               const PageRules& r) {
  STD_TORCH_CHECK(pool.scalar_type() == ScalarType::Byte && pool.dim() == 2 && pool.is_contiguous(), op,
                  ": pools must be contiguous uint8 of shape [pages, page bytes], got ",
                  torch::headeronly::toString(pool.scalar_type()), " ", shape_of(pool));
  STD_TORCH_CHECK(same_device(pool, q), op, ": pools must be on the device of q, got another device");
  const auto address = reinterpret_cast<uintptr_t>(pool.const_data_ptr());
  STD_TORCH_CHECK(address % page_blob::kSectionAlignment == 0, op, ": pools must start on a 16-byte boundary, got ",
                  address % page_blob::kSectionAlignment, " bytes behind one");
  STD_TORCH_CHECK((f[6] == 1) == r.mma16, op, ": layout of pools must be ",
                  r.mma16 ? "'mma16' on CUDA" : "'linear' on CPU", ", got ", f[6] == 1 ? "'mma16'" : "'linear'");
  PagePool p;
  p.k = half_of(op, "tier_k", f[0], f[1], f[2], r.mma16 ? kvquant::Layout::mma16_k : kvquant::Layout::linear, r);
  p.v = half_of(op, "tier_v", f[3], f[4], f[5], r.mma16 ? kvquant::Layout::mma16_v : kvquant::Layout::linear, r);
  const auto blob = [](int64_t tier, const PageHalf& h) {
    return kvquant::blob_format(page_blob::Tier(tier), h.format);
  };
  const page_blob::Sections at = page_blob::sections({blob(f[0], p.k), blob(f[3], p.v), int(r.P), int(r.D)});
  STD_TORCH_CHECK(pool.size(1) == at.bytes, op, ": pools must have pages of ", at.bytes,
                  " bytes for their format, got ", pool.size(1));
  STD_TORCH_CHECK(pool.size(0) < int64_t(1) << kPageNumberBits, op, ": pools must have fewer than ",
                  int64_t(1) << kPageNumberBits, " pages, got ", pool.size(0));
  p.k.codes = int(at.k_codes), p.k.params = int(at.k_params);
  p.v.codes = int(at.v_codes), p.v.params = int(at.v_params);
  p.base = static_cast<const uint8_t*>(pool.const_data_ptr());
  p.page_bytes = at.bytes;
  p.pages = int(pool.size(0));
  return p;
}

inline PageTypes make_page_types(const char* op, const Tensor& q, const PageTypeOptions& o, const PageRules& r) {
  PageTypes types;
  const std::vector<Tensor> pools = o.pools.value_or(std::vector<Tensor>{});
  const std::vector<int64_t> formats = o.formats.value_or(std::vector<int64_t>{});
  const int64_t count = int64_t(pools.size());
  STD_TORCH_CHECK(count <= kMaxPageTypes, op, ": pools must be at most ", kMaxPageTypes, ", got ", count);
  STD_TORCH_CHECK(int64_t(formats.size()) == count * kNumbersPerFormat, op, ": formats must have ", kNumbersPerFormat,
                  " numbers a pool, got ", formats.size(), " for ", count, " pools");
  STD_TORCH_CHECK(!count || r.Dv == r.D, op, ": v_pages must have D=", r.D, " channels beside quantized pools, got ",
                  r.Dv);
  for (int64_t i = 0; i < count; ++i) {
    types.pool[i] = make_page_pool(op, pools[i], formats.data() + i * kNumbersPerFormat, q, r);
  }
  types.count = int(count);
  const auto map = [&](const char* name, const std::optional<Tensor>& t) {
    STD_TORCH_CHECK(count || !t, op, ": ", name, " must be None without pools, got a tensor");
    return side_array<float>(op, name, t, q, ScalarType::Float, {r.B, r.Hkv, r.D}, "q");
  };
  types.maps = {map("k_scale", o.k_scale), map("k_bias", o.k_bias), map("v_scale", o.v_scale), map("v_bias", o.v_bias)};
  return types;
}

}  // namespace tokencomp
