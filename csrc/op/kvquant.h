// kvquant family at the torch boundary: the schemas, and the only place where their arguments are checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <tuple>

#include "core/kvquant.h"
#include "op/check.h"

namespace tokencomp::kvquant {

constexpr const char* kSchemas[] = {
    "kv_quantize(Tensor x, int bits, *, str axis='token', SymInt group, Tensor? pre_scale=None, Tensor? pre_bias=None, "
    "str layout='linear', str rounding='even', str kind='int') -> (Tensor codes, Tensor params)",
    "kv_dequantize(Tensor codes, Tensor params, int bits, *, str axis='token', SymInt group, Tensor? pre_scale=None, "
    "Tensor? pre_bias=None, str layout='linear', str kind='int', ScalarType dtype) -> Tensor",
    "kv_repack(Tensor codes, int bits, str source, str target) -> Tensor",
    "hadamard(Tensor x, Tensor? signs=None, *, bool inverse=False) -> Tensor",
    "channel_stats(Tensor x, *, Tensor? lengths=None, Tensor? starts=None) -> Tensor",
    "kv_page_write_(Tensor(a!) pool, Tensor k, Tensor v, Tensor sequence, Tensor index, Tensor pages, *, str tier_k, "
    "str axis_k, int group_k, str tier_v, str axis_v, int group_v, str layout='linear', Tensor? k_scale=None, Tensor? "
    "k_bias=None, Tensor? v_scale=None, Tensor? v_bias=None) -> ()",
    "kv_retier_(Tensor(a!) pool, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor sequence, Tensor slots, "
    "Tensor pages, *, str tier_k, str axis_k, int group_k, str tier_v, str axis_v, int group_v, str layout='linear', "
    "Tensor? k_scale=None, Tensor? k_bias=None, Tensor? v_scale=None, Tensor? v_bias=None) -> ()",
    "kv_page_read(Tensor pool, Tensor pages, int tokens, int D, *, str tier_k, str axis_k, int group_k, str tier_v, "
    "str axis_v, int group_v, str layout='linear', Tensor? sequence=None, Tensor? k_scale=None, Tensor? k_bias=None, "
    "Tensor? v_scale=None, Tensor? v_bias=None, ScalarType dtype) -> (Tensor k, Tensor v)",
};

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxSequences = 1 << 24, kMaxTokens = 1 << 28, kMaxPages = 1 << 28;

inline int in_range(const char* op, const char* argument, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(value >= low && value <= high, op, ": ", argument, " must be in [", low, ", ", high, "], got ",
                  value);
  return int(value);
}

inline void check_sheet(const char* op, const char* argument, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", argument, " must have shape [B, H, S, D], got ", shape_of(x));
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) <= 1, op, ": ", argument,
                  " must be contiguous in its last dimension, got stride ", x.stride(3));
  in_range(op, "B * H", x.size(0) * x.size(1), 0, kMaxSequences);
  in_range(op, "S", x.size(2), 0, kMaxTokens);
  in_range(op, "head dimension D", x.size(3), 1, kMaxHeadDim);
}

inline Layout layout_of(const char* op, const char* argument, const std::string& layout) {
  return choice<Layout>(op, argument, layout, {"linear", "mma16_k", "mma16_v"});
}

// Which bits, head dimensions and numbers of tokens a layout can hold.
inline void check_layout(const char* op, Layout layout, int bits, int64_t D, int64_t tokens) {
  const int64_t multiple = bits == 3 ? 8 : bits < 8 ? 8 / bits : 1;
  STD_TORCH_CHECK(D % multiple == 0, op, ": head dimension D must be a multiple of ", multiple, " for ", bits,
                  " bits, got ", D);
  if (layout == Layout::linear) return;
  STD_TORCH_CHECK(
      D == 64 || D == 128 || D == 256, op,
      ": head dimension D must be 64, 128 or 256 for the mma16 layouts (layout 'linear' takes others), got ", D);
  STD_TORCH_CHECK(tokens % bitpack::kBlock == 0, op, ": S must be a multiple of ", bitpack::kBlock,
                  " for the mma16 layouts, got ", tokens);
}

inline Format make_format(const char* op, int64_t bits, const std::string& kind, const std::string& axis, int64_t group,
                          Layout layout, int64_t D, int64_t tokens) {
  Format f;
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, op, ": bits must be 2, 3, 4 or 8, got ", bits);
  f.bits = int(bits);
  f.kind = choice<Kind>(op, "kind", kind, {"int", "fp8"});
  STD_TORCH_CHECK(f.kind == Kind::integer || bits == 8, op, ": bits must be 8 for kind 'fp8', got ", bits);
  f.axis = choice<Axis>(op, "axis", axis, {"token", "channel"});
  f.layout = layout;
  check_layout(op, layout, f.bits, D, tokens);
  const bool token = f.axis == Axis::token;
  const int64_t extent = token ? D : tokens;
  if (group == -1) group = extent > 0 ? extent : 1;
  STD_TORCH_CHECK(group >= 1 && extent % group == 0, op, ": group must be -1 (all) or divide ",
                  token ? "the channels D=" : "the tokens S=", extent, " along axis '", axis, "', got ", group);
  STD_TORCH_CHECK(token || layout == Layout::linear || group % bitpack::kBlock == 0, op,
                  ": group must be a multiple of ", bitpack::kBlock,
                  " along axis 'channel' for the mma16 layouts, got ", group);
  f.group = int(group);
  return f;
}

