// Functions of the special-function unit that CUDA C++ does not spell (nvcc).
#pragma once

namespace gpu {

// 2^x within 2 ulp. Results below the normal range are 0; NaN stays NaN.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace gpu
