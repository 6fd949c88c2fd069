// Decode attention over pages on CUDA, torch side: parts, working memory, launches, registration. One launch, and one
// that hides all logits before where logits are asked for.
#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "cuda/decode_kernels.h"
#include "cuda/decode_launch.h"
#include "cuda/decode_plain.h"
#include "cuda/decode_types.h"

namespace tokencomp::decode {

void hide_logits(const DecodeArgs& a, gpu::LaunchConfig config) {
  const int64_t count = int64_t(a.B) * a.Hq * a.T * a.capacity;
  if (!a.logits || count == 0) return;
  config.grid = dim3(unsigned(std::min<int64_t>(ceil_div(count, kThreads), 8 * gpu::sm_count())));
  gpu::launch(decode_hide, config, a.logits, count);
}

namespace {

void watch_arguments(const DecodeArgs& a) {
  const int64_t bytes = a.dtype == DType::f32 ? 4 : 2, rows = int64_t(a.B) * a.Hq * a.T, pairs = int64_t(a.B) * a.Hkv;
  const int64_t last = (a.B - 1) * a.q_stride_b + (a.Hq - 1) * a.q_stride_h + (a.T - 1) * a.q_stride_t;
  gpu::watch(a.q, (last + a.D) * bytes, "q", true);
  for (const auto& [p, name] : {std::pair{&a.k, "k_pages"}, std::pair{&a.v, "v_pages"}}) {
    const int64_t heads = p->head_stride ? a.Hkv : 1, slots = a.dense ? a.capacity : a.table.page_size();
    const int64_t span =
        (a.pages - 1) * p->page_stride + (heads - 1) * p->head_stride + (slots - 1) * p->slot_stride + p->channels;
    if (a.pages && slots) gpu::watch(p->base, span * bytes, name, true);
  }
  const int64_t table = (a.B - 1) * a.table.stride_b + (a.Hkv - 1) * a.table.stride_h + a.table.places;
  if (a.table.places) gpu::watch(a.table.entry, table * 4, "block_table", true);
  gpu::watch(a.lengths, pairs * 4, "lengths", true);
  if (a.index) gpu::watch(a.index, pairs * a.listed * 4, "index", true);
  if (a.index_count) gpu::watch(a.index_count, pairs * 4, "index_count", true);
  const auto by_slot = [&](int64_t b, int64_t h) { return ((a.B - 1) * b + (a.Hkv - 1) * h + a.slots) * 4; };
  if (a.key_bias) gpu::watch(a.key_bias, by_slot(a.bias_stride_b, a.bias_stride_h), "key_bias", true);
  if (a.position) gpu::watch(a.position, by_slot(a.position_stride_b, a.position_stride_h), "position", true);
  if (a.q_position) gpu::watch(a.q_position, (a.q_position_stride * (a.B - 1) + a.T) * 4, "q_position", true);
  if (a.sinks) gpu::watch(a.sinks, a.Hq * 4, "sinks", true);
  for (int i = 0; i < a.types.count; ++i) {
    const PagePool& pool = a.types.pool[i];
    if (pool.pages) gpu::watch(pool.base, pool.pages * pool.page_bytes, "pool", true);
  }
  const PageMaps& maps = a.types.maps;
  for (const float* map : {maps.k_scale, maps.k_bias, maps.v_scale, maps.v_bias}) {
    if (map) gpu::watch(map, pairs * a.D * 4, "map", true);
  }
  gpu::watch(a.out, rows * a.Dv * bytes, "out", false);
  gpu::watch(a.lse, rows * 4, "lse", false);
  if (a.logits) gpu::watch(a.logits, rows * a.capacity * 4, "logits", false);
}

template <class T, int kD, bool kWhole>
void launch_tiles(const DecodeArgs& a, const Tensor& q) {
  using S = Shape<T, kD, kWhole>;
  static_assert(sizeof(Smem<S>) <= kSmemOfSm80);
  launch(a, q, S::kRows, S::kBlocks, sizeof(Smem<S>), decode_tiles<S>);
}

template <int kD>
void launch_plain(const DecodeArgs& a, const Tensor& q) {
  if (a.types.count) return launch(a, q, kPlainRows, 4, sizeof(PlainSmem<kD>), decode_plain<kD, true>);
  launch(a, q, kPlainRows, 4, sizeof(PlainSmem<kD>), decode_plain<kD, false>);
}

void run_decode(const DecodeArgs& a, const Tensor& q) {
  if (int64_t(a.B) * a.rows() == 0) return;
  const gpu::DeviceGuard device(a.device);
  const gpu::WatchScope scope;
  watch_arguments(a);
  const int dim = std::max(a.D, a.Dv);
  dispatch_dtype(a.dtype, [&]<class T> {
    if constexpr (sizeof(T) == 4) {
      if (dim <= 64) return launch_plain<64>(a, q);
      if (dim <= 128) return launch_plain<128>(a, q);
      return launch_plain<256>(a, q);
    } else {
      if (a.types.count) return launch_types(a, q);
      if (!whole(a.k) || !whole(a.v)) return launch_tiles<T, 256, false>(a, q);
      if (dim <= 64) return launch_tiles<T, 64, true>(a, q);
      if (dim <= 96) return launch_tiles<T, 96, true>(a, q);
      if (dim <= 128) return launch_tiles<T, 128, true>(a, q);
      return launch_tiles<T, 256, true>(a, q);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> paged_decode(
    const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, MaybeTensor block_table, const Tensor& lengths,
    double scale, MaybeTensor index, MaybeTensor index_count, MaybeTensor key_bias, MaybeTensor position,
    MaybeTensor q_position, std::optional<int64_t> window, std::optional<double> softcap, MaybeTensor sinks,
    bool causal, bool logits_out, std::optional<std::vector<Tensor>> pools, std::optional<std::vector<int64_t>> formats,
    MaybeTensor k_scale, MaybeTensor k_bias, MaybeTensor v_scale, MaybeTensor v_bias) {
  const Options options{index,
                        index_count,
                        key_bias,
                        position,
                        q_position,
                        sinks,
                        window,
                        softcap,
                        causal,
                        logits_out,
                        {pools, formats, k_scale, k_bias, v_scale, v_bias}};
  DecodeArgs a = make_decode_args(q, k_pages, v_pages, block_table, lengths, scale, options, true);
  std::tuple<Tensor, Tensor, Tensor> out = make_decode_outputs(a, q, logits_out);
  run_decode(a, q);
  return out;
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out, const Tensor& lse) {
  MergeArgs m = make_merge_args(out, lse);
  std::tuple<Tensor, Tensor> merged = make_merge_outputs(m, out, lse);
  if (m.rows == 0) return merged;
  const gpu::DeviceGuard device(m.device);
  const gpu::WatchScope scope;
  const int64_t bytes = m.dtype == DType::f32 ? 4 : 2;
  if (out.numel()) gpu::watch(m.out, out.numel() * bytes, "out", true);
  if (m.states) gpu::watch(m.lse, lse.numel() * 4, "lse", true);
  if (m.D) gpu::watch(m.merged, m.rows * m.D * bytes, "merged", false);
  gpu::watch(m.merged_lse, m.rows * 4, "merged_lse", false);
  gpu::LaunchConfig config{dim3(unsigned(ceil_div(m.rows, kWarps))), dim3(kThreads)};
  config.stream = gpu::stream_of(m.device);
  dispatch_dtype(m.dtype, [&]<class T> { gpu::launch(decode_merge<T>, config, m); });
  return merged;
}

}  // namespace
}  // namespace tokencomp::decode

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("paged_decode", TORCH_BOX(&tokencomp::decode::paged_decode));
  m.impl("merge_states", TORCH_BOX(&tokencomp::decode::merge_states));
}
