// PyTorch's current device and stream, for launchers: hold a gpu::DeviceGuard(tensor.get_device_index()), launch on
// gpu::stream_of(the same). Both are nothing in the emulator.
#pragma once
#include <cstdint>

#include "cuda/arch/gpu.h"

#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

// Declared by shim.h only where a CUDA build of PyTorch is; the symbol itself belongs to every such build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace gpu {

#ifdef __CUDACC__
using torch::stable::accelerator::DeviceGuard;

inline Stream stream_of(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<Stream>(stream);
}
#else
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline Stream stream_of(int32_t) { return nullptr; }
#endif

}  // namespace gpu
