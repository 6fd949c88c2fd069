// The emulator's side of namespace gpu: every wrapper of cuda/arch under the same name and signature, plus the source
// location of the caller. What each one means is written beside its PTX twin; what it checks, beside its body in emu/.
#pragma once
#include <array>
#include <bit>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "core/dtype.h"
#include "emu/cuda_names.h"
#include "emu/emu.h"

namespace gpu {

// ---- launch
using Stream = void*;

struct LaunchConfig {
  dim3 grid, block;
  size_t smem = 0;
  unsigned cluster = 1;
  bool cooperative = false;
  Stream stream = nullptr;
};

namespace detail {
template <class... P>
struct Call {
  void (*kernel)(P...);
  std::tuple<P...> arguments;
  static void run(void* self) {
    const auto* call = static_cast<const Call*>(self);
    std::apply(call->kernel, call->arguments);
  }
};
}  // namespace detail

template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchConfig& c, A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each kernel parameter");
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernel parameters travel as bytes");
  detail::Call<P...> call{kernel, {static_cast<P>(arguments)...}};
  emu::run({c.grid, c.block, c.smem, c.cluster, c.cooperative}, reinterpret_cast<const void*>(kernel),
           &detail::Call<P...>::run, &call);
}

inline int sm_count() { return emu::device().sms; }
inline int compute_capability_major() { return emu::device().major; }
inline unsigned max_cluster_size() { return unsigned(emu::device().max_cluster); }
inline size_t max_shared_memory_per_block() { return emu::device().max_smem; }
inline void memset_async(void* p, int byte, size_t bytes, Stream) {
  std::memset(p, byte, bytes);
  emu::host_wrote(p, bytes);
}
// Tells the race build of a tensor: accesses outside it are found, and reads before writes unless it was `written`.
inline void watch(const void* p, size_t bytes, const char* name, bool written) { emu::watch(p, bytes, name, written); }
// Forgets what was watched when it goes out of scope; an operator that calls watch() holds one.
struct WatchScope {
  WatchScope() = default;
  WatchScope(const WatchScope&) = delete;
  ~WatchScope() { emu::unwatch(); }
};

// ---- shared memory
template <class T>
inline T& dynamic_smem(EMU_LOC) {
  size_t bytes = 0;
  if constexpr (!std::is_unbounded_array_v<T>) bytes = sizeof(T);
  return *static_cast<T*>(emu::shared_memory(bytes, alignof(T), loc));
}
inline uint32_t smem_address(const void* p, EMU_LOC) { return emu::shared_address(p, loc); }

// ---- mathematics: exact here, so tolerances must leave room for the GPU's approximation
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline int opaque(int x) { return x; }
inline uint32_t pack_f16x2(float low, float high) {
  const tokencomp::f16 pair[2] = {tokencomp::from_float<tokencomp::f16>(low),
                                  tokencomp::from_float<tokencomp::f16>(high)};
  return std::bit_cast<uint32_t>(pair);
}
// Products are exact in fp32, sums in double; a sum of more than 24 bits is rounded twice here.
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  using Pair = std::array<tokencomp::f16, 2>;
  const Pair x = std::bit_cast<Pair>(a), y = std::bit_cast<Pair>(b), z = std::bit_cast<Pair>(c);
  float sum[2];
  for (int i = 0; i < 2; i++) sum[i] = float(double(to_float(x[i])) * to_float(y[i]) + to_float(z[i]));
  return pack_f16x2(sum[0], sum[1]);
}
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) { return fma_f16x2(a, b, 0x80008000u); }

// ---- asynchronous copies
inline void cp_async16(void* dst, const void* src, bool valid = true, EMU_LOC) {
  emu::cp_async16(dst, src, valid, loc);
}
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
inline void cp_async_wait(EMU_LOC) {
  emu::cp_async_wait(N, loc);
}

// ---- mbarriers and bulk copies
using Mbarrier = uint64_t;
inline void mbar_init(Mbarrier* b, unsigned count, EMU_LOC) { emu::mbar_init(b, count, loc); }
inline void mbar_arrive(Mbarrier* b, EMU_LOC) { emu::mbar_arrive(b, 0, loc); }
inline void mbar_arrive_expect_tx(Mbarrier* b, unsigned bytes, EMU_LOC) { emu::mbar_arrive(b, bytes, loc); }
inline void mbar_wait(Mbarrier* b, unsigned parity, EMU_LOC) { emu::mbar_wait(b, parity, loc); }
inline void fence_mbarrier_init() {}
inline void fence_proxy_async(EMU_LOC) { emu::fence_proxy_async(loc); }
inline void bulk_load(void* dst, const void* src, unsigned bytes, Mbarrier* b, EMU_LOC) {
  emu::bulk_load(dst, src, bytes, b, loc);
}

