// The stream that PyTorch is working on, for launchers: gpu::stream_of(tensor.get_device_index()). Null in the
// emulator.
#pragma once
#include <cstdint>

#include "cuda/arch/gpu.h"

#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

// Declared by shim.h only where a CUDA build of PyTorch is; the symbol itself belongs to every such build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace gpu {

#ifdef __CUDACC__
inline Stream stream_of(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<Stream>(stream);
}
#else
inline Stream stream_of(int32_t) { return nullptr; }
#endif

}  // namespace gpu
