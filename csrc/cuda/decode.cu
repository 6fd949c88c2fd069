// Decode attention over pages on CUDA, torch side: parts, working memory, launches, registration. One launch, and one
// that hides all logits before where logits are asked for.
#include "op/decode.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>

#include "core/decode_plan.h"
#include "core/dispatch.h"
#include "cuda/decode_kernels.h"
#include "cuda/decode_plain.h"
#include "op/stream.h"

namespace tokencomp::decode {
namespace {

constexpr size_t kSmemOfSm80 = 163 << 10;  // what a block may have there

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Each row starts on a 16-byte boundary and is a whole number of 16-byte chunks.
bool whole(const Pages& p) {
  const int64_t strides = p.page_stride | p.head_stride | p.slot_stride | p.channels;
  return ((int64_t(reinterpret_cast<uintptr_t>(p.base)) | strides * 2) & 15) == 0;
}

// The plan's, or those that TOKENCOMP_DECODE_PARTS asks for.
int choose_parts(const DecodeArgs& a, int64_t units, int blocks_per_sm) {
  const char* forced = std::getenv("TOKENCOMP_DECODE_PARTS");
  if (forced && *forced) {
    const int parts = std::atoi(forced);
    STD_TORCH_CHECK(parts >= 1 && parts <= kMaxParts, "paged_decode: TOKENCOMP_DECODE_PARTS must be in [1, ", kMaxParts,
                    "], got '", forced, "'");
    return parts;
  }
  return plan_parts(units, a.index ? a.listed : a.slots, int64_t(gpu::sm_count()) * blocks_per_sm);
}

void watch_arguments(const DecodeArgs& a) {
  const int64_t bytes = a.dtype == DType::f32 ? 4 : 2, rows = int64_t(a.B) * a.Hq * a.T, pairs = int64_t(a.B) * a.Hkv;
  const int64_t last = (a.B - 1) * a.q_stride_b + (a.Hq - 1) * a.q_stride_h + (a.T - 1) * a.q_stride_t;
  gpu::watch(a.q, (last + a.D) * bytes, "q", true);
  for (const auto& [p, name] : {std::pair{&a.k, "k_pages"}, std::pair{&a.v, "v_pages"}}) {
    const int64_t heads = p->head_stride ? a.Hkv : 1;
    const int64_t span = (a.pages - 1) * p->page_stride + (heads - 1) * p->head_stride +
                         (a.table.page_size() - 1) * p->slot_stride + p->channels;
    if (a.pages) gpu::watch(p->base, span * bytes, name, true);
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
  gpu::watch(a.out, rows * a.Dv * bytes, "out", false);
  gpu::watch(a.lse, rows * 4, "lse", false);
  if (a.logits) gpu::watch(a.logits, rows * capacity_of(a) * 4, "logits", false);
}

void hide_logits(const DecodeArgs& a, gpu::LaunchConfig config) {
  const int64_t count = int64_t(a.B) * a.Hq * a.T * capacity_of(a);
  if (!a.logits || count == 0) return;
  config.grid = dim3(unsigned(std::min<int64_t>(ceil_div(count, kThreads), 8 * gpu::sm_count())));
  gpu::launch(decode_hide, config, a.logits, count);
}

// `rows` of a group go to a block.
void launch(const DecodeArgs& a, const Tensor& q, int rows, int blocks_per_sm, size_t smem,
            void (*kernel)(DecodeArgs, Workspace)) {
  Workspace w{};
  const int64_t blocks = ceil_div(a.rows(), rows), units = int64_t(a.B) * a.Hkv * blocks;
  w.parts = choose_parts(a, units, blocks_per_sm);
  const int64_t floats = w.parts > 1 ? units * w.parts * rows * (a.Dv + 2) : 0;
  Tensor partial = torch::stable::new_empty(q, {floats}, ScalarType::Float);
  Tensor ticket = torch::stable::new_zeros(q, {w.parts > 1 ? units : 0}, ScalarType::Int);
  w.partial = static_cast<float*>(partial.mutable_data_ptr());
  w.ticket = static_cast<uint32_t*>(ticket.mutable_data_ptr());
  if (floats) gpu::watch(w.partial, floats * 4, "partial", false);
  if (floats) gpu::watch(w.ticket, units * 4, "ticket", true);
  gpu::LaunchConfig config{dim3(unsigned(a.B * a.Hkv), unsigned(w.parts), unsigned(blocks)), dim3(kThreads)};
  config.stream = gpu::stream_of(a.device);
  hide_logits(a, config);
  config.smem = smem;
  gpu::launch(kernel, config, a, w);
}

template <class T, int kD, bool kWhole>
void launch_tiles(const DecodeArgs& a, const Tensor& q) {
  using S = Shape<T, kD, kWhole>;
  static_assert(sizeof(Smem<S>) <= kSmemOfSm80);
  launch(a, q, S::kRows, S::kBlocks, sizeof(Smem<S>), decode_tiles<S>);
}

template <int kD>
void launch_plain(const DecodeArgs& a, const Tensor& q) {
  launch(a, q, kPlainRows, 4, sizeof(PlainSmem<kD>), decode_plain<kD>);
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
      if (!whole(a.k) || !whole(a.v)) return launch_tiles<T, 256, false>(a, q);
      if (dim <= 64) return launch_tiles<T, 64, true>(a, q);
      if (dim <= 96) return launch_tiles<T, 96, true>(a, q);
      if (dim <= 128) return launch_tiles<T, 128, true>(a, q);
      return launch_tiles<T, 256, true>(a, q);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> paged_decode(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                                const Tensor& block_table, const Tensor& lengths, double scale,
                                                MaybeTensor index, MaybeTensor index_count, MaybeTensor key_bias,
                                                MaybeTensor position, MaybeTensor q_position,
                                                std::optional<int64_t> window, std::optional<double> softcap,
                                                MaybeTensor sinks, bool causal, bool logits_out) {
  const Options options{index, index_count, key_bias, position, q_position, sinks, window, softcap, causal, logits_out};
  DecodeArgs a = make_decode_args(q, k_pages, v_pages, block_table, lengths, scale, options);
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
