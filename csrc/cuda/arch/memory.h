// Shared-memory access and the loads, stores and atomics that ordinary C++ cannot spell (nvcc).
#pragma once
#include <cstdint>

namespace gpu {

// The block's dynamic shared memory as a T; 1024-aligned, as the 128-byte swizzle wants it.
template <class T>
__device__ __forceinline__ T& dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char tokencomp_dynamic_smem[];
  return *reinterpret_cast<T*>(tokencomp_dynamic_smem);
}

// A shared-memory pointer as the 32-bit address that instructions take.
__device__ __forceinline__ uint32_t smem_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// What other threads released before the value was written is visible after it was read, device-wide.
__device__ __forceinline__ uint32_t ld_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void st_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// 16 bytes of global memory that nobody writes while the kernel runs; 16-aligned.
__device__ __forceinline__ uint4 ld_nc_16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Shared or global memory; returns the old value.
__device__ __forceinline__ unsigned long long atomic_max(unsigned long long* p, unsigned long long v) {
  return atomicMax(p, v);
}

// A load that no cache nearer than L2 answers and that atomics of other threads do not tear; orders nothing else.
template <class T>
__device__ __forceinline__ T atomic_load_relaxed(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T v;
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
    memcpy(&v, &bits, sizeof v);
  } else {
    uint64_t bits;
    asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(bits) : "l"(p) : "memory");
    memcpy(&v, &bits, sizeof v);
  }
  return v;
}

}  // namespace gpu
