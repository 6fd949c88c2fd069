// Small real kernels that put the wrappers together: a row sum, clusters with distributed shared memory, a pipeline of
// bulk copies between warps of different roles, a tensor-core product with double-buffered copies, a cooperative grid,
// and a sum finished by the last block. Compiled by g++ and nvcc alike; expected values in tests/emu/test_kernels.py.
#include <cmath>

#include "call.h"
#include "core/dtype.h"

namespace test {
namespace {

using tokencomp::bf16;
using tokencomp::f16;

// ---- one block a row
struct RowSumSmem {
  float scratch[gpu::kMaxWarps];
};

// registers: row_sum_kernel <= 32
__global__ void __launch_bounds__(256) row_sum_kernel(const float* x, float* out, int columns) {
  auto& s = gpu::dynamic_smem<RowSumSmem>();
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += x[size_t(blockIdx.x) * columns + i];
  sum = gpu::block_sum(sum, s.scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

Tensor row_sum(const Tensor& x) {
  Call call(x);
  Tensor out = call.make<float>({x.size(0)});
  gpu::launch(row_sum_kernel, call.config(unsigned(x.size(0)), 256, sizeof(RowSumSmem)), call.in<float>(x, "x"),
              call.out<float>(out), int(x.size(1)));
  return out;
}

// ---- each block of a cluster publishes a row; its right neighbour reads it. Split barrier: work between the halves.
struct ExchangeSmem {
  float row[64];
};
constexpr int kExchange = 66;

// registers: cluster_exchange_kernel <= 32
__global__ void __launch_bounds__(64) cluster_exchange_kernel(const float* x, float* out) {
  auto& s = gpu::dynamic_smem<ExchangeSmem>();
  const unsigned rank = gpu::cluster_rank(), size = gpu::cluster_size(), t = threadIdx.x;
  s.row[t] = x[blockIdx.x * 64 + t];
  gpu::cluster_arrive();
  if (t < 2) out[blockIdx.x * kExchange + 64 + t] = float(t == 0 ? rank : size);
  gpu::cluster_wait();
  out[blockIdx.x * kExchange + t] = gpu::cluster_map(s.row, (rank + 1) % size)[63 - t];
  gpu::cluster_sync();  // nobody leaves while its neighbour reads
}

Tensor cluster_exchange(const Tensor& x, int64_t cluster) {
  Call call(x);
  Tensor out = call.make<float>({x.size(0), kExchange});
  gpu::launch(cluster_exchange_kernel, call.config(unsigned(x.size(0)), 64, sizeof(ExchangeSmem), unsigned(cluster)),
              call.in<float>(x, "x"), call.out<float>(out));
  return out;
}

// ---- argmax of a row by a cluster; ties go to the smaller index
struct Best {
  float value;
  int index;
};
struct ArgmaxSmem {
  Best warp[8], block;
};

__device__ __forceinline__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

__device__ __forceinline__ Best warp_best(Best b) {
  for (int d = 16; d > 0; d /= 2) {
    b = better(b, {__shfl_xor_sync(~0u, b.value, d), __shfl_xor_sync(~0u, b.index, d)});
  }
  return b;
}

// registers: cluster_argmax_kernel <= 40
__global__ void __launch_bounds__(256) cluster_argmax_kernel(const float* x, int* out, int n) {
  auto& s = gpu::dynamic_smem<ArgmaxSmem>();
  const int rank = int(gpu::cluster_rank()), size = int(gpu::cluster_size()), row = blockIdx.x / size, t = threadIdx.x;
  Best best{-INFINITY, 0x7fffffff};
  for (int i = rank * 256 + t; i < n; i += size * 256) best = better(best, {x[size_t(row) * n + i], i});
  best = warp_best(best);
  if (t % 32 == 0) s.warp[t / 32] = best;
  __syncthreads();
  if (t == 0) {
    for (int w = 1; w < 8; w++) best = better(best, s.warp[w]);
    s.block = best;
  }
  gpu::cluster_sync();
  if (rank == 0 && t == 0) {
    for (int r = 1; r < size; r++) best = better(best, *gpu::cluster_map(&s.block, r));
    out[row] = best.index;
  }
  gpu::cluster_sync();
}

Tensor cluster_argmax(const Tensor& x, int64_t cluster) {
  Call call(x);
  Tensor out = call.make<int>({x.size(0)});
  gpu::launch(cluster_argmax_kernel,
              call.config(unsigned(x.size(0) * cluster), 256, sizeof(ArgmaxSmem), unsigned(cluster)),
              call.in<float>(x, "x"), call.out<int>(out), int(x.size(1)));
  return out;
}

// ---- a producer warp feeds four consumer warps through two buffers
constexpr int kTile = 256, kConsumers = 128;
struct PipelineSmem {
  alignas(128) float tile[2][kTile];
  gpu::Mbarrier full[2], empty[2];
  float warp[4];
};

// registers: pipeline_kernel <= 40
__global__ void __launch_bounds__(160) pipeline_kernel(const float* x, float* out, int tiles) {
  auto& s = gpu::dynamic_smem<PipelineSmem>();
  const int t = threadIdx.x;
  if (t == 0) {
    for (int i = 0; i < 2; i++) {
      gpu::mbar_init(&s.full[i], 1);
      gpu::mbar_init(&s.empty[i], kConsumers);
    }
    gpu::fence_mbarrier_init();
  }
  __syncthreads();
  if (t >= kConsumers) {
    if (t == kConsumers) {
      for (int i = 0; i < tiles; i++) {
        if (i >= 2) gpu::mbar_wait(&s.empty[i % 2], (i / 2 - 1) % 2);
        gpu::mbar_arrive_expect_tx(&s.full[i % 2], kTile * sizeof(float));
        gpu::bulk_load(s.tile[i % 2], x + (size_t(blockIdx.x) * tiles + i) * kTile, kTile * sizeof(float),
                       &s.full[i % 2]);
      }
    }
    gpu::named_barrier_arrive(2, 160);
  } else {
    float sum = 0;
    for (int i = 0; i < tiles; i++) {
      gpu::mbar_wait(&s.full[i % 2], i / 2 % 2);
      sum += s.tile[i % 2][t] + s.tile[i % 2][t + kConsumers];
      gpu::mbar_arrive(&s.empty[i % 2]);
    }
    sum = gpu::warp_sum(sum);
    if (t % 32 == 0) s.warp[t / 32] = sum;
    gpu::named_barrier_sync(1, kConsumers);
    gpu::named_barrier_sync(2, 160);
    if (t == 0) out[blockIdx.x] = s.warp[0] + s.warp[1] + s.warp[2] + s.warp[3];
  }
}

Tensor pipeline(const Tensor& x) {
  Call call(x);
  Tensor out = call.make<float>({x.size(0)});
  gpu::launch(pipeline_kernel, call.config(unsigned(x.size(0)), 160, sizeof(PipelineSmem)), call.in<float>(x, "x"),
              call.out<float>(out), int(x.size(1) / kTile));
  return out;
}

// ---- c[M, N] = a[M, K] b[N, K]^T: 64 x 64 tiles, K in steps of 32, two buffers, four warps of 16 rows each
constexpr int kStep = 32;
template <class T>
struct GemmSmem {
  alignas(128) T a[2][64][kStep], b[2][64][kStep];
};

// Four 16-byte chunks a row, exchanged so that the eight rows of an ldmatrix fall into different banks.
template <class T>
__device__ __forceinline__ T* chunk(T (*tile)[kStep], int row, int c) {
  return &tile[row][(c ^ (row / 2 % 4)) * 8];
}

// registers: gemm_kernel <= 96
template <class T>
__global__ void __launch_bounds__(128) gemm_kernel(const T* a, const T* b, float* c, int rows, int columns, int depth) {
  auto& s = gpu::dynamic_smem<GemmSmem<T>>();
  const int t = threadIdx.x, lane = t % 32, warp = t / 32, row0 = blockIdx.x * 64, column0 = blockIdx.y * 64;
  auto load = [&](int step) {
    for (int i = t; i < 64 * 4; i += 128) {
      const int r = i / 4, k = step * kStep + i % 4 * 8, buffer = step % 2;
      const bool in_a = row0 + r < rows && k < depth, in_b = column0 + r < columns && k < depth;
      gpu::cp_async16(chunk(s.a[buffer], r, i % 4), in_a ? a + size_t(row0 + r) * depth + k : a, in_a);
      gpu::cp_async16(chunk(s.b[buffer], r, i % 4), in_b ? b + size_t(column0 + r) * depth + k : b, in_b);
    }
  };
  const int steps = (depth + kStep - 1) / kStep;
  float acc[8][4] = {};
  load(0);
  gpu::cp_async_commit();
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) load(step + 1);
    gpu::cp_async_commit();
    gpu::cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStep / 16; k++) {
      uint32_t fa[4];
      gpu::ldmatrix_x4(fa, chunk(s.a[step % 2], warp * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < 4; n++) {
        uint32_t fb[4];
        gpu::ldmatrix_x4(fb, chunk(s.b[step % 2], n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        gpu::mma_m16n8k16<T>(acc[2 * n], fa, {fb[0], fb[1]});
        gpu::mma_m16n8k16<T>(acc[2 * n + 1], fa, {fb[2], fb[3]});
      }
    }
    __syncthreads();  // the next step overwrites the buffer just read
  }
  gpu::cp_async_wait<0>();
#pragma unroll
  for (int n = 0; n < 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = row0 + warp * 16 + lane / 4 + i / 2 * 8, column = column0 + n * 8 + lane % 4 * 2 + i % 2;
      if (row < rows && column < columns) c[size_t(row) * columns + column] = acc[n][i];
    }
  }
}

Tensor gemm(const Tensor& a, const Tensor& b) {
  Call call(a);
  const int rows = int(a.size(0)), columns = int(b.size(0)), depth = int(a.size(1));
  STD_TORCH_CHECK(depth % 8 == 0, "gemm: the depth must be a multiple of 8");
  Tensor out = call.make<float>({rows, columns});
  auto run = [&]<class T>(T) {
    gpu::LaunchConfig config = call.config(unsigned(rows + 63) / 64, 128, sizeof(GemmSmem<T>));
    config.grid.y = unsigned(columns + 63) / 64;
    gpu::launch(gemm_kernel<T>, config, call.in<T>(a, "a"), call.in<T>(b, "b"), call.out<float>(out), rows, columns,
                depth);
  };
  if (a.scalar_type() == ScalarType::BFloat16)
    run(bf16{});
  else
    run(f16{});
  return out;
}

// ---- phases of a cooperative grid: each block smooths its share of a ring that its neighbours wrote
// registers: grid_phases_kernel <= 40
__global__ void __launch_bounds__(64)
    grid_phases_kernel(const float* x, float* ring, uint32_t* counter, int n, int phases) {
  const int stride = gridDim.x * 64, first = blockIdx.x * 64 + threadIdx.x;
  for (int i = first; i < n; i += stride) ring[i] = x[i];
  for (int p = 0; p < phases; p++) {
    gpu::grid_barrier(counter, gridDim.x);
    const float* from = ring + p % 2 * n;
    float* to = ring + (p + 1) % 2 * n;
    for (int i = first; i < n; i += stride) to[i] = from[(i + n - 1) % n] + from[(i + 1) % n];
  }
}

Tensor grid_phases(const Tensor& x, int64_t blocks, int64_t phases) {
  Call call(x);
  Tensor out = call.make<float>({2, x.numel()}), counter = call.make<int>({1});
  gpu::launch(grid_phases_kernel, call.cooperative(unsigned(blocks), 64), call.in<float>(x, "x"), call.out<float>(out),
              call.zeros<uint32_t>(counter, "counter"), int(x.numel()), int(phases));
  return out;
}

// ---- the block that finishes last adds up what all have left in global memory
struct LastBlockSmem {
  float scratch[gpu::kMaxWarps];
  bool last;
};

// registers: last_block_kernel <= 32
__global__ void __launch_bounds__(128)
    last_block_kernel(const float* x, float* partial, uint32_t* counter, float* out, int n) {
  auto& s = gpu::dynamic_smem<LastBlockSmem>();
  float sum = 0;
  for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) sum += x[i];
  sum = gpu::block_sum(sum, s.scratch);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    s.last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (s.last) {
    __threadfence();
    sum = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += 128) sum += partial[i];
    sum = gpu::block_sum(sum, s.scratch);
    if (threadIdx.x == 0) *out = sum;
  }
}

Tensor last_block_sum(const Tensor& x) {
  Call call(x);
  const unsigned blocks = 7;
  Tensor out = call.make<float>({1}), partial = call.make<float>({blocks}), counter = call.make<int>({1});
  gpu::launch(last_block_kernel, call.config(blocks, 128, sizeof(LastBlockSmem)), call.in<float>(x, "x"),
              call.out<float>(partial, "partial"), call.zeros<uint32_t>(counter, "counter"), call.out<float>(out),
              int(x.numel()));
  return out;
}

}  // namespace
}  // namespace test

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_TEST_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("row_sum", TORCH_BOX(&test::row_sum));
  m.impl("cluster_exchange", TORCH_BOX(&test::cluster_exchange));
  m.impl("cluster_argmax", TORCH_BOX(&test::cluster_argmax));
  m.impl("pipeline", TORCH_BOX(&test::pipeline));
  m.impl("gemm", TORCH_BOX(&test::gemm));
  m.impl("grid_phases", TORCH_BOX(&test::grid_phases));
  m.impl("last_block_sum", TORCH_BOX(&test::last_block_sum));
}