inline void add_maps(const char* op, Sheets& s, const Tensor& x, const char* x_name, const MaybeTensor& scale,
                     const MaybeTensor& bias, int64_t B, int64_t H, const char* scale_name = "pre_scale",
                     const char* bias_name = "pre_bias") {
  s.pre_scale = side_array<float>(op, scale_name, scale, x, ScalarType::Float, {B, H, s.D}, x_name);
  s.pre_bias = side_array<float>(op, bias_name, bias, x, ScalarType::Float, {B, H, s.D}, x_name);
}

inline Sheets make_dense(const char* op, const char* argument, const Tensor& x) {
  check_sheet(op, argument, x);
  Sheets s;
  s.dtype = dtype_of(op, argument, x);
  s.x = const_cast<void*>(x.const_data_ptr());
  s.stride_b = x.stride(0), s.stride_h = x.stride(1), s.stride_s = x.stride(2);
  s.H = int(x.size(1)), s.S = int(x.size(2)), s.D = int(x.size(3));
  s.sequences = int(x.size(0) * x.size(1));
  s.device = x.get_device_index();
  return s;
}

inline Sheets make_quantize_args(const Tensor& x, int64_t bits, const std::string& axis, int64_t group,
                                 const MaybeTensor& pre_scale, const MaybeTensor& pre_bias, const std::string& layout,
                                 const std::string& rounding, const std::string& kind) {
  constexpr const char* op = "kv_quantize";
  Sheets s = make_dense(op, "x", x);
  s.format = make_format(op, bits, kind, axis, group, layout_of(op, "layout", layout), s.D, s.S);
  s.format.away = choice<int>(op, "rounding", rounding, {"even", "away"}) == 1;
  STD_TORCH_CHECK(s.format.kind == Kind::integer || !s.format.away, op,
                  ": rounding must be 'even' for kind 'fp8', got 'away'");
  add_maps(op, s, x, "x", pre_scale, pre_bias, x.size(0), x.size(1));
  s.sheets = s.places = s.sequences;
  s.tokens = s.S;
  return s;
}

// [B, H, S, D / group, 2] or [B, H, S / group, D, 2].
inline std::array<int64_t, 5> param_shape(const Sheets& s, int64_t B) {
  const bool token = s.format.axis == Axis::token;
  return {B, s.H, token ? s.S : s.S / s.format.group, token ? s.D / s.format.group : s.D, 2};
}

inline void set_strides(Sheets& s) {
  s.code_stride = int64_t(s.S) * s.row_bytes();
  s.param_stride = int64_t(s.S) * s.D / s.format.group * page_blob::kParamBytes;
}

inline std::tuple<Tensor, Tensor> make_quantize_outputs(Sheets& s, const Tensor& x) {
  const auto shape = param_shape(s, x.size(0));
  Tensor codes = torch::stable::new_empty(x, {x.size(0), s.H, s.S, s.row_bytes()}, ScalarType::Byte);
  Tensor params = torch::stable::new_empty(x, {shape[0], shape[1], shape[2], shape[3], 2}, ScalarType::Half);
  s.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  s.params = static_cast<f16*>(params.mutable_data_ptr());
  set_strides(s);
  return {codes, params};
}

inline DType float_dtype(const char* op, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op,
                  ": dtype must be float32, float16 or bfloat16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float ? DType::f32 : type == ScalarType::Half ? DType::f16 : DType::bf16;
}

inline void check_codes(const char* op, const Tensor& codes) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, op, ": codes must be uint8, got ",
                  torch::headeronly::toString(codes.scalar_type()));
  STD_TORCH_CHECK(codes.dim() == 4 && codes.is_contiguous(), op,
                  ": codes must be contiguous of shape [B, H, S, D * bits / 8], got ", shape_of(codes));
  in_range(op, "B * H", codes.size(0) * codes.size(1), 0, kMaxSequences);
  in_range(op, "S", codes.size(2), 0, kMaxTokens);
}

inline int head_dim_of(const char* op, const Tensor& codes, int64_t bits) {
  const int64_t D = codes.size(3) * 8 / bits;
  STD_TORCH_CHECK(D >= 1 && D <= kMaxHeadDim && D * bits == codes.size(3) * 8, op,
                  ": codes must have rows of D * bits / 8 bytes with D in [1, ", kMaxHeadDim, "], got ", codes.size(3),
                  " bytes for ", bits, " bits");
  return int(D);
}

