// merge family at the torch boundary: the schemas, and the only place where their arguments are checked.
#pragma once

#include <tuple>

#include "core/merge.h"
#include "op/check.h"

namespace tokencomp::merge {

constexpr const char* kMatchSchema =
    "cosine_match(Tensor a, Tensor b, *, Tensor? a_index=None, Tensor? b_index=None, Tensor? a2=None, "
    "Tensor? b2=None, float alpha=1.0, Tensor? a_weight=None, Tensor? b_weight=None, int band=-1, "
    "int protect_a=0, int protect_b=0, Tensor? mask_a=None, Tensor? mask_b=None, "
    "float? min_similarity=None, int top=1, bool exclude_self=False) -> (Tensor value, Tensor index)";
constexpr const char* kEnergySchema =
    "energy_score(Tensor x, float margin, *, float alpha=1.0, str kind='elu', int prefix=0, Tensor? mask=None) "
    "-> Tensor";
constexpr const char* kMapSchema =
    "bipartite_map(Tensor value, Tensor index, SymInt r, SymInt tokens, *, int prefix=1, bool distill=False, "
    "str order='tome', Tensor? a_tokens=None, Tensor? b_tokens=None, Tensor? rest_tokens=None) -> Tensor";
// Tensors that are keyword-only cannot have a gradient registered beside them, so these are not.
constexpr const char* kMergeSchema =
    "merge_tokens(Tensor x, Tensor token_map, SymInt out_tokens, Tensor? size=None, Tensor? weight=None, "
    "str mode='mean') -> (Tensor y, Tensor out_size)";

// The three in one: the even/odd split of ToMe, or the lists of bipartite_map.
constexpr const char* kBipartiteSchema =
    "bipartite_merge(Tensor x, Tensor metric, SymInt r, Tensor? size=None, Tensor? weight=None, int prefix=1, "
    "str order='tome', str mode='mean', Tensor? a_tokens=None, Tensor? b_tokens=None, Tensor? rest_tokens=None) -> "
    "(Tensor y, Tensor out_size, Tensor token_map)";

constexpr int64_t kMaxBatch = 65535, kMaxChannels = 1 << 20;
constexpr int64_t kMaxTokens = 1 << 20;  // what index arithmetic in floats and int32 can hold, with room
constexpr int64_t kMaxMapRows = 16384;   // rows one block of threads ranks in shared memory

// x is [B, N, C] with contiguous channels and in range; `argument` names it.
inline void check_tokens(const char* op, const char* argument, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": ", argument, " must have shape [B, N, C], got ", shape_of(x));
  STD_TORCH_CHECK(x.size(0) <= kMaxBatch, op, ": B must be at most ", kMaxBatch, ", got ", x.size(0));
  STD_TORCH_CHECK(x.size(1) <= kMaxTokens, op, ": ", argument, " must hold at most ", kMaxTokens, " tokens, got ",
                  x.size(1));
  STD_TORCH_CHECK(x.size(2) >= 1 && x.size(2) <= kMaxChannels, op, ": ", argument, " must have between 1 and ",
                  kMaxChannels, " channels, got ", x.size(2));
  STD_TORCH_CHECK(x.stride(2) == 1 || x.size(2) == 1, op, ": ", argument,
                  " must be contiguous in its last dimension, got stride ", x.stride(2));
}

// A tensor beside the first argument: same device and dtype.
inline void check_alike(const char* op, const char* argument, const Tensor& t, const char* first, const Tensor& x) {
  STD_TORCH_CHECK(same_device(t, x), op, ": ", argument, " must be on the device of ", first, ", got another device");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", argument, " must have the dtype of ", first, ", ",
                  torch::headeronly::toString(x.scalar_type()), ", got ", torch::headeronly::toString(t.scalar_type()));
}

inline int64_t list_length(const char* op, const char* argument, const Tensor& t, int64_t B) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == B, op, ": ", argument, " must have shape [B=", B, ", R], got ",
                  shape_of(t));
  STD_TORCH_CHECK(t.size(1) <= kMaxTokens, op, ": ", argument, " must hold at most ", kMaxTokens, " places, got ",
                  t.size(1));
  return t.size(1);
}

