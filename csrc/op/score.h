// score family at the torch boundary: the schemas, and the only place where their arguments are checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "core/score.h"
#include "op/attention.h"

namespace tokencomp::score {

constexpr const char* kSchemas[] = {
    "column_score(Tensor q, Tensor k, Tensor lse, *, float scale, Tensor? row_weight=None, Tensor? key_bias=None, "
    "Tensor? q_position=None, Tensor? lengths=None, Tensor? starts=None, bool causal=True, int? window=None, float? "
    "softcap=None, str rows='sum', str heads='none', int power=1) -> Tensor",
    "diagonal_score(Tensor q, Tensor k, Tensor lse, *, float scale, Tensor? row_weight=None, Tensor? key_bias=None, "
    "Tensor? q_position=None, Tensor? lengths=None, Tensor? starts=None, bool causal=True, int? window=None, float? "
    "softcap=None, str heads='none', int power=1) -> Tensor",
    "attention_lse(Tensor q, Tensor k, *, float scale, Tensor? key_bias=None, Tensor? q_position=None, Tensor? "
    "lengths=None, Tensor? starts=None, bool causal=True, int? window=None, float? softcap=None) -> Tensor",
    "qk_scores(Tensor q, Tensor k, *, float scale, Tensor? block_table=None, Tensor? k_min=None, Tensor? "
    "key_bias=None, Tensor? lengths=None, Tensor? starts=None, float? softcap=None, " TOKENCOMP_PAGE_TYPES_SCHEMA
    ") -> (Tensor scores, Tensor lse)",
    "head_vote(Tensor scores, Tensor? lse=None, *, str mode='softmax_sum', int groups=1) -> Tensor",
    "decay_score_(Tensor(a!) score, Tensor logits, Tensor? lse=None, *, float gamma=1.0, Tensor? lengths=None, str "
    "heads='kv_sum', int power=1, Tensor(b!)? count=None, Tensor(c!)? last=None, Tensor(d!)? interval=None, int "
    "step=0, float alpha=1.0) -> ()",
};

inline int power_of(const char* op, int64_t power) {
  STD_TORCH_CHECK(power == 1 || power == 2, op, ": power must be 1 or 2, got ", power);
  return int(power);
}

inline Heads heads_of(const char* op, const std::string& heads) {
  return choice<Heads>(op, "heads", heads, {"none", "kv_sum", "kv_mean", "kv_max", "mean", "rms"});
}

inline ColumnArgs make_column_args(const char* op, const Tensor& q, const Tensor& k, const Tensor& lse, double scale,
                                   const MaybeTensor& row_weight, const MaybeTensor& key_bias, const Sight& sight,
                                   std::optional<double> softcap, const std::string& rows, const std::string& heads,
                                   int64_t power) {
  ColumnArgs c{};
  c.a = make_attention(op, q, k, scale, softcap);
  add_bias(op, c.a, q, key_bias);
  add_sight(op, c.a, q, sight);
  const Geometry& g = c.a.g;
  c.lse = side_array<float>(op, "lse", lse, q, ScalarType::Float, {g.B, g.Hq, g.T});
  if (row_weight) {
    const bool wide = row_weight->dim() == 3;
    const int64_t batch = wide && row_weight->size(0) == 1 ? 1 : g.B, h = wide && row_weight->size(1) == 1 ? 1 : g.Hq;
    c.row_weight = side_array<float>(op, "row_weight", row_weight, q, ScalarType::Float, {batch, h, g.T});
    c.weight_stride_b = batch == 1 ? 0 : h * g.T;
    c.weight_stride_h = h == 1 ? 0 : g.T;
  }
  c.rows = choice<Rows>(op, "rows", rows, {"sum", "max"});
  c.heads = heads_of(op, heads);
  c.power = power_of(op, power);
  return c;
}

inline Tensor make_column_output(ColumnArgs& c, const Tensor& q) {
  const Geometry& g = c.a.g;
  Tensor out = torch::stable::new_empty(q, {g.B, heads_out(c.heads, g.Hq, g.Hkv), g.S}, ScalarType::Float);
  c.out = static_cast<float*>(out.mutable_data_ptr());
  return out;
}

inline LseArgs make_lse_args(const Tensor& q, const Tensor& k, double scale, const MaybeTensor& key_bias,
                             const Sight& sight, std::optional<double> softcap) {
  constexpr const char* op = "attention_lse";
  LseArgs l{};
  l.a = make_attention(op, q, k, scale, softcap);
  add_bias(op, l.a, q, key_bias);
  add_sight(op, l.a, q, sight);
  return l;
}

inline Tensor make_lse_output(LseArgs& l, const Tensor& q) {
  const Geometry& g = l.a.g;
  Tensor lse = torch::stable::new_empty(q, {g.B, g.Hq, g.T}, ScalarType::Float);
  l.lse = static_cast<float*>(lse.mutable_data_ptr());
  return lse;
}

// The smallest value of each channel beside the largest: laid out as k, so that one offset serves both.
inline void add_minima(const char* op, Attention& a, const Tensor& k, const MaybeTensor& k_min) {
  if (!k_min) return;
  STD_TORCH_CHECK(same_device(*k_min, k) && k_min->scalar_type() == k.scalar_type(), op,
                  ": k_min must have the device and dtype of k, got another");
  STD_TORCH_CHECK(has_shape(*k_min, {k.size(0), k.size(1), k.size(2), k.size(3)}), op,
                  ": k_min must have the shape of k, ", shape_of(k), ", got ", shape_of(*k_min));
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(k_min->size(i) <= 1 || k_min->stride(i) == k.stride(i), op,
                    ": k_min must have the strides of k, got stride ", k_min->stride(i), " in dimension ", i);
  }
  a.k_min = k_min->const_data_ptr();
}

