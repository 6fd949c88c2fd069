// Quantization on CUDA. A block takes 16 tokens of a sheet, or one group of tokens 16 at a time: rows go to shared
// memory as floats, groups are fitted by a warp each (channels by a thread each), codes stay there as bytes until the
// words of the layout are put together from them. The layout `linear` takes any D (kD = 0), the mma16 layouts the D of
// kD.
#pragma once

#include "core/kvquant.h"
#include "cuda/rows.h"

namespace tokencomp::kvquant {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = bitpack::kBlock;

struct TileSmem {
  float y[kTile * kMaxHeadDim];
  float minimum[kMaxHeadDim], step[kMaxHeadDim];  // of a group of tokens, one a channel
  float low[kThreads], high[kThreads], poison[kThreads];
  uint8_t codes[kTile * kMaxHeadDim];
};

// Calls f<kBits, kLayout>() for an mma16 layout; all threads take the same branch.
template <class F>
__device__ __forceinline__ void for_fragments(int bits, Layout layout, F&& f) {
  if (layout == Layout::mma16_k) {
    if (bits == 2) return f.template operator()<2, Layout::mma16_k>();
    if (bits == 3) return f.template operator()<3, Layout::mma16_k>();
    if (bits == 4) return f.template operator()<4, Layout::mma16_k>();
    return f.template operator()<8, Layout::mma16_k>();
  }
  if (bits == 2) return f.template operator()<2, Layout::mma16_v>();
  if (bits == 3) return f.template operator()<3, Layout::mma16_v>();
  if (bits == 4) return f.template operator()<4, Layout::mma16_v>();
  f.template operator()<8, Layout::mma16_v>();
}

// Words of a block of 16 tokens from its codes in shared memory.
template <int kD>
__device__ __forceinline__ void pack_fragments(int bits, Layout layout, const uint8_t* codes, uint8_t* out) {
  for_fragments(bits, layout, [&]<int kBits, Layout kLayout>() {
#pragma unroll 1
    for (int word = int(threadIdx.x); word < kTile * kD * kBits / 32; word += kThreads) {
      uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        packed |= uint32_t(bitpack::pack_byte(kLayout, kBits, kD, codes, 4 * word + i)) << 8 * i;
      }
      reinterpret_cast<uint32_t*>(out)[word] = packed;
    }
  });
}

// Bytes of `rows` linear rows.
__device__ __forceinline__ void pack_rows(int bits, int D, int rows, const uint8_t* codes, uint8_t* out) {
  const int bytes = D * bits / 8;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < rows * bytes; i += kThreads) {
    const int t = i / bytes, byte = i - t * bytes, low = bits == 3 ? D / 4 : bytes;
    const bool high = byte >= low;
    const int width = high ? 1 : bitpack::low_width(bits), stride = D * width / 8;
    const uint8_t* code = codes + t * D + (high ? byte - low : byte);
    int packed = 0;
#pragma unroll 1
    for (int shift = 0; shift < 8; shift += width, code += stride) {
      packed |= (*code >> (high ? 2 : 0) & ((1 << width) - 1)) << shift;
    }
    out[i] = uint8_t(packed);
  }
}

// y of tokens [begin, begin + rows) in shared memory; empty slots are zeros.
template <class T>
__device__ __forceinline__ void load_tile(const Sheets& s, int sheet, int begin, int rows, bool whole, float* y) {
  const int chunks = chunks_of(s.D, kVec<T>);
  const float *scale = s.scale_of(sheet), *bias = s.bias_of(sheet);
  const int64_t origin = s.sheet_offset(sheet);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < rows * chunks; i += kThreads) {
    const int t = i / chunks, chunk = i - t * chunks;
    const int64_t offset = s.row_offset(origin, sheet, begin + t);
    float v[kVec<T>] = {};
    if (offset >= 0) {
      const T* row = static_cast<const T*>(s.x) + offset;
      unpack<T>(whole ? load_chunk<T, true>(row, chunk, s.D) : load_chunk<T, false>(row, chunk, s.D), v);
    }
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) {
      const int d = chunk * kVec<T> + e;
      if (d >= s.D) continue;
      float x = v[e];
      if (bias && offset >= 0) x = x - bias[d];
      if (scale && offset >= 0) x = x * scale[d];
      y[t * s.D + d] = x;
    }
  }
}