inline Sheets make_dequantize_args(const Tensor& codes, const Tensor& params, int64_t bits, const std::string& axis,
                                   int64_t group, const MaybeTensor& pre_scale, const MaybeTensor& pre_bias,
                                   const std::string& layout, const std::string& kind, ScalarType dtype) {
  constexpr const char* op = "kv_dequantize";
  check_codes(op, codes);
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, op, ": bits must be 2, 3, 4 or 8, got ", bits);
  Sheets s;
  s.D = head_dim_of(op, codes, bits);
  s.H = int(codes.size(1)), s.S = s.tokens = int(codes.size(2));
  s.sheets = s.places = s.sequences = int(codes.size(0) * codes.size(1));
  s.format = make_format(op, bits, kind, axis, group, layout_of(op, "layout", layout), s.D, s.S);
  s.dtype = float_dtype(op, dtype);
  const auto shape = param_shape(s, codes.size(0));
  s.params = const_cast<f16*>(side_array<f16>(op, "params", params, codes, ScalarType::Half,
                                              {shape[0], shape[1], shape[2], shape[3], 2}, "codes"));
  add_maps(op, s, codes, "codes", pre_scale, pre_bias, codes.size(0), codes.size(1));
  s.codes = const_cast<uint8_t*>(static_cast<const uint8_t*>(codes.const_data_ptr()));
  set_strides(s);
  s.device = codes.get_device_index();
  return s;
}

inline Tensor make_dequantize_output(Sheets& s, const Tensor& codes, ScalarType dtype) {
  Tensor x = torch::stable::new_empty(codes, {codes.size(0), s.H, s.S, s.D}, dtype);
  s.x = x.mutable_data_ptr();
  s.stride_s = s.D, s.stride_h = int64_t(s.S) * s.D, s.stride_b = s.H * s.stride_h;
  return x;
}

inline RepackArgs make_repack_args(const Tensor& codes, int64_t bits, const std::string& source,
                                   const std::string& target) {
  constexpr const char* op = "kv_repack";
  RepackArgs r;
  check_codes(op, codes);
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16, op,
                  ": bits must be 2, 3, 4, 8 or 16, got ", bits);
  r.bits = int(bits);
  r.D = head_dim_of(op, codes, bits);
  r.from = layout_of(op, "source", source);
  r.to = layout_of(op, "target", target);
  for (const Layout layout : {r.from, r.to}) check_layout(op, layout, r.bits, r.D, codes.size(2));
  const bool rows = r.from == Layout::linear && r.to == Layout::linear;
  r.units = codes.size(0) * codes.size(1) * (codes.size(2) / (rows ? 1 : bitpack::kBlock));
  r.in = static_cast<const uint8_t*>(codes.const_data_ptr());
  r.device = codes.get_device_index();
  return r;
}

inline Tensor make_repack_output(RepackArgs& r, const Tensor& codes) {
  Tensor out = torch::stable::empty_like(codes);
  r.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  return out;
}

inline HadamardArgs make_hadamard_args(const Tensor& x, const MaybeTensor& signs, bool inverse) {
  constexpr const char* op = "hadamard";
  HadamardArgs a;
  check_sheet(op, "x", x);
  a.dtype = dtype_of(op, "x", x);
  const int64_t D = x.size(3);
  STD_TORCH_CHECK((D & (D - 1)) == 0, op, ": head dimension D must be a power of two up to ", kMaxHeadDim, ", got ", D);
  a.signs = side_array<float>(op, "signs", signs, x, ScalarType::Float, {D});
  a.x = x.const_data_ptr();
  a.stride_b = x.stride(0), a.stride_h = x.stride(1), a.stride_s = x.stride(2);
  a.B = int(x.size(0)), a.H = int(x.size(1)), a.S = int(x.size(2)), a.D = int(D);
  a.inverse = inverse;
  a.norm = float(1 / std::sqrt(double(D)));
  a.device = x.get_device_index();
  return a;
}

inline Tensor make_hadamard_output(HadamardArgs& a, const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, {a.B, a.H, a.S, a.D}, x.scalar_type());
  a.out = out.mutable_data_ptr();
  return out;
}

inline StatsArgs make_stats_args(const Tensor& x, const MaybeTensor& lengths, const MaybeTensor& starts) {
  constexpr const char* op = "channel_stats";
  StatsArgs a;
  check_sheet(op, "x", x);
  a.dtype = dtype_of(op, "x", x);
  a.lengths = side_array<int>(op, "lengths", lengths, x, ScalarType::Int, {x.size(0)});
  a.starts = side_array<int>(op, "starts", starts, x, ScalarType::Int, {x.size(0)});
  a.x = x.const_data_ptr();
  a.stride_b = x.stride(0), a.stride_h = x.stride(1), a.stride_s = x.stride(2);
  a.B = int(x.size(0)), a.H = int(x.size(1)), a.S = int(x.size(2)), a.D = int(x.size(3));
  a.device = x.get_device_index();
  return a;
}

inline Tensor make_stats_output(StatsArgs& a, const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, {4, a.B, a.H, a.D}, ScalarType::Float);
  a.out = static_cast<float*>(out.mutable_data_ptr());
  return out;
}
inline Tensor make_stats_memory(StatsArgs& a, const Tensor& x) {
  Tensor memory = torch::stable::new_empty(x, {int64_t(a.B) * a.H * a.parts() * 3 * a.D}, ScalarType::Float);
  a.partial = static_cast<float*>(memory.mutable_data_ptr());
  return memory;
}

}  // namespace tokencomp::kvquant
