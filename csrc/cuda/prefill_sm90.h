// Prefill attention on CUDA, sm_90a: the sums of prefill_kernels.h with warpgroup products. One warpgroup loads
// (prefill_sm90_load.h), two compute 64 rows each. While the tensor cores multiply queries with the next 128 keys and
// the last weights with their values, nothing depends on them but the wait that follows; the two warpgroups take turns
// in starting products, so that those of one run while the other takes exponentials. Logits become weights in registers
// and are an operand as they are.
#pragma once

#include "cuda/prefill_sm90_load.h"

namespace tokencomp::prefill {

template <class S>
struct Compute {
  using T = typename S::T;
  static constexpr int kKeys = S::kKeys, kThreads = 2 * 128;

  const PrefillArgs& p;
  const Geometry& g;
  const WgmmaWork& w;
  WgmmaSmem<S>& s;
  unsigned stage;  // whose weights are computed
  Range range[2];  // keys that the thread's rows see
  Range every;     // keys that all rows of its warp see
  float top[2], sum[2];

  __device__ static int group() { return int(threadIdx.x) / 128 - 1; }
  __device__ static int lane() { return int(threadIdx.x) % 32; }
  // The thread's row i of the item, and its column (n, e) of a tile.
  __device__ static int row(int i) { return group() * 64 + int(threadIdx.x) % 128 / 32 * 16 + i * 8 + lane() / 4; }
  __device__ static int column(int n, int e) { return n * 8 + lane() % 4 * 2 + e; }

  // The warpgroup whose turn it is starts its products; the other waits here.
  __device__ static void take_turn() { gpu::named_barrier_sync(kTurnBarrier + group(), kThreads); }
  __device__ static void pass_turn() { gpu::named_barrier_arrive(kTurnBarrier + (group() ^ 1), kThreads); }

  __device__ __forceinline__ void run() {
    if (group() == 1) pass_turn();
    for_items(g, w, [&](const Item& item, unsigned round) { attend(item, round); });
    if (group() == 0) take_turn();  // the last one, which nobody needs
  }

  __device__ __forceinline__ static void release(gpu::Mbarrier* barrier) {
    __syncwarp();
    if (lane() == 0) gpu::mbar_arrive(barrier);
  }

  __device__ __forceinline__ void attend(const Item& item, unsigned round) {
    float out[S::kD / 2];
#pragma unroll
    for (int i = 0; i < S::kD / 2; ++i) out[i] = 0.0f;
    see(item);
    gpu::mbar_wait(&s.q_full, round % 2);
    if (s.any) {
      float z[kKeys / 2], shrink[2];
      uint32_t weight[kKeys / 16][4];
      wait_for_keys();
      multiply(z);
      gpu::wgmma_wait<0>();
      gpu::wgmma_hold(z);
      bool more = done_with_keys();
      if (!more) release(&s.q_empty);
      soften(z, shrink);
      pack(z, weight);
#pragma unroll 1
      while (more) {
        ++stage;
        wait_for_keys();
        take_turn();
        multiply(z);
        accumulate(out, weight, stage - 1);
        pass_turn();
        gpu::wgmma_wait<1>();
        gpu::wgmma_hold(z);
        more = done_with_keys();
        soften(z, shrink);
        if (!more) release(&s.q_empty);  // here, because ptxas draws the wait ahead of all that no branch separates
        gpu::wgmma_wait<0>();
        gpu::wgmma_hold(out);
        release(&s.v_empty[S::slot(stage - 1)]);
        rescale(out, shrink);
        pack(z, weight);
      }
      accumulate(out, weight, stage);
      gpu::wgmma_wait<0>();
      gpu::wgmma_hold(out);
      release(&s.v_empty[S::slot(stage)]);
      ++stage;
    } else {
      release(&s.q_empty);
    }
    finish(item, out);
  }

