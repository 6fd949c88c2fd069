// What device code compiled by g++ calls: the interface of the emulator's run time. Each CUDA thread is a fiber; a warp
// or block operation parks the fiber until its partners arrive, and the last one to arrive computes for all. The bodies
// live in the .cpp files beside this one, compiled without sanitizers, so that a race-checking build instruments
// kernels and nothing else. Every call carries the source location of the device code, for messages and for the check
// that the threads of a barrier meet at one place.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "emu/types.h"

#pragma GCC visibility push(hidden)

namespace emu {

using Loc = std::source_location;
#define EMU_LOC emu::Loc loc = emu::Loc::current()

// ---- launching and the device that is pretended to be there
struct LaunchShape {
  dim3 grid, block;
  size_t smem;
  unsigned cluster;
  bool cooperative;
};
void run(const LaunchShape& shape, const void* kernel, void (*body)(void*), void* context);

struct Device {
  int major, sms, max_cluster;
  size_t max_smem;
};
Device device();  // named by TOKENCOMP_EMU_DEVICE: sm_90 (default) or sm_80

[[noreturn]] void fail(const std::string& message, Loc loc);
unsigned lane();

// ---- shared memory and clusters
void* shared_memory(size_t bytes, size_t alignment, Loc loc);
uint32_t shared_address(const void* p, Loc loc);
unsigned cluster_rank();
unsigned cluster_size();
void* cluster_map(void* p, unsigned rank, Loc loc);

// ---- barriers
enum class Vote : uint8_t { none, any, all, count };
int block_barrier(const char* op, Vote vote, bool predicate, Loc loc);
void named_barrier(int id, int threads, bool wait, Loc loc);
void cluster_arrive(Loc loc);
void cluster_wait(Loc loc);
void grid_barrier(uint32_t* counter, unsigned blocks, Loc loc);

// ---- warp operations
void warp_barrier(uint32_t mask, Loc loc);
void shuffle(uint32_t mask, const char* op, void* value, size_t bytes, int source, Loc loc);
uint32_t ballot(uint32_t mask, const char* op, bool predicate, Loc loc);
enum class Reduce : uint8_t { add, min, max, bit_and, bit_or, bit_xor };
int32_t reduce(uint32_t mask, Reduce kind, int32_t value, Loc loc);
uint32_t reduce(uint32_t mask, Reduce kind, uint32_t value, Loc loc);
uint32_t match_any(uint32_t mask, uint64_t value, Loc loc);

// ---- asynchronous copies
void cp_async16(void* dst, const void* src, bool valid, Loc loc);
void cp_async_commit();
void cp_async_wait(int pending, Loc loc);
void mbar_init(uint64_t* barrier, unsigned count, Loc loc);
void mbar_arrive(uint64_t* barrier, unsigned expect_bytes, Loc loc);
void mbar_wait(uint64_t* barrier, unsigned parity, Loc loc);
void bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* barrier, Loc loc);

// ---- matrix instructions
enum class Half : uint8_t { f16, bf16 };
void ldmatrix_x4(uint32_t* r, const void* row, bool transpose, Loc loc);
void stmatrix_x4(void* row, const uint32_t* r, bool transpose, Loc loc);
uint32_t movmatrix_trans(uint32_t a, Loc loc);
void mma_m16n8k16(Half type, float* d, const uint32_t* a, const uint32_t* b, Loc loc);
void mma_m16n8k32_s8(int32_t* d, const uint32_t* a, const uint32_t* b, Loc loc);
void wgmma(Half type, int columns, float* d, uint64_t a, uint64_t b, bool accumulate, Loc loc);
void wgmma_fragment(Half type, int columns, float* d, const uint32_t* a, uint64_t b, bool accumulate, Loc loc);
void require_warpgroup(const char* op, Loc loc);
void wgmma_fence(Loc loc);
void wgmma_commit(Loc loc);
void wgmma_wait(int pending, Loc loc);
void fence_proxy_async(Loc loc);

// ---- memory operations that the race checker must hear of (no-ops elsewhere, except for the alignment check)
enum class Order : uint8_t { plain, relaxed, acquire, release };
void before_read(const void* p, size_t bytes, Order order, Loc loc);
void before_write(const void* p, size_t bytes, Order order, Loc loc);
void before_atomic(const void* p, size_t bytes, Loc loc);
void thread_fence();
void host_wrote(const void* p, size_t bytes);
void watch(const void* p, size_t bytes, const char* name, bool written);
void unwatch();

}  // namespace emu

// The built-in variables; rewritten each time a fiber is resumed.
extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#pragma GCC visibility pop