__device__ __forceinline__ void load_tile(const Sheets& s, int sheet, int begin, int rows, bool whole, float* y) {
  if (s.dtype == DType::f32) return load_tile<float>(s, sheet, begin, rows, whole, y);
  if (s.dtype == DType::f16) return load_tile<f16>(s, sheet, begin, rows, whole, y);
  load_tile<bf16>(s, sheet, begin, rows, whole, y);
}

__device__ __forceinline__ uint8_t code_of(const Format& f, float y, const Grid& g) {
  if (!g.usable()) return 0;
  const float t = (y - g.minimum) / g.step;
  if (f.kind == Kind::fp8) return bitpack::fp8_from_float(t);
  const float top = float(f.levels()), inside = t > 0 ? (t < top ? t : top) : 0.0f, whole = rintf(inside);
  return uint8_t(int(whole + (f.away && inside - whole == 0.5f ? 1.0f : 0.0f)));
}

__device__ __forceinline__ void write_param(f16* p, const Grid& g) {
  p[0] = from_float<f16>(g.step);
  p[1] = from_float<f16>(g.minimum);
}

// Groups of channels: a warp fits a group and codes it.
__device__ __forceinline__ void fit_tokens(const Sheets& s, int rows, const float* y, f16* params, uint8_t* codes) {
  const int lane = int(threadIdx.x) % 32, group = s.format.group, count = rows * (s.D / group);
#pragma unroll 1
  for (int i = int(threadIdx.x) / 32; i < count; i += kWarps) {
    const float* v = y + i * group;
    float low = kInfinity, high = -kInfinity, poison = 0;
    for (int d = lane; d < group; d += 32) {
      low = v[d] < low ? v[d] : low;
      high = v[d] > high ? v[d] : high;
      poison += v[d] * 0.0f;
    }
    const Grid g = make_grid(s.format, gpu::warp_min(low), gpu::warp_max(high), gpu::warp_sum(poison));
    if (lane == 0) write_param(params + 2 * i, g);
    for (int d = lane; d < group; d += 32) codes[i * group + d] = code_of(s.format, v[d], g);
  }
}

// Groups of tokens: the grid of every channel over [begin, end), of which 16 at a time are in shared memory.
__device__ __forceinline__ void fit_channels(const Sheets& s, int sheet, int begin, int end, bool whole, f16* params,
                                             TileSmem& smem) {
  const int tid = int(threadIdx.x), width = kThreads / s.D, lane = tid / s.D, d = tid - lane * s.D;
  const int64_t origin = s.sheet_offset(sheet);
  float low = kInfinity, high = -kInfinity, poison = 0;
  int any = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += kTile) {
    const int rows = end - first < kTile ? end - first : kTile;
    load_tile(s, sheet, first, rows, whole, smem.y);
    __syncthreads();
    for (int t = lane; t < rows && lane < width; t += width) {
      if (s.row_offset(origin, sheet, first + t) < 0) continue;
      const float v = smem.y[t * s.D + d];
      any = 1;
      low = v < low ? v : low;
      high = v > high ? v : high;
      poison += v * 0.0f;
    }
    __syncthreads();
  }
  smem.low[tid] = low, smem.high[tid] = high, smem.poison[tid] = poison;
  any = __syncthreads_or(any);
  if (tid < s.D) {
    for (int i = 1; i < width; ++i) {
      const int other = i * s.D + tid;
      low = smem.low[other] < low ? smem.low[other] : low;
      high = smem.high[other] > high ? smem.high[other] : high;
      poison += smem.poison[other];
    }
    const Grid g = any ? make_grid(s.format, low, high, poison) : Grid{};
    write_param(params + 2 * tid, g);
    smem.step[tid] = g.step, smem.minimum[tid] = g.minimum;
  }
  __syncthreads();
}

__device__ __forceinline__ void code_channels(const Sheets& s, int sheet, int begin, int rows, TileSmem& smem) {
  const int64_t origin = s.sheet_offset(sheet);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < rows * s.D; i += kThreads) {
    const int t = i / s.D, d = i - t * s.D;
    const bool there = s.row_offset(origin, sheet, begin + t) >= 0;
    smem.codes[i] = there ? code_of(s.format, smem.y[i], {smem.step[d], smem.minimum[d]}) : uint8_t(0);
  }
}

