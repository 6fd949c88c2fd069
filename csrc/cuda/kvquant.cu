// Quantization of KV caches on CUDA, torch side: launches and registration. The kernels are in kvquant_kernels.h and
// kvquant_maps.h.
#include "op/kvquant.h"

#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "cuda/kvquant_kernels.h"
#include "cuda/kvquant_maps.h"
#include "op/kvquant_pages.h"
#include "op/stream.h"

namespace tokencomp::kvquant {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

gpu::LaunchConfig config(int64_t blocks, size_t smem, int device) {
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "kvquant: too many blocks for one launch, got ", blocks);
  gpu::LaunchConfig c{dim3(unsigned(blocks)), dim3(kThreads), smem};
  c.stream = gpu::stream_of(device);
  return c;
}

// Calls f<kD>() with the head dimension an mma16 layout is compiled for.
template <class F>
void for_fragment_dim(int D, F&& f) {
  if (D == 64) return f.template operator()<64>();
  if (D == 128) return f.template operator()<128>();
  f.template operator()<256>();
}
// The same, or f<0>() for linear rows, whatever their dimension.
template <class F>
void for_head_dim(Layout layout, int D, F&& f) {
  if (layout == Layout::linear) return f.template operator()<0>();
  for_fragment_dim(D, f);
}

int64_t elements_spanned(const Sheets& s) {
  if (s.x_by_sheet) return int64_t(s.sheets) * s.tokens * s.D;
  if (s.table.entry) {
    return (s.source_pages - 1) * s.stride_b + (s.H - 1) * s.stride_h + (s.table.page_size() - 1) * s.stride_s + s.D;
  }
  return (s.sequences / s.H - 1) * s.stride_b + (s.H - 1) * s.stride_h + (s.S - 1) * s.stride_s + s.D;
}

// Tells the checker what belongs to the call. Pages are one tensor, watched by the caller.
void watch(const Sheets& s, bool quantizes) {
  const size_t maps = size_t(s.sequences) * s.D * 4;
  if (s.x_by_sheet || (s.sequences > 0 && s.S > 0 && (!s.table.entry || s.source_pages > 0))) {
    gpu::watch(s.x, size_t(elements_spanned(s) * element_bytes(s.dtype)), "x", quantizes);
  }
  if (s.pre_scale) gpu::watch(s.pre_scale, maps, "pre_scale", true);
  if (s.pre_bias) gpu::watch(s.pre_bias, maps, "pre_bias", true);
  if (s.sequence) gpu::watch(s.sequence, size_t(s.sheets) * 4, "sequence", true);
  if (s.index) gpu::watch(s.index, size_t(s.sheets) * s.tokens * 4, "index", true);
  if (s.pages) return gpu::watch(s.pages, size_t(s.sheets) * 4, "pages", true);
  gpu::watch(s.codes, size_t(s.code_stride) * s.sheets, "codes", !quantizes);
  gpu::watch(s.params, size_t(s.param_stride) * s.sheets, "params", !quantizes);
}

bool whole_chunks(const Sheets& s) {
  const int64_t bytes = element_bytes(s.dtype);
  const int64_t bits =
      int64_t(reinterpret_cast<uintptr_t>(s.x)) | (s.stride_b | s.stride_h | s.stride_s | int64_t(s.D)) * bytes;
  return (bits & 15) == 0;
}

void quantize(const Sheets& s) {
  const int unit = s.format.axis == Axis::channel ? s.format.group : kTile;
  const int64_t units = ceil_div(s.tokens, unit);
  if (s.sheets == 0 || units == 0) return;
  watch(s, true);
  for_head_dim(s.format.layout, s.D, [&]<int kD>() {
    gpu::launch(kv_quantize_tiles<kD>, config(s.sheets * units, sizeof(TileSmem), s.device), s, unit, int(units),
                whole_chunks(s));
  });
}

void dequantize(const Sheets& s) {
  const int64_t tiles = ceil_div(s.tokens, kTile);
  if (s.sheets == 0 || tiles == 0) return;
  watch(s, false);
  for_head_dim(s.format.layout, s.D, [&]<int kD>() {
    gpu::launch(kv_dequantize_tiles<kD>, config(s.sheets * tiles, 0, s.device), s, int(tiles));
  });
}

