// 16-bit floats as the matrix instructions see them: bits in, fp32 out. Independent of core/dtype.h on purpose, so that
// a mistake there is not repeated here and the two check each other.
#pragma once
#include <bit>
#include <cstdint>

#include "emu/emu.h"

namespace emu {

template <Half type>
inline float widen(uint16_t bits) {
  if constexpr (type == Half::bf16) return std::bit_cast<float>(uint32_t(bits) << 16);
  // The f16 exponent and mantissa, read as fp32, are the value divided by 2^112; subnormals come out right as well.
  const float magnitude = std::bit_cast<float>(uint32_t(bits & 0x7fffu) << 13) * 0x1p112f;
  const bool special = (bits & 0x7c00u) == 0x7c00u;
  const uint32_t magnitude_bits =
      special ? 0x7f800000u | uint32_t(bits & 0x3ffu) << 13 : std::bit_cast<uint32_t>(magnitude);
  return std::bit_cast<float>(magnitude_bits | uint32_t(bits & 0x8000u) << 16);
}

}  // namespace emu
