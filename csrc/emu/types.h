// The CUDA types and qualifiers that device code spells out, for compilers that know nothing of CUDA. These are our own
// definitions, so the emulator builds where no CUDA toolkit is installed. `__shared__` is deliberately left undefined:
// shared memory is reached through gpu::dynamic_smem<T>() alone, which the emulator can poison, guard and check.
#pragma once
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Vectors of two and four carry the alignment of one load instruction, as in CUDA.
#define EMU_VECTOR2(name, T)           \
  struct alignas(2 * sizeof(T)) name { \
    T x, y;                            \
  };                                   \
  constexpr name make_##name(T x, T y) { return {x, y}; }
#define EMU_VECTOR4(name, T)                                \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name { \
    T x, y, z, w;                                           \
  };                                                        \
  constexpr name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

EMU_VECTOR2(char2, signed char)
EMU_VECTOR2(uchar2, unsigned char)
EMU_VECTOR2(short2, short)
EMU_VECTOR2(ushort2, unsigned short)
EMU_VECTOR2(int2, int)
EMU_VECTOR2(uint2, unsigned)
EMU_VECTOR2(float2, float)
EMU_VECTOR2(double2, double)
EMU_VECTOR2(longlong2, long long)
EMU_VECTOR2(ulonglong2, unsigned long long)
EMU_VECTOR4(char4, signed char)
EMU_VECTOR4(uchar4, unsigned char)
EMU_VECTOR4(short4, short)
EMU_VECTOR4(ushort4, unsigned short)
EMU_VECTOR4(int4, int)
EMU_VECTOR4(uint4, unsigned)
EMU_VECTOR4(float4, float)

#undef EMU_VECTOR2
#undef EMU_VECTOR4

constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
