// Codes between whole numbers and bytes on the CPU. Included by kvquant*_kernels.cpp only.
#pragma once

#include "core/bitpack.h"
#include "cpu/simd_bytes.h"
#include "cpu/unpack_codes.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using bitpack::Layout;

// Not inlined: there are many callers and a call a row costs nothing. Internal to the file, so of this level alone.
#define TC_ONCE static __attribute__((noinline))

TC_INLINE int at_most(int n, int limit) { return n < limit ? n : limit; }

// Fields of `kBits` from whole numbers q[D] in floats, as the layout `linear` has them.
template <int kBits>
TC_INLINE void pack_plane(const float* q, int D, uint8_t* out) {
  constexpr int kFields = 8 / kBits;
  const int bytes = D / kFields;
  const Vec shift = broadcast(float(1 << kBits));
  for (int k = 0; k < bytes; k += kWidth) {
    const int n = at_most(bytes - k, kWidth);
    Vec packed = load_up_to(q + (kFields - 1) * bytes + k, n);
    for (int f = kFields - 2; f >= 0; --f) packed = fma(packed, shift, load_up_to(q + f * bytes + k, n));
    store_bytes_up_to(out + k, packed, n);
  }
}

// A linear row; three bits are split in place.
TC_ONCE void pack_row(float* q, int bits, int D, uint8_t* out) {
  switch (bits) {
    case 8:
      return pack_plane<8>(q, D, out);
    case 4:
      return pack_plane<4>(q, D, out);
    case 2:
      return pack_plane<2>(q, D, out);
    default: {
      alignas(64) float high[256];
      for (int d = 0; d < D; d += kWidth) {
        const Vec code = load(q + d), four = broadcast(4.0f), zero = broadcast(0.0f);
        store_up_to(q + d, sub(code, select_ge(code, four, four, zero)), D - d);  // behind it lies the next row
        store(high + d, select_ge(code, four, broadcast(1.0f), zero));
      }
      pack_plane<2>(q, D, out);
      pack_plane<1>(high, D, out + D / 4);
    }
  }
}

// Blocks of 16 tokens of the mma16 layouts, whose head dimensions are powers of two: codes are one byte each, [16, D].
template <int kD>
TC_INLINE void pack_block_of(Layout layout, int bits, const uint8_t* codes, uint8_t* out) {
  const int bytes = bitpack::unit_bytes(layout, bits, kD);
  for (int i = 0; i < bytes; ++i) out[i] = bitpack::pack_byte(layout, bits, kD, codes, i);
}
template <int kD>
TC_INLINE void unpack_block_of(Layout layout, int bits, const uint8_t* in, uint8_t* codes) {
  for (int t = 0; t < bitpack::kBlock; ++t) {
    for (int d = 0; d < kD; ++d) codes[t * kD + d] = uint8_t(bitpack::code_at(layout, bits, kD, in, t, d));
  }
}

TC_ONCE void pack_block(Layout layout, int bits, int D, const uint8_t* codes, uint8_t* out) {
  if (D == 64) return pack_block_of<64>(layout, bits, codes, out);
  if (D == 128) return pack_block_of<128>(layout, bits, codes, out);
  pack_block_of<256>(layout, bits, codes, out);
}
TC_ONCE void unpack_block(Layout layout, int bits, int D, const uint8_t* in, uint8_t* codes) {
  if (D == 64) return unpack_block_of<64>(layout, bits, in, codes);
  if (D == 128) return unpack_block_of<128>(layout, bits, in, codes);
  unpack_block_of<256>(layout, bits, in, codes);
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
