// Linear attention with decay on the CPU: the rows of a head in chunks, all products in float32 by one small matrix
// kernel. Compiled once per instruction-set level; no torch here. The order of all sums is that of the rows.
#include "cpu/linear_kernels.h"

#include <cmath>

#include "core/dispatch.h"
#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {
namespace {

using namespace linear;

// A chunk of a head in working memory; columns are padded with zeros to whole vectors.
struct Chunk {
  float *decay, *q, *kt, *v, *product, *out, *state;
  int m, D, Dv, width;  // rows, dimensions, padded Dv
};

// out[rows, kCols vectors] = factor out + w[rows, depth] x[depth, ...].
template <int kTall, int kCols>
TC_INLINE void multiply_tile(int depth, const float* w, int w_stride, const float* x, int x_stride, float* out,
                             int out_stride, float factor) {
  Vec sum[kTall][kCols];
  for (int r = 0; r < kTall; ++r) {
    for (int c = 0; c < kCols; ++c) {
      // What is not asked for is not read: it may be anything.
      sum[r][c] = factor == 0.0f ? broadcast(0.0f) : mul(broadcast(factor), load(out + r * out_stride + c * kWidth));
    }
  }
  for (int i = 0; i < depth; ++i) {
    Vec row[kCols];
    for (int c = 0; c < kCols; ++c) row[c] = load(x + int64_t(i) * x_stride + c * kWidth);
    for (int r = 0; r < kTall; ++r) {
      const Vec weight = broadcast(w[int64_t(r) * w_stride + i]);
      for (int c = 0; c < kCols; ++c) sum[r][c] = fma(weight, row[c], sum[r][c]);
    }
  }
  for (int r = 0; r < kTall; ++r) {
    for (int c = 0; c < kCols; ++c) store(out + r * out_stride + c * kWidth, sum[r][c]);
  }
}

template <int kTall>
TC_INLINE void multiply_rows(int columns, int depth, const float* w, int w_stride, const float* x, int x_stride,
                             float* out, int out_stride, float factor) {
  int c = 0;
  for (; c + kTileCols * kWidth <= columns; c += kTileCols * kWidth) {
    multiply_tile<kTall, kTileCols>(depth, w, w_stride, x + c, x_stride, out + c, out_stride, factor);
  }
  for (; c < columns; c += kWidth) {
    multiply_tile<kTall, 1>(depth, w, w_stride, x + c, x_stride, out + c, out_stride, factor);
  }
}

void multiply(int rows, int columns, int depth, const float* w, int w_stride, const float* x, int x_stride, float* out,
              int out_stride, float factor) {
  int r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    multiply_rows<kTileRows>(columns, depth, w + int64_t(r) * w_stride, w_stride, x, x_stride,
                             out + int64_t(r) * out_stride, out_stride, factor);
  }
  for (; r < rows; ++r) {
    multiply_rows<1>(columns, depth, w + int64_t(r) * w_stride, w_stride, x, x_stride, out + int64_t(r) * out_stride,
                     out_stride, factor);
  }
}

// `count` elements as floats, then zeros up to `width`, a multiple of the vector.
template <class T>
TC_INLINE void widen_row(const T* from, int count, float* to, int width) {
  for (int i = 0; i < width; i += kWidth) {
    store(to + i, count > i ? load_up_to(from + i, count - i) : broadcast(0.0f));
  }
}

template <class T>
void read_chunk(const LinearArgs& p, const Chunk& c, int b, int h, int first) {
  const Attention& a = p.a;
  const int kv = h / (a.g.Hq / a.g.Hkv), q_width = padded(c.D), m = padded(c.m);
  const T* q = static_cast<const T*>(a.q) + b * a.q_stride_b + h * a.q_stride_h;
  const T* k = static_cast<const T*>(a.k) + b * a.k_stride_b + kv * a.k_stride_h;
  const T* v = static_cast<const T*>(p.v) + b * p.v_stride_b + kv * p.v_stride_h;
  for (int i = 0; i < c.m; ++i) {
    widen_row(q + (first + i) * a.q_stride_t, c.D, c.q + i * q_width, q_width);
    widen_row(v + (first + i) * p.v_stride_s, c.Dv, c.v + i * c.width, c.width);
    const T* key = k + (first + i) * a.k_stride_s;
    for (int d = 0; d < c.D; ++d) c.kt[d * kRows + i] = to_float(key[d]);
  }
  for (int d = 0; d < c.D; ++d) {
    for (int i = c.m; i < m; ++i) c.kt[d * kRows + i] = 0.0f;
  }
}

