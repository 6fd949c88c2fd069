// Wrappers of cuda/arch that work on pairs of 16-bit numbers in a register; see conformance.cu.
#include "call.h"

namespace test {
namespace {

// registers: movmatrix_kernel <= 32
__global__ void __launch_bounds__(32) movmatrix_kernel(const uint32_t* x, uint32_t* out) {
  out[threadIdx.x] = gpu::movmatrix_trans(x[threadIdx.x]);
}

Tensor movmatrix(const Tensor& x) {
  Call call(x);
  Tensor out = call.make<int>({32});
  gpu::launch(movmatrix_kernel, call.config(1, 32), call.in<uint32_t>(x, "x"), call.out<uint32_t>(out));
  return out;
}

// Pairs of halves: a product of two words and what its rounding lost, and two floats packed.
// registers: f16x2_kernel <= 32
__global__ void __launch_bounds__(128) f16x2_kernel(const uint32_t* a, const uint32_t* b, uint32_t* out, int n) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i >= n) return;
  const uint32_t product = gpu::mul_f16x2(a[i], b[i]);
  out[3 * i] = product;
  out[3 * i + 1] = gpu::pack_f16x2(__uint_as_float(a[i]), __uint_as_float(b[i]));
  out[3 * i + 2] = gpu::fma_f16x2(a[i], b[i], product ^ 0x80008000u);
}

Tensor f16x2(const Tensor& a, const Tensor& b) {
  Call call(a);
  const int n = int(a.numel());
  Tensor out = call.make<int>({n, 3});
  gpu::launch(f16x2_kernel, call.config(unsigned(n + 127) / 128, 128), call.in<uint32_t>(a, "a"),
              call.in<uint32_t>(b, "b"), call.out<uint32_t>(out), n);
  return out;
}

}  // namespace
}  // namespace test

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_TEST_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("movmatrix", TORCH_BOX(&test::movmatrix));
  m.impl("f16x2", TORCH_BOX(&test::f16x2));
}
