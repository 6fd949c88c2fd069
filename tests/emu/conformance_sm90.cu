// Warpgroup matrix products, compiled for sm_90a alone: c[64, N] = a[64, 64] b[N, 64]^T (+ c) in four steps of 16; with
// a in registers, rounded there from fp32, and b [64, N] with its columns side by side.
#include "call.h"
#include "core/dtype.h"

namespace test {
namespace {

using tokencomp::bf16;
using tokencomp::f16;

template <class T, int N>
struct WgmmaSmem {
  alignas(1024) T a[64][64];
  alignas(1024) T b[N][64];
};

// 16-byte chunk c of row r lies at chunk c ^ (r % 8): the 128-byte swizzle.
template <class T, int ROWS>
__device__ __forceinline__ void load_swizzled(T (&tile)[ROWS][64], const T* x, int stride = 64) {
  for (int i = threadIdx.x; i < ROWS * 8; i += 128) {
    const int r = i / 8, c = i % 8;
    *reinterpret_cast<uint4*>(&tile[r][(c ^ (r % 8)) * 8]) = gpu::ld_nc_16(x + r * stride + c * 8);
  }
}

__device__ __forceinline__ int row_of(int i) {
  return int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4 + i / 2 % 2 * 8;
}
__device__ __forceinline__ int column_of(int i) { return i / 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2; }

// registers: wgmma_kernel <= 128
template <class T, int N>
__global__ void __launch_bounds__(128) wgmma_kernel(const T* a, const T* b, const float* c, float* out) {
  auto& s = gpu::dynamic_smem<WgmmaSmem<T, N>>();
  load_swizzled(s.a, a);
  load_swizzled(s.b, b);
  gpu::fence_proxy_async();
  __syncthreads();
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[i] = c ? c[row_of(i) * N + column_of(i)] : 0.0f;
  const uint64_t da = gpu::wgmma_descriptor_128b(s.a), db = gpu::wgmma_descriptor_128b(s.b);
  gpu::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const bool accumulate = c != nullptr || k > 0;
    if constexpr (N == 64)
      gpu::wgmma_m64n64k16<T>(d, da + k * 2, db + k * 2, accumulate);
    else
      gpu::wgmma_m64n128k16<T>(d, da + k * 2, db + k * 2, accumulate);
  }
  gpu::wgmma_commit();
  gpu::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; i++) out[row_of(i) * N + column_of(i)] = d[i];
}

template <class T, int N>
struct FragmentSmem {
  alignas(1024) T b[N / 64][64][64];  // panels of 64 columns
};

// registers: wgmma_fragment_kernel <= 160
template <class T, int N>
__global__ void __launch_bounds__(128) wgmma_fragment_kernel(const float* a, const T* b, const float* c, float* out) {
  auto& s = gpu::dynamic_smem<FragmentSmem<T, N>>();
  for (int panel = 0; panel < N / 64; panel++) load_swizzled(s.b[panel], b + panel * 64, N);
  gpu::fence_proxy_async();
  __syncthreads();
  uint32_t fragment[4][4];
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < 16; i++) {  // pairs of neighbours: rows and columns of accumulators 2 i and 2 i + 1
    const float* pair = a + row_of(2 * i) * 64 + column_of(2 * i);
    fragment[i / 4][i % 4] = gpu::pack_halves<T>(pair[0], pair[1]);
  }
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[i] = c ? c[row_of(i) * N + column_of(i)] : 0.0f;
  const uint64_t db = gpu::wgmma_descriptor_columns(s.b, sizeof(s.b[0]));
  gpu::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const bool accumulate = c != nullptr || k > 0;
    if constexpr (N == 64)
      gpu::wgmma_m64n64k16_fragment<T>(d, fragment[k], db + k * 128, accumulate);
    else
      gpu::wgmma_m64n128k16_fragment<T>(d, fragment[k], db + k * 128, accumulate);
  }
  gpu::wgmma_commit();
  gpu::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; i++) out[row_of(i) * N + column_of(i)] = d[i];
}

template <class T, int N>
Tensor run(const Tensor& a, const Tensor& b, const std::optional<Tensor>& c) {
  Call call(a);
  Tensor out = call.make<float>({64, N});
  gpu::launch(wgmma_kernel<T, N>, call.config(1, 128, sizeof(WgmmaSmem<T, N>)), call.in<T>(a, "a"), call.in<T>(b, "b"),
              c ? call.in<float>(*c, "c") : nullptr, call.out<float>(out));
  return out;
}

Tensor wgmma(const Tensor& a, const Tensor& b, std::optional<Tensor> c) {
  const bool wide = b.size(0) == 128;
  if (a.scalar_type() == ScalarType::BFloat16) return wide ? run<bf16, 128>(a, b, c) : run<bf16, 64>(a, b, c);
  return wide ? run<f16, 128>(a, b, c) : run<f16, 64>(a, b, c);
}

template <class T, int N>
Tensor run_fragment(const Tensor& a, const Tensor& b, const std::optional<Tensor>& c) {
  Call call(a);
  Tensor out = call.make<float>({64, N});
  gpu::launch(wgmma_fragment_kernel<T, N>, call.config(1, 128, sizeof(FragmentSmem<T, N>)), call.in<float>(a, "a"),
              call.in<T>(b, "b"), c ? call.in<float>(*c, "c") : nullptr, call.out<float>(out));
  return out;
}

Tensor wgmma_fragment(const Tensor& a, const Tensor& b, std::optional<Tensor> c) {
  const bool wide = b.size(1) == 128;
  if (b.scalar_type() == ScalarType::BFloat16)
    return wide ? run_fragment<bf16, 128>(a, b, c) : run_fragment<bf16, 64>(a, b, c);
  return wide ? run_fragment<f16, 128>(a, b, c) : run_fragment<f16, 64>(a, b, c);
}

}  // namespace
}  // namespace test

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_TEST_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("wgmma", TORCH_BOX(&test::wgmma));
  m.impl("wgmma_fragment", TORCH_BOX(&test::wgmma_fragment));
}