// The products of the chunk's rows with each other become weights of its values; those of q carry the decay since
// before the chunk.
void weigh(const Chunk& c, float scale) {
  const int q_width = padded(c.D);
  multiply(c.m, padded(c.m), c.D, c.q, q_width, c.kt, kRows, c.product, kRows, 0.0f);
  for (int i = 0; i < c.m; ++i) {
    float* row = c.product + i * kRows;
    for (int j = 0; j <= i; ++j) row[j] *= scale * c.decay[i - j];
    for (int j = i + 1; j < c.m; ++j) row[j] = 0.0f;
    const Vec factor = broadcast(scale * c.decay[i + 1]);
    for (int d = 0; d < q_width; d += kWidth) {
      store(c.q + i * q_width + d, mul(factor, load(c.q + i * q_width + d)));
    }
  }
}

void update_state(const Chunk& c) {
  for (int d = 0; d < c.D; ++d) {
    float* row = c.kt + d * kRows;
    for (int i = 0; i < c.m; ++i) row[i] *= c.decay[c.m - 1 - i];
  }
  multiply(c.D, c.width, c.m, c.kt, kRows, c.v, c.width, c.state, c.width, c.decay[c.m]);
}

template <class T>
void attend_head(const LinearArgs& p, int64_t unit, float* scratch) {
  const Geometry& g = p.a.g;
  const int b = int(unit / g.Hq), h = int(unit % g.Hq), width = padded(p.Dv), tokens = tokens_of(p, b);
  Chunk c{scratch, scratch + padded(kDecays), nullptr, nullptr, nullptr, nullptr, nullptr, 0, g.D, p.Dv, width};
  c.kt = c.q + kRows * padded(g.D);
  c.v = c.kt + kRows * g.D;
  c.product = c.v + kRows * width;
  c.out = c.product + kRows * kRows;
  c.state = c.out + kRows * width;
  for (int n = 0; n <= kRows; ++n) c.decay[n] = expf(-p.slope[h] * float(n));
  const int64_t own = unit * g.D * p.Dv;
  for (int d = 0; d < g.D; ++d) {
    const float* held = p.state_in ? p.state_in + own + int64_t(d) * p.Dv : nullptr;
    widen_row(held, held ? p.Dv : 0, c.state + d * width, width);
  }
  T* out = static_cast<T*>(p.out) + unit * g.T * p.Dv;
  for (int first = 0; first < tokens; first += kRows) {
    c.m = tokens - first < kRows ? tokens - first : kRows;
    read_chunk<T>(p, c, b, h, first);
    weigh(c, p.a.scale);
    multiply(c.m, width, g.D, c.q, padded(g.D), c.state, width, c.out, width, 0.0f);
    multiply(c.m, width, c.m, c.product, kRows, c.v, width, c.out, width, 1.0f);
    update_state(c);
    for (int i = 0; i < c.m; ++i) {
      for (int e = 0; e < p.Dv; e += kWidth) {
        store_up_to(out + int64_t(first + i) * p.Dv + e, load(c.out + i * width + e), p.Dv - e);
      }
    }
  }
  for (int64_t e = int64_t(tokens) * p.Dv; e < int64_t(g.T) * p.Dv; ++e) out[e] = from_float<T>(0.0f);
  for (int d = 0; d < g.D; ++d) {
    for (int e = 0; e < p.Dv; e += kWidth) {
      store_up_to(p.state_out + own + int64_t(d) * p.Dv + e, load(c.state + d * width + e), p.Dv - e);
    }
  }
}

}  // namespace

HeadKernel linear_head;
void linear_head(const LinearArgs& p, int64_t unit, float* scratch) {
  dispatch_dtype(p.a.dtype, [&]<class T> { attend_head<T>(p, unit, scratch); });
}

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
