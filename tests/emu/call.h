// Glue between torch tensors and the test kernels: pointers, outputs filled with poison, launch configuration, and the
// registration of each tensor with the race checker. One Call per operator invocation.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <vector>

#include "cuda/arch/gpu.h"
#include "op/stream.h"

namespace test {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType scalar_type() {
  if (std::is_same_v<T, float>) return ScalarType::Float;
  if (std::is_same_v<T, uint8_t>) return ScalarType::Byte;
  return sizeof(T) == 8 ? ScalarType::Long : sizeof(T) == 4 ? ScalarType::Int : ScalarType::Short;
}

class Call {
 public:
  explicit Call(const Tensor& like) : like_(like), stream_(gpu::stream_of(like.get_device_index())) {}

  // The elements of a contiguous input whose elements are as wide as T.
  template <class T>
  const T* in(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_contiguous() && t.element_size() == sizeof(T), name, ": wrong element size or strides");
    gpu::watch(t.const_data_ptr(), t.numel() * sizeof(T), name, true);
    return static_cast<const T*>(t.const_data_ptr());
  }

  template <class T>
  Tensor make(std::initializer_list<int64_t> shape) {
    const std::vector<int64_t> sizes(shape);
    return torch::stable::new_empty(like_, sizes, scalar_type<T>());
  }

  // An output: poisoned here, and not yet written as far as the checker is concerned.
  template <class T>
  T* out(Tensor& t, const char* name = "out") {
    gpu::memset_async(t.mutable_data_ptr(), 0xff, t.numel() * sizeof(T), stream_);
    gpu::watch(t.mutable_data_ptr(), t.numel() * sizeof(T), name, false);
    return static_cast<T*>(t.mutable_data_ptr());
  }

  // Scratch that kernels find zeroed.
  template <class T>
  T* zeros(Tensor& t, const char* name) {
    gpu::watch(t.mutable_data_ptr(), t.numel() * sizeof(T), name, false);
    gpu::memset_async(t.mutable_data_ptr(), 0, t.numel() * sizeof(T), stream_);
    return static_cast<T*>(t.mutable_data_ptr());
  }

  gpu::LaunchConfig config(unsigned grid, unsigned block, size_t smem = 0, unsigned cluster = 1) const {
    gpu::LaunchConfig c;
    c.grid = dim3(grid);
    c.block = dim3(block);
    c.smem = smem;
    c.cluster = cluster;
    c.stream = stream_;
    return c;
  }

  gpu::LaunchConfig cooperative(unsigned grid, unsigned block, size_t smem = 0) const {
    gpu::LaunchConfig c = config(grid, block, smem);
    c.cooperative = true;
    return c;
  }

 private:
  gpu::WatchScope scope_;
  const Tensor& like_;
  gpu::Stream stream_;
};

}  // namespace test
