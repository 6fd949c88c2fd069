// Prefill attention on CUDA, sm_90a: shapes, shared memory, and the warpgroup that fills it. Two of its warps bring
// queries and keys, two bring values, each pair through a ring of stages of 128 keys: two of the 64-key units that the
// walk over runs, blocks and columns yields. Rows go by cp.async, 16 bytes a thread: those are as good for single
// columns as for blocks, leave out what a sequence does not have, and take any stride.
#pragma once

#include "cuda/prefill_sm90_order.h"
#include "cuda/prefill_tiles.h"

namespace tokencomp::prefill {

template <class T_, int kDim>
struct WgmmaShape {
  using T = T_;
  static constexpr int kD = kDim, kPanels = kD / 64, kChunks = kD / 8;
  static constexpr int kRows = kWgmmaRows, kKeys = 128, kUnit = 64;
  // Two stages of keys and of values fill what shared memory there is at 128 channels.
  static constexpr int kStages = kD == 64 ? 4 : 2;
  // Stages still under way when the next one is asked for. A stage is refilled when its consumers are done with what it
  // held; where there are two, for that they need the one just loaded.
  static constexpr unsigned kLag = kStages > 2 ? 1 : 0;
  static constexpr int kNotes = 2 * kStages;  // a note is read after its keys were released

  // Stages are counted from the first item to the last. Where stage n lies, and the parity of its round in the ring.
  __device__ static unsigned slot(unsigned n) { return n % kStages; }
  __device__ static unsigned parity(unsigned n) { return n / kStages % 2; }
};

constexpr int kLoaders = 64;            // threads that fill a ring
constexpr int kWgmmaThreads = 3 * 128;  // a warpgroup that loads, two that compute
// Registers of a thread; a block starts with 168 for each, which is what 128 * 56 + 256 * 224 make.
constexpr int kLoadRegisters = 56, kComputeRegisters = 224;
// Named barriers: of the two pairs of warps that load, and of the warpgroups that compute.
constexpr int kLoadBarrier = 1, kTurnBarrier = 3;

// What is known of the keys of a stage.
struct Notes {
  float bias[128];    // in units of log2(e)
  int position[128];  // -1 where there is no key
  int first[2];       // of the units that are 64 neighbours; -1 for others, which need a mask
  int more;           // another stage follows in this item
};

template <class S>
struct WgmmaSmem {
  // Panels of 64 channels. 16-byte chunk c of row r lies at position c ^ (r % 8), the 128-byte swizzle.
  alignas(1024) uint4 q[S::kPanels][S::kRows][8];
  alignas(1024) uint4 k[S::kStages][S::kPanels][S::kKeys][8];
  alignas(1024) uint4 v[S::kStages][S::kPanels][S::kKeys][8];
  Notes notes[S::kNotes];
  // The queries, and with them what an item is; the stages. Full: loaded; empty: nobody reads it any more.
  gpu::Mbarrier q_full, q_empty;
  gpu::Mbarrier k_full[S::kStages], k_empty[S::kStages], v_full[S::kStages], v_empty[S::kStages];
  int any;              // the item has a stage
  Range seen[2][2];     // by the rows of each warp of a pair
  Walk walk[2];         // of keys, of values
  Tile units[2][4][2];  // of stage n: at n % 4
};

// One of the two pairs of warps that load.
template <class S, bool kValues>
struct Loader {
  using T = typename S::T;
  static constexpr int kAtOnce = kLoaders / S::kChunks;  // rows that the threads copy together

  const PrefillArgs& p;
  const Geometry& g;
  const WgmmaWork& w;
  WgmmaSmem<S>& s;
  unsigned stage;  // to fill next

  __device__ static int thread() { return int(threadIdx.x) % kLoaders; }
  __device__ static int row() { return thread() / S::kChunks; }
  __device__ static int chunk() { return thread() % S::kChunks; }
  __device__ static void meet() { gpu::named_barrier_sync(kLoadBarrier + kValues, kLoaders); }

  __device__ __forceinline__ void run() {
    for_items(g, w, [&](const Item& item, unsigned round) { load_item(item, round); });
  }

  __device__ __forceinline__ void load_item(const Item& item, unsigned round) {
    start(item);
    const Range there = keys_of(g, item.b, 0);
    const Tile(&units)[4][2] = s.units[kValues];
    if constexpr (!kValues) load_queries(item, units[0][0].count != 0, round);
    const unsigned first = stage;
#pragma unroll 1
    for (unsigned n = 0; units[n % 4][0].count; ++n, ++stage) {
      if (thread() == 0) walk(n + 2);
      gpu::mbar_wait(kValues ? &s.v_empty[S::slot(stage)] : &s.k_empty[S::slot(stage)], S::parity(stage) ^ 1);
      load_stage(item, units[n % 4], there);
      gpu::cp_async_commit();
      if constexpr (!kValues) take_note(item, units[n % 4], units[(n + 1) % 4][0].count != 0);
      gpu::cp_async_wait<S::kLag>();
      if (!kValues && n == S::kLag) announce(&s.q_full);
      if (!S::kLag || n) announce_stage(stage - S::kLag);
      meet();  // unit n + 2 is known to all, and all are done with unit n
    }
    gpu::cp_async_wait<0>();
    if (!kValues && stage - first < S::kLag + 1) announce(&s.q_full);
    if (S::kLag && stage != first) announce_stage(stage - S::kLag);
  }

