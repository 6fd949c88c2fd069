// Rows of a paged cache on the CPU, whatever the type of their pages: rows of working pages where they lie, those of
// quantized pages as numbers of the working dtype, the bits that kv_page_read gives.
#pragma once

#include "core/attention.h"
#include "cpu/simd_bytes.h"
#include "cpu/unpack_codes.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace attention;

// Whose rows: the keys or the values of one (b, kv).
struct PageSource {
  const Attention& a;
  const void* base;    // of the working pool
  const Pages& pages;  // its layout
  int channels;
  bool values;
  int b, kv;
};

template <class T>
class PageRows {
 public:
  TC_INLINE_MEMBER explicit PageRows(const PageSource& source) : s(source) {
    const PageMaps& maps = s.a.types.maps;
    const int64_t at = (int64_t(s.b) * s.a.g.Hkv + s.kv) * s.channels;
    scale = map_of(s.values ? maps.v_scale : maps.k_scale, at);
    bias = map_of(s.values ? maps.v_bias : maps.k_bias, at);
  }

  // The row of a slot, null where no page is there. Those of quantized pages are written to `buffer`.
  TC_INLINE_MEMBER const T* row(int slot, T* buffer) {
    const PageTable& table = s.a.table;
    if (slot >> table.shift != place) find(slot >> table.shift);
    const int in_page = table.slot_in_page(slot);
    if (type < 0) return nullptr;
    if (type == 0) return working + in_page * s.pages.slot_stride;
    dequantize(in_page, buffer);
    return buffer;
  }

 private:
  static TC_INLINE_MEMBER const float* map_of(const float* map, int64_t at) { return map ? map + at : nullptr; }

  TC_INLINE_MEMBER void find(int at) {
    const int32_t entry = s.a.table.row(s.b, s.kv)[at];
    place = at;
    grid_row = -1;
    type = s.a.types.type_of(entry, s.a.page_count);
    if (type == 0) working = static_cast<const T*>(s.base) + s.pages.offset(entry, s.kv, 0);
    if (type <= 0) return;
    const PagePool& pool = s.a.types.pool_of(type);
    half = s.values ? pool.v : pool.k;
    page = s.a.types.page(entry);
  }

  TC_INLINE_MEMBER void dequantize(int t, T* out) {
    const int D = s.channels, bits = half.format.bits;
    uint8_t codes[kMaxHeadDim + kWidth];
    alignas(64) float y[kMaxHeadDim + kWidth];
    unpack_row(page + half.codes + int64_t(t) * (D * bits / 8), bits, D, codes);
    if (half.format.kind == kvquant::Kind::fp8) {
      for (int d = 0; d < D; ++d) y[d] = bitpack::fp8_to_float(codes[d]);
    } else {
      for (int d = 0; d < D; d += kWidth) store(y + d, load_bytes(codes + d));
    }
    read_grid(t);
    for (int d = 0; d < D; d += kWidth) {
      const int n = D - d;
      Vec x = fma(load(step + d), load(y + d), load(minimum + d));
      if (scale) x = div(x, load_up_to(scale + d, n));
      if (bias) x = add(x, load_up_to(bias + d, n));
      store_up_to(out + d, x, n);
    }
  }

  // The grid of token t, a number a channel; tokens of a group share it.
  TC_INLINE_MEMBER void read_grid(int t) {
    const int D = s.channels, group = half.format.group;
    const bool by_token = half.format.axis == kvquant::Axis::token;
    const int row = by_token ? t : t / group;
    if (row == grid_row) return;
    grid_row = row;
    const f16* p = reinterpret_cast<const f16*>(page + half.params) + int64_t(row) * (by_token ? D / group : D) * 2;
    if (!by_token) {
      for (int d = 0; d < D; ++d) step[d] = to_float(p[2 * d]), minimum[d] = to_float(p[2 * d + 1]);
      return;
    }
    for (int begin = 0; begin < D; begin += group, p += 2) {
      const Vec own_step = broadcast(to_float(p[0])), own_minimum = broadcast(to_float(p[1]));
      for (int d = begin; d < begin + group; d += kWidth) {  // what reaches past the group is overwritten
        store(step + d, own_step);
        store(minimum + d, own_minimum);
      }
    }
  }

  const PageSource s;
  const float *scale, *bias;
  int place = -1, type = -1, grid_row = -1;
  const T* working = nullptr;
  const uint8_t* page = nullptr;
  PageHalf half;
  alignas(64) float step[kMaxHeadDim + kWidth], minimum[kMaxHeadDim + kWidth];
};

}  // namespace tokencomp::cpu::TOKENCOMP_ISA
