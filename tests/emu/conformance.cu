// One tiny kernel for each wrapper of cuda/arch that works on a thread, a warp or a block, as torch operators. The same
// source is compiled by g++ (emulator) and by nvcc; tests/emu/test_conformance.py compares both with plain statements
// of what the PTX documentation says. Once a GPU agrees, the emulator's semantics may be trusted.
#include "call.h"
#include "core/dtype.h"

namespace test {
namespace {

using tokencomp::bf16;
using tokencomp::f16;

// ---- matrix fragments
struct MatrixSmem {
  alignas(128) uint16_t row[32][8];
};

// registers: ldmatrix_kernel <= 32
__global__ void __launch_bounds__(32) ldmatrix_kernel(const uint16_t* x, uint32_t* out, bool transpose) {
  auto& s = gpu::dynamic_smem<MatrixSmem>();
  const int lane = threadIdx.x;
  for (int j = 0; j < 8; j++) s.row[lane][j] = x[lane * 8 + j];
  __syncwarp();
  uint32_t r[4];
  if (transpose)
    gpu::ldmatrix_x4_trans(r, s.row[lane]);
  else
    gpu::ldmatrix_x4(r, s.row[lane]);
  for (int m = 0; m < 4; m++) out[lane * 4 + m] = r[m];
}

// registers: stmatrix_kernel <= 32
__global__ void __launch_bounds__(32) stmatrix_kernel(const uint32_t* x, uint16_t* out, bool transpose) {
  auto& s = gpu::dynamic_smem<MatrixSmem>();
  const int lane = threadIdx.x;
  const uint32_t r[4] = {x[lane * 4], x[lane * 4 + 1], x[lane * 4 + 2], x[lane * 4 + 3]};
  if (transpose)
    gpu::stmatrix_x4_trans(s.row[lane], r);
  else
    gpu::stmatrix_x4(s.row[lane], r);
  __syncwarp();
  for (int j = 0; j < 8; j++) out[lane * 8 + j] = s.row[lane][j];
}

// registers: mma_kernel <= 32
template <class T>
__global__ void __launch_bounds__(32) mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int lane = threadIdx.x;
  const uint32_t fa[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  const uint32_t fb[2] = {b[lane * 2], b[lane * 2 + 1]};
  float d[4] = {c[lane * 4], c[lane * 4 + 1], c[lane * 4 + 2], c[lane * 4 + 3]};
  gpu::mma_m16n8k16<T>(d, fa, fb);
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = d[i];
}

// registers: mma_s8_kernel <= 32
__global__ void __launch_bounds__(32) mma_s8_kernel(const uint32_t* a, const uint32_t* b, const int* c, int* out) {
  const int lane = threadIdx.x;
  const uint32_t fa[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  const uint32_t fb[2] = {b[lane * 2], b[lane * 2 + 1]};
  int32_t d[4] = {c[lane * 4], c[lane * 4 + 1], c[lane * 4 + 2], c[lane * 4 + 3]};
  gpu::mma_m16n8k32_s8(d, fa, fb);
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = d[i];
}

Tensor ldmatrix(const Tensor& x, bool transpose) {
  Call call(x);
  Tensor out = call.make<uint32_t>({32, 4});
  gpu::launch(ldmatrix_kernel, call.config(1, 32, sizeof(MatrixSmem)), call.in<uint16_t>(x, "x"),
              call.out<uint32_t>(out), transpose);
  return out;
}

Tensor stmatrix(const Tensor& x, bool transpose) {
  Call call(x);
  Tensor out = call.make<uint16_t>({32, 8});
  gpu::launch(stmatrix_kernel, call.config(1, 32, sizeof(MatrixSmem)), call.in<uint32_t>(x, "x"),
              call.out<uint16_t>(out), transpose);
  return out;
}

Tensor mma(const Tensor& a, const Tensor& b, const Tensor& c, bool is_bf16) {
  Call call(a);
  Tensor out = call.make<float>({32, 4});
  gpu::launch(is_bf16 ? mma_kernel<bf16> : mma_kernel<f16>, call.config(1, 32), call.in<uint32_t>(a, "a"),
              call.in<uint32_t>(b, "b"), call.in<float>(c, "c"), call.out<float>(out));
  return out;
}

Tensor mma_s8(const Tensor& a, const Tensor& b, const Tensor& c) {
  Call call(a);
  Tensor out = call.make<int>({32, 4});
  gpu::launch(mma_s8_kernel, call.config(1, 32), call.in<uint32_t>(a, "a"), call.in<uint32_t>(b, "b"),
              call.in<int>(c, "c"), call.out<int>(out));
  return out;
}

// ---- shuffles, votes, reductions
// registers: shuffle_kernel <= 32
template <class T>
__global__ void __launch_bounds__(32) shuffle_kernel(const T* x, const int* argument, T* out, int kind, int width) {
  const T v = x[threadIdx.x];
  const int a = argument[threadIdx.x];
  T r = v;
  switch (kind) {
    case 0:
      r = __shfl_sync(~0u, v, a, width);
      break;
    case 1:
      r = __shfl_xor_sync(~0u, v, a, width);
      break;
    case 2:
      r = __shfl_up_sync(~0u, v, unsigned(a), width);
      break;
    case 3:
      r = __shfl_down_sync(~0u, v, unsigned(a), width);
      break;
  }
  out[threadIdx.x] = r;
}

Tensor shuffle(const Tensor& x, const Tensor& argument, int64_t kind, int64_t width) {
  Call call(x);
  const int *a = call.in<int>(argument, "argument"), k = int(kind), w = int(width);
  const bool wide = x.element_size() == 8;
  Tensor out = wide ? call.make<long long>({32}) : call.make<int>({32});
  if (wide) {
    gpu::launch(shuffle_kernel<long long>, call.config(1, 32), call.in<long long>(x, "x"), a, call.out<long long>(out),
                k, w);
  } else {
    gpu::launch(shuffle_kernel<int>, call.config(1, 32), call.in<int>(x, "x"), a, call.out<int>(out), k, w);
  }
  return out;
}

constexpr int kVotes = 17;

// registers: votes_kernel <= 48
__global__ void __launch_bounds__(64) votes_kernel(const int* x, int* out, int lanes) {
  const int v = x[threadIdx.x], lane = threadIdx.x % 32;
  const unsigned u = unsigned(v), mask = lanes == 32 ? ~0u : (1u << lanes) - 1;
  int r[kVotes] = {};
  if (lane < lanes) {
    r[0] = int(__ballot_sync(mask, v & 1));
    r[1] = __any_sync(mask, v & 1) != 0;
    r[2] = __all_sync(mask, v & 1) != 0;
    r[3] = int(__match_any_sync(mask, v));
    r[4] = __reduce_add_sync(mask, v);
    r[5] = __reduce_min_sync(mask, v);
    r[6] = __reduce_max_sync(mask, v);
    r[7] = int(__reduce_add_sync(mask, u));
    r[8] = int(__reduce_min_sync(mask, u));
    r[9] = int(__reduce_max_sync(mask, u));
    r[10] = int(__reduce_and_sync(mask, u));
    r[11] = int(__reduce_or_sync(mask, u));
    r[12] = int(__reduce_xor_sync(mask, u));
    r[13] = gpu::elect_one(mask);
  }
  r[14] = __syncthreads_or(v == 3) != 0;
  r[15] = __syncthreads_and(v != 3) != 0;
  r[16] = __syncthreads_count(v & 1);
  for (int i = 0; i < kVotes; i++) out[threadIdx.x * kVotes + i] = r[i];
}

Tensor votes(const Tensor& x, int64_t lanes) {
  Call call(x);
  Tensor out = call.make<int>({64, kVotes});
  gpu::launch(votes_kernel, call.config(1, 64), call.in<int>(x, "x"), call.out<int>(out), int(lanes));
  return out;
}

struct ReduceSmem {
  float f[gpu::kMaxWarps];
  unsigned long long u[gpu::kMaxWarps];
};
constexpr int kReductions = 6;

// registers: reduce_kernel <= 40
__global__ void __launch_bounds__(1024) reduce_kernel(const float* x, float* out) {
  auto& s = gpu::dynamic_smem<ReduceSmem>();
  const float v = x[threadIdx.x];
  const unsigned long long key = (unsigned long long)(v * 1024 + 8192) << 32 | threadIdx.x;
  const float r[kReductions] = {gpu::block_sum(v, s.f),
                                gpu::block_max(v, s.f, -1e30f),
                                gpu::block_reduce(v, s.f, 1e30f, gpu::Min{}),
                                float(gpu::block_max_u64(key, s.u) & 0xffffffffu),
                                gpu::warp_sum(v) + gpu::warp_max(v) * 2 + gpu::warp_min(v) * 4,
                                float(gpu::warp_max_u64(key) & 0xffffffffu)};
  for (int i = 0; i < kReductions; i++) out[threadIdx.x * kReductions + i] = r[i];
}

Tensor reduce(const Tensor& x) {
  Call call(x);
  const unsigned threads = unsigned(x.numel());
  Tensor out = call.make<float>({threads, kReductions});
  gpu::launch(reduce_kernel, call.config(1, threads, sizeof(ReduceSmem)), call.in<float>(x, "x"), call.out<float>(out));
  return out;
}

// ---- copies and memory
struct CopySmem {
  uint4 chunk[2][128];
};

// Two groups of cp.async, waited for one after the other.
// registers: cp_async_kernel <= 32
__global__ void __launch_bounds__(128) cp_async_kernel(const uint4* x, const int* valid, uint4* out) {
  auto& s = gpu::dynamic_smem<CopySmem>();
  const int t = threadIdx.x, other = 127 - t;
  for (int g = 0; g < 2; g++) {
    gpu::cp_async16(&s.chunk[g][t], x + g * 128 + t, valid[g * 128 + t] != 0);
    gpu::cp_async_commit();
  }
  gpu::cp_async_wait<1>();
  __syncthreads();
  out[other] = s.chunk[0][other];
  gpu::cp_async_wait<0>();
  __syncthreads();
  out[128 + other] = s.chunk[1][other];
}

Tensor cp_async(const Tensor& x, const Tensor& valid) {
  Call call(x);
  Tensor out = call.make<int>({256, 4});
  const auto* chunks = reinterpret_cast<const uint4*>(call.in<int>(x, "x"));
  gpu::launch(cp_async_kernel, call.config(1, 128, sizeof(CopySmem)), chunks, call.in<int>(valid, "valid"),
              reinterpret_cast<uint4*>(call.out<int>(out)));
  return out;
}

// registers: loads_kernel <= 32
__global__ void __launch_bounds__(64) loads_kernel(const uint4* x, uint4* out, uint32_t* word) {
  const int t = threadIdx.x;
  gpu::prefetch_l2(x + t);
  if (t == 0) gpu::st_release(word, 7);
  __syncthreads();
  const uint4 v = gpu::ld_nc_16(x + t);
  const auto* wide = reinterpret_cast<const unsigned long long*>(x + t);
  const unsigned long long low = gpu::atomic_load_relaxed(wide);
  const uint32_t last = gpu::atomic_load_relaxed(reinterpret_cast<const uint32_t*>(x + t) + 3);
  out[t] = make_uint4(v.x + gpu::ld_acquire(word), unsigned(low >> 32), v.z, last);
}

Tensor loads(const Tensor& x) {
  Call call(x);
  Tensor out = call.make<int>({64, 4}), word = call.make<int>({1});
  const auto* chunks = reinterpret_cast<const uint4*>(call.in<int>(x, "x"));
  gpu::launch(loads_kernel, call.config(1, 64), chunks, reinterpret_cast<uint4*>(call.out<int>(out)),
              call.zeros<uint32_t>(word, "word"));
  return out;
}

constexpr int kAtomics = 10;

// registers: atomics_kernel <= 32
__global__ void __launch_bounds__(64) atomics_kernel(const int* x, int* out, unsigned long long* wide) {
  const int v = x[blockIdx.x * 64 + threadIdx.x];
  auto* u = reinterpret_cast<unsigned*>(out);
  atomicAdd(&out[0], v);
  atomicMax(&out[1], v);
  atomicMin(&out[2], v);
  atomicMax(&u[3], unsigned(v));
  atomicOr(&u[4], unsigned(v));
  atomicXor(&u[5], unsigned(v));
  atomicAdd(reinterpret_cast<float*>(&out[6]), float(v % 64));
  atomicSub(&out[7], v);
  atomicInc(&u[8], 50u);
  for (int seen = gpu::atomic_load_relaxed(&out[9]), next;; seen = next) {  // a sum by compare and swap
    next = atomicCAS(&out[9], seen, int(unsigned(seen) + (unsigned(v) | 1u)));
    if (next == seen) break;
  }
  gpu::atomic_max(wide, (unsigned long long)(unsigned(v)) << 20 | threadIdx.x);
}

std::tuple<Tensor, Tensor> atomics(const Tensor& x) {
  Call call(x);
  Tensor out = call.make<int>({kAtomics}), wide = call.make<unsigned long long>({1});
  int* words = call.zeros<int>(out, "out");
  gpu::launch(atomics_kernel, call.config(unsigned(x.numel() / 64), 64), call.in<int>(x, "x"), words,
              call.zeros<unsigned long long>(wide, "wide"));
  return {out, wide};
}

// ---- integer and floating-point functions
constexpr int kBits = 12;

// registers: bits_kernel <= 40
__global__ void __launch_bounds__(128) bits_kernel(const int* a, const int* b, int* out, int n) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i >= n) return;
  const int x = a[i], y = b[i];
  const unsigned u = unsigned(x), v = unsigned(y);
  const long long wide = (long long)((unsigned long long)u << 32 | v);
  const int r[kBits] = {__popc(u),
                        __clz(x),
                        __ffs(x),
                        int(__brev(u)),
                        int(__byte_perm(u, v, v & 0x7777u)),
                        int(__funnelshift_l(u, v, v)),
                        int(__funnelshift_r(u, v, u)),
                        int(__umulhi(u, v)),
                        __dp4a(x, y, 5),
                        __popcll((unsigned long long)wide),
                        __clzll(wide),
                        __ffsll(wide)};
  for (int k = 0; k < kBits; k++) out[i * kBits + k] = r[k];
}

Tensor bits(const Tensor& a, const Tensor& b) {
  Call call(a);
  const int n = int(a.numel());
  Tensor out = call.make<int>({n, kBits});
  gpu::launch(bits_kernel, call.config(unsigned(n + 127) / 128, 128), call.in<int>(a, "a"), call.in<int>(b, "b"),
              call.out<int>(out), n);
  return out;
}

constexpr int kMaths = 11;

// registers: maths_kernel <= 40
__global__ void __launch_bounds__(128) maths_kernel(const float* a, const float* b, float* out, int n) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i >= n) return;
  const float x = a[i], y = b[i];
  const float r[kMaths] = {min(x, y),
                           max(x, y),
                           __saturatef(x),
                           rsqrtf(fabsf(x) + 1),
                           __expf(x / 8),
                           __logf(fabsf(x) + 1),
                           __fdividef(x, fabsf(y) + 1),
                           __fmaf_rn(x, y, 1.0f),
                           float(__float2int_rn(x == x ? x : 0.0f)),
                           __uint_as_float(__float_as_uint(x) ^ 0x80000000u),
                           gpu::exp2_approx(x)};
  for (int k = 0; k < kMaths; k++) out[i * kMaths + k] = r[k];
}

