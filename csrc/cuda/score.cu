// Attention scores on CUDA, torch side: parts, working memory, launches, registration. A column score is three launches
// (rows, sweep, heads), a log-sum-exp two (sweep, merge). Working memory is O(Hq (T + parts S)).
#include "op/score.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "core/dispatch.h"
#include "cuda/score_diagonal.h"
#include "cuda/score_lse.h"
#include "cuda/score_point.h"
#include "op/stream.h"

namespace tokencomp::score {
namespace {

constexpr int kMaxParts = 8;      // of the rows of a column score: bounds its working memory
constexpr int kBlocksPerSm = 8;   // blocks wanted for each multiprocessor, so that uneven ones even out
constexpr int kMaxKeyParts = 64;  // of the keys of a log-sum-exp
constexpr int kFewRows = 64;      // up to this many rows a group, the sweep with 16 still rows is taken

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

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

// Each row starts on a 16-byte boundary and is a whole number of 16-byte chunks.
bool whole_chunks(const Attention& a, const void* p, int64_t stride_b, int64_t stride_h, int64_t stride_row) {
  const int64_t bytes = a.dtype == DType::f32 ? 4 : 2;
  const int64_t bits = int64_t(reinterpret_cast<uintptr_t>(p)) | (stride_b | stride_h | stride_row | a.g.D) * bytes;
  return (bits & 15) == 0;
}
bool whole_queries(const Attention& a) { return whole_chunks(a, a.q, a.q_stride_b, a.q_stride_h, a.q_stride_t); }
bool whole_keys(const Attention& a) {
  return whole_chunks(a, a.k, a.k_stride_b, a.k_stride_h, a.k_stride_s) &&
         (!a.k_min || whole_chunks(a, a.k_min, a.k_stride_b, a.k_stride_h, a.k_stride_s));
}

void watch_attention(const Attention& a) {
  const Geometry& g = a.g;
  const int64_t bytes = a.dtype == DType::f32 ? 4 : 2;
  const auto span = [&](int64_t heads, int64_t rows, int64_t b, int64_t h, int64_t r) {
    return rows ? ((g.B - 1) * b + (heads - 1) * h + (rows - 1) * r + g.D) * bytes : 0;
  };
  gpu::watch(a.q, span(g.Hq, g.T, a.q_stride_b, a.q_stride_h, a.q_stride_t), "q", true);
  const int64_t keys = span(g.Hkv, g.S, a.k_stride_b, a.k_stride_h, a.k_stride_s);
  gpu::watch(a.k, keys, "k", true);
  if (a.k_min) gpu::watch(a.k_min, keys, "k_min", true);
  if (a.key_bias)
    gpu::watch(a.key_bias, (a.bias_stride_b * (g.B - 1) + a.bias_stride_h * (g.Hkv - 1) + g.S) * 4, "key_bias", true);
  if (g.q_position) gpu::watch(g.q_position, (g.position_stride * (g.B - 1) + g.T) * 4, "q_position", true);
  if (g.lengths) gpu::watch(g.lengths, g.B * 4, "lengths", true);
  if (g.starts) gpu::watch(g.starts, g.B * 4, "starts", true);
}

gpu::LaunchConfig config_of(int device, dim3 grid, size_t smem = 0) {
  gpu::LaunchConfig config{grid, dim3(kThreads), smem};
  config.stream = gpu::stream_of(device);
  return config;
}

dim3 grid_of(int64_t threads) { return dim3(unsigned(ceil_div(threads, kThreads))); }

// Arrays that live until the launches are enqueued.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}
  template <class T>
  T* take(int64_t count, const char* name) {
    tensors_.push_back(torch::stable::new_empty(like_, {count * int64_t(sizeof(T)) / 4}, ScalarType::Float));
    T* p = static_cast<T*>(tensors_.back().mutable_data_ptr());
    gpu::watch(p, count * sizeof(T), name, false);
    return p;
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

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

template <class S>
void launch_columns(const ColumnArgs& c, Workspace& memory) {
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

std::tuple<Tensor, Tensor> qk_scores(const Tensor& q, const Tensor& k, double scale, MaybeTensor k_min,
                                     MaybeTensor key_bias, MaybeTensor lengths, MaybeTensor starts,
                                     std::optional<double> softcap) {
  LseArgs l = make_qk_args(q, k, scale, k_min, key_bias, lengths, starts, softcap);
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
