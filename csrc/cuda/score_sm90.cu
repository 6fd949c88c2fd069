// Launches the column sweep with warpgroup products; compiled for sm_90a alone. score.cu finds it through a pointer, so
// that a build for other GPUs does without.
#include "core/dispatch.h"
#include "cuda/score_sm90.h"

namespace tokencomp::score {
namespace {

template <class S>
void launch(const ColumnArgs& c, const ColumnWorkspace& w, gpu::LaunchConfig config) {
  const Geometry& g = c.a.g;
  static_assert(sizeof(WgmmaSmem<S>) <= kSmemOfSm90);
  config.grid = dim3(unsigned(g.B * g.Hkv), unsigned((g.S + kWgmmaKeys - 1) / kWgmmaKeys), unsigned(w.parts));
  config.block = dim3(kThreads);
  config.smem = sizeof(WgmmaSmem<S>);
  gpu::launch(c.rows == Rows::max ? score_columns_wgmma<S, true> : score_columns_wgmma<S, false>, config, c, w);
}

void launch_columns(const ColumnArgs& c, const ColumnWorkspace& w, gpu::LaunchConfig config) {
  dispatch_dtype(c.a.dtype, [&]<class T> {
    if constexpr (sizeof(T) == 2) {
      if (c.a.g.D <= 64) return launch<WgmmaShape<T, 64>>(c, w, config);
      if (c.a.g.D <= 96) return launch<WgmmaShape<T, 96>>(c, w, config);
      launch<WgmmaShape<T, kWgmmaDim>>(c, w, config);
    }
  });
}

[[maybe_unused]] const bool registered = (wgmma_columns = &launch_columns, true);

}  // namespace
}  // namespace tokencomp::score