  // What rows see, and with it the units to come.
  __device__ __forceinline__ void start(const Item& item) {
    Range some{g.S, 0};
#pragma unroll
    for (int r = thread(); r < S::kRows; r += kLoaders) {
      const Range range = item.t0 + r < g.T ? visible(g, item.b, 0, item.t0 + r) : Range{0, 0};
      if (range.begin >= range.end) continue;
      some.begin = min(some.begin, range.begin);
      some.end = max(some.end, range.end);
    }
    some = {__reduce_min_sync(~0u, some.begin), __reduce_max_sync(~0u, some.end)};
    Range(&seen)[2] = s.seen[kValues];
    if (thread() % 32 == 0) seen[thread() / 32] = some;
    meet();
    if (thread() == 0) {
      some = {min(seen[0].begin, seen[1].begin), max(seen[0].end, seen[1].end)};
      s.walk[kValues].start(p, some, item.b, item.h, item.t0 / kWgmmaRows, S::kUnit);
#pragma unroll 1
      for (int n = 0; n < 2; ++n) walk(n);
    }
    meet();
  }

  __device__ __forceinline__ void walk(int n) {
#pragma unroll 1
    for (int u = 0; u < 2; ++u) s.walk[kValues].next(p, S::kUnit, s.units[kValues][n % 4][u]);
  }

  __device__ __forceinline__ void load_queries(const Item& item, bool any, unsigned round) {
    gpu::mbar_wait(&s.q_empty, round % 2 ^ 1);
    if (thread() == 0) s.any = any;
    const T* q = static_cast<const T*>(p.a.q) + item.b * p.a.q_stride_b + item.h * p.a.q_stride_h;
#pragma unroll 4
    for (int r = row(); r < S::kRows; r += kAtOnce) {
      const int t = item.t0 + r;
      const bool inside = any && t < g.T && chunk() * 8 < g.D;
      const T* from = inside ? q + t * p.a.q_stride_t + chunk() * 8 : q;
      gpu::cp_async16(&s.q[chunk() / 8][r][chunk() % 8 ^ (r & 7)], from, inside);
    }
    gpu::cp_async_commit();
  }

  // The copies have landed: those who compute may read them with the tensor cores.
  __device__ __forceinline__ static void announce(gpu::Mbarrier* full) {
    gpu::fence_proxy_async();
    gpu::mbar_arrive(full);
  }
  __device__ __forceinline__ void announce_stage(unsigned n) {
    announce(kValues ? &s.v_full[S::slot(n)] : &s.k_full[S::slot(n)]);
  }

  // The position of key r of a unit; -1 where there is none.
  __device__ __forceinline__ int position(const Tile& unit, int r) const {
    if (!unit.entries) return r < unit.count ? unit.first + r : -1;
    return r < unit.count ? unit.entries[r] : -1;
  }

  // Zeros for keys that the sequence does not have: their weights are 0, and 0 times NaN would be NaN.
  __device__ __forceinline__ void load_stage(const Item& item, const Tile (&units)[2], const Range& there) const {
    const int dim = kValues ? p.Dv : g.D;
    const int64_t stride = kValues ? p.v_stride_s : p.a.k_stride_s;
    const T* base = static_cast<const T*>(kValues ? p.v : p.a.k) + chunk() * 8 +
                    item.b * (kValues ? p.v_stride_b : p.a.k_stride_b) +
                    item.kv * (kValues ? p.v_stride_h : p.a.k_stride_h);
    const T* nothing = static_cast<const T*>(kValues ? p.v : p.a.k);
    auto& panel = kValues ? s.v[S::slot(stage)][chunk() / 8] : s.k[S::slot(stage)][chunk() / 8];
#pragma unroll 1
    for (int u = 0; u < 2; ++u) {
      const Tile unit = units[u];
      uint4(*to)[8] = &panel[u * S::kUnit];
      if (!unit.entries && unit.first >= there.begin && unit.first + unit.count <= there.end &&
          unit.count == S::kUnit && dim == S::kD) {
        const T* from = base + (unit.first + row()) * stride;
#pragma unroll 4
        for (int r = row(); r < S::kUnit; r += kAtOnce, from += kAtOnce * stride) {
          gpu::cp_async16(&to[r][chunk() % 8 ^ (r & 7)], from);
        }
        continue;
      }
#pragma unroll 4
      for (int r = row(); r < S::kUnit; r += kAtOnce) {
        const int at = position(unit, r);
        const bool inside = at >= there.begin && at < there.end && chunk() * 8 < dim;
        const T* from = inside ? base + at * stride : nothing;
        gpu::cp_async16(&to[r][chunk() % 8 ^ (r & 7)], from, inside);
      }
    }
  }

  __device__ __forceinline__ void take_note(const Item& item, const Tile (&units)[2], bool more) {
    Notes& n = s.notes[stage % S::kNotes];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int at = position(units[u], thread()), c = u * S::kUnit + thread();
      n.position[c] = at < g.S ? at : -1;
      n.bias[c] = p.a.key_bias && at >= 0 ? bias_of(p.a, item.b, item.kv, at) * kLog2e : 0.0f;
    }
    if (thread() == 0) {
#pragma unroll
      for (int u = 0; u < 2; ++u) n.first[u] = units[u].entries || !units[u].count ? -1 : units[u].first;
      n.more = more;
    }
  }
};

}  // namespace tokencomp::prefill
