// Attention scores on CUDA, torch side: parts, working memory, launches, registration. A column score is three launches
// (rows, sweep, heads), a log-sum-exp two (sweep, merge). Working memory is O(Hq (T + parts S)).
#include "op/score.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "core/dispatch.h"
#include "cuda/score_diagonal.h"
#include "cuda/score_lse.h"
#include "cuda/score_point.h"
#include "op/stream.h"
#include "op/workspace.h"

namespace tokencomp::score {

ColumnSweepLauncher* wgmma_columns = nullptr;

namespace {

constexpr int kMaxParts = 8;      // of the rows of a column score: bounds its working memory
constexpr int kBlocksPerSm = 8;   // blocks wanted for each multiprocessor, so that uneven ones even out
constexpr int kMaxKeyParts = 64;  // of the keys of a log-sum-exp
constexpr int kFewRows = 64;      // up to this many rows a group, the sweep with 16 still rows is taken
constexpr int kWgmmaLeast = 64;   // up to this many rows, tiles of 128 rows would be half empty

template <class T, bool kFew, class F>
void with_shape(int dim, F&& f) {
  if (dim <= 64) return f.template operator()<Shape<T, 64, kFew>>();
  if constexpr (sizeof(T) == 2) {
    if (dim <= 96) return f.template operator()<Shape<T, 96, kFew>>();
  }
  if (dim <= 128) return f.template operator()<Shape<T, 128, kFew>>();
  if constexpr (sizeof(T) == 2) {
    if (dim <= 192) return f.template operator()<Shape<T, 192, kFew>>();
  }
  f.template operator()<Shape<T, 256, kFew>>();
}

gpu::LaunchConfig config_of(int device, dim3 grid, size_t smem = 0) {
  gpu::LaunchConfig config{grid, dim3(kThreads), smem};
  config.stream = gpu::stream_of(device);
  return config;
}

dim3 grid_of(int64_t threads) { return dim3(unsigned(ceil_div(threads, kThreads))); }

ColumnWorkspace make_column_workspace(const ColumnArgs& c, Workspace& memory, int tile_rows, int still, bool split) {
  const Geometry& g = c.a.g;
  const int64_t heads = int64_t(g.B) * g.Hq;
  ColumnWorkspace w{};
  w.tile_rows = tile_rows;
  w.tiles = int(ceil_div(g.T, tile_rows));
  const int64_t blocks = int64_t(g.B) * g.Hkv * ceil_div(g.S, still), wanted = int64_t(gpu::sm_count()) * kBlocksPerSm;
  const int64_t parts = split ? std::min<int64_t>(kMaxParts, ceil_div(wanted, blocks)) : 1;
  w.tiles_per_part = int(std::max<int64_t>(ceil_div(w.tiles, parts), ceil_div(still, tile_rows)));
  w.parts = int(std::max<int64_t>(1, ceil_div(w.tiles, w.tiles_per_part)));
  w.beta = memory.take<float>(heads * w.tiles * tile_rows, "beta");
  w.range = memory.take<Range>(int64_t(g.B) * w.tiles * tile_rows, "range");
  w.bounds = memory.take<TileBounds>(heads * w.tiles, "bounds");
  w.partial = memory.take<float>(w.parts * heads * g.S, "partial");
  return w;
}

void prepare_columns(const ColumnArgs& c, const ColumnWorkspace& w) {
  const Geometry& g = c.a.g;
  if (w.tiles) gpu::launch(score_rows, config_of(c.a.device, grid_of(int64_t(g.B) * g.Hq * w.tiles * 32)), c, w);
}

void finish_columns(const ColumnArgs& c, const ColumnWorkspace& w) {
  const Geometry& g = c.a.g;
  const int64_t out = int64_t(g.B) * heads_out(c.heads, g.Hq, g.Hkv) * g.S;
  gpu::launch(score_heads, config_of(c.a.device, grid_of(out)), c, w);
}

// Why the sweep with warpgroup products cannot run; null where it can.
const char* wgmma_refused(const ColumnArgs& c) {
  if (!wgmma_columns) return "this build has no kernels for sm_90a";
  if (gpu::compute_capability_major() != 9) return "the GPU is not an sm_90";
  if (c.a.dtype == DType::f32) return "float32 has no products of that kind";
  if (c.a.g.D > kWgmmaDim) return "D is more than 128";
  if (c.a.softcap > 0) return "there is a soft cap";
  if (!whole_queries(c.a) || !whole_keys(c.a)) return "rows are not whole 16-byte chunks";
  return nullptr;
}

// Whether to take it: where it can run and rows fill its tiles, or as TOKENCOMP_SCORE_PLAN says.
bool takes_wgmma(const ColumnArgs& c) {
  const char* refused = wgmma_refused(c);
  const char* set = std::getenv("TOKENCOMP_SCORE_PLAN");
  const std::string_view plan = set ? set : "";
  if (plan.empty()) return !refused && c.a.g.T > kWgmmaLeast;
  STD_TORCH_CHECK(plan == "mma" || plan == "wgmma",
                  "column_score: TOKENCOMP_SCORE_PLAN must be 'mma' or 'wgmma', got '", set, "'");
  STD_TORCH_CHECK(plan == "mma" || !refused, "column_score: TOKENCOMP_SCORE_PLAN must name a possible plan, got '", set,
                  "': ", refused ? refused : "");
  return plan == "wgmma";
}

void launch_wgmma(const ColumnArgs& c, Workspace& memory) {
  const ColumnWorkspace w = make_column_workspace(c, memory, kWgmmaRows, kWgmmaKeys, true);
  prepare_columns(c, w);
  wgmma_columns(c, w, config_of(c.a.device, dim3(1)));
  finish_columns(c, w);
}

template <class S>
void launch_columns(const ColumnArgs& c, Workspace& memory) {
  if (takes_wgmma(c)) return launch_wgmma(c, memory);
  const Geometry& g = c.a.g;
  const ColumnWorkspace w = make_column_workspace(c, memory, S::kStream, S::kStill, true);
  const bool whole = whole_queries(c.a) && whole_keys(c.a);
  prepare_columns(c, w);
  static_assert(sizeof(Smem<S>) <= kSmemOfSm80);
  const dim3 grid(unsigned(g.B * g.Hkv), unsigned(ceil_div(g.S, S::kStill)), unsigned(w.parts));
  const gpu::LaunchConfig config = config_of(c.a.device, grid, sizeof(Smem<S>));
  gpu::launch(c.rows == Rows::max ? score_columns<S, true> : score_columns<S, false>, config, c, w, whole);
  finish_columns(c, w);
}

template <class Columns>
void launch_diagonals(const ColumnArgs& c, Workspace& memory) {
  using S = DiagonalShape<typename Columns::T, Columns::kD>;
  const Geometry& g = c.a.g;
  const ColumnWorkspace w = make_column_workspace(c, memory, S::kStream, S::kStill, false);
  const bool whole = whole_queries(c.a) && whole_keys(c.a);
  prepare_columns(c, w);
  static_assert(sizeof(DiagonalSmem<S>) <= kSmemOfSm80);
  const dim3 grid(unsigned(g.B * g.Hq), unsigned(ceil_div(g.S, kOffsets)));
  gpu::launch(score_diagonals<S>, config_of(c.a.device, grid, sizeof(DiagonalSmem<S>)), c, w, whole);
  finish_columns(c, w);
}

template <class S>
void launch_lse(const LseArgs& l, Workspace& memory) {
  const Geometry& g = l.a.g;
  LseWorkspace w{};
  w.blocks = int(ceil_div(int64_t(g.group()) * g.T, S::kStill));
  const int64_t blocks = int64_t(g.B) * g.Hkv * w.blocks, wanted = int64_t(gpu::sm_count()) * kBlocksPerSm;
  const int64_t parts = std::min<int64_t>(kMaxKeyParts, ceil_div(wanted, blocks));
  w.keys_per_part = int(std::max<int64_t>(round_up(ceil_div(g.S, parts), S::kStream), 4 * S::kStream));
  w.parts = int(std::max<int64_t>(1, ceil_div(g.S, w.keys_per_part)));
  const int64_t rows = int64_t(g.B) * g.Hq * g.T;
  w.partial = memory.take<float2>(w.parts * rows, "partial");
  static_assert(sizeof(Smem<S>) <= kSmemOfSm80);
  const dim3 grid(unsigned(g.B * g.Hkv), unsigned(w.blocks), unsigned(w.parts));
  gpu::launch(score_lse<S>, config_of(l.a.device, grid, sizeof(Smem<S>)), l, w, whole_queries(l.a), whole_keys(l.a));
  gpu::launch(score_merge, config_of(l.a.device, grid_of(rows)), l, w);
}

// Working memory first, so that the checker forgets it after the last launch.
template <class F>
void run_columns(const ColumnArgs& c, const Tensor& q, int64_t out_bytes, F&& launch) {
  const Geometry& g = c.a.g;
  if (out_bytes == 0) return;
  const gpu::DeviceGuard device(c.a.device);
  const gpu::WatchScope scope;
  watch_attention(c.a);
  gpu::watch(c.lse, int64_t(g.B) * g.Hq * g.T * 4, "lse", true);
  if (c.row_weight) {
    gpu::watch(c.row_weight, (c.weight_stride_b * (g.B - 1) + c.weight_stride_h * (g.Hq - 1) + g.T) * 4, "row_weight",
               true);
  }
  gpu::watch(c.out, out_bytes, "out", false);
  Workspace memory(q);
  dispatch_dtype(c.a.dtype, [&]<class T> { with_shape<T, false>(g.D, [&]<class S> { launch(S{}, memory); }); });
}

Tensor column_score(const Tensor& q, const Tensor& k, const Tensor& lse, double scale, MaybeTensor row_weight,
                    MaybeTensor key_bias, MaybeTensor q_position, MaybeTensor lengths, MaybeTensor starts, bool causal,
                    std::optional<int64_t> window, std::optional<double> softcap, std::string rows, std::string heads,
                    int64_t power) {
  ColumnArgs c = make_column_args("column_score", q, k, lse, scale, row_weight, key_bias,
                                  {q_position, lengths, starts, causal, window}, softcap, rows, heads, power);
  Tensor out = make_column_output(c, q);
  run_columns(c, q, out.numel() * 4, [&]<class S>(S, Workspace& memory) { launch_columns<S>(c, memory); });
  return out;
}

Tensor diagonal_score(const Tensor& q, const Tensor& k, const Tensor& lse, double scale, MaybeTensor row_weight,
                      MaybeTensor key_bias, MaybeTensor q_position, MaybeTensor lengths, MaybeTensor starts,
                      bool causal, std::optional<int64_t> window, std::optional<double> softcap, std::string heads,
                      int64_t power) {
  ColumnArgs c = make_column_args("diagonal_score", q, k, lse, scale, row_weight, key_bias,
                                  {q_position, lengths, starts, causal, window}, softcap, "sum", heads, power);
  Tensor out = make_column_output(c, q);
  run_columns(c, q, out.numel() * 4, [&]<class S>(S, Workspace& memory) { launch_diagonals<S>(c, memory); });
  return out;
}

void run_lse(const LseArgs& l, const Tensor& q) {
  const Geometry& g = l.a.g;
  const int64_t rows = int64_t(g.B) * g.Hq * g.T;
  if (rows == 0) return;
  const gpu::DeviceGuard device(l.a.device);
  const gpu::WatchScope scope;
  watch_attention(l.a);
  gpu::watch(l.lse, rows * 4, "lse", false);
  if (l.logits) gpu::watch(l.logits, rows * g.S * 4, "logits", false);
  Workspace memory(q);
  const int dim = l.a.k_min ? 2 * g.D : g.D;
  dispatch_dtype(l.a.dtype, [&]<class T> {
    if (l.logits || int64_t(g.group()) * g.T <= kFewRows) {
      with_shape<T, true>(dim, [&]<class S> { launch_lse<S>(l, memory); });
    } else {
      with_shape<T, false>(dim, [&]<class S> { launch_lse<S>(l, memory); });
    }
  });
}

Tensor attention_lse(const Tensor& q, const Tensor& k, double scale, MaybeTensor key_bias, MaybeTensor q_position,
                     MaybeTensor lengths, MaybeTensor starts, bool causal, std::optional<int64_t> window,
                     std::optional<double> softcap) {
  LseArgs l = make_lse_args(q, k, scale, key_bias, {q_position, lengths, starts, causal, window}, softcap);
  Tensor lse = make_lse_output(l, q);
  run_lse(l, q);
  return lse;
}

std::tuple<Tensor, Tensor> qk_scores(const Tensor& q, const Tensor& k, double scale, MaybeTensor block_table,
                                     MaybeTensor k_min, MaybeTensor key_bias, MaybeTensor lengths, MaybeTensor starts,
                                     std::optional<double> softcap, MaybePools pools, MaybeFormats formats,
                                     MaybeTensor k_scale, MaybeTensor k_bias, MaybeTensor v_scale, MaybeTensor v_bias) {
  LseArgs l = make_qk_args(q, k, scale, block_table, k_min, key_bias, lengths, starts, softcap,
                           {pools, formats, k_scale, k_bias, v_scale, v_bias}, true);
  STD_TORCH_CHECK(!k_min || 2 * l.a.g.D <= kMaxHeadDim, "qk_scores: head dimension D must be at most ", kMaxHeadDim / 2,
                  " with k_min on CUDA, got ", l.a.g.D);
  std::tuple<Tensor, Tensor> out = make_qk_outputs(l, q);
  run_lse(l, q);
  return out;
}

Tensor head_vote(const Tensor& scores, MaybeTensor lse, std::string mode, int64_t groups) {
  VoteArgs v = make_vote_args(scores, lse, mode, groups);
  Tensor out = make_vote_output(v, scores);
  if (out.numel() == 0) return out;
  const gpu::DeviceGuard device(v.device);
  const gpu::WatchScope scope;
  gpu::watch(v.scores, scores.numel() * 4, "scores", true);
  if (v.lse) gpu::watch(v.lse, int64_t(v.B) * v.Hq * 4, "lse", true);
  gpu::watch(v.out, out.numel() * 4, "out", false);
  gpu::launch(score_vote, config_of(v.device, grid_of(out.numel())), v);
  return out;
}

void decay_score_(const Tensor& score, const Tensor& logits, MaybeTensor lse, double gamma, MaybeTensor lengths,
                  std::string heads, int64_t power, MaybeTensor count, MaybeTensor last, MaybeTensor interval,
                  int64_t step, double alpha) {
  const DecayArgs d =
      make_decay_args(score, logits, lse, gamma, lengths, heads, power, count, last, interval, step, alpha);
  const int64_t slots = score.numel();
  if (slots == 0) return;
  const gpu::DeviceGuard device(d.device);
  const gpu::WatchScope scope;
  gpu::watch(d.score, slots * 4, "score", true);
  gpu::watch(d.logits, logits.numel() * 4, "logits", true);
  if (d.lse) gpu::watch(d.lse, int64_t(d.B) * d.Hq * 4, "lse", true);
  if (d.lengths) gpu::watch(d.lengths, d.B * 4, "lengths", true);
  if (d.count) gpu::watch(d.count, slots * 4, "count", true);
  if (d.last) gpu::watch(d.last, slots * 4, "last", true);
  if (d.interval) gpu::watch(d.interval, slots * 4, "interval", true);
  gpu::launch(score_decay, config_of(d.device, grid_of(slots)), d);
}

}  // namespace
}  // namespace tokencomp::score

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("column_score", TORCH_BOX(&tokencomp::score::column_score));
  m.impl("diagonal_score", TORCH_BOX(&tokencomp::score::diagonal_score));
  m.impl("attention_lse", TORCH_BOX(&tokencomp::score::attention_lse));
  m.impl("qk_scores", TORCH_BOX(&tokencomp::score::qk_scores));
  m.impl("head_vote", TORCH_BOX(&tokencomp::score::head_vote));
  m.impl("decay_score_", TORCH_BOX(&tokencomp::score::decay_score_));
}