// The names of one side's arguments, as they appear in messages.
struct SideNames {
  const char *x, *index, *x2, *weight, *protect, *mask;
};

inline Side make_side(const char* op, const SideNames& names, const Tensor& x, const std::optional<Tensor>& index,
                      const std::optional<Tensor>& x2, const std::optional<Tensor>& weight, int64_t protect,
                      const std::optional<Tensor>& mask) {
  Side s;
  const int64_t B = x.size(0), N = x.size(1);
  const int64_t R = index ? list_length(op, names.index, *index, B) : N;
  s.index = side_array<int>(op, names.index, index, x, ScalarType::Int, {B, R});
  s.weight = side_array<float>(op, names.weight, weight, x, ScalarType::Float, {B, R});
  s.mask = side_array<bool>(op, names.mask, mask, x, ScalarType::Bool, {B, R});
  STD_TORCH_CHECK(protect >= 0, op, ": ", names.protect, " must not be negative, got ", protect);
  if (x2) {
    check_tokens(op, names.x2, *x2);
    check_alike(op, names.x2, *x2, names.x, x);
    STD_TORCH_CHECK(x2->size(0) == B && x2->size(1) == N, op, ": ", names.x2, " must have shape [", B, ", ", N,
                    ", C2], got ", shape_of(*x2));
    s.x2 = x2->const_data_ptr();
    s.stride2_b = x2->stride(0);
    s.stride2_n = x2->stride(1);
  }
  s.x = x.const_data_ptr();
  s.stride_b = x.stride(0);
  s.stride_n = x.stride(1);
  s.N = int(N);
  s.R = int(R);
  s.protect = int(protect < R ? protect : R);
  return s;
}

inline MatchArgs make_match_args(const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_index,
                                 const std::optional<Tensor>& b_index, const std::optional<Tensor>& a2,
                                 const std::optional<Tensor>& b2, double alpha, const std::optional<Tensor>& a_weight,
                                 const std::optional<Tensor>& b_weight, int64_t band, int64_t protect_a,
                                 int64_t protect_b, const std::optional<Tensor>& mask_a,
                                 const std::optional<Tensor>& mask_b, std::optional<double> min_similarity, int64_t top,
                                 bool exclude_self) {
  constexpr const char* op = "cosine_match";
  MatchArgs m;
  check_tokens(op, "a", a);
  m.dtype = dtype_of(op, "a", a);
  check_tokens(op, "b", b);
  check_alike(op, "b", b, "a", a);
  STD_TORCH_CHECK(b.size(0) == a.size(0) && b.size(2) == a.size(2), op, ": b must have shape [", a.size(0), ", Nb, ",
                  a.size(2), "], got ", shape_of(b));
  STD_TORCH_CHECK(a2.has_value() == b2.has_value(), op, ": a2 and b2 must be given together, got one of them");
  STD_TORCH_CHECK(a2 || alpha == 1, op, ": alpha must be 1 without a2 and b2, got ", alpha);
  STD_TORCH_CHECK(std::isfinite(alpha), op, ": alpha must be finite, got ", alpha);
  STD_TORCH_CHECK(top >= 1 && top <= kMaxTop, op, ": top must be in [1, ", kMaxTop, "], got ", top);
  STD_TORCH_CHECK(!min_similarity || *min_similarity == *min_similarity, op,
                  ": min_similarity must be a number, got NaN");
  m.a = make_side(op, {"a", "a_index", "a2", "a_weight", "protect_a", "mask_a"}, a, a_index, a2, a_weight, protect_a,
                  mask_a);
  m.b = make_side(op, {"b", "b_index", "b2", "b_weight", "protect_b", "mask_b"}, b, b_index, b2, b_weight, protect_b,
                  mask_b);
  if (a2) {
    STD_TORCH_CHECK(b2->size(2) == a2->size(2), op, ": b2 must have the ", a2->size(2), " channels of a2, got ",
                    b2->size(2));
    m.C2 = int(a2->size(2));
  }
  m.B = int(a.size(0));
  m.C = int(a.size(2));
  if (band >= 0) m.farthest = int(band < kMaxTokens ? band : kMaxTokens);
  m.nearest = exclude_self ? 1 : 0;
  m.top = int(top);
  m.alpha = float(alpha);
  if (min_similarity) m.min_similarity = float(*min_similarity);
  m.device = a.get_device_index();
  return m;
}

