// Meeting points wider or narrower than a block (nvcc): clusters (sm_90; elsewhere a block is a cluster of one), named
// barriers among some warps of a block, the barrier of a cooperative grid, and the choice of one lane.
#pragma once
#include <cstdint>

#include "cuda/arch/memory.h"

namespace gpu {

__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
#else
  return 0;
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  unsigned r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
#else
  return 1;
#endif
}

// The cluster barrier in two halves: what was written before arrive is visible to all after their wait. All threads of
// all blocks call both, alternately.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where p, in this block's shared memory, lies in the shared memory of block `rank` of the cluster. A peer's memory
// exists until the peer exits: the last access is followed by a cluster_sync.
template <class T>
__device__ __forceinline__ T* cluster_map(T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  if (rank != 0) __trap();
  return p;
#endif
}

// Barrier `id` (1 to 15) among `threads` threads (whole warps): sync waits for the others, arrive does not.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A barrier among `blocks` blocks of a cooperative launch that share `counter`, a word that was zero at the launch. All
// threads of these blocks call, as often as they like; global memory written before is visible after.
__device__ __forceinline__ void grid_barrier(uint32_t* counter, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    __threadfence();  // makes the whole block's writes, ordered before this thread by the barrier, visible to the
                      // device
    const uint32_t ticket = atomicAdd(counter, 1u);
    const uint32_t goal = ticket - ticket % blocks + blocks;
    while (int32_t(ld_acquire(counter) - goal) < 0) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

// True in exactly one of the lanes in `mask`, all of which call.
__device__ __forceinline__ bool elect_one(unsigned mask = ~0u) {
#if __CUDA_ARCH__ >= 900
  uint32_t elected = 0;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, %1;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected)
      : "r"(mask));
  return elected != 0;
#else
  __syncwarp(mask);
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32 == unsigned(__ffs(int(mask)) - 1);
#endif
}

}  // namespace gpu
