// topk family at the torch boundary: the schemas, and the only place where arguments are checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "core/topk.h"
#include "op/check.h"

namespace tokencomp::topk {

constexpr const char* kSelectSchema =
    "topk_select(Tensor score, int k, *, Tensor? k_per_row=None, int head=0, int tail=0, Tensor? keep=None, "
    "Tensor? lengths=None) -> (Tensor index, Tensor count)";
constexpr const char* kToppSchema =
    "topp_select(Tensor score, float p, int max_k, *, int min_k=0, int head=0, int tail=0, Tensor? lengths=None) -> "
    "(Tensor index, Tensor count)";
constexpr const char* kBudgetSchema =
    "topk_budget(Tensor score, int k, *, int floor=0, Tensor? lengths=None) -> Tensor";

constexpr int64_t kMaxTokens = int64_t(1) << 24, kMaxRows = int64_t(1) << 24, kMaxShared = int64_t(1) << 30;

inline void check_score(const char* op, const Tensor& score, const char* axes, int64_t dims) {
  STD_TORCH_CHECK(score.dim() == dims, op, ": score must have shape ", axes, ", got ", shape_of(score));
  const int64_t S = score.size(dims - 1);
  STD_TORCH_CHECK(S <= kMaxTokens, op, ": S must be at most ", kMaxTokens, ", got ", S);
  STD_TORCH_CHECK(S <= 1 || score.stride(dims - 1) == 1, op,
                  ": score must be contiguous in its last dimension, got stride ", score.stride(dims - 1));
}

inline int in_range(const char* op, const char* argument, int64_t value, int64_t high) {
  STD_TORCH_CHECK(value >= 0 && value <= high, op, ": ", argument, " must be in [0, ", high, "], got ", value);
  return int(value);
}

// What topk_select and topp_select share. `width` is the argument that bounds a row's count.
inline Args make_row_args(const char* op, const Tensor& score, const char* width, int64_t k, int64_t head, int64_t tail,
                          const std::optional<Tensor>& lengths) {
  check_score(op, score, "[R, S]", 2);
  Args a;
  a.dtype = dtype_of(op, "score", score);
  const int64_t R = score.size(0);
  STD_TORCH_CHECK(R <= kMaxRows, op, ": R must be at most ", kMaxRows, ", got ", R);
  a.R = int(R);
  a.S = int(score.size(1));
  a.k = in_range(op, width, k, kMaxTokens);
  a.head = in_range(op, "head", head, kMaxTokens);
  a.tail = in_range(op, "tail", tail, kMaxTokens);
  a.lengths = side_array<int>(op, "lengths", lengths, score, ScalarType::Int, {R}, "score");
  a.score = score.const_data_ptr();
  a.stride = score.stride(0);
  a.device = score.get_device_index();
  return a;
}

inline Args make_args(const Tensor& score, int64_t k, const std::optional<Tensor>& k_per_row, int64_t head,
                      int64_t tail, const std::optional<Tensor>& keep, const std::optional<Tensor>& lengths) {
  constexpr const char* op = "topk_select";
  Args a = make_row_args(op, score, "k", k, head, tail, lengths);
  a.k_per_row = side_array<int>(op, "k_per_row", k_per_row, score, ScalarType::Int, {a.R}, "score");
  a.keep = side_array<uint8_t>(op, "keep", keep, score, ScalarType::Bool, {a.R, a.S}, "score");
  return a;
}

inline Args make_topp_args(const Tensor& score, double p, int64_t max_k, int64_t min_k, int64_t head, int64_t tail,
                           const std::optional<Tensor>& lengths) {
  constexpr const char* op = "topp_select";
  Args a = make_row_args(op, score, "max_k", max_k, head, tail, lengths);
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, op, ": p must be in [0, 1], got ", p);
  STD_TORCH_CHECK(min_k >= 0 && min_k <= max_k, op, ": min_k must be in [0, max_k=", max_k, "], got ", min_k);
  a.min_k = int(min_k);
  a.by_mass = true;
  a.p = p;
  return a;
}

struct Outputs {
  Tensor index;  // [R, k] int32
  Tensor count;  // [R] int32
};

inline Outputs make_outputs(Args& a, const Tensor& score) {
  Outputs out{torch::stable::new_empty(score, {a.R, a.k}, ScalarType::Int),
              torch::stable::new_empty(score, {a.R}, ScalarType::Int)};
  a.index = static_cast<int*>(out.index.mutable_data_ptr());
  a.count = static_cast<int*>(out.count.mutable_data_ptr());
  return out;
}

inline BudgetArgs make_budget_args(const Tensor& score, int64_t k, int64_t floor,
                                   const std::optional<Tensor>& lengths) {
  constexpr const char* op = "topk_budget";
  constexpr int64_t kMaxBatch = 65535, kMaxHeads = 65535;
  check_score(op, score, "[B, H, S]", 3);
  BudgetArgs a;
  a.dtype = dtype_of(op, "score", score);
  const int64_t B = score.size(0), H = score.size(1), S = score.size(2);
  STD_TORCH_CHECK(B <= kMaxBatch, op, ": B must be at most ", kMaxBatch, ", got ", B);
  STD_TORCH_CHECK(H <= kMaxHeads, op, ": H must be at most ", kMaxHeads, ", got ", H);
  STD_TORCH_CHECK(H * S <= kMaxShared, op, ": H * S must be at most ", kMaxShared, ", got ", H * S);
  a.k = in_range(op, "k", k, kMaxShared);
  STD_TORCH_CHECK(floor >= 0 && floor <= (H ? k / H : k), op, ": floor must be in [0, k / H=", H ? k / H : k, "], got ",
                  floor);
  a.floor = int(floor);
  a.lengths = side_array<int>(op, "lengths", lengths, score, ScalarType::Int, {B, H}, "score");
  a.score = score.const_data_ptr();
  a.stride_b = score.stride(0);
  a.stride_h = score.stride(1);
  a.B = int(B);
  a.H = int(H);
  a.S = int(S);
  a.device = score.get_device_index();
  return a;
}

inline Tensor make_budget(BudgetArgs& a, const Tensor& score) {
  Tensor budget = torch::stable::new_empty(score, {a.B, a.H}, ScalarType::Int);
  a.budget = static_cast<int*>(budget.mutable_data_ptr());
  return budget;
}

}  // namespace tokencomp::topk