Tensor maths(const Tensor& a, const Tensor& b) {
  Call call(a);
  const int n = int(a.numel());
  Tensor out = call.make<float>({n, kMaths});
  gpu::launch(maths_kernel, call.config(unsigned(n + 127) / 128, 128), call.in<float>(a, "a"), call.in<float>(b, "b"),
              call.out<float>(out), n);
  return out;
}

std::tuple<int64_t, int64_t, int64_t, int64_t> device_info(const Tensor&) {
  return {gpu::sm_count(), gpu::compute_capability_major(), int64_t(gpu::max_cluster_size()),
          int64_t(gpu::max_shared_memory_per_block())};
}

}  // namespace
}  // namespace test

STABLE_TORCH_LIBRARY_IMPL(TOKENCOMP_TEST_NAMESPACE, TOKENCOMP_KEY, m) {
  m.impl("ldmatrix", TORCH_BOX(&test::ldmatrix));
  m.impl("stmatrix", TORCH_BOX(&test::stmatrix));
  m.impl("mma", TORCH_BOX(&test::mma));
  m.impl("mma_s8", TORCH_BOX(&test::mma_s8));
  m.impl("shuffle", TORCH_BOX(&test::shuffle));
  m.impl("votes", TORCH_BOX(&test::votes));
  m.impl("reduce", TORCH_BOX(&test::reduce));
  m.impl("cp_async", TORCH_BOX(&test::cp_async));
  m.impl("loads", TORCH_BOX(&test::loads));
  m.impl("atomics", TORCH_BOX(&test::atomics));
  m.impl("bits", TORCH_BOX(&test::bits));
  m.impl("maths", TORCH_BOX(&test::maths));
  m.impl("device_info", TORCH_BOX(&test::device_info));
}