std::tuple<Tensor, Tensor> kv_quantize(const Tensor& x, int64_t bits, std::string axis, int64_t group,
                                       MaybeTensor pre_scale, MaybeTensor pre_bias, std::string layout,
                                       std::string rounding, std::string kind) {
  Sheets s = make_quantize_args(x, bits, axis, group, pre_scale, pre_bias, layout, rounding, kind);
  auto out = make_quantize_outputs(s, x);
  const gpu::DeviceGuard device(s.device);
  const gpu::WatchScope scope;
  quantize(s);
  return out;
}

Tensor kv_dequantize(const Tensor& codes, const Tensor& params, int64_t bits, std::string axis, int64_t group,
                     MaybeTensor pre_scale, MaybeTensor pre_bias, std::string layout, std::string kind,
                     ScalarType dtype) {
  Sheets s = make_dequantize_args(codes, params, bits, axis, group, pre_scale, pre_bias, layout, kind, dtype);
  Tensor x = make_dequantize_output(s, codes, dtype);
  const gpu::DeviceGuard device(s.device);
  const gpu::WatchScope scope;
  dequantize(s);
  return x;
}

Tensor kv_repack(const Tensor& codes, int64_t bits, std::string source, std::string target) {
  RepackArgs r = make_repack_args(codes, bits, source, target);
  Tensor out = make_repack_output(r, codes);
  const int64_t bytes = codes.numel();
  if (bytes == 0) return out;
  const gpu::DeviceGuard device(r.device);
  const gpu::WatchScope scope;
  gpu::watch(r.in, size_t(bytes), "codes", true);
  gpu::watch(r.out, size_t(bytes), "out", false);
  if (r.from == r.to) {
    gpu::launch(kv_repack_copy, config(ceil_div(bytes, kThreads), 0, r.device), r, bytes);
    return out;
  }
  for_fragment_dim(
      r.D, [&]<int kD>() { gpu::launch(kv_repack_blocks<kD>, config(r.units, sizeof(RepackSmem), r.device), r); });
  return out;
}

int64_t elements_spanned(const Tensor& x) {
  int64_t last = 1;
  for (int64_t i = 0; i < x.dim(); ++i) last += (x.size(i) - 1) * x.stride(i);
  return last;
}

Tensor hadamard(const Tensor& x, MaybeTensor signs, bool inverse) {
  HadamardArgs a = make_hadamard_args(x, signs, inverse);
  Tensor out = make_hadamard_output(a, x);
  if (a.rows() == 0) return out;
  const gpu::DeviceGuard device(a.device);
  const gpu::WatchScope scope;
  gpu::watch(a.x, size_t(elements_spanned(x) * element_bytes(a.dtype)), "x", true);
  if (a.signs) gpu::watch(a.signs, size_t(a.D) * 4, "signs", true);
  gpu::watch(a.out, size_t(a.rows() * a.D * element_bytes(a.dtype)), "out", false);
  const gpu::LaunchConfig c = config(ceil_div(a.rows(), kWarps), 0, a.device);
  dispatch_dtype(a.dtype, [&]<class T>() {
    if (a.D <= 32) return gpu::launch(hadamard_rows<T, 1>, c, a);
    if (a.D == 64) return gpu::launch(hadamard_rows<T, 2>, c, a);
    if (a.D == 128) return gpu::launch(hadamard_rows<T, 4>, c, a);
    gpu::launch(hadamard_rows<T, 8>, c, a);
  });
  return out;
}

Tensor channel_stats(const Tensor& x, MaybeTensor lengths, MaybeTensor starts) {
  StatsArgs a = make_stats_args(x, lengths, starts);
  Tensor out = make_stats_output(a, x);
  const Tensor memory = make_stats_memory(a, x);
  const int64_t sequences = int64_t(a.B) * a.H, plane = sequences * a.D;
  if (plane == 0) return out;
  const gpu::DeviceGuard device(a.device);
  const gpu::WatchScope scope;
  if (a.S > 0) gpu::watch(a.x, size_t(elements_spanned(x) * element_bytes(a.dtype)), "x", true);
  if (a.lengths) gpu::watch(a.lengths, size_t(a.B) * 4, "lengths", true);
  if (a.starts) gpu::watch(a.starts, size_t(a.B) * 4, "starts", true);
  gpu::watch(a.out, size_t(plane) * 16, "out", false);
  if (a.parts() > 0) {
    gpu::watch(a.partial, size_t(plane) * a.parts() * 12, "partial", false);
    const gpu::LaunchConfig c = config(sequences * a.parts(), sizeof(StatSmem), a.device);
    dispatch_dtype(a.dtype, [&]<class T>() { gpu::launch(channel_stat_parts<T>, c, a); });
  }
  gpu::launch(channel_stat_sequences, config(ceil_div(plane, kThreads), 0, a.device), a);
  return out;
}