struct MatchOutputs {
  Tensor value;  // [B, Ra] or [B, Ra, top] float32
  Tensor index;  // the same shape, int32
};

inline MatchOutputs make_match_outputs(MatchArgs& m, const Tensor& a) {
  const auto make = [&](ScalarType type) {
    return m.top == 1 ? new_output(a, {m.B, m.a.R}, type) : new_output(a, {m.B, m.a.R, m.top}, type);
  };
  MatchOutputs out{make(ScalarType::Float), make(ScalarType::Int)};
  m.value = static_cast<float*>(out.value.mutable_data_ptr());
  m.index = static_cast<int*>(out.index.mutable_data_ptr());
  return out;
}

inline EnergyArgs make_energy_args(const Tensor& x, double margin, double alpha, const std::string& kind,
                                   int64_t prefix, const std::optional<Tensor>& mask) {
  constexpr const char* op = "energy_score";
  EnergyArgs e;
  check_tokens(op, "x", x);
  e.dtype = dtype_of(op, "x", x);
  e.kind = choice<Energy>(op, "kind", kind, {"elu", "paper", "gauss"});
  STD_TORCH_CHECK(std::isfinite(margin), op, ": margin must be finite, got ", margin);
  STD_TORCH_CHECK(e.kind != Energy::gauss || margin < 1, op, ": margin must be below 1 for kind 'gauss', got ", margin);
  STD_TORCH_CHECK(std::isfinite(alpha), op, ": alpha must be finite, got ", alpha);
  e.x = make_side(op, {"x", "", "", "", "prefix", "mask"}, x, std::nullopt, std::nullopt, std::nullopt, prefix, mask);
  e.B = int(x.size(0));
  e.C = int(x.size(2));
  e.margin = float(margin);
  e.alpha = float(alpha);
  if (e.kind == Energy::gauss) {  // in double: 1 - margin cancels
    const double sigma = 1 - margin;
    e.rate = float(-0.5 / (sigma * sigma));
    e.height = float(0.39894228040143268 / sigma);
  }
  e.device = x.get_device_index();
  return e;
}

inline Tensor make_energy_output(EnergyArgs& e, const Tensor& x) {
  Tensor out = new_output(x, {e.B, e.x.N}, ScalarType::Float);
  e.energy = static_cast<float*>(out.mutable_data_ptr());
  return out;
}

// The map of a match of B items with Ra rows; `like` is on the device that everything has to be on. Values and columns
// of the match are left to the caller.
inline MapArgs make_plan(const char* op, const Tensor& like, const char* like_name, int64_t B, int64_t Ra, int64_t r,
                         int64_t tokens, int64_t prefix, const std::string& order,
                         const std::optional<Tensor>& a_tokens, const std::optional<Tensor>& b_tokens,
                         const std::optional<Tensor>& rest_tokens) {
  MapArgs m;
  STD_TORCH_CHECK(B <= kMaxBatch, op, ": B must be at most ", kMaxBatch, ", got ", B);
  STD_TORCH_CHECK(Ra <= kMaxMapRows, op, ": ", like_name, " must hold at most ", kMaxMapRows, " rows, got ", Ra);
  STD_TORCH_CHECK(tokens >= 0 && tokens <= kMaxTokens, op, ": tokens must be in [0, ", kMaxTokens, "], got ", tokens);
  STD_TORCH_CHECK(r >= 0, op, ": r must not be negative, got ", r);
  m.order = choice<Order>(op, "order", order, {"tome", "index", "similarity", "position"});
  STD_TORCH_CHECK(a_tokens.has_value() == b_tokens.has_value(), op,
                  ": a_tokens and b_tokens must be given together, got one of them");
  STD_TORCH_CHECK(a_tokens || !rest_tokens, op, ": rest_tokens must come with a_tokens and b_tokens, got it alone");
  STD_TORCH_CHECK(a_tokens || Ra == (tokens + 1) / 2, op, ": ", like_name, " must have shape [B, ", (tokens + 1) / 2,
                  "] without a_tokens, got [", B, ", ", Ra, "]");
  const int64_t Rb = b_tokens ? list_length(op, "b_tokens", *b_tokens, B) : tokens / 2;
  const int64_t Rr = rest_tokens ? list_length(op, "rest_tokens", *rest_tokens, B) : 0;
  m.a_tokens = side_array<int>(op, "a_tokens", a_tokens, like, ScalarType::Int, {B, Ra}, like_name);
  m.b_tokens = side_array<int>(op, "b_tokens", b_tokens, like, ScalarType::Int, {B, Rb}, like_name);
  m.rest_tokens = side_array<int>(op, "rest_tokens", rest_tokens, like, ScalarType::Int, {B, Rr}, like_name);
  STD_TORCH_CHECK(Ra + Rb + Rr <= tokens, op, ": a_tokens, b_tokens and rest_tokens must list at most tokens=", tokens,
                  " tokens together, got ", Ra + Rb + Rr);
  STD_TORCH_CHECK(prefix >= 0, op, ": prefix must not be negative, got ", prefix);
  const int64_t led = prefix < tokens ? prefix : tokens;
  const int64_t most = a_tokens ? Ra : (tokens - led) / 2;
  m.B = int(B);
  m.N = int(tokens);
  m.Ra = int(Ra);
  m.Rb = int(Rb);
  m.Rr = int(Rr);
  m.r = int(r < most ? r : most);
  m.prefix = int(led);
  if (m.order == Order::tome) m.order = led > 0 ? Order::index : Order::similarity;
  m.device = like.get_device_index();
  return m;
}

