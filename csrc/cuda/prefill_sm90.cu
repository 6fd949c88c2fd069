// Launches prefill attention with warpgroup products; compiled for sm_90a alone. prefill.cu finds it through a pointer,
// so that a build for other GPUs does without.
#include "core/dispatch.h"
#include "cuda/prefill_sm90.h"

namespace tokencomp::prefill {
namespace {

constexpr size_t kSmemOfSm90 = 227 << 10;  // what a block may have there

template <class S>
void launch(const PrefillArgs& p, const WgmmaWork& w, gpu::LaunchConfig config) {
  static_assert(sizeof(WgmmaSmem<S>) <= kSmemOfSm90);
  const int blocks = gpu::sm_count();
  config.grid = dim3(unsigned(w.items < blocks ? w.items : blocks));
  config.block = dim3(kWgmmaThreads);
  config.smem = sizeof(WgmmaSmem<S>);
  gpu::launch(prefill_wgmma<S>, config, p, w);
}

void launch_prefill(const PrefillArgs& p, const WgmmaWork& w, gpu::LaunchConfig config) {
  if (w.order) {
    config.block = dim3(kOrderThreads);
    config.smem = sizeof(OrderSmem);
    gpu::launch(prefill_order, config, p, w);
  }
  dispatch_dtype(p.a.dtype, [&]<class T> {
    if constexpr (sizeof(T) == 2) {
      if (p.a.g.D <= 64 && p.Dv <= 64) return launch<WgmmaShape<T, 64>>(p, w, config);
      launch<WgmmaShape<T, kWgmmaDim>>(p, w, config);
    }
  });
}

[[maybe_unused]] const bool registered = (wgmma_prefill = &launch_prefill, true);

}  // namespace
}  // namespace tokencomp::prefill
