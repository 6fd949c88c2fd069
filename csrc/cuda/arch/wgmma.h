// wgmma (nvcc, sm_90a): the asynchronous matrix product of a warpgroup, four warps whose first thread has a rank that
// is a multiple of 128. Operands lie in shared memory, K-major (a row is 64 16-bit values = 128 bytes), with the
// 128-byte swizzle: 16-byte chunk c of row r is stored at chunk c ^ (r % 8); or a comes from registers and b has its
// columns side by side (MN-major), swizzled alike. All 128 threads call everything here.
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

// Describes a b tile whose columns lie side by side (MN-major): panels of 64 columns, `panel_bytes` apart, each of
// which is like a K-major tile with k as its rows. The next 16 values of k are 2048 bytes further: add 128 to the
// descriptor.
__device__ __forceinline__ uint64_t wgmma_descriptor_columns(const void* tile, unsigned panel_bytes) {
  constexpr uint64_t kStride = 1024 >> 4, kSwizzle128 = 1;  // the stride leads to the next eight k
  return uint64_t((smem_address(tile) & 0x3ffff) >> 4) | uint64_t(panel_bytes >> 4) << 16 | kStride << 32 |
         kSwizzle128 << 62;
}

// Registers of a thread from here on, for a kernel whose warpgroups have different work: all 128 threads of a warpgroup
// call, in kernels with __launch_bounds__(threads, 1). The sum over the block must not exceed what it started with.
template <int N>
__device__ __forceinline__ void warpgroup_give_registers() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
#if TOKENCOMP_HAS_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
__device__ __forceinline__ void warpgroup_take_registers() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
#if TOKENCOMP_HAS_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
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

// ---- the instructions. Accumulators are operands 0 to N / 2 - 1; then come a, b and whether to accumulate.
#define TOKENCOMP_WGMMA_LIST_32                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TOKENCOMP_WGMMA_SUMS_32                                                                               \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define TOKENCOMP_WGMMA_LIST_64                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "           \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
  "%60, %61, %62, %63"
#define TOKENCOMP_WGMMA_SUMS_64                                                                               \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), \
      "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), \
      "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
      "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define TOKENCOMP_WGMMA(type, columns, list, operands, accumulate, flags)                                           \
  "{\n"                                                                                                             \
  ".reg .pred p;\n"                                                                                                 \
  "setp.ne.b32 p, " accumulate                                                                                      \
  ", 0;\n"                                                                                                          \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" list "}, " operands ", p, 1, 1, " flags \
  ";\n"                                                                                                             \
  "}"
// Both operands in shared memory, K-major; or a in registers and b with its columns side by side.
#define TOKENCOMP_WGMMA_SHARED(type, columns, list, sums, a_at, b_at, p_at)       \
  asm volatile(TOKENCOMP_WGMMA(type, columns, list, a_at ", " b_at, p_at, "0, 0") \
               : sums                                                             \
               : "l"(a), "l"(b), "r"(int(accumulate)))
#define TOKENCOMP_WGMMA_FRAGMENT(type, columns, list, sums, a_at, b_at, p_at)  \
  asm volatile(TOKENCOMP_WGMMA(type, columns, list, a_at ", " b_at, p_at, "1") \
               : sums                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)))

// d = a * b^T (+ d if accumulate): a 64 x 16, b 64 x 16, T is bf16 or f16.
template <class T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(__is_same(T, tokencomp::bf16) || __is_same(T, tokencomp::f16));
#if TOKENCOMP_HAS_WGMMA
  if constexpr (__is_same(T, tokencomp::bf16))
    TOKENCOMP_WGMMA_SHARED("bf16", "64", TOKENCOMP_WGMMA_LIST_32, TOKENCOMP_WGMMA_SUMS_32, "%32", "%33", "%34");
  else
    TOKENCOMP_WGMMA_SHARED("f16", "64", TOKENCOMP_WGMMA_LIST_32, TOKENCOMP_WGMMA_SUMS_32, "%32", "%33", "%34");
#else
  __trap();
#endif
}

// d = a * b^T (+ d if accumulate): a 64 x 16, b 128 x 16, T is bf16 or f16.
template <class T>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(__is_same(T, tokencomp::bf16) || __is_same(T, tokencomp::f16));
#if TOKENCOMP_HAS_WGMMA
  if constexpr (__is_same(T, tokencomp::bf16))
    TOKENCOMP_WGMMA_SHARED("bf16", "128", TOKENCOMP_WGMMA_LIST_64, TOKENCOMP_WGMMA_SUMS_64, "%64", "%65", "%66");
  else
    TOKENCOMP_WGMMA_SHARED("f16", "128", TOKENCOMP_WGMMA_LIST_64, TOKENCOMP_WGMMA_SUMS_64, "%64", "%65", "%66");
#else
  __trap();
#endif
}

// d = a * b (+ d if accumulate): a 64 x 16 in registers, those of mma_m16n8k16 for the warp's own 16 rows, which must
// not change before the wait; b 16 x 64, columns side by side (wgmma_descriptor_columns). T is bf16 or f16.
template <class T>
__device__ __forceinline__ void wgmma_m64n64k16_fragment(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                                         bool accumulate) {
  static_assert(__is_same(T, tokencomp::bf16) || __is_same(T, tokencomp::f16));
#if TOKENCOMP_HAS_WGMMA
  if constexpr (__is_same(T, tokencomp::bf16))
    TOKENCOMP_WGMMA_FRAGMENT("bf16", "64", TOKENCOMP_WGMMA_LIST_32, TOKENCOMP_WGMMA_SUMS_32, "{%32, %33, %34, %35}",
                             "%36", "%37");
  else
    TOKENCOMP_WGMMA_FRAGMENT("f16", "64", TOKENCOMP_WGMMA_LIST_32, TOKENCOMP_WGMMA_SUMS_32, "{%32, %33, %34, %35}",
                             "%36", "%37");
#else
  __trap();
#endif
}

// d = a * b (+ d if accumulate): a 64 x 16 in registers, those of mma_m16n8k16 for the warp's own 16 rows, which must
// not change before the wait; b 16 x 128, columns side by side (wgmma_descriptor_columns). T is bf16 or f16.
template <class T>
__device__ __forceinline__ void wgmma_m64n128k16_fragment(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                                          bool accumulate) {
  static_assert(__is_same(T, tokencomp::bf16) || __is_same(T, tokencomp::f16));
#if TOKENCOMP_HAS_WGMMA
  if constexpr (__is_same(T, tokencomp::bf16))
    TOKENCOMP_WGMMA_FRAGMENT("bf16", "128", TOKENCOMP_WGMMA_LIST_64, TOKENCOMP_WGMMA_SUMS_64, "{%64, %65, %66, %67}",
                             "%68", "%69");
  else
    TOKENCOMP_WGMMA_FRAGMENT("f16", "128", TOKENCOMP_WGMMA_LIST_64, TOKENCOMP_WGMMA_SUMS_64, "{%64, %65, %66, %67}",
                             "%68", "%69");
#else
  __trap();
#endif
}

#undef TOKENCOMP_WGMMA
#undef TOKENCOMP_WGMMA_SHARED
#undef TOKENCOMP_WGMMA_FRAGMENT
#undef TOKENCOMP_WGMMA_LIST_32
#undef TOKENCOMP_WGMMA_SUMS_32
#undef TOKENCOMP_WGMMA_LIST_64
#undef TOKENCOMP_WGMMA_SUMS_64

}  // namespace gpu
