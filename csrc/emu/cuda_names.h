// The CUDA built-in functions under their own names, for device code compiled by g++: barriers, warp operations,
// atomics, bit tricks and fast mathematics. Fast mathematics is exact here: tolerances must leave room for the GPU's
// approximations.
#pragma once
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "emu/emu.h"

// ---- barriers
inline void __syncthreads(EMU_LOC) { emu::block_barrier("__syncthreads", emu::Vote::none, false, loc); }
inline int __syncthreads_or(int p, EMU_LOC) {
  return emu::block_barrier("__syncthreads_or", emu::Vote::any, p != 0, loc);
}
inline int __syncthreads_and(int p, EMU_LOC) {
  return emu::block_barrier("__syncthreads_and", emu::Vote::all, p != 0, loc);
}
inline int __syncthreads_count(int p, EMU_LOC) {
  return emu::block_barrier("__syncthreads_count", emu::Vote::count, p != 0, loc);
}
inline void __syncwarp(unsigned mask = ~0u, EMU_LOC) { emu::warp_barrier(mask, loc); }

// ---- shuffles: a lane whose source lies outside its segment of `width` lanes keeps its own value
template <class T>
inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMU_LOC) {
  const int segment = int(emu::lane()) & ~(width - 1);
  emu::shuffle(mask, "__shfl_sync", &v, sizeof(T), segment + (source & (width - 1)), loc);
  return v;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, EMU_LOC) {
  const int lane = int(emu::lane()), source = lane ^ lanes;
  const bool later_segment = (source & ~(width - 1)) > (lane & ~(width - 1));
  emu::shuffle(mask, "__shfl_xor_sync", &v, sizeof(T), later_segment ? lane : source, loc);
  return v;
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, EMU_LOC) {
  const int lane = int(emu::lane());
  const bool outside = (lane & (width - 1)) + int(delta) >= width;
  emu::shuffle(mask, "__shfl_down_sync", &v, sizeof(T), outside ? lane : lane + int(delta), loc);
  return v;
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, EMU_LOC) {
  const int lane = int(emu::lane());
  const bool outside = (lane & (width - 1)) < int(delta);
  emu::shuffle(mask, "__shfl_up_sync", &v, sizeof(T), outside ? lane : lane - int(delta), loc);
  return v;
}

// ---- votes, reductions, matches
inline unsigned __ballot_sync(unsigned mask, int p, EMU_LOC) { return emu::ballot(mask, "__ballot_sync", p != 0, loc); }
inline int __any_sync(unsigned mask, int p, EMU_LOC) { return emu::ballot(mask, "__any_sync", p != 0, loc) != 0; }
inline int __all_sync(unsigned mask, int p, EMU_LOC) { return emu::ballot(mask, "__all_sync", p == 0, loc) == 0; }
template <class T>
inline T __reduce_add_sync(unsigned mask, T v, EMU_LOC) {
  return emu::reduce(mask, emu::Reduce::add, v, loc);
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T v, EMU_LOC) {
  return emu::reduce(mask, emu::Reduce::min, v, loc);
}
template <class T>
inline T __reduce_max_sync(unsigned mask, T v, EMU_LOC) {
  return emu::reduce(mask, emu::Reduce::max, v, loc);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned v, EMU_LOC) {
  return emu::reduce(mask, emu::Reduce::bit_and, v, loc);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v, EMU_LOC) {
  return emu::reduce(mask, emu::Reduce::bit_or, v, loc);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v, EMU_LOC) {
  return emu::reduce(mask, emu::Reduce::bit_xor, v, loc);
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T v, EMU_LOC) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  return emu::match_any(mask, bits, loc);
}

// ---- atomics: real ones, since independent blocks may run on several OS threads
namespace emu {
template <class T, class F>
__attribute__((no_sanitize_thread)) inline T read_modify_write(T* p, F f, Loc loc) {
  before_atomic(p, sizeof(T), loc);
  T old, desired;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    desired = f(old);
  } while (!__atomic_compare_exchange(p, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
// Integer sums wrap on a GPU; in C++ only unsigned ones do.
template <class T>
constexpr T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b));
  else
    return a + b;
}
}  // namespace emu

template <class T>
inline T atomicAdd(T* p, std::type_identity_t<T> v, EMU_LOC) {
  return emu::read_modify_write(p, [v](T old) { return emu::wrapping_add(old, v); }, loc);
}
template <class T>
inline T atomicSub(T* p, std::type_identity_t<T> v, EMU_LOC) {
  return emu::read_modify_write(p, [v](T old) { return emu::wrapping_add(old, T(0u - v)); }, loc);
}
template <class T>
inline T atomicMax(T* p, std::type_identity_t<T> v, EMU_LOC) {
  return emu::read_modify_write(p, [v](T old) { return old > v ? old : v; }, loc);
}
template <class T>
inline T atomicMin(T* p, std::type_identity_t<T> v, EMU_LOC) {
  return emu::read_modify_write(p, [v](T old) { return old < v ? old : v; }, loc);
}
template <class T>
inline T atomicAnd(T* p, std::type_identity_t<T> v, EMU_LOC) {
  return emu::read_modify_write(p, [v](T old) { return T(old & v); }, loc);
}
template <class T>
inline T atomicOr(T* p, std::type_identity_t<T> v, EMU_LOC) {
  return emu::read_modify_write(p, [v](T old) { return T(old | v); }, loc);
}
template <class T>
inline T atomicXor(T* p, std::type_identity_t<T> v, EMU_LOC) {
  return emu::read_modify_write(p, [v](T old) { return T(old ^ v); }, loc);
}
template <class T>
inline T atomicExch(T* p, std::type_identity_t<T> v, EMU_LOC) {
  return emu::read_modify_write(p, [v](T) { return v; }, loc);
}
template <class T>
inline T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v, EMU_LOC) {
  return emu::read_modify_write(p, [=](T old) { return old == expected ? v : old; }, loc);
}
inline unsigned atomicInc(unsigned* p, unsigned limit, EMU_LOC) {
  return emu::read_modify_write(p, [limit](unsigned old) { return old >= limit ? 0u : old + 1; }, loc);
}
inline void __threadfence() { emu::thread_fence(); }
inline void __threadfence_block() {}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, std::type_identity_t<T> v) {
  *p = v;
}
[[noreturn]] inline void __trap(EMU_LOC) { emu::fail("__trap", loc); }
inline void __nanosleep(unsigned) {}

// ---- bits
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline int __ffsll(long long x) { return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned lo, unsigned hi, unsigned selector) {
  const uint64_t bytes = uint64_t(hi) << 32 | lo;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned s = selector >> (4 * i) & 15u, byte = unsigned(bytes >> (8 * (s & 7u))) & 255u;
    r |= (s & 8u ? (byte & 128u ? 255u : 0u) : byte) << (8 * i);
  }
  return r;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((uint64_t(hi) << 32 | lo) >> (32 - (shift & 31u)));
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((uint64_t(hi) << 32 | lo) >> (shift & 31u));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __dp4a(int a, int b, int c) {
  unsigned sum = unsigned(c);
  for (int i = 0; i < 4; i++) {
    sum += unsigned(int(int8_t(unsigned(a) >> (8 * i))) * int(int8_t(unsigned(b) >> (8 * i))));
  }
  return int(sum);
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// ---- mathematics
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) {
  return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;  // a NaN becomes 0, as on the GPU
}
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return float(x); }

// As in CUDA: mixed operands meet in their common type, and of a number and a NaN the number wins.
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(T(a), T(b));
  else
    return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(T(a), T(b));
  else
    return T(a) > T(b) ? T(a) : T(b);
}