// One block a unit; `whole` promises rows of whole aligned 16-byte chunks.
// registers: kv_quantize_tiles <= 80
template <int kD>
__global__ void __launch_bounds__(kThreads, 3) kv_quantize_tiles(Sheets s, int unit, int units_per_sheet, bool whole) {
  TileSmem& smem = gpu::dynamic_smem<TileSmem>();
  const int sheet = int(blockIdx.x) / units_per_sheet, begin = int(blockIdx.x) % units_per_sheet * unit;
  const int end = begin + unit < s.tokens ? begin + unit : s.tokens, place = s.place_of(sheet);
  if (place < 0) return;
  const bool by_token = s.format.axis == Axis::token;
  f16* params = s.params_at(place) + 2 * int64_t(by_token ? begin : begin / s.format.group) * s.groups_per_row();
  if (!by_token) fit_channels(s, sheet, begin, end, whole, params, smem);
#pragma unroll 1
  for (int first = begin; first < end; first += kTile) {
    const int rows = end - first < kTile ? end - first : kTile;
    load_tile(s, sheet, first, rows, whole, smem.y);
    __syncthreads();
    if (by_token) {
      fit_tokens(s, rows, smem.y, params, smem.codes);
    } else {
      code_channels(s, sheet, first, rows, smem);
    }
    __syncthreads();
    uint8_t* out = s.codes_at(place) + int64_t(first) * s.row_bytes();
    if constexpr (kD > 0) {
      pack_fragments<kD>(s.format.bits, s.format.layout, smem.codes, out);
    } else {
      pack_rows(s.format.bits, s.D, rows, smem.codes, out);
    }
    __syncthreads();
  }
}

// The code of an element of a tile of 16 tokens that starts at `tile`.
template <int kD>
__device__ __forceinline__ int read_code(const Format& f, int D, const uint8_t* tile, int t, int d) {
  if constexpr (kD == 0) return bitpack::code_at(Layout::linear, f.bits, D, tile + t * (D * f.bits / 8), 0, d);
  int code = 0;
  if constexpr (kD > 0) {
    for_fragments(f.bits, f.layout,
                  [&]<int kBits, Layout kLayout>() { code = bitpack::code_at(kLayout, kBits, kD, tile, t, d); });
  }
  return code;
}

template <class T, int kD>
__device__ __forceinline__ void read_tile(const Sheets& s, int sheet, int begin, int rows) {
  const int place = s.place_of(sheet);
  const int64_t origin = s.sheet_offset(sheet);
  const float *scale = s.scale_of(sheet), *bias = s.bias_of(sheet);
  const uint8_t* tile = place < 0 ? nullptr : s.codes_at(place) + int64_t(begin) * s.row_bytes();
#pragma unroll 1
  for (int i = int(threadIdx.x); i < rows * s.D; i += kThreads) {
    const int t = i / s.D, d = i - t * s.D;
    float x = kNaN;  // what is nowhere reads so
    if (place >= 0) {
      const int code = read_code<kD>(s.format, s.D, tile, t, d);
      const bool by_token = s.format.axis == Axis::token;
      const int row = by_token ? begin + t : (begin + t) / s.format.group, column = by_token ? d / s.format.group : d;
      const f16* p = s.params_at(place) + 2 * (int64_t(row) * s.groups_per_row() + column);
      const float number = s.format.kind == Kind::fp8 ? bitpack::fp8_to_float(uint8_t(code)) : float(code);
      x = fmaf(to_float(p[0]), number, to_float(p[1]));
      if (scale) x = x / scale[d];
      if (bias) x = x + bias[d];
    }
    static_cast<T*>(s.x)[s.row_offset(origin, sheet, begin + t) + d] = from_float<T>(x);
  }
}

// One block for 16 tokens of a sheet.
// registers: kv_dequantize_tiles <= 64
template <int kD>
__global__ void __launch_bounds__(kThreads, 4) kv_dequantize_tiles(Sheets s, int tiles_per_sheet) {
  const int sheet = int(blockIdx.x) / tiles_per_sheet, begin = int(blockIdx.x) % tiles_per_sheet * kTile;
  const int rows = s.tokens - begin < kTile ? s.tokens - begin : kTile;
  if (s.dtype == DType::f32) return read_tile<float, kD>(s, sheet, begin, rows);
  if (s.dtype == DType::f16) return read_tile<f16, kD>(s, sheet, begin, rows);
  read_tile<bf16, kD>(s, sheet, begin, rows);
}

}  // namespace tokencomp::kvquant
