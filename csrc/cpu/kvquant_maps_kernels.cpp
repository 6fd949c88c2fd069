// What surrounds quantization on the CPU, compiled once per instruction-set level: other layouts of codes, the Hadamard
// transform, statistics of channels.
#include "core/dispatch.h"
#include "cpu/kvquant_codes.h"
#include "cpu/kvquant_kernels.h"
#include "cpu/simd_lanes.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace kvquant;

constexpr int kMaxD = kMaxHeadDim, kBlock = bitpack::kBlock;

// ---- layouts

void repack_codes(const RepackArgs& r, const uint8_t* in, uint8_t* out, uint8_t* codes) {
  if (r.from == Layout::linear) {
    for (int t = 0; t < kBlock; ++t) unpack_row(in + t * r.D * r.bits / 8, r.bits, r.D, codes + t * r.D);
  } else {
    unpack_block(r.from, r.bits, r.D, in, codes);
  }
  if (r.to != Layout::linear) return pack_block(r.to, r.bits, r.D, codes, out);
  for (int t = 0; t < kBlock; ++t) {
    alignas(64) float q[kMaxD + kWidth];
    for (int d = 0; d < r.D; d += kWidth) store(q + d, load_bytes(codes + t * r.D + d));
    pack_row(q, r.bits, r.D, out + t * r.D * r.bits / 8);
  }
}

void repack_elements(const RepackArgs& r, const uint8_t* in, uint8_t* out) {
  const auto at = [&](Layout layout, int t, int d) {
    const int byte = bitpack::place(layout, 16, r.D, t, d).byte;
    return layout == Layout::linear ? byte + 2 * t * r.D : byte;
  };
  for (int t = 0; t < kBlock; ++t) {
    for (int d = 0; d < r.D; ++d) __builtin_memcpy(out + at(r.to, t, d), in + at(r.from, t, d), 2);
  }
}

// ---- Hadamard

constexpr int kRows = kWidth;  // rows worked on together, one in each lane while neighbours are added

struct RowBlock {
  alignas(64) float at[kRows][kMaxD];
};

// Butterflies among the channels of a vector: there lanes are rows.
TC_INLINE void near_stages(RowBlock& m, int D) {
  for (int begin = 0; begin < D; begin += kWidth) {
    Vec v[kWidth];
    for (int r = 0; r < kRows; ++r) v[r] = load(m.at[r] + begin);
    transpose(v);
    for (int stride = 1; stride < kWidth && stride < D; stride *= 2) {
      for (int i = 0; i < kWidth; ++i) {
        if (i & stride) continue;
        const Vec a = v[i], b = v[i + stride];
        v[i] = add(a, b), v[i + stride] = sub(a, b);
      }
    }
    transpose(v);
    for (int r = 0; r < kRows; ++r) store(m.at[r] + begin, v[r]);
  }
}

TC_INLINE void far_stages(float* y, int D) {
  for (int stride = kWidth; stride < D; stride *= 2) {
    for (int begin = 0; begin < D; begin += 2 * stride) {
      for (int i = begin; i < begin + stride; i += kWidth) {
        const Vec a = load(y + i), b = load(y + i + stride);
        store(y + i, add(a, b));
        store(y + i + stride, sub(a, b));
      }
    }
  }
}

template <class T>
void transform(const HadamardArgs& a, int64_t begin, int64_t end) {
  RowBlock m = {};
  const Vec norm = broadcast(a.norm);
  for (int64_t first = begin; first < end; first += kRows) {
    const int rows = end - first < kRows ? int(end - first) : kRows;
    for (int r = 0; r < rows; ++r) {
      const T* x = static_cast<const T*>(a.x) + a.row_offset(first + r);
      for (int d = 0; d < a.D; d += kWidth) {
        Vec v = load_up_to(x + d, a.D - d);
        if (a.signs && !a.inverse) v = mul(v, load_up_to(a.signs + d, a.D - d));
        store_up_to(m.at[r] + d, v, a.D - d);
      }
    }
    near_stages(m, a.D);
    for (int r = 0; r < rows; ++r) {
      far_stages(m.at[r], a.D);
      T* out = static_cast<T*>(a.out) + (first + r) * a.D;
      for (int d = 0; d < a.D; d += kWidth) {
        Vec v = mul(load(m.at[r] + d), norm);
        if (a.signs && a.inverse) v = mul(v, load_up_to(a.signs + d, a.D - d));
        store_up_to(out + d, v, a.D - d);
      }
    }
  }
}

