// Linear attention with decay on CUDA, torch side: shapes, launch, registration. One launch, no working memory.
#include "op/linear.h"

#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "cuda/linear_kernels.h"
#include "op/stream.h"

namespace tokencomp::linear {
namespace {

template <class F>
void with_dim(int D, F&& f) {
  if (D <= 64) return f.template operator()<64>();
  if (D <= 128) return f.template operator()<128>();
  f.template operator()<256>();
}

void watch_arguments(const LinearArgs& p) {
  const Geometry& g = p.a.g;
  const int64_t bytes = p.a.dtype == DType::f32 ? 4 : 2;
  const auto span = [&](int64_t stride_b, int64_t stride_h, int heads, int64_t stride_t, int dim) {
    return g.T ? size_t(((g.B - 1) * stride_b + (heads - 1) * stride_h + (g.T - 1) * stride_t + dim) * bytes) : 0;
  };
  gpu::watch(p.a.q, span(p.a.q_stride_b, p.a.q_stride_h, g.Hq, p.a.q_stride_t, g.D), "q", true);
  gpu::watch(p.a.k, span(p.a.k_stride_b, p.a.k_stride_h, g.Hkv, p.a.k_stride_s, g.D), "k", true);
  gpu::watch(p.v, span(p.v_stride_b, p.v_stride_h, g.Hkv, p.v_stride_s, p.Dv), "v", true);
  gpu::watch(p.slope, size_t(g.Hq) * 4, "slope", true);
  const size_t state = size_t(g.B) * g.Hq * g.D * p.Dv * 4;
  if (p.state_in) gpu::watch(p.state_in, state, "state", true);
  if (p.lengths) gpu::watch(p.lengths, size_t(g.B) * 4, "lengths", true);
  gpu::watch(p.out, size_t(int64_t(g.B) * g.Hq * g.T * p.Dv * bytes), "out", false);
  gpu::watch(p.state_out, state, "new state", false);
}

std::tuple<Tensor, Tensor> decay_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& slope, double scale, MaybeTensor state,
                                                  MaybeTensor lengths) {
  LinearArgs p = make_linear_args(q, k, v, slope, scale, state, lengths);
  std::tuple<Tensor, Tensor> out = make_linear_outputs(p, q);
  const int parts = (p.Dv + kColumns - 1) / kColumns;
  const int64_t blocks = int64_t(p.a.g.B) * p.a.g.Hq * parts;
  if (blocks == 0) return out;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, kOp, ": B * Hq must be at most ", 0x7fffffff / parts, " on CUDA, got ",
                  int64_t(p.a.g.B) * p.a.g.Hq);
  const gpu::DeviceGuard device(p.a.device);
  const gpu::WatchScope scope;
  watch_arguments(p);
  dispatch_dtype(p.a.dtype, [&]<class T> {
    with_dim(p.a.g.D, [&]<int kD> {
      static_assert(sizeof(Smem<kD>) <= kSmemOfSm80);
      gpu::LaunchConfig config{dim3(unsigned(blocks)), dim3(kThreads), sizeof(Smem<kD>)};
      config.stream = gpu::stream_of(p.a.device);
      gpu::launch(linear_attend<T, kD>, config, p, parts);
    });
  });
  return out;
}

}  // namespace
}  // namespace tokencomp::linear

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("decay_linear_attention", TORCH_BOX(&tokencomp::linear::decay_linear_attention));
}