inline LseArgs make_qk_args(const Tensor& q, const Tensor& k, double scale, const MaybeTensor& block_table,
                            const MaybeTensor& k_min, const MaybeTensor& key_bias, const MaybeTensor& lengths,
                            const MaybeTensor& starts, std::optional<double> softcap, const PageTypeOptions& types,
                            bool mma16) {
  constexpr const char* op = "qk_scores";
  STD_TORCH_CHECK(q.dim() == 3, op, ": q must have shape [B, Hq, D], got ", shape_of(q));
  LseArgs l{};
  l.a = make_attention(op, torch::stable::unsqueeze(q, 2), k, scale, softcap, block_table);
  add_bias(op, l.a, q, key_bias);
  add_sight(op, l.a, q, {{}, {}, starts, false, {}});
  add_lengths(op, l.a, q, lengths, true);
  STD_TORCH_CHECK(!k_min || !types.pools || types.pools->empty(), op,
                  ": k_min must be None beside quantized pools, got a tensor");
  add_page_types(op, l.a, q, types, l.a.g.D, mma16);
  add_minima(op, l.a, k, k_min);
  return l;
}

inline std::tuple<Tensor, Tensor> make_qk_outputs(LseArgs& l, const Tensor& q) {
  const Geometry& g = l.a.g;
  Tensor scores = torch::stable::new_empty(q, {g.B, g.Hq, g.S}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(q, {g.B, g.Hq}, ScalarType::Float);
  l.logits = static_cast<float*>(scores.mutable_data_ptr());
  l.lse = static_cast<float*>(lse.mutable_data_ptr());
  return {scores, lse};
}

inline VoteArgs make_vote_args(const Tensor& scores, const MaybeTensor& lse, const std::string& mode, int64_t groups) {
  constexpr const char* op = "head_vote";
  STD_TORCH_CHECK(scores.dim() == 3, op, ": scores must have shape [B, Hq, S], got ", shape_of(scores));
  VoteArgs v{};
  v.B = in_int(op, "B", scores.size(0), 0, kMaxBatch);
  v.Hq = in_int(op, "Hq", scores.size(1), 1, kMaxHeads);
  v.S = in_int(op, "S", scores.size(2), 0, kMaxTokens);
  v.scores = side_array<float>(op, "scores", scores, scores, ScalarType::Float, {v.B, v.Hq, v.S});
  v.lse = side_array<float>(op, "lse", lse, scores, ScalarType::Float, {v.B, v.Hq});
  v.mode = choice<Vote>(op, "mode", mode, {"softmax_sum", "sum", "max", "mean"});
  STD_TORCH_CHECK(v.mode != Vote::softmax_sum || lse, op, ": lse must be given for mode 'softmax_sum', got None");
  STD_TORCH_CHECK(groups >= 1 && v.Hq % groups == 0, op, ": groups must divide Hq=", v.Hq, ", got ", groups);
  v.groups = int(groups);
  v.device = scores.get_device_index();
  return v;
}

inline Tensor make_vote_output(VoteArgs& v, const Tensor& scores) {
  Tensor out = torch::stable::new_empty(scores, {v.B, v.groups, v.S}, ScalarType::Float);
  v.out = static_cast<float*>(out.mutable_data_ptr());
  return out;
}

// A state that is updated in place: checked like a side array, but written.
template <class T>
T* state_array(const char* op, const char* argument, const MaybeTensor& t, const Tensor& x, ScalarType dtype,
               std::initializer_list<int64_t> shape) {
  return const_cast<T*>(side_array<T>(op, argument, t, x, dtype, shape));
}

inline DecayArgs make_decay_args(const Tensor& score, const Tensor& logits, const MaybeTensor& lse, double gamma,
                                 const MaybeTensor& lengths, const std::string& heads, int64_t power,
                                 const MaybeTensor& count, const MaybeTensor& last, const MaybeTensor& interval,
                                 int64_t step, double alpha) {
  constexpr const char* op = "decay_score_";
  STD_TORCH_CHECK(score.dim() == 3, op, ": score must have shape [B, H, S], got ", shape_of(score));
  STD_TORCH_CHECK(logits.dim() == 3, op, ": logits must have shape [B, Hq, S], got ", shape_of(logits));
  DecayArgs d{};
  d.B = in_int(op, "B", score.size(0), 0, kMaxBatch);
  d.H = in_int(op, "H", score.size(1), 1, kMaxHeads);
  d.S = in_int(op, "S", score.size(2), 0, kMaxTokens);
  d.Hq = in_int(op, "Hq", logits.size(1), 1, kMaxHeads);
  d.heads = heads_of(op, heads);
  const bool shared = d.heads == Heads::mean || d.heads == Heads::rms;
  const bool fits = d.heads == Heads::none ? d.H == d.Hq : shared ? d.H == 1 : d.Hq % d.H == 0;
  STD_TORCH_CHECK(fits, op, ": H must fit heads='", heads, "' with Hq=", d.Hq, ", got ", d.H);
  const std::initializer_list<int64_t> state = {d.B, d.H, d.S};
  d.score = state_array<float>(op, "score", score, score, ScalarType::Float, state);
  d.logits = side_array<float>(op, "logits", logits, score, ScalarType::Float, {d.B, d.Hq, d.S});
  d.lse = side_array<float>(op, "lse", lse, score, ScalarType::Float, {d.B, d.Hq});
  d.lengths = side_array<int>(op, "lengths", lengths, score, ScalarType::Int, {d.B});
  d.count = state_array<int>(op, "count", count, score, ScalarType::Int, state);
  d.last = state_array<int>(op, "last", last, score, ScalarType::Int, state);
  d.interval = state_array<int>(op, "interval", interval, score, ScalarType::Int, state);
  STD_TORCH_CHECK(last || !interval, op, ": interval must be None unless last is given, got a tensor");
  STD_TORCH_CHECK(gamma > 0 && gamma <= 1, op, ": gamma must be in (0, 1], got ", gamma);
  STD_TORCH_CHECK(alpha >= 0, op, ": alpha must be >= 0, got ", alpha);
  d.step = in_int(op, "step", step, 0, 0x7fffffff);
  d.power = power_of(op, power);
  d.gamma = float(gamma);
  d.alpha = float(alpha);
  d.device = score.get_device_index();
  return d;
}

}  // namespace tokencomp::score
