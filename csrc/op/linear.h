// linear family at the torch boundary: the schema, and the only place where its arguments are checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "core/linear.h"
#include "op/attention.h"

namespace tokencomp::linear {

constexpr const char* kSchema =
    "decay_linear_attention(Tensor q, Tensor k, Tensor v, Tensor slope, *, float scale=1.0, Tensor? state=None, "
    "Tensor? lengths=None) -> (Tensor out, Tensor state)";

constexpr const char* kOp = "decay_linear_attention";

inline LinearArgs make_linear_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slope, double scale,
                                   const MaybeTensor& state, const MaybeTensor& lengths) {
  LinearArgs p{};
  p.a = make_attention(kOp, q, k, scale, {});
  const Geometry& g = p.a.g;
  STD_TORCH_CHECK(g.S == g.T, kOp, ": k must have the T=", g.T, " tokens of q, got ", g.S);
  STD_TORCH_CHECK(v.dim() == 4 && v.size(0) == g.B && v.size(1) == g.Hkv && v.size(2) == g.T, kOp,
                  ": v must have shape [B=", g.B, ", Hkv=", g.Hkv, ", T=", g.T, ", Dv], got ", shape_of(v));
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), kOp, ": v must have the dtype of q, ",
                  torch::headeronly::toString(q.scalar_type()), ", got ", torch::headeronly::toString(v.scalar_type()));
  STD_TORCH_CHECK(same_device(q, v), kOp, ": v must be on the device of q, got another device");
  p.Dv = in_int(kOp, "value dimension Dv", v.size(3), 1, kMaxHeadDim);
  check_last_contiguous(kOp, "v", v);
  p.v = v.const_data_ptr();
  p.v_stride_b = v.stride(0), p.v_stride_h = v.stride(1), p.v_stride_s = v.stride(2);
  p.slope = side_array<float>(kOp, "slope", slope, q, ScalarType::Float, {g.Hq}, "q");
  p.state_in = side_array<float>(kOp, "state", state, q, ScalarType::Float, {g.B, g.Hq, g.D, p.Dv}, "q");
  p.lengths = side_array<int>(kOp, "lengths", lengths, q, ScalarType::Int, {g.B}, "q");
  return p;
}

inline std::tuple<Tensor, Tensor> make_linear_outputs(LinearArgs& p, const Tensor& q) {
  const Geometry& g = p.a.g;
  Tensor out = torch::stable::new_empty(q, {g.B, g.Hq, g.T, p.Dv});
  Tensor state = torch::stable::new_empty(q, {g.B, g.Hq, g.D, p.Dv}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.state_out = static_cast<float*>(state.mutable_data_ptr());
  return {out, state};
}

}  // namespace tokencomp::linear
