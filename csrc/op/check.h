// What every op/<family>.h needs to turn tensors into arguments: readable names and uniform messages
// "<op>: <argument> must be <expected>, got <got>".
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace tokencomp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline std::string listed(std::initializer_list<int64_t> shape) {
  std::string s = "[";
  for (int64_t extent : shape) s += (s.size() > 1 ? ", " : "") + std::to_string(extent);
  return s + "]";
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != int64_t(shape.size())) return false;
  int64_t i = 0;
  for (int64_t extent : shape) {
    if (t.size(i++) != extent) return false;
  }
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.device().type() == b.device().type() && a.get_device_index() == b.get_device_index();
}

inline DType dtype_of(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " must be float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

inline int in_int(const char* op, const char* argument, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(value >= low && value <= high, op, ": ", argument, " must be in [", low, ", ", high, "], got ",
                  value);
  return int(value);
}

inline void check_last_contiguous(const char* op, const char* argument, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.stride(last) == 1 || t.size(last) <= 1, op, ": ", argument,
                  " must be contiguous in its last dimension, got stride ", t.stride(last));
}

// A side array: same device as `x` (which the operator may call otherwise), exact dtype and shape, contiguous. Null
// where absent.
template <class T>
const T* side_array(const char* op, const char* argument, const std::optional<Tensor>& t, const Tensor& x,
                    ScalarType dtype, std::initializer_list<int64_t> shape, const char* x_name = "x") {
  if (!t) return nullptr;
  STD_TORCH_CHECK(same_device(*t, x), op, ": ", argument, " must be on the device of ", x_name, ", got another device");
  STD_TORCH_CHECK(t->scalar_type() == dtype, op, ": ", argument, " must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(t->scalar_type()));
  STD_TORCH_CHECK(has_shape(*t, shape), op, ": ", argument, " must have shape ", listed(shape), ", got ", shape_of(*t));
  STD_TORCH_CHECK(t->is_contiguous(), op, ": ", argument, " must be contiguous, got strides that are not");
  return static_cast<const T*>(t->const_data_ptr());
}

// An uninitialized contiguous tensor on the device of `like`. Not new_empty, which finds its operator by name and boxes
// its arguments every time: 1 us in the caches and 10 us out of them, a third of a small call.
inline Tensor new_output(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t strides[8], dense = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = dense;
    const int64_t extent = shape.begin()[i];
    dense *= extent > 1 ? extent : 1;
  }
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &out));
  return Tensor(out);
}

// One of a list of names; the position in the list is the value of the enum.
template <class E>
E choice(const char* op, const char* argument, const std::string& got, std::initializer_list<const char*> names) {
  int i = 0;
  std::string list;
  for (const char* name : names) {
    if (got == name) return E(i);
    list += (i++ ? ", '" : "'") + std::string(name) + "'";
  }
  STD_TORCH_CHECK(false, op, ": ", argument, " must be one of ", list, ", got '", got, "'");
}

}  // namespace tokencomp
