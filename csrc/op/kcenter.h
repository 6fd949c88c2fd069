// kcenter family at the torch boundary: the schema, and the only place where its arguments are checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "core/kcenter.h"
#include "op/check.h"

namespace tokencomp::kcenter {

constexpr const char* kSchema =
    "kcenter_greedy(Tensor x, int k, *, str objective='max_min', str metric='cosine', str first='largest_nn', "
    "Tensor? seed=None, Tensor? weight=None, Tensor? lengths=None) -> (Tensor index, Tensor value)";

struct Outputs {
  Tensor index;  // [B, k] int32
  Tensor value;  // [B, k] float32
};

inline Args make_args(const Tensor& x, int64_t k, const std::string& objective, const std::string& metric,
                      const std::string& first, const std::optional<Tensor>& seed, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& lengths) {
  constexpr const char* op = "kcenter_greedy";
  constexpr int64_t kMaxBatch = 65535, kMaxTokens = 1 << 20, kMaxChannels = 1 << 20;
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must have shape [B, N, C], got ", shape_of(x));
  Args a;
  a.dtype = dtype_of(op, "x", x);
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2);
  STD_TORCH_CHECK(B <= kMaxBatch, op, ": B must be at most ", kMaxBatch, ", got ", B);
  STD_TORCH_CHECK(N <= kMaxTokens, op, ": N must be at most ", kMaxTokens, ", got ", N);
  STD_TORCH_CHECK(C >= 1 && C <= kMaxChannels, op, ": C must be in [1, ", kMaxChannels, "], got ", C);
  STD_TORCH_CHECK(x.stride(2) == 1 || C == 1, op, ": x must be contiguous in its last dimension, got stride ",
                  x.stride(2));
  STD_TORCH_CHECK(k >= 1 && k <= N, op, ": k must be in [1, N=", N, "], got ", k);
  a.objective = choice<Objective>(op, "objective", objective, {"max_min", "max_sum"});
  a.metric = choice<Metric>(op, "metric", metric, {"cosine", "l2", "dot"});
  a.first = choice<First>(op, "first", first, {"largest_nn", "index0", "centroid"});
  int64_t S = 0;
  if (seed) {
    STD_TORCH_CHECK(seed->dim() == 2, op, ": seed must have shape [B=", B, ", s], got ", shape_of(*seed));
    S = seed->size(1);
    STD_TORCH_CHECK(S >= 1 && S <= k, op, ": seed must hold between 1 and k=", k, " tokens per item, got ", S);
  }
  a.seed = side_array<int>(op, "seed", seed, x, ScalarType::Int, {B, S});
  a.weight = side_array<float>(op, "weight", weight, x, ScalarType::Float, {B, N});
  a.lengths = side_array<int>(op, "lengths", lengths, x, ScalarType::Int, {B});
  a.x = x.const_data_ptr();
  a.x_stride_b = x.stride(0);
  a.x_stride_n = x.stride(1);
  a.B = int(B);
  a.N = int(N);
  a.C = int(C);
  a.k = int(k);
  a.S = int(S);
  a.device = x.get_device_index();
  return a;
}

inline Outputs make_outputs(Args& a, const Tensor& x) {
  Outputs out{torch::stable::new_empty(x, {a.B, a.k}, ScalarType::Int),
              torch::stable::new_empty(x, {a.B, a.k}, ScalarType::Float)};
  a.index = static_cast<int*>(out.index.mutable_data_ptr());
  a.value = static_cast<float*>(out.value.mutable_data_ptr());
  return out;
}

}  // namespace tokencomp::kcenter