// Again for every launch: a call that watches after one forgets what was watched before it.
void watch_bytes(const Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  const size_t bytes = t.scalar_type() == ScalarType::Int ? 4 : 1;
  gpu::watch(t.const_data_ptr(), size_t(elements_spanned(t)) * bytes, name, true);
}

void kv_page_write_(const Tensor& pool, const Tensor& k, const Tensor& v, const Tensor& sequence, const Tensor& index,
                    const Tensor& pages, std::string tier_k, std::string axis_k, int64_t group_k, std::string tier_v,
                    std::string axis_v, int64_t group_v, std::string layout, MaybeTensor k_scale, MaybeTensor k_bias,
                    MaybeTensor v_scale, MaybeTensor v_bias) {
  const PageArgs a = make_page_write_args(pool, k, v, sequence, index, pages,
                                          {tier_k, axis_k, group_k, tier_v, axis_v, group_v, layout}, k_scale, k_bias,
                                          v_scale, v_bias);
  const gpu::DeviceGuard device(a.k.device);
  const gpu::WatchScope scope;
  for (const Sheets& half : {a.k, a.v}) {
    watch_bytes(pool, "pool");
    quantize(half);
  }
}

void kv_retier_(const Tensor& pool, const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                const Tensor& sequence, const Tensor& slots, const Tensor& pages, std::string tier_k,
                std::string axis_k, int64_t group_k, std::string tier_v, std::string axis_v, int64_t group_v,
                std::string layout, MaybeTensor k_scale, MaybeTensor k_bias, MaybeTensor v_scale, MaybeTensor v_bias) {
  const PageArgs a =
      make_retier_args(pool, k_pages, v_pages, block_table, sequence, slots, pages,
                       {tier_k, axis_k, group_k, tier_v, axis_v, group_v, layout}, k_scale, k_bias, v_scale, v_bias);
  const gpu::DeviceGuard device(a.k.device);
  const gpu::WatchScope scope;
  for (const Sheets& half : {a.k, a.v}) {
    watch_bytes(pool, "pool");
    watch_bytes(block_table, "block_table");
    quantize(half);
  }
}

std::tuple<Tensor, Tensor> kv_page_read(const Tensor& pool, const Tensor& pages, int64_t tokens, int64_t D,
                                        std::string tier_k, std::string axis_k, int64_t group_k, std::string tier_v,
                                        std::string axis_v, int64_t group_v, std::string layout, MaybeTensor sequence,
                                        MaybeTensor k_scale, MaybeTensor k_bias, MaybeTensor v_scale,
                                        MaybeTensor v_bias, ScalarType dtype) {
  PageArgs a = make_page_read_args(pool, pages, tokens, D, {tier_k, axis_k, group_k, tier_v, axis_v, group_v, layout},
                                   sequence, k_scale, k_bias, v_scale, v_bias, dtype);
  auto out = make_page_read_outputs(a, pool, dtype);
  const gpu::DeviceGuard device(a.k.device);
  const gpu::WatchScope scope;
  for (const Sheets& half : {a.k, a.v}) {
    watch_bytes(pool, "pool");
    dequantize(half);
  }
  return out;
}

}  // namespace
}  // namespace tokencomp::kvquant

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("kv_quantize", TORCH_BOX(&tokencomp::kvquant::kv_quantize));
  m.impl("kv_dequantize", TORCH_BOX(&tokencomp::kvquant::kv_dequantize));
  m.impl("kv_repack", TORCH_BOX(&tokencomp::kvquant::kv_repack));
  m.impl("hadamard", TORCH_BOX(&tokencomp::kvquant::hadamard));
  m.impl("channel_stats", TORCH_BOX(&tokencomp::kvquant::channel_stats));
  m.impl("kv_page_write_", TORCH_BOX(&tokencomp::kvquant::kv_page_write_));
  m.impl("kv_retier_", TORCH_BOX(&tokencomp::kvquant::kv_retier_));
  m.impl("kv_page_read", TORCH_BOX(&tokencomp::kvquant::kv_page_read));
}
