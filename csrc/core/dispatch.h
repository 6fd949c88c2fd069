// Turn run-time values into template arguments. Written once, used by every family:
//   dispatch_dtype(args.dtype, [&]<class T> { ... });
#pragma once

#include "core/dtype.h"

namespace tokencomp {

template <class F>
decltype(auto) dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f16:
      return f.template operator()<f16>();
    case DType::bf16:
      break;
  }
  return f.template operator()<bf16>();
}

}  // namespace tokencomp