// ---- matrix instructions
namespace detail {
template <class T>
constexpr emu::Half half_type() {
  static_assert(std::is_same_v<T, tokencomp::bf16> || std::is_same_v<T, tokencomp::f16>);
  return std::is_same_v<T, tokencomp::bf16> ? emu::Half::bf16 : emu::Half::f16;
}
}  // namespace detail

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMU_LOC) { emu::ldmatrix_x4(r, row, false, loc); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMU_LOC) { emu::ldmatrix_x4(r, row, true, loc); }
inline void stmatrix_x4(void* row, const uint32_t (&r)[4], EMU_LOC) { emu::stmatrix_x4(row, r, false, loc); }
inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], EMU_LOC) { emu::stmatrix_x4(row, r, true, loc); }
inline uint32_t movmatrix_trans(uint32_t a, EMU_LOC) { return emu::movmatrix_trans(a, loc); }
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_LOC) {
  emu::mma_m16n8k16(detail::half_type<T>(), d, a, b, loc);
}
inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_LOC) {
  emu::mma_m16n8k32_s8(d, a, b, loc);
}
template <class T>
inline uint32_t pack_halves(float low, float high) {
  uint16_t bits[2];
  const T pair[2] = {tokencomp::from_float<T>(low), tokencomp::from_float<T>(high)};
  std::memcpy(bits, pair, sizeof bits);
  return uint32_t(bits[1]) << 16 | bits[0];
}
inline uint64_t wgmma_descriptor_128b(const void* tile, EMU_LOC) {
  const uint32_t address = emu::shared_address(tile, loc);
  if (address % 1024) emu::fail("wgmma_descriptor_128b: misaligned: the tile must start at a multiple of 1024", loc);
  return uint64_t(address >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
inline uint64_t wgmma_descriptor_columns(const void* tile, unsigned panel_bytes, EMU_LOC) {
  if (panel_bytes % 1024 || panel_bytes >> 4 > 0x3fff) {
    emu::fail("wgmma_descriptor_columns: panels must be a multiple of 1024 bytes apart, and less than 256 KiB", loc);
  }
  return (wgmma_descriptor_128b(tile, loc) & ~(uint64_t(0x3fff) << 16)) | uint64_t(panel_bytes >> 4) << 16;
}
template <int N>
inline void warpgroup_give_registers(EMU_LOC) {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  emu::require_warpgroup("warpgroup_give_registers", loc);
}
template <int N>
inline void warpgroup_take_registers(EMU_LOC) {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  emu::require_warpgroup("warpgroup_take_registers", loc);
}
inline void wgmma_fence(EMU_LOC) { emu::wgmma_fence(loc); }
template <int N>
inline void wgmma_hold(float (&)[N]) {}
inline void wgmma_commit(EMU_LOC) { emu::wgmma_commit(loc); }
template <int N>
inline void wgmma_wait(EMU_LOC) {
  emu::wgmma_wait(N, loc);
}
template <class T>
inline void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate, EMU_LOC) {
  emu::wgmma(detail::half_type<T>(), 64, d, a, b, accumulate, loc);
}
template <class T>
inline void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate, EMU_LOC) {
  emu::wgmma(detail::half_type<T>(), 128, d, a, b, accumulate, loc);
}

template <class T>
inline void wgmma_m64n64k16_fragment(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate, EMU_LOC) {
  emu::wgmma_fragment(detail::half_type<T>(), 64, d, a, b, accumulate, loc);
}
template <class T>
inline void wgmma_m64n128k16_fragment(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate, EMU_LOC) {
  emu::wgmma_fragment(detail::half_type<T>(), 128, d, a, b, accumulate, loc);
}

// ---- clusters, named barriers, grid barrier
inline unsigned cluster_rank() { return emu::cluster_rank(); }
inline unsigned cluster_size() { return emu::cluster_size(); }
inline void cluster_arrive(EMU_LOC) { emu::cluster_arrive(loc); }
inline void cluster_wait(EMU_LOC) { emu::cluster_wait(loc); }
inline void cluster_sync(EMU_LOC) {
  emu::cluster_arrive(loc);
  emu::cluster_wait(loc);
}
template <class T>
inline T* cluster_map(T* p, unsigned rank, EMU_LOC) {
  return static_cast<T*>(emu::cluster_map(const_cast<std::remove_const_t<T>*>(p), rank, loc));
}
inline void named_barrier_sync(int id, int threads, EMU_LOC) { emu::named_barrier(id, threads, true, loc); }
inline void named_barrier_arrive(int id, int threads, EMU_LOC) { emu::named_barrier(id, threads, false, loc); }
inline void grid_barrier(uint32_t* counter, unsigned blocks, EMU_LOC) { emu::grid_barrier(counter, blocks, loc); }
inline bool elect_one(unsigned mask = ~0u, EMU_LOC) {
  const uint32_t lanes = emu::ballot(mask, "elect_one", true, loc);
  return emu::lane() == unsigned(__ffs(int(lanes)) - 1);
}

// ---- memory. The accesses themselves are reported to the checker by the run time, hence not once more by the
// compiler.
#define EMU_UNCHECKED __attribute__((no_sanitize_thread))
EMU_UNCHECKED inline uint32_t ld_acquire(const uint32_t* p, EMU_LOC) {
  emu::before_read(p, sizeof *p, emu::Order::acquire, loc);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
EMU_UNCHECKED inline void st_release(uint32_t* p, uint32_t v, EMU_LOC) {
  emu::before_write(p, sizeof *p, emu::Order::release, loc);
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
// Inlined, because the compiler reports no store of a struct that a function returns: `tile[i] = ld_nc_16(p)`.
__forceinline__ uint4 ld_nc_16(const void* p, EMU_LOC) {
  emu::before_read(p, sizeof(uint4), emu::Order::plain, loc);
  return *static_cast<const uint4*>(p);
}
inline void prefetch_l2(const void*) {}
inline unsigned long long atomic_max(unsigned long long* p, unsigned long long v, EMU_LOC) {
  return atomicMax(p, v, loc);
}
template <class T>
EMU_UNCHECKED inline T atomic_load_relaxed(const T* p, EMU_LOC) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  emu::before_read(p, sizeof(T), emu::Order::relaxed, loc);
  T v;
  __atomic_load(p, &v, __ATOMIC_RELAXED);
  return v;
}

}  // namespace gpu