// ---- statistics

// NaN where either is.
TC_INLINE Vec larger(Vec v, Vec best) { return select_ge(v, v, select_gt(v, best, v, best), v); }
TC_INLINE Vec smaller(Vec v, Vec best) { return select_ge(v, v, select_gt(best, v, v, best), v); }

// Two channels' vectors at a time over the tokens of one part.
template <class T>
void stat_part(const StatsArgs& a, int64_t sequence, int part) {
  const int b = int(sequence / a.H), from = part * kStatTokens;
  const int begin = from > a.begin(b) ? from : a.begin(b), end = at_most(from + kStatTokens, a.end(b));
  const T* x = static_cast<const T*>(a.x) + b * a.stride_b + sequence % a.H * a.stride_h;
  float* out = a.partial + (sequence * a.parts() + part) * 3 * a.D;
  for (int d = 0; d < a.D; d += kWidth) {
    const int n = a.D - d;
    Vec low = broadcast(kInfinity), high = broadcast(-kInfinity), total = broadcast(0.0f);
    for (int t = begin; t < end;) {
      Vec few = broadcast(0.0f);
      for (const int stop = at_most(t + kStatRun, end); t < stop; ++t) {
        const Vec v = load_up_to(x + t * a.stride_s + d, n);
        low = smaller(v, low), high = larger(v, high), few = add(few, v);
      }
      total = add(total, few);
    }
    store_up_to(out + d, low, n);
    store_up_to(out + a.D + d, high, n);
    store_up_to(out + 2 * a.D + d, total, n);
  }
}

TC_INLINE float magnitude(float x) { return x < 0 ? -x : x; }

void finish_stats(const StatsArgs& a, int64_t sequence) {
  const int b = int(sequence / a.H), count = a.end(b) - a.begin(b);
  const int64_t plane = int64_t(a.B) * a.H * a.D;
  float* out = a.out + sequence * a.D;
  for (int d = 0; d < a.D; ++d) {
    float low = kInfinity, high = -kInfinity;
    double total = 0;
    for (int part = 0; part < a.parts(); ++part) {
      const float* in = a.partial + (sequence * a.parts() + part) * 3 * a.D + d;
      low = low != low || in[0] >= low ? low : in[0];  // NaN stays
      high = high != high || in[a.D] <= high ? high : in[a.D];
      total += in[2 * a.D];
    }
    const bool any = count > 0;
    const float size = magnitude(low) > high ? magnitude(low) : magnitude(high);
    out[d] = any ? size : 0;
    out[plane + d] = any ? low : 0;
    out[2 * plane + d] = any ? high : 0;
    out[3 * plane + d] = any ? float(total / count) : 0;
  }
}

}  // namespace

void repack_units(const RepackArgs& r, int64_t begin, int64_t end) {
  const bool rows = r.from == Layout::linear && r.to == Layout::linear;
  const int64_t bytes = int64_t(rows ? 1 : kBlock) * r.D * r.bits / 8;
  if (r.from == r.to) return void(__builtin_memcpy(r.out + begin * bytes, r.in + begin * bytes, (end - begin) * bytes));
  uint8_t codes[kBlock * kMaxD + kWidth];
  for (int64_t u = begin; u < end; ++u) {
    if (r.bits == 16) {
      repack_elements(r, r.in + u * bytes, r.out + u * bytes);
    } else {
      repack_codes(r, r.in + u * bytes, r.out + u * bytes, codes);
    }
  }
}

void hadamard_rows(const HadamardArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.dtype, [&]<class T>() { transform<T>(a, begin, end); });
}

void stat_parts(const StatsArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.dtype, [&]<class T>() {
    for (int64_t i = begin; i < end; ++i) stat_part<T>(a, i / a.parts(), int(i % a.parts()));
  });
}

void stat_sequences(const StatsArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) finish_stats(a, i);
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
