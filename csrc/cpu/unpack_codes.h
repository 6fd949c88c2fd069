// Linear rows of codes to one byte each, for every family that reads quantized pages.
#pragma once

#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

template <int kBits>
TC_INLINE void unpack_plane(const uint8_t* in, int D, uint8_t* codes) {
  constexpr int kFields = 8 / kBits, kMask = (1 << kBits) - 1;
  const int bytes = D / kFields;
  for (int f = 0; f < kFields; ++f) {
    for (int k = 0; k < bytes; ++k) codes[f * bytes + k] = uint8_t(in[k] >> f * kBits & kMask);
  }
}

TC_INLINE void unpack_row(const uint8_t* in, int bits, int D, uint8_t* codes) {
  switch (bits) {
    case 8:
      return unpack_plane<8>(in, D, codes);
    case 4:
      return unpack_plane<4>(in, D, codes);
    case 2:
      return unpack_plane<2>(in, D, codes);
    default: {
      uint8_t high[256];
      unpack_plane<2>(in, D, codes);
      unpack_plane<1>(in + D / 4, D, high);
      for (int d = 0; d < D; ++d) codes[d] = uint8_t(codes[d] | high[d] << 2);
    }
  }
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
