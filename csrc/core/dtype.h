// The three element types of the package and their conversions, with the same names for host code, nvcc and the
// emulator. Under nvcc bf16/f16 are the toolkit's types, so that kernels get hardware conversions; everywhere else they
// are plain 16-bit structs, so that no toolkit header is needed.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace tokencomp {

enum class DType { f32, f16, bf16 };

#ifdef __CUDACC__

using bf16 = __nv_bfloat16;
using f16 = __half;

TC_HD float to_float(bf16 x) { return __bfloat162float(x); }
TC_HD float to_float(f16 x) { return __half2float(x); }

template <class T>
TC_HD T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (__is_same(T, bf16)) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

#else

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace detail {
TC_HD float as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
TC_HD uint32_t as_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
}  // namespace detail

TC_HD float to_float(bf16 x) { return detail::as_float(uint32_t(x.bits) << 16); }

TC_HD float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return detail::as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return detail::as_float(sign | ((magnitude << 13) + 0x38000000));
  const float subnormal = float(magnitude) * 0x1p-24f;  // exact: at most ten significant bits
  return sign ? -subnormal : subnormal;
}

template <class T>
TC_HD T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (__is_same(T, bf16)) {
    const uint32_t u = detail::as_bits(x);
    if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t(u >> 16 | 0x40)};  // keep NaN a NaN
    return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
  } else {
    const uint32_t u = detail::as_bits(x);
    const uint16_t sign = uint16_t(u >> 16 & 0x8000);
    const uint32_t magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {  // subnormal half: adding 0.5 lets the FPU round at the right bit
      return {uint16_t(sign | uint16_t(detail::as_bits(detail::as_float(magnitude) + 0.5f) - 0x3f000000))};
    }
    return {uint16_t(sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
  }
}

#endif

TC_HD float to_float(float x) { return x; }

}  // namespace tokencomp
