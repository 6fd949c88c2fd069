// mbarriers and bulk copies (nvcc, sm_90): a 64-bit word in shared memory that counts arrivals and bytes. A phase ends
// when `count` threads have arrived and all expected bytes have been copied; then the next one, of the other parity,
// begins. The first phase has parity 0, so mbar_wait(b, 0) waits for the first phase to end.
#pragma once
#include <cstdint>

#include "cuda/arch/memory.h"

namespace gpu {

using Mbarrier = uint64_t;

// One thread calls; then fence_mbarrier_init() if a bulk copy or a peer block uses it, and a barrier before anybody
// does.
__device__ __forceinline__ void mbar_init(Mbarrier* b, unsigned count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(smem_address(b)), "r"(count) : "memory");
}

__device__ __forceinline__ void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
}

// Orders ordinary accesses to shared memory before later ones by bulk copies and wgmma. The writer calls it, then a
// barrier.
__device__ __forceinline__ void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void mbar_arrive(Mbarrier* b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(b)) : "memory");
#else
  __trap();
#endif
}

// Announces `bytes` of bulk copies to this phase, then arrives.
__device__ __forceinline__ void mbar_arrive_expect_tx(Mbarrier* b, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(b)), "r"(bytes) : "memory");
#else
  __trap();
#endif
}

// Waits until the phase of this parity has ended. A loop in C++ rather than in PTX: labels would clash when inlined
// twice.
__device__ __forceinline__ void mbar_wait(Mbarrier* b, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(smem_address(b)), "r"(parity)
        : "memory");
  }
#else
  __trap();
#endif
}

// One thread copies `bytes` from global to its block's shared memory; addresses and size are multiples of 16. The copy
// ends with `bytes` counted off the mbarrier.
__device__ __forceinline__ void bulk_load(void* dst, const void* src, unsigned bytes, Mbarrier* b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_address(dst)),
               "l"(src), "r"(bytes), "r"(smem_address(b))
               : "memory");
#else
  __trap();
#endif
}

}  // namespace gpu
