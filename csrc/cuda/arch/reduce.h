// Reductions of a warp and of a block, built from shuffles; the same text for GPU and emulator. Sums are taken in a
// fixed order, so results repeat bit by bit. Warp functions: all 32 lanes call, all hold the result. Block functions:
// all threads of a block of whole warps call, all hold the result; `scratch` is shared memory for one value a warp (at
// most kMaxWarps) and is free for reuse on return.
#pragma once
#include <cstdint>

namespace gpu {

constexpr int kMaxWarps = 32;

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

struct Min {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

__device__ __forceinline__ unsigned thread_rank() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

// `combine` is commutative and associative up to rounding; both partners of a pair compute the same bits.
template <class T, class F>
__device__ __forceinline__ T warp_reduce(T v, F combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v = combine(v, __shfl_xor_sync(~0u, v, distance));
  return v;
}

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  return warp_reduce(v, Sum{});
}

// A NaN operand may win or lose: use keys (warp_max_u64) where NaN matters.
template <class T>
__device__ __forceinline__ T warp_max(T v) {
  return warp_reduce(v, Max{});
}

template <class T>
__device__ __forceinline__ T warp_min(T v) {
  return warp_reduce(v, Min{});
}

__device__ __forceinline__ unsigned long long warp_max_u64(unsigned long long v) { return warp_reduce(v, Max{}); }

// The sum over this lane and those below it.
template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T v) {
  const unsigned lane = thread_rank() % 32;
#pragma unroll
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const T below = __shfl_up_sync(~0u, v, distance);
    v += lane >= distance ? below : T(0);
  }
  return v;
}

// `identity` is what combine ignores; it stands for the warps that the block does not have.
template <class T, class F>
__device__ __forceinline__ T block_reduce(T v, T* scratch, T identity, F combine) {
  const unsigned rank = thread_rank(), lane = rank % 32, warps = blockDim.x * blockDim.y * blockDim.z / 32;
  v = warp_reduce(v, combine);
  if (lane == 0) scratch[rank / 32] = v;
  __syncthreads();
  v = warp_reduce(lane < warps ? scratch[lane] : identity, combine);
  __syncthreads();  // all have read: the caller may use scratch again
  return v;
}

template <class T>
__device__ __forceinline__ T block_sum(T v, T* scratch) {
  return block_reduce(v, scratch, T(0), Sum{});
}

// `lowest` is not above any value of the block.
template <class T>
__device__ __forceinline__ T block_max(T v, T* scratch, T lowest) {
  return block_reduce(v, scratch, lowest, Max{});
}

__device__ __forceinline__ unsigned long long block_max_u64(unsigned long long v, unsigned long long* scratch) {
  return block_reduce(v, scratch, 0ull, Max{});
}

}  // namespace gpu