  __device__ __forceinline__ void see(const Item& item) {
    every = {0, g.S};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = item.t0 + row(i);
      range[i] = t < g.T ? visible(g, item.b, 0, t) : Range{0, g.S};
      every = {max(every.begin, range[i].begin), min(every.end, range[i].end)};
      top[i] = -INFINITY;
      sum[i] = 0.0f;
    }
    every = {__reduce_max_sync(~0u, every.begin), __reduce_min_sync(~0u, every.end)};
  }

  __device__ __forceinline__ void wait_for_keys() { gpu::mbar_wait(&s.k_full[S::slot(stage)], S::parity(stage)); }

  // After the products with the keys of the stage: whether another one follows.
  __device__ __forceinline__ bool done_with_keys() {
    const bool more = notes().more;
    release(&s.k_empty[S::slot(stage)]);
    return more;
  }

  __device__ __forceinline__ const Notes& notes() const { return s.notes[stage % S::kNotes]; }

  // Queries by keys: under way when it returns, one group.
  __device__ __forceinline__ void multiply(float (&z)[kKeys / 2]) {
    constexpr uint64_t kRowPanel = sizeof(s.q[0]) >> 4, kKeyPanel = sizeof(s.k[0][0]) >> 4;
    const uint64_t a = gpu::wgmma_descriptor_128b(s.q[0][group() * 64]);
    const uint64_t b = gpu::wgmma_descriptor_128b(s.k[S::slot(stage)][0][0]);
    gpu::wgmma_hold(z);
    gpu::wgmma_fence();
#pragma unroll
    for (int k = 0; k < S::kD / 16; ++k) {
      gpu::wgmma_m64n128k16<T>(z, a + k / 4 * kRowPanel + k % 4 * 2, b + k / 4 * kKeyPanel + k % 4 * 2, k > 0);
    }
    gpu::wgmma_commit();
  }

