// Kernels with a mistake that can be switched on: synchronisation, bounds, initialisation, alignment, arithmetic. With
// `inject` false a kernel is right and must pass every check; with `inject` true tests/emu/test_detectors.py demands
// that the detector named there finds it. Emulator only: on a GPU these mistakes are undefined behaviour.
#include <map>
#include <string>

#include "call.h"

namespace test {
namespace {

using Bug = Tensor (*)(const Tensor& x, bool inject);

// Most kernels here take one block of `kThreads` threads and one element a thread.
constexpr int kThreads = 128;
struct Smem {
  float value[kThreads];
};
using Kernel = void (*)(const float* x, float* out, bool inject);

template <Kernel kernel, unsigned blocks = 1, size_t smem = sizeof(Smem)>
Tensor run(const Tensor& x, bool inject) {
  Call call(x);
  STD_TORCH_CHECK(x.numel() == kThreads, "bug: x must have ", kThreads, " elements");
  Tensor out = call.make<float>({kThreads});
  gpu::launch(kernel, call.config(blocks, kThreads, smem), call.in<float>(x, "x"), call.out<float>(out), inject);
  return out;
}

// ---- synchronisation
__global__ void missing_barrier(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<Smem>();
  const int t = threadIdx.x;
  s.value[t] = x[t];
  if (!inject) __syncthreads();
  out[t] = s.value[kThreads - 1 - t];
}

__global__ void missing_second_barrier(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<Smem>();
  const int t = threadIdx.x;
  s.value[t] = x[t];
  __syncthreads();
  const float mirrored = s.value[kThreads - 1 - t];
  if (!inject) __syncthreads();  // all have read before anybody overwrites
  s.value[t] = mirrored;
  __syncthreads();
  out[t] = s.value[kThreads - 1 - t] * 2;
}

__global__ void missing_syncwarp(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<Smem>();
  const int t = threadIdx.x;
  s.value[t] = x[t];
  if (!inject) __syncwarp();
  out[t] = s.value[t ^ 1];
}

__global__ void shuffle_is_no_barrier(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<Smem>();
  const int t = threadIdx.x;
  s.value[t] = x[t];
  __shfl_sync(~0u, t, 0);
  if (!inject) __syncwarp();
  out[t] = s.value[t ^ 1];
}

__global__ void divergent_barrier(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<Smem>();
  const int t = threadIdx.x;
  s.value[t] = x[t];
  if (inject && t >= 64)
    __syncthreads();
  else
    __syncthreads();
  out[t] = s.value[kThreads - 1 - t];
}

__global__ void missing_lane(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  out[t] = x[t];
  if (inject && t % 32 >= 16) return;
  const float neighbour = __shfl_xor_sync(~0u, x[t], 1);
  if (t % 32 < 16) out[t] = neighbour;
}

__global__ void different_collectives(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  if (inject && t % 2) {
    out[t] = float(__popc(__ballot_sync(~0u, 1)));
  } else {
    out[t] = __shfl_xor_sync(~0u, x[t], 1);
  }
}

__global__ void lane_not_in_mask(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  out[t] = __shfl_xor_sync(inject ? 0xffffu : ~0u, x[t], 1);
}

__global__ void deadlock(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  if (t < 64) gpu::named_barrier_sync(1, inject ? 96 : 64);
  out[t] = x[t];
}

__global__ void half_warp_barrier(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  if (inject ? t % 2 == 0 : t < 64) gpu::named_barrier_sync(1, 64);
  __syncwarp();
  out[t] = x[t];
}

__global__ void named_barrier_left_open(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  gpu::named_barrier_arrive(3, 128);
  if (inject && t < 32) gpu::named_barrier_arrive(3, 128);
  out[t] = x[t];
}

// A thread may leave before a barrier of the others, but not before a warp operation that names it.
__global__ void collective_after_return(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<Smem>();
  const int t = threadIdx.x;
  out[t] = x[t];
  if (t % 2) return;
  s.value[t] = x[t];
  __syncthreads();
  if (inject) __shfl_sync(~0u, t, 0);
  out[t] = s.value[126 - t];
}

// ---- who writes what
__global__ void two_threads_one_element(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  out[t] = x[t];
  __syncthreads();
  if (t >= 64) out[inject ? 0 : t] = 1;
}

__global__ void two_blocks_one_element(const float* x, float* out, bool inject) {
  const int t = threadIdx.x, b = blockIdx.x;
  if (inject ? t < 64 + b : t / 64 == b) out[t] = x[t];
}

__global__ void missing_atomic(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  if (t == 0)
    out[0] = 0;
  else
    out[t] = x[t];
  __syncthreads();
  if (inject)
    out[0] += 1;
  else
    atomicAdd(&out[0], 1.0f);
}

// ---- bounds and initialisation
__global__ void shared_read_past(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<Smem>();
  const int t = threadIdx.x;
  s.value[t] = x[t];
  __syncthreads();
  const int next = inject ? t + 1 : (t + 1) % kThreads;
  out[t] = (&s.value[0])[next];
}

__global__ void shared_write_past(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<Smem>();
  const int t = threadIdx.x;
  (&s.value[0])[inject ? t + 1 : t] = x[t];
  __syncthreads();
  out[t] = inject ? 0 : s.value[t];
}

__global__ void tensor_read_past(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  out[t] = x[inject ? t + 1 : t];
}

__global__ void tensor_write_past(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  out[inject ? t - 1 : t] = x[t];
}

__global__ void uninitialised_shared(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<Smem>();
  const int t = threadIdx.x;
  if (!inject || t != 5) s.value[t] = x[t];
  __syncthreads();
  const float v = s.value[kThreads - 1 - t];
  out[t] = v == v ? v : 0;  // the poison does not reach the result
}

__global__ void uninitialised_tensor(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  if (!inject) out[t] = 0;
  const float before = out[t];
  out[t] = (before == before ? before : 0) + x[t];
}

__global__ void smem_too_small(const float* x, float* out, bool inject) {
  struct Large {
    float value[2 * kThreads];
  };
  const int t = threadIdx.x;
  float* s = inject ? gpu::dynamic_smem<Large>().value : gpu::dynamic_smem<Smem>().value;
  s[t] = x[t];
  out[t] = s[t];
}

// ---- what the compiler's own checks find
__global__ void misaligned_load(const float* x, float* out, bool inject) {
  const int t = threadIdx.x, i = t / 4 * 4;
  const uint4 v = *reinterpret_cast<const uint4*>(x + (inject && t == 7 ? i + 1 : i));
  out[t] = __uint_as_float(t % 4 == 0 ? v.x : t % 4 == 1 ? v.y : t % 4 == 2 ? v.z : v.w);
}

__global__ void integer_overflow(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  const int offset = (t + 1) * (inject ? 0x7fffffff : 1);
  out[t] = x[t] + (inject ? float(offset) : 0.0f);
}

__global__ void array_overrun(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  float local[4] = {x[t], 0, 0, 0};
  volatile int i = inject && t == 3 ? 4 : 0;
  out[t] = local[i];
}

__global__ void spins(const float* x, float* out, bool inject) {
  const int t = threadIdx.x;
  volatile float unused = 0;
  if (inject && t == 5) {
    for (long i = 0; i < 100'000'000; i++) unused = unused + 1;
  }
  out[t] = x[t];
}

// Rows 128 bytes apart: unless their chunks are swizzled, ldmatrix finds all eight of a matrix in one bank group.
struct RowsSmem {
  alignas(128) float rows[32][32];
};

__global__ void rows_in_one_bank(const float* x, float* out, bool inject) {
  auto& s = gpu::dynamic_smem<RowsSmem>();
  const int t = threadIdx.x, lane = t % 32;
  for (int i = t; i < 32 * 32; i += kThreads) s.rows[i / 32][i % 32] = x[i % kThreads];
  __syncthreads();
  uint32_t r[4];
  gpu::ldmatrix_x4(r, &s.rows[lane][inject ? 0 : (lane & 7) * 4]);
  out[t] = __uint_as_float(r[t / 32]);
}

const std::map<std::string, Bug>& bugs() {
  static const std::map<std::string, Bug> all = {
      {"missing_barrier", run<missing_barrier>},
      {"missing_second_barrier", run<missing_second_barrier>},
      {"missing_syncwarp", run<missing_syncwarp>},
      {"shuffle_is_no_barrier", run<shuffle_is_no_barrier>},
      {"divergent_barrier", run<divergent_barrier>},
      {"missing_lane", run<missing_lane>},
      {"different_collectives", run<different_collectives>},
      {"lane_not_in_mask", run<lane_not_in_mask>},
      {"deadlock", run<deadlock>},
      {"half_warp_barrier", run<half_warp_barrier>},
      {"named_barrier_left_open", run<named_barrier_left_open>},
      {"collective_after_return", run<collective_after_return>},
      {"two_threads_one_element", run<two_threads_one_element>},
      {"two_blocks_one_element", run<two_blocks_one_element, 2>},
      {"missing_atomic", run<missing_atomic>},
      {"shared_read_past", run<shared_read_past>},
      {"shared_write_past", run<shared_write_past>},
      {"tensor_read_past", run<tensor_read_past>},
      {"tensor_write_past", run<tensor_write_past>},
      {"uninitialised_shared", run<uninitialised_shared>},
      {"uninitialised_tensor", run<uninitialised_tensor>},
      {"smem_too_small", run<smem_too_small>},
      {"misaligned_load", run<misaligned_load>},
      {"integer_overflow", run<integer_overflow>},
      {"array_overrun", run<array_overrun>},
      {"spins", run<spins>},
      {"rows_in_one_bank", run<rows_in_one_bank, 1, sizeof(RowsSmem)>},
  };
  return all;
}

Tensor bug(std::string name, const Tensor& x, bool inject) {
  const auto found = bugs().find(name);
  STD_TORCH_CHECK(found != bugs().end(), "bug: no kernel named ", name);
  return found->second(x, inject);
}

}  // namespace
}  // namespace test

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_TEST_NAMESPACE, TOKENCOMP_KEY, m) { m.impl("bug", TORCH_BOX(&test::bug)); }
