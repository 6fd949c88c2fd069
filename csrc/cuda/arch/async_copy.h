// cp.async (sm_80): a thread's copies from global to shared memory that run beside its computation (nvcc).
#pragma once
#include <cstdint>

#include "cuda/arch/memory.h"

namespace gpu {

// 16 bytes from global to shared memory, both 16-aligned. Not valid: 16 zeros, and src is not read (but must be a
// pointer one could read). Visible to the issuing thread after its cp_async_wait, to others after a barrier following
// that.
__device__ __forceinline__ void cp_async16(void* dst, const void* src, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(dst)), "l"(src), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of copies issued since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of the newest groups of this thread are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace gpu