  // Weights of stage n by its values, once they are there; likewise.
  __device__ __forceinline__ void accumulate(float (&out)[S::kD / 2], const uint32_t (&weight)[kKeys / 16][4],
                                             unsigned n) {
    gpu::mbar_wait(&s.v_full[S::slot(n)], S::parity(n));
    const uint64_t b = gpu::wgmma_descriptor_columns(s.v[S::slot(n)][0][0], sizeof(s.v[0][0]));
    gpu::wgmma_hold(out);
    gpu::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      if constexpr (S::kD == 64)
        gpu::wgmma_m64n64k16_fragment<T>(out, weight[k], b + k * 128, true);
      else
        gpu::wgmma_m64n128k16_fragment<T>(out, weight[k], b + k * 128, true);
    }
    gpu::wgmma_commit();
  }

  __device__ __forceinline__ bool masked(const Notes& n) const {
    return min(n.first[0], n.first[1]) < every.begin || max(n.first[0], n.first[1]) + S::kUnit > every.end;
  }

  // Products to weights relative to the largest of the row so far; what there was is to shrink.
  __device__ __forceinline__ void soften(float (&z)[kKeys / 2], float (&shrink)[2]) {
    const Notes& n = notes();
    float factor = p.a.scale * kLog2e;
    if (p.a.key_bias) {
      bias(z, n, factor);
      factor = 1.0f;
    }
    if (masked(n)) mask(z, n);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = -INFINITY;
#pragma unroll
      for (int j = 0; j < kKeys / 4; ++j) most = fmaxf(most, z[j / 2 * 4 + i * 2 + j % 2]);
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
      most = fmaxf(top[i], most * factor);
      const float origin = most == -INFINITY ? 0.0f : most;
      shrink[i] = top[i] == most ? 1.0f : gpu::exp2_approx(top[i] - origin);
      top[i] = most;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys / 4; ++j) {
        float& x = z[j / 2 * 4 + i * 2 + j % 2];
        x = gpu::exp2_approx(fmaxf(fmaf(x, factor, -origin), -INFINITY));  // NaN counts as -inf
        total += x;
      }
      sum[i] = sum[i] * shrink[i] + total;
    }
  }

  __device__ __forceinline__ static void bias(float (&z)[kKeys / 2], const Notes& n, float factor) {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const float2 own = *reinterpret_cast<const float2*>(&n.bias[column(j, 0)]);
#pragma unroll
      for (int i = 0; i < 4; ++i) z[j * 4 + i] = fmaf(z[j * 4 + i], factor, i % 2 ? own.y : own.x);
    }
  }

  __device__ __forceinline__ void mask(float (&z)[kKeys / 2], const Notes& n) const {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const int2 at = *reinterpret_cast<const int2*>(&n.position[column(j, 0)]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int own = i % 2 ? at.y : at.x;
        if (!(own >= range[i / 2].begin && own < range[i / 2].end)) z[j * 4 + i] = -INFINITY;
      }
    }
  }

  __device__ __forceinline__ static void rescale(float (&out)[S::kD / 2], const float (&shrink)[2]) {
    if (!__any_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;  // most tiles move no maximum
#pragma unroll
    for (int i = 0; i < S::kD / 2; ++i) out[i] *= shrink[i / 2 % 2];
  }

  __device__ __forceinline__ static void pack(const float (&z)[kKeys / 2], uint32_t (&weight)[kKeys / 16][4]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weight[i / 4][i % 4] = gpu::pack_halves<T>(z[i * 2], z[i * 2 + 1]);
  }

  __device__ __forceinline__ void finish(const Item& item, const float (&out)[S::kD / 2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], lanes);
      const int t = item.t0 + row(i);
      if (t >= g.T) continue;
      const RowEnd end = finish_row(top[i], sum[i], p.sinks ? p.sinks + item.h : nullptr);
      const int64_t at = (int64_t(item.b) * g.Hq + item.h) * g.T + t;
      if (lane() % 4 == 0) p.lse[at] = end.lse;
      T* to = static_cast<T*>(p.out) + at * p.Dv;
#pragma unroll
      for (int n = 0; n < S::kD / 8; ++n) {
        const int c = column(n, 0);
        const uint32_t pair = gpu::pack_halves<T>(out[n * 4 + i * 2] * end.factor, out[n * 4 + i * 2 + 1] * end.factor);
        if (c < p.Dv) *reinterpret_cast<uint32_t*>(to + c) = pair;
      }
    }
  }
};

// Blocks: as many as run at once; see for_items. The register limits below are those of ptxas for the whole block:
// loading and computing have kLoadRegisters and kComputeRegisters.
// registers: prefill_wgmma <= 168
template <class S>
__global__ void __launch_bounds__(kWgmmaThreads, 1) prefill_wgmma(PrefillArgs p, WgmmaWork w) {
  auto& s = gpu::dynamic_smem<WgmmaSmem<S>>();
  if (threadIdx.x == 0) {
    constexpr int kWarps = 8;  // that compute
    gpu::mbar_init(&s.q_full, kLoaders);
    gpu::mbar_init(&s.q_empty, kWarps);
    for (int i = 0; i < S::kStages; ++i) {
      gpu::mbar_init(&s.k_full[i], kLoaders);
      gpu::mbar_init(&s.v_full[i], kLoaders);
      gpu::mbar_init(&s.k_empty[i], kWarps);
      gpu::mbar_init(&s.v_empty[i], kWarps);
    }
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    gpu::warpgroup_give_registers<kLoadRegisters>();
    if (threadIdx.x < kLoaders) {
      Loader<S, false>{p, p.a.g, w, s, 0}.run();
    } else {
      Loader<S, true>{p, p.a.g, w, s, 0}.run();
    }
  } else {
    gpu::warpgroup_take_registers<kComputeRegisters>();
    Compute<S>{p, p.a.g, w, s, 0, {}, {}, {}, {}}.run();
  }
}

}  // namespace tokencomp::prefill
