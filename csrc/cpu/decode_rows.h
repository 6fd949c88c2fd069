// Rows of quantized pages for the decode kernels: the numbers of their codes, and the elements they stand for. Included
// by decode_kernels.cpp only.
#pragma once

#include "cpu/decode_kernels.h"
#include "cpu/simd_codes.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace decode;

// Not inlined: a call a row costs nothing. Internal to the file, so of this level alone.
#define TC_ONCE static __attribute__((noinline))

// Per channel of a head: x = y / scale + bias; null: 1 and 0.
struct ChannelMaps {
  const float *scale, *bias;
};

TC_INLINE const f16* params_of(const PageHalf& half, const uint8_t* page) {
  return reinterpret_cast<const f16*>(page + half.params);
}

// The numbers of `count` tokens from t on, in rows `stride` elements apart.
template <class T>
TC_ONCE void unpack_tokens(const PageHalf& half, int D, const uint8_t* page, int t, int count, int stride, T* out) {
  const int bytes = D * half.format.bits / 8;
  const uint8_t* row = page + half.codes + t * bytes;
  const auto each = [&](auto&& unpack) __attribute__((always_inline)) {
    for (int i = 0; i < count; ++i) unpack(row + i * bytes, out + int64_t(i) * stride);
  };
  if (half.format.kind == kvquant::Kind::fp8) {
    each([&](const uint8_t* in, T* to) __attribute__((always_inline)) { unpack_fp8(in, D, to); });
  } else if (half.format.bits == 8) {
    each([&](const uint8_t* in, T* to) __attribute__((always_inline)) { unpack_fields<8>(in, D, to); });
  } else if (half.format.bits == 4) {
    each([&](const uint8_t* in, T* to) __attribute__((always_inline)) { unpack_fields<4>(in, D, to); });
  } else if (half.format.bits == 2) {
    each([&](const uint8_t* in, T* to) __attribute__((always_inline)) { unpack_fields<2>(in, D, to); });
  } else {
    each([&](const uint8_t* in, T* to) __attribute__((always_inline)) { unpack_planes(in, D, to); });
  }
}

// n grids from p on; of numbers around the middle of the codes.
TC_INLINE void load_grid(const PageHalf& half, const f16* p, int n, Vec& step, Vec& low) {
  load_params(p, n, step, low);
  if (half.format.kind == kvquant::Kind::integer) low = fma(step, broadcast(middle_code(half.format.bits)), low);
}

// Token t as it was before it was quantized.
template <class T>
TC_ONCE void dequantize_token(const PageHalf& half, int D, const uint8_t* page, int t, ChannelMaps maps, T* out) {
  alignas(64) float x[kMaxHeadDim + kWidth];
  unpack_tokens(half, D, page, t, 1, 0, x);
  const bool by_token = half.format.axis == page_blob::Axis::token;
  const int group = half.format.group;
  const f16* params = params_of(half, page);
  for (int d = 0; by_token && d < D; d += group) {
    Vec step, low;
    load_grid(half, params + 2 * ((t * D + d) / group), 1, step, low);
    float one[2][kWidth];
    store(one[0], step), store(one[1], low);
    for (int c = 0; c < group; c += kWidth) {
      const int n = group - c;
      store_up_to(x + d + c, fma(load_up_to(x + d + c, n), broadcast(one[0][0]), broadcast(one[1][0])), n);
    }
  }
  for (int d = 0; d < D; d += kWidth) {
    const int n = D - d;
    Vec v = load(x + d), step, low;
    if (!by_token) {
      load_grid(half, params + 2 * (t / group * D + d), n, step, low);
      v = fma(v, step, low);
    }
    if (maps.scale) v = div(v, load_up_to(maps.scale + d, n));
    if (maps.bias) v = add(v, load_up_to(maps.bias + d, n));
    store_up_to(out + d, v, n);
  }
}

enum class Reading { rows, token, channel };

// Codes of the half may stay codes where a grid is that of whole product steps, or of whole blocks of keys.
TC_INLINE Reading reading_of(const kvquant::Format& f, int D) {
  if (f.axis == page_blob::Axis::channel) return f.group % kBlockKeys ? Reading::rows : Reading::channel;
  return f.group == D || f.group % kKeyPadding == 0 ? Reading::token : Reading::rows;
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