inline MapArgs make_map_args(const Tensor& value, const Tensor& index, int64_t r, int64_t tokens, int64_t prefix,
                             bool distill, const std::string& order, const std::optional<Tensor>& a_tokens,
                             const std::optional<Tensor>& b_tokens, const std::optional<Tensor>& rest_tokens) {
  constexpr const char* op = "bipartite_map";
  STD_TORCH_CHECK(value.dim() == 2, op, ": value must have shape [B, Ra], got ", shape_of(value));
  STD_TORCH_CHECK(prefix >= 0, op, ": prefix must not be negative, got ", prefix);
  const int64_t B = value.size(0), Ra = value.size(1);
  MapArgs m = make_plan(op, value, "value", B, Ra, r, tokens, prefix + distill, order, a_tokens, b_tokens, rest_tokens);
  m.value = side_array<float>(op, "value", value, value, ScalarType::Float, {B, Ra});
  m.index = side_array<int>(op, "index", index, value, ScalarType::Int, {B, Ra}, "value");
  return m;
}

inline Tensor make_map_output(MapArgs& m, const Tensor& value) {
  Tensor out = new_output(value, {m.B, m.N}, ScalarType::Int);
  m.map = static_cast<int*>(out.mutable_data_ptr());
  return out;
}

// How rows are merged; the map and the number of output rows are left to the caller.
inline MergeArgs make_rows(const char* op, const Tensor& x, const std::optional<Tensor>& size,
                           const std::optional<Tensor>& weight, const std::string& mode) {
  MergeArgs m;
  check_tokens(op, "x", x);
  m.dtype = dtype_of(op, "x", x);
  m.mode = choice<Mode>(op, "mode", mode, {"mean", "sum", "amax", "drop", "mlerp"});
  const int64_t B = x.size(0), N = x.size(1);
  m.size = side_array<float>(op, "size", size, x, ScalarType::Float, {B, N});
  m.weight = side_array<float>(op, "weight", weight, x, ScalarType::Float, {B, N});
  m.x = x.const_data_ptr();
  m.x_stride_b = x.stride(0);
  m.x_stride_n = x.stride(1);
  m.B = int(B);
  m.N = int(N);
  m.C = int(x.size(2));
  m.device = x.get_device_index();
  return m;
}

inline MergeArgs make_merge_args(const Tensor& x, const Tensor& token_map, int64_t out_tokens,
                                 const std::optional<Tensor>& size, const std::optional<Tensor>& weight,
                                 const std::string& mode) {
  constexpr const char* op = "merge_tokens";
  MergeArgs m = make_rows(op, x, size, weight, mode);
  STD_TORCH_CHECK(out_tokens >= 0 && out_tokens <= kMaxTokens, op, ": out_tokens must be in [0, ", kMaxTokens,
                  "], got ", out_tokens);
  m.map = side_array<int>(op, "token_map", token_map, x, ScalarType::Int, {m.B, m.N});
  m.M = int(out_tokens);
  return m;
}

