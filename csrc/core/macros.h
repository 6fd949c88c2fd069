// Qualifiers for code that compiles on the host, under nvcc and in the emulator alike.
#pragma once

#ifdef __CUDACC__
#define TC_HD __host__ __device__ __forceinline__
#else
// Always inlined: an out-of-line copy compiled with AVX-512 flags could be the one the linker keeps for everybody.
#define TC_HD inline __attribute__((always_inline))
#endif
