// Prefill attention on CUDA, torch side: shapes, launch, registration. One launch, no working memory.
#include "op/prefill.h"

#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "cuda/prefill_kernels.h"
#include "op/stream.h"

namespace tokencomp::prefill {
namespace {

template <class T, int kQueries, class F>
void with_shape(int dim, F&& f) {
  if (dim <= 64) return f.template operator()<Shape<T, 64, kQueries>>();
  if constexpr (sizeof(T) == 2) {
    if (dim <= 96) return f.template operator()<Shape<T, 96, kQueries>>();
  }
  if (dim <= 128) return f.template operator()<Shape<T, 128, kQueries>>();
  if constexpr (sizeof(T) == 2) {
    if (dim <= 192) return f.template operator()<Shape<T, 192, kQueries>>();
  }
  f.template operator()<Shape<T, 256, kQueries>>();
}

template <class S>
void launch(const PrefillArgs& p) {
  const Geometry& g = p.a.g;
  const int64_t row_blocks = ceil_div(g.T, S::kRows), blocks = row_blocks * g.B * g.Hq;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, kOp, ": B * Hq * T must be at most ", int64_t(0x7fffffff) * S::kRows,
                  " on CUDA, got ", int64_t(g.B) * g.Hq * g.T);
  static_assert(sizeof(Smem<S>) <= kSmemOfSm80);
  gpu::LaunchConfig config{dim3(unsigned(blocks)), dim3(S::kThreads), sizeof(Smem<S>)};
  config.stream = gpu::stream_of(p.a.device);
  const bool whole_v = whole_chunks(p.a.dtype, p.Dv, p.v, p.v_stride_b, p.v_stride_h, p.v_stride_s);
  gpu::launch(prefill_attend<S>, config, p, int(row_blocks), whole_queries(p.a), whole_keys(p.a), whole_v);
}

void run(const PrefillArgs& p) {
  const Geometry& g = p.a.g;
  dispatch_dtype(p.a.dtype, [&]<class T> {
    const int dim = g.D > p.Dv ? g.D : p.Dv;
    const bool few = sizeof(T) == 4 || g.T <= 64 || (p.blocks.pointer && p.block_q == 64);
    if constexpr (sizeof(T) == 2) {
      if (!few) return with_shape<T, 128>(dim, [&]<class S> { launch<S>(p); });
    }
    with_shape<T, 64>(dim, [&]<class S> { launch<S>(p); });
  });
}

void watch_lists(const Lists& lists, const char* pointer_name, int64_t pointers, const char* entries_name) {
  if (!lists.pointer) return;
  gpu::watch(lists.pointer, size_t(pointers) * 4, pointer_name, true);
  gpu::watch(lists.entries, size_t(lists.capacity) * 4, entries_name, true);
}

void watch_arguments(const PrefillArgs& p) {
  const Geometry& g = p.a.g;
  const int64_t bytes = p.a.dtype == DType::f32 ? 4 : 2, rows = int64_t(g.B) * g.Hq * g.T;
  watch_attention(p.a);
  const int64_t values = (g.B - 1) * p.v_stride_b + (g.Hkv - 1) * p.v_stride_h + (g.S - 1) * p.v_stride_s + p.Dv;
  gpu::watch(p.v, size_t(g.S ? values * bytes : 0), "v", true);
  const int64_t blocks = int64_t(g.B) * p.query_blocks;
  watch_lists(p.blocks, "indptr", blocks * p.blocks.heads + 1, "indices");
  watch_lists(p.columns, "column_ptr", blocks * p.columns.heads + 1, "columns");
  if (p.sinks) gpu::watch(p.sinks, size_t(g.Hq) * 4, "sinks", true);
  gpu::watch(p.out, size_t(rows * p.Dv * bytes), "out", false);
  gpu::watch(p.lse, size_t(rows) * 4, "lse", false);
}

std::tuple<Tensor, Tensor> flash_prefill(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                         MaybeTensor indptr, MaybeTensor indices, MaybeTensor column_ptr,
                                         MaybeTensor columns, int64_t block_q, int64_t block_k, MaybeTensor key_bias,
                                         MaybeTensor q_position, MaybeTensor lengths, MaybeTensor starts, bool causal,
                                         std::optional<int64_t> window, std::optional<double> softcap,
                                         MaybeTensor sinks) {
  PrefillArgs p = make_prefill_args(q, k, v, scale, {indptr, indices, column_ptr, columns, block_q, block_k}, key_bias,
                                    {q_position, lengths, starts, causal, window}, softcap, sinks);
  std::tuple<Tensor, Tensor> out = make_prefill_outputs(p, q);
  if (int64_t(p.a.g.B) * p.a.g.T == 0) return out;
  const gpu::DeviceGuard device(p.a.device);
  const gpu::WatchScope scope;
  watch_arguments(p);
  run(p);
  return out;
}

}  // namespace
}  // namespace tokencomp::prefill

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("flash_prefill", TORCH_BOX(&tokencomp::prefill::flash_prefill));
}
