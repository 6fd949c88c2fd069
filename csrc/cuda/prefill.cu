// Prefill attention on CUDA, torch side: shapes, launch, registration. One launch, no working memory.
#include "op/prefill.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string_view>

#include "core/dispatch.h"
#include "cuda/prefill_kernels.h"
#include "cuda/prefill_work.h"
#include "op/stream.h"

namespace tokencomp::prefill {

WgmmaLauncher* wgmma_prefill = nullptr;

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

// Blocks of `rows` queries of all heads.
int64_t count_blocks(const PrefillArgs& p, int rows) {
  const Geometry& g = p.a.g;
  const int64_t blocks = ceil_div(g.T, rows) * g.B * g.Hq;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, kOp, ": B * Hq * T must be at most ", int64_t(0x7fffffff) * rows,
                  " on CUDA, got ", int64_t(g.B) * g.Hq * g.T);
  return blocks;
}

bool whole_values(const PrefillArgs& p) {
  const Pages& pages = p.v_pages;
  return p.a.table.entry ? whole_chunks(p.a.dtype, p.Dv, p.v, pages.page_stride, pages.head_stride, pages.slot_stride)
                         : whole_chunks(p.a.dtype, p.Dv, p.v, p.v_stride_b, p.v_stride_h, p.v_stride_s);
}

template <class S>
void launch(const PrefillArgs& p) {
  const int64_t row_blocks = ceil_div(p.a.g.T, S::kRows), blocks = count_blocks(p, S::kRows);
  static_assert(sizeof(Smem<S>) <= kSmemOfSm80);
  gpu::LaunchConfig config{dim3(unsigned(blocks)), dim3(S::kThreads), sizeof(Smem<S>)};
  config.stream = gpu::stream_of(p.a.device);
  const bool paged = p.a.table.entry;
  auto* kernel = prefill_attend<S, false>;
  if constexpr (S::kRows == 64) kernel = paged ? prefill_attend<S, true> : kernel;
  gpu::launch(kernel, config, p, int(row_blocks), whole_queries(p.a), whole_keys(p.a), whole_values(p));
}

// Why the version with warpgroup products cannot run; null where it can.
const char* wgmma_refused(const PrefillArgs& p) {
  if (!wgmma_prefill) return "this build has no kernels for sm_90a";
  if (gpu::compute_capability_major() != 9) return "the GPU is not an sm_90";
  if (p.a.dtype == DType::f32) return "float32 has no products of that kind";
  if (p.a.g.D > kWgmmaDim || p.Dv > kWgmmaDim) return "D or Dv is more than 128";
  if (p.a.softcap > 0) return "there is a soft cap";
  if (p.a.table.entry) return "keys are in pages";
  if (p.blocks.pointer && p.block_q != kWgmmaRows) return "lists are for blocks of 64 queries";
  if (!whole_queries(p.a) || !whole_keys(p.a) || !whole_values(p)) return "rows are not whole 16-byte chunks";
  return nullptr;
}

// Whether to take it: where it can run and more than half of a block's rows are there, or as TOKENCOMP_PREFILL_PLAN
// says.
bool takes_wgmma(const PrefillArgs& p) {
  const char* refused = wgmma_refused(p);
  const char* set = std::getenv("TOKENCOMP_PREFILL_PLAN");
  const std::string_view plan = set ? set : "";
  if (plan.empty()) return !refused && p.a.g.T > kWgmmaRows / 2;
  STD_TORCH_CHECK(plan == "mma" || plan == "wgmma", kOp, ": TOKENCOMP_PREFILL_PLAN must be 'mma' or 'wgmma', got '",
                  set, "'");
  STD_TORCH_CHECK(plan == "mma" || !refused, kOp, ": TOKENCOMP_PREFILL_PLAN must name a possible plan, got '", set,
                  "': ", refused ? refused : "");
  return plan == "wgmma";
}

void launch_wgmma(const PrefillArgs& p, const Tensor& q) {
  WgmmaWork w{int(count_blocks(p, kWgmmaRows)), int(ceil_div(p.a.g.T, kWgmmaRows)), nullptr};
  Tensor order;
  if (p.blocks.pointer) {
    order = torch::stable::new_empty(q, {w.items}, ScalarType::Int);
    w.order = static_cast<int*>(order.mutable_data_ptr());
    gpu::watch(w.order, size_t(w.items) * 4, "order", false);
  }
  gpu::LaunchConfig config{dim3(1), dim3(1)};
  config.stream = gpu::stream_of(p.a.device);
  wgmma_prefill(p, w, config);
}

void run(const PrefillArgs& p) {
  const Geometry& g = p.a.g;
  dispatch_dtype(p.a.dtype, [&]<class T> {
    const int dim = g.D > p.Dv ? g.D : p.Dv;
    const bool few = sizeof(T) == 4 || g.T <= 64 || p.a.table.entry || (p.blocks.pointer && p.block_q == 64);
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
  const int64_t values = p.a.table.entry
                             ? (p.a.page_count - 1) * p.v_pages.page_stride + (g.Hkv - 1) * p.v_pages.head_stride +
                                   (p.a.table.page_size() - 1) * p.v_pages.slot_stride + p.Dv
                             : (g.B - 1) * p.v_stride_b + (g.Hkv - 1) * p.v_stride_h + (g.S - 1) * p.v_stride_s + p.Dv;
  const bool any = p.a.table.entry ? p.a.page_count : g.S;
  gpu::watch(p.v, size_t(any ? values * bytes : 0), "v", true);
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
                                         MaybeTensor sinks, MaybeTensor block_table, MaybeTensor q_starts,
                                         MaybeTensor q_counts, MaybePools pools, MaybeFormats formats,
                                         MaybeTensor k_scale, MaybeTensor k_bias, MaybeTensor v_scale,
                                         MaybeTensor v_bias) {
  PrefillArgs p = make_prefill_args(q, k, v, scale, {indptr, indices, column_ptr, columns, block_q, block_k}, key_bias,
                                    {q_position, lengths, starts, causal, window, q_starts, q_counts}, softcap, sinks,
                                    {block_table, {pools, formats, k_scale, k_bias, v_scale, v_bias}, true});
  std::tuple<Tensor, Tensor> out = make_prefill_outputs(p, q);
  if (int64_t(p.a.g.B) * p.a.g.T == 0) return out;
  const gpu::DeviceGuard device(p.a.device);
  const gpu::WatchScope scope;
  watch_arguments(p);
  takes_wgmma(p) ? launch_wgmma(p, q) : run(p);
  return out;
}

}  // namespace
}  // namespace tokencomp::prefill

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("flash_prefill", TORCH_BOX(&tokencomp::prefill::flash_prefill));
}
