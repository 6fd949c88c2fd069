// Device memory that an operator needs for the duration of its launches.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda/arch/gpu.h"
#include "op/check.h"

namespace tokencomp {

// Arrays that live until the launches are enqueued.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}
  template <class T>
  T* take(int64_t count, const char* name) {
    tensors_.push_back(torch::stable::new_empty(like_, {count * int64_t(sizeof(T)) / 4}, ScalarType::Float));
    T* p = static_cast<T*>(tensors_.back().mutable_data_ptr());
    gpu::watch(p, count * sizeof(T), name, false);
    return p;
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

}  // namespace tokencomp
