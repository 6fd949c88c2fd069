// States of attention over disjoint keys to that over their union, compiled once per instruction-set level.
#include "core/dispatch.h"
#include "cpu/decode_kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace decode;

void merge_states(const MergeArgs& m) {
  dispatch_dtype(m.dtype, [&]<class T> {
    parallel_for(m.rows, 1 + (1 << 15) / (int64_t(m.D + 1) * (m.states + 1)), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        float top = -INFINITY, total = 0.0f;
        for (int s = 0; s < m.states; ++s) top = fmaxf(top, m.lse[s * m.rows + r]);
        const auto weight = [&](int s) {
          const float lse = m.lse[s * m.rows + r];
          return lse > -INFINITY ? exp2f((lse - top) * kLog2e) : 0.0f;
        };
        for (int s = 0; s < m.states; ++s) total += weight(s);
        m.merged_lse[r] = total > 0.0f ? top + logf(total) : -INFINITY;
        T* out = static_cast<T*>(m.merged) + r * m.D;
        for (int c = 0; c < m.D; c += kWidth) {
          Vec x = broadcast(0.0f);
          for (int s = 0; s < m.states; ++s) {
            const T* own = static_cast<const T*>(m.out) + (s * m.rows + r) * m.D + c;
            const float factor = weight(s);
            if (factor > 0.0f) x = fma(load_up_to(own, m.D - c), broadcast(factor / total), x);
          }
          store_up_to(out + c, x, m.D - c);
        }
      }
    });
  });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
