// Host side (nvcc): launching a kernel and asking the device what it can do. Errors are exceptions; nothing is ignored.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace gpu {

using Stream = cudaStream_t;

struct LaunchConfig {
  dim3 grid, block;
  size_t smem = 0;           // bytes of dynamic shared memory, normally sizeof(Smem)
  unsigned cluster = 1;      // blocks in a cluster, along x; grid.x is a multiple of it
  bool cooperative = false;  // all blocks are resident together, as grid_barrier needs
  Stream stream = nullptr;
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // takes a non-sticky error away, so that the next call does not report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchConfig& config, A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each kernel parameter");
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernel parameters travel as bytes");
  constexpr size_t kSmemWithoutAsking = 48 << 10;
  constexpr unsigned kPortableCluster = 8;
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (config.smem > kSmemWithoutAsking) {
    check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.smem)),
          "launch: shared memory");
  }
  if (config.cluster > kPortableCluster) {
    check(cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "launch: cluster size");
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t native = {};
  native.gridDim = config.grid;
  native.blockDim = config.block;
  native.dynamicSmemBytes = config.smem;
  native.stream = config.stream;
  native.attrs = attributes;
  if (config.cluster > 1) {
    cudaLaunchAttribute& a = attributes[native.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = config.cluster;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (config.cooperative) {
    cudaLaunchAttribute& a = attributes[native.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&native, kernel, static_cast<P>(arguments)...), "launch");
}

namespace detail {
inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}
}  // namespace detail

// Of the current device.
inline int sm_count() { return detail::device_attribute(cudaDevAttrMultiProcessorCount); }
inline int compute_capability_major() { return detail::device_attribute(cudaDevAttrComputeCapabilityMajor); }
// The portable size: 8 where there are clusters, else 1. A launch of up to 16 may succeed, depending on the kernel.
inline unsigned max_cluster_size() { return detail::device_attribute(cudaDevAttrClusterLaunch) ? 8 : 1; }
inline size_t max_shared_memory_per_block() {
  return size_t(detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}
inline void memset_async(void* p, int byte, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(p, byte, bytes, stream), "memset_async");
}

// The race-checking build of the emulator learns the bounds of tensors here; on a GPU there is nothing to tell.
inline void watch(const void* /*p*/, size_t /*bytes*/, const char* /*name*/, bool /*written*/) {}
struct WatchScope {
  WatchScope() = default;
  WatchScope(const WatchScope&) = delete;
  ~WatchScope() {}
};

}  // namespace gpu
