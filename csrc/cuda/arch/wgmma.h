// wgmma (nvcc, sm_90a): the asynchronous matrix product of a warpgroup, four warps whose first thread has a rank that
// is a multiple of 128. Both operands lie in shared memory, K-major (a row is 64 16-bit values = 128 bytes), with the
// 128-byte swizzle: 16-byte chunk c of row r is stored at chunk c ^ (r % 8). All 128 threads call everything here.
// Accumulator i of thread t (0..127): row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i
// % 2. Use: write tiles, fence_proxy_async, barrier; wgmma_fence; wgmma...; wgmma_commit; wgmma_wait<0>; read the
// accumulators.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "cuda/arch/memory.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TOKENCOMP_HAS_WGMMA 1
#else
#define TOKENCOMP_HAS_WGMMA 0
#endif

namespace gpu {

// Describes a tile that starts at a multiple of 1024 bytes; rows in groups of eight, 1024 bytes apart. The next 16
// values of k are 32 bytes further: add 2 to the descriptor.
__device__ __forceinline__ uint64_t wgmma_descriptor_128b(const void* tile) {
  constexpr uint64_t kLeading = 1, kStride = 1024 >> 4,
                     kSwizzle128 = 1;  // the leading offset is not used when swizzled
  return uint64_t((smem_address(tile) & 0x3ffff) >> 4) | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}

// Orders this thread's accesses to accumulator registers before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
#if TOKENCOMP_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#if TOKENCOMP_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// Waits until at most N of the newest committed groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
#if TOKENCOMP_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  __trap();
#endif
}

// Accumulators change behind the compiler's back, between the product and the wait. Naming them before a product that
// starts in them, and after the wait, keeps their other uses on the right side.
template <int N>
__device__ __forceinline__ void wgmma_hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a * b^T (+ d if accumulate): a 64 x 16, b 64 x 16, T is bf16 or f16.
template <class T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(__is_same(T, tokencomp::bf16) || __is_same(T, tokencomp::f16));
#if TOKENCOMP_HAS_WGMMA
#define TOKENCOMP_WGMMA(type)                                                                                       \
  asm volatile(                                                                                                     \
      "{\n"                                                                                                         \
      ".reg .pred p;\n"                                                                                             \
      "setp.ne.b32 p, %34, 0;\n"                                                                                    \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                   \
      " {"                                                                                                          \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "             \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                                       \
      "}, %32, %33, p, 1, 1, 0, 0;\n"                                                                               \
      "}"                                                                                                           \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                   \
      : "l"(a), "l"(b), "r"(int(accumulate)))
  if constexpr (__is_same(T, tokencomp::bf16))
    TOKENCOMP_WGMMA("bf16");
  else
    TOKENCOMP_WGMMA("f16");
#undef TOKENCOMP_WGMMA
#else
  __trap();
#endif
}

// d = a * b^T (+ d if accumulate): a 64 x 16, b 128 x 16, T is bf16 or f16.
template <class T>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(__is_same(T, tokencomp::bf16) || __is_same(T, tokencomp::f16));
#if TOKENCOMP_HAS_WGMMA
#define TOKENCOMP_WGMMA(type)                                                                                       \
  asm volatile(                                                                                                     \
      "{\n"                                                                                                         \
      ".reg .pred p;\n"                                                                                             \
      "setp.ne.b32 p, %66, 0;\n"                                                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                  \
      " {"                                                                                                          \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "             \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "             \
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "             \
      "%59, %60, %61, %62, %63"                                                                                     \
      "}, %64, %65, p, 1, 1, 0, 0;\n"                                                                               \
      "}"                                                                                                           \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),     \
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),     \
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),     \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),     \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                   \
      : "l"(a), "l"(b), "r"(int(accumulate)))
  if constexpr (__is_same(T, tokencomp::bf16))
    TOKENCOMP_WGMMA("bf16");
  else
    TOKENCOMP_WGMMA("f16");
#undef TOKENCOMP_WGMMA
#else
  __trap();
#endif
}

}  // namespace gpu
