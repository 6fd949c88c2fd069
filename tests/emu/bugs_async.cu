// As bugs.cu, for everything asynchronous or wider than a block: copies, mbarriers, clusters, wgmma, fences, the grid.
#include <map>
#include <string>

#include "call.h"
#include "core/dtype.h"

namespace test {
namespace {

using Bug = Tensor (*)(const Tensor& x, bool inject);
using tokencomp::bf16;

constexpr int kThreads = 64, kTile = 256, kTiles = 4;
using Kernel = void (*)(const float* x, float* out, bool inject);

// One block, or a cluster of two, over kTiles tiles of kTile floats; one tile of results.
template <Kernel kernel, size_t smem, unsigned cluster = 1>
Tensor run(const Tensor& x, bool inject) {
  Call call(x);
  STD_TORCH_CHECK(x.numel() == kTiles * kTile, "async_bug: x must have ", kTiles * kTile, " elements");
  Tensor out = call.make<float>({kTile});
  gpu::launch(kernel, call.config(cluster, kThreads, smem, cluster), call.in<float>(x, "x"), call.out<float>(out),
              inject);
  return out;
}

struct TileSmem {
  alignas(128) float value[kTile];
};

// Adds up the tiles, each element read by another warp than the one that copied it.
struct Sum {
  float v[4] = {};
  __device__ void add(const float* tile) {
    for (int i = 0; i < 4; i++) v[i] += tile[(threadIdx.x * 4 + i + kTile / 2) % kTile];
  }
  __device__ void store(float* out) const {
    for (int i = 0; i < 4; i++) out[(threadIdx.x * 4 + i + kTile / 2) % kTile] = v[i];
  }
};

__device__ void copy_tile(float* dst, const float* src) {
  gpu::cp_async16(dst + threadIdx.x * 4, src + threadIdx.x * 4);
  gpu::cp_async_commit();
}

// ---- cp.async
__global__ void missing_tail_barrier(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<TileSmem>();
  Sum sum;
  for (int i = 0; i < kTiles; i++) {
    copy_tile(s.value, x + i * kTile);
    gpu::cp_async_wait<0>();
    __syncthreads();
    sum.add(s.value);
    if (!inject) __syncthreads();  // the next copy overwrites what was just read
  }
  sum.store(out);
}

struct TwoTilesSmem {
  alignas(128) float value[2][kTile];
};

__global__ void wait_too_weak(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<TwoTilesSmem>();
  Sum sum;
  copy_tile(s.value[0], x);
  for (int i = 0; i < kTiles; i++) {
    if (i + 1 < kTiles)
      copy_tile(s.value[(i + 1) % 2], x + (i + 1) * kTile);
    else
      gpu::cp_async_commit();
    if (inject)
      gpu::cp_async_wait<2>();
    else
      gpu::cp_async_wait<1>();
    __syncthreads();
    sum.add(s.value[i % 2]);
    __syncthreads();
  }
  gpu::cp_async_wait<0>();
  sum.store(out);
}

__global__ void missing_barrier_after_wait(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<TileSmem>();
  Sum sum;
  copy_tile(s.value, x);
  gpu::cp_async_wait<0>();
  if (!inject) __syncthreads();  // a wait covers a thread's own copies only
  sum.add(s.value);
  sum.store(out);
}

__global__ void copy_never_waited_for(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<TileSmem>();
  copy_tile(s.value, x);
  if (!inject) gpu::cp_async_wait<0>();
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = x[threadIdx.x * 4 + i];
}

__global__ void misaligned_copy(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<TileSmem>();
  Sum sum;
  if (inject && threadIdx.x == 9) gpu::cp_async16(s.value + threadIdx.x * 4, x + threadIdx.x * 4 + 2);
  copy_tile(s.value, x);
  gpu::cp_async_wait<0>();
  __syncthreads();
  sum.add(s.value);
  sum.store(out);
}

__global__ void copy_past_tensor(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<TileSmem>();
  Sum sum;
  copy_tile(s.value, x + (kTiles - 1) * kTile + (inject ? 4 : 0));
  gpu::cp_async_wait<0>();
  __syncthreads();
  sum.add(s.value);
  sum.store(out);
}

// ---- mbarriers and bulk copies
struct BulkSmem {
  alignas(128) float value[2][kTile];
  gpu::Mbarrier full[2];
};

__device__ void load_bulk(BulkSmem& s, const float* x, int i) {
  gpu::mbar_arrive_expect_tx(&s.full[i % 2], sizeof s.value[0]);
  gpu::bulk_load(s.value[i % 2], x + i * kTile, sizeof s.value[0], &s.full[i % 2]);
}

__device__ void sum_bulk(const float* x, float* out, bool skip_wait, bool skip_init, bool skip_barrier) {
  auto& s = gpu::dynamic_smem<BulkSmem>();
  const int t = threadIdx.x;
  if (t == 0 && !skip_init) {
    gpu::mbar_init(&s.full[0], 1);
    gpu::mbar_init(&s.full[1], 1);
    gpu::fence_mbarrier_init();
  }
  if (!skip_barrier) __syncthreads();
  if (t == 0) load_bulk(s, x, 0);
  Sum sum;
  for (int i = 0; i < kTiles; i++) {
    if (t == 0 && i + 1 < kTiles) load_bulk(s, x, i + 1);
    if (!skip_wait || i != 2) gpu::mbar_wait(&s.full[i % 2], i / 2 % 2);
    sum.add(s.value[i % 2]);
    __syncthreads();
  }
  sum.store(out);
}

__global__ void missing_mbar_wait(const float* x, float* out, bool inject) { sum_bulk(x, out, inject, false, false); }
__global__ void mbarrier_not_initialised(const float* x, float* out, bool inject) {
  sum_bulk(x, out, false, inject, false);
}
__global__ void mbarrier_not_published(const float* x, float* out, bool inject) {
  sum_bulk(x, out, false, false, inject);
}

__global__ void too_many_arrivals(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<BulkSmem>();
  const int t = threadIdx.x;
  if (t == 0) {
    gpu::mbar_init(&s.full[0], 2);
    for (int i = 0; i < (inject ? 3 : 2); i++) gpu::mbar_arrive_expect_tx(&s.full[0], 8);
  }
  for (int i = 0; i < 4; i++) out[t * 4 + i] = x[t * 4 + i];
}

// ---- clusters
__global__ void missing_final_cluster_barrier(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<TileSmem>();
  const int t = threadIdx.x, rank = int(gpu::cluster_rank());
  for (int i = t; i < kTile; i += kThreads) s.value[i] = x[rank * kTile + i];
  gpu::cluster_sync();
  if (rank == 0) {
    const float* peer = gpu::cluster_map(s.value, 1);
    for (int i = t; i < kTile; i += kThreads) out[i] = s.value[i] + peer[i];
  }
  if (!inject) gpu::cluster_sync();  // the peer stays while its memory is read
}

__global__ void missing_first_cluster_barrier(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<TileSmem>();
  const int t = threadIdx.x, rank = int(gpu::cluster_rank());
  for (int i = t; i < kTile; i += kThreads) s.value[i] = x[rank * kTile + i];
  if (inject)
    __syncthreads();
  else
    gpu::cluster_sync();
  if (rank == 0) {
    const float* peer = gpu::cluster_map(s.value, 1);
    for (int i = t; i < kTile; i += kThreads) out[i] = s.value[i] + peer[i];
  }
  gpu::cluster_sync();
}

__global__ void cluster_wait_without_arrive(const float* x, float* out, bool inject) {
  if (!inject) gpu::cluster_arrive();
  gpu::cluster_wait();
  for (int i = threadIdx.x; i < kTile && gpu::cluster_rank() == 0; i += kThreads) out[i] = x[i];
}

// ---- wgmma: out = the first row of a[64, 64] a[64, 64]^T, 64 values, four times over
struct WgmmaSmem {
  alignas(1024) bf16 a[64][64];
};

__device__ void wgmma_square(const float* x, float* out, bool skip_wait, bool skip_fence, bool skip_proxy,
                             bool overwrite) {
  auto& s = gpu::dynamic_smem<WgmmaSmem>();
  const int t = threadIdx.x;
  for (int i = t; i < 64 * 64; i += 128) {
    const int r = i / 64, k = i % 64;
    s.a[r][(k / 8 ^ r % 8) * 8 + k % 8] = tokencomp::from_float<bf16>(x[i % (kTiles * kTile)]);
  }
  if (!skip_proxy) gpu::fence_proxy_async();
  __syncthreads();
  float d[32];
  const uint64_t a = gpu::wgmma_descriptor_128b(s.a);
  if (!skip_fence) gpu::wgmma_fence();
  for (int k = 0; k < 4; k++) gpu::wgmma_m64n64k16<bf16>(d, a + k * 2, a + k * 2, k > 0);
  gpu::wgmma_commit();
  if (overwrite) s.a[t / 64][t % 64] = bf16{};
  if (!skip_wait) gpu::wgmma_wait<0>();
  for (int i = 0; i < 32; i++) {
    const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
    if (row < 4) out[row * 64 + column] = d[i];
  }
}

__global__ void missing_wgmma_wait(const float* x, float* out, bool inject) {
  wgmma_square(x, out, inject, false, false, false);
}
__global__ void missing_wgmma_fence(const float* x, float* out, bool inject) {
  wgmma_square(x, out, false, inject, false, false);
}
__global__ void missing_proxy_fence(const float* x, float* out, bool inject) {
  wgmma_square(x, out, false, false, inject, false);
}
__global__ void operand_overwritten(const float* x, float* out, bool inject) {
  wgmma_square(x, out, false, false, false, inject);
}

// With the identity as its operand in registers.
__global__ void fragment_changed(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<WgmmaSmem>();
  const int t = threadIdx.x;
  for (int i = t; i < 64 * 64; i += 128) {
    const int r = i / 64, c = i % 64;
    s.a[r][(c / 8 ^ r % 8) * 8 + c % 8] = tokencomp::from_float<bf16>(x[i % (kTiles * kTile)]);
  }
  gpu::fence_proxy_async();
  __syncthreads();
  uint32_t one[4][4];
  for (int i = 0; i < 16; i++) {
    const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, column = i / 2 * 8 + t % 4 * 2;
    one[i / 4][i % 4] = gpu::pack_halves<bf16>(row == column, row == column + 1);
  }
  float d[32];
  const uint64_t b = gpu::wgmma_descriptor_columns(s.a, sizeof s.a);
  gpu::wgmma_fence();
  for (int k = 0; k < 4; k++) gpu::wgmma_m64n64k16_fragment<bf16>(d, one[k], b + k * 128, k > 0);
  gpu::wgmma_commit();
  if (inject) one[3][0] = 0x3f803f80;
  gpu::wgmma_wait<0>();
  for (int i = 0; i < 32; i++) {
    const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
    if (row < 4) out[row * 64 + column] = d[i];
  }
}

template <Kernel kernel>
Tensor run_wgmma(const Tensor& x, bool inject) {
  Call call(x);
  Tensor out = call.make<float>({kTile});
  gpu::launch(kernel, call.config(1, 128, sizeof(WgmmaSmem)), call.in<float>(x, "x"), call.out<float>(out), inject);
  return out;
}

// ---- between blocks
constexpr unsigned kBlocks = kTiles;

__global__ void last_block_kernel(const float* x, float* partial, uint32_t* counter, float* out, bool inject) {
  const int t = threadIdx.x;
  for (int i = t; i < kTile; i += kThreads) partial[blockIdx.x * kTile + i] = x[blockIdx.x * kTile + i];
  if (!inject) __threadfence();
  __syncthreads();
  bool last = false;
  if (t == 0) last = atomicAdd(counter, 1u) == gridDim.x - 1;
  if (!__syncthreads_or(last)) return;
  for (int i = t; i < kTile; i += kThreads) {
    out[i] = 0;
    for (unsigned b = 0; b < kBlocks; b++) out[i] += partial[b * kTile + i];
  }
}

Tensor missing_threadfence(const Tensor& x, bool inject) {
  Call call(x);
  Tensor out = call.make<float>({kTile}), partial = call.make<float>({kBlocks * kTile}), counter = call.make<int>({1});
  gpu::launch(last_block_kernel, call.config(kBlocks, kThreads), call.in<float>(x, "x"),
              call.out<float>(partial, "partial"), call.zeros<uint32_t>(counter, "counter"), call.out<float>(out),
              inject);
  return out;
}

__global__ void grid_kernel(const float* x, float* partial, uint32_t* counter, float* out, bool skip_barrier) {
  const int t = threadIdx.x;
  for (int i = t; i < kTile; i += kThreads) partial[blockIdx.x * kTile + i] = x[blockIdx.x * kTile + i];
  if (!skip_barrier) gpu::grid_barrier(counter, gridDim.x);
  for (int i = blockIdx.x * kThreads + t; i < kTile; i += kBlocks * kThreads) {
    out[i] = 0;
    for (unsigned b = 0; b < kBlocks; b++) out[i] += partial[b * kTile + i];
  }
}

template <bool not_cooperative, bool dirty_counter>
Tensor run_grid(const Tensor& x, bool inject) {
  Call call(x);
  Tensor out = call.make<float>({kTile}), partial = call.make<float>({kBlocks * kTile}), counter = call.make<int>({1});
  gpu::LaunchConfig config = call.cooperative(kBlocks, kThreads);
  config.cooperative = !(not_cooperative && inject);
  const bool skip = inject && !not_cooperative && !dirty_counter;
  const auto* in = call.in<float>(x, "x");
  float* p = call.out<float>(partial, "partial");
  uint32_t* word = call.zeros<uint32_t>(counter, "counter");
  if (dirty_counter && inject) *word = 1;
  gpu::launch(grid_kernel, config, in, p, word, call.out<float>(out), skip);
  return out;
}

const std::map<std::string, Bug>& bugs() {
  static const std::map<std::string, Bug> all = {
      {"missing_tail_barrier", run<missing_tail_barrier, sizeof(TileSmem)>},
      {"wait_too_weak", run<wait_too_weak, sizeof(TwoTilesSmem)>},
      {"missing_barrier_after_wait", run<missing_barrier_after_wait, sizeof(TileSmem)>},
      {"copy_never_waited_for", run<copy_never_waited_for, sizeof(TileSmem)>},
      {"misaligned_copy", run<misaligned_copy, sizeof(TileSmem)>},
      {"copy_past_tensor", run<copy_past_tensor, sizeof(TileSmem)>},
      {"missing_mbar_wait", run<missing_mbar_wait, sizeof(BulkSmem)>},
      {"mbarrier_not_initialised", run<mbarrier_not_initialised, sizeof(BulkSmem)>},
      {"mbarrier_not_published", run<mbarrier_not_published, sizeof(BulkSmem)>},
      {"too_many_arrivals", run<too_many_arrivals, sizeof(BulkSmem)>},
      {"missing_final_cluster_barrier", run<missing_final_cluster_barrier, sizeof(TileSmem), 2>},
      {"missing_first_cluster_barrier", run<missing_first_cluster_barrier, sizeof(TileSmem), 2>},
      {"cluster_wait_without_arrive", run<cluster_wait_without_arrive, sizeof(TileSmem), 2>},
      {"missing_wgmma_wait", run_wgmma<missing_wgmma_wait>},
      {"missing_wgmma_fence", run_wgmma<missing_wgmma_fence>},
      {"missing_proxy_fence", run_wgmma<missing_proxy_fence>},
      {"operand_overwritten", run_wgmma<operand_overwritten>},
      {"fragment_changed", run_wgmma<fragment_changed>},
      {"missing_threadfence", missing_threadfence},
      {"missing_grid_barrier", run_grid<false, false>},
      {"grid_not_cooperative", run_grid<true, false>},
      {"grid_counter_not_zero", run_grid<false, true>},
  };
  return all;
}

Tensor async_bug(std::string name, const Tensor& x, bool inject) {
  const auto found = bugs().find(name);
  STD_TORCH_CHECK(found != bugs().end(), "async_bug: no kernel named ", name);
  return found->second(x, inject);
}

}  // namespace
}  // namespace test

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_TEST_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("async_bug", TORCH_BOX(&test::async_bug));
}
