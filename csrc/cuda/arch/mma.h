// Warp-wide matrix instructions (nvcc). All 32 lanes call. With g = lane / 4 and t = lane % 4, 16-bit operands:
//   A (16 x 16) a0: row g, k 2t..2t+1   a1: row g+8, same k   a2: row g, k 2t+8..2t+9   a3: row g+8, k 2t+8..2t+9
//   B (16 x 8)  b0: k 2t..2t+1, column g   b1: k 2t+8..2t+9, column g
//   D (16 x 8)  d0, d1: row g, columns 2t, 2t+1   d2, d3: row g+8, same columns
// 8-bit operands: four values of k in a register instead of two (k 4t..4t+3, and + 16).
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "cuda/arch/memory.h"

namespace gpu {

// Four 8x8 matrices of 16-bit elements; lane 8m + i points to row i of matrix m (16 bytes, 16-aligned, shared memory).
// Lane l receives in r[m] elements (l / 4, 2 (l % 4)) and the one to its right.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// The same of the transposed matrices: lane l receives elements (2 (l % 4), l / 4) and the one below.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// The inverse of ldmatrix (sm_90).
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  __trap();
#endif
}

// Two values as a register of a fragment: `low` in the lower half; rounded to T, bf16 or f16.
template <class T>
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  static_assert(__is_same(T, tokencomp::bf16) || __is_same(T, tokencomp::f16));
  uint32_t pair;
  if constexpr (__is_same(T, tokencomp::bf16))
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The transpose of an 8x8 matrix of 16-bit elements, of which lane l holds (l / 4, 2 (l % 4)) and the one to its right,
// held in the same way.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// d += a * b, fp32 sums; T is bf16 or f16.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(__is_same(T, tokencomp::bf16) || __is_same(T, tokencomp::f16));
  if constexpr (__is_same(T, tokencomp::bf16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// d += a * b, signed 8-bit operands, 32-bit sums that wrap.
__device__ __forceinline__ void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace gpu