struct MergeOutputs {
  Tensor y;     // [B, M, C]
  Tensor size;  // [B, M] float32
};

inline MergeOutputs make_merge_outputs(MergeArgs& m, const Tensor& x) {
  MergeOutputs out{new_output(x, {m.B, m.M, m.C}, x.scalar_type()), new_output(x, {m.B, m.M}, ScalarType::Float)};
  m.y = out.y.mutable_data_ptr();
  m.out_size = static_cast<float*>(out.size.mutable_data_ptr());
  return out;
}

// Even (parity 0) or odd tokens of `metric`, without the prefix tokens among them.
inline Side half_of(const Tensor& metric, DType dtype, int parity, int prefix) {
  Side s;
  const int64_t bytes = dtype == DType::f32 ? 4 : 2;
  s.x = static_cast<const char*>(metric.const_data_ptr()) + parity * metric.stride(1) * bytes;
  s.stride_b = metric.stride(0);
  s.stride_n = 2 * metric.stride(1);
  s.N = s.R = int((metric.size(1) + 1 - parity) / 2);
  s.protect = (prefix + 1 - parity) / 2;
  return s;
}

// A match, the map that is made of it, and the merge by that map. The map reads what the match writes: value and index,
// [B, Ra], are the caller's to provide.
struct BipartiteArgs {
  MatchArgs match;
  MapArgs map;
  MergeArgs merge;

  void through(float* value, int* index) {
    map.value = match.value = value;
    map.index = match.index = index;
  }
};

inline BipartiteArgs make_bipartite_args(const Tensor& x, const Tensor& metric, int64_t r,
                                         const std::optional<Tensor>& size, const std::optional<Tensor>& weight,
                                         int64_t prefix, const std::string& order, const std::string& mode,
                                         const std::optional<Tensor>& a_tokens, const std::optional<Tensor>& b_tokens,
                                         const std::optional<Tensor>& rest_tokens) {
  constexpr const char* op = "bipartite_merge";
  BipartiteArgs all;
  all.merge = make_rows(op, x, size, weight, mode);
  check_tokens(op, "metric", metric);
  all.match.dtype = dtype_of(op, "metric", metric);
  STD_TORCH_CHECK(same_device(metric, x), op, ": metric must be on the device of x, got another device");
  const int64_t B = x.size(0), N = x.size(1);
  STD_TORCH_CHECK(metric.size(0) == B && metric.size(1) == N, op, ": metric must have shape [B=", B, ", N=", N,
                  ", D], got ", shape_of(metric));
  const int64_t Ra = a_tokens ? list_length(op, "a_tokens", *a_tokens, B) : (N + 1) / 2;
  all.map = make_plan(op, metric, "metric", B, Ra, r, N, prefix, order, a_tokens, b_tokens, rest_tokens);
  MatchArgs& m = all.match;
  m.B = int(B);
  m.C = int(metric.size(2));
  m.device = metric.get_device_index();
  if (a_tokens) {
    const auto side = [&](const char* name, const std::optional<Tensor>& tokens) {
      return make_side(op, {"metric", name, "", "", "", ""}, metric, tokens, std::nullopt, std::nullopt, 0,
                       std::nullopt);
    };
    m.a = side("a_tokens", a_tokens);
    m.b = side("b_tokens", b_tokens);
  } else {
    m.a = half_of(metric, m.dtype, 0, all.map.prefix);
    m.b = half_of(metric, m.dtype, 1, all.map.prefix);
  }
  all.merge.M = int(N) - all.map.r;
  return all;
}

struct BipartiteOutputs {
  MergeOutputs merged;
  Tensor map;  // [B, N] int32
};

inline BipartiteOutputs make_bipartite_outputs(BipartiteArgs& all, const Tensor& x) {
  BipartiteOutputs out{make_merge_outputs(all.merge, x), make_map_output(all.map, x)};
  all.merge.map = all.map.map;
  return out;
}

}  // namespace tokencomp::merge
