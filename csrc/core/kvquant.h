// Quantization of KV caches: the arguments every back end receives and the rules they share.
//
//   y = (x - pre_bias) * pre_scale                        per channel of a head
//   step = fp16((max - min) / (2^b - 1)), minimum = fp16(min)      over the group; rounded before codes are fitted to
//   them code = clamp(round((y - minimum) / step), 0, 2^b - 1), 0 where the step is 0 y' = step * code + minimum,    x'
//   = y' / pre_scale + pre_bias
//
// In fp32, one rounding an operation (step * code is exact), so all back ends agree bit by bit. fp8 has no minimum:
// step = fp16(largest / 448), code = e4m3(y / step). A group with NaN or infinities, or one whose step or minimum fp16
// cannot hold, gets the codes 0, and NaN for step and minimum: it comes back as NaN, never as a wrong number.
#pragma once

#include <cstdint>

#include "core/bitpack.h"
#include "core/dtype.h"
#include "core/page_blob.h"
#include "core/pages.h"

namespace tokencomp::kvquant {

using bitpack::Layout;
using page_blob::Axis;

constexpr int kMaxHeadDim = 256;
constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf("");

enum class Kind { integer, fp8 };

struct Format {
  int bits = 8;
  Kind kind = Kind::integer;
  Axis axis = Axis::token;
  int group = 0;  // channels of a token, or tokens of a channel
  Layout layout = Layout::linear;
  bool away = false;  // ties go away from zero instead of to even

  TC_HD int levels() const { return (1 << bits) - 1; }
};

// Sheets of `tokens` rows of D channels on one side (dense tensors), codes and parameters on the other. A sheet is all
// tokens of a sequence and head, or one page.
struct Sheets {
  void* x = nullptr;              // [B, H, S, D] elements of `dtype`, last dimension contiguous; or [sheets, tokens, D]
  const int* sequence = nullptr;  // [sheets] b * H + h, or null: the number of the sheet
  const int* index = nullptr;     // [sheets, tokens] rows of the sequence, -1 = empty slot; or null: all in order
  const float* pre_scale = nullptr;  // [B, H, D], or null
  const float* pre_bias = nullptr;   // [B, H, D], or null
  uint8_t* codes = nullptr;
  f16* params = nullptr;                      // (step, minimum): [tokens, D / group] or [tokens / group, D]
  const int* pages = nullptr;                 // [sheets] where a sheet's codes and parameters lie, or null: its number
  int64_t code_stride = 0, param_stride = 0;  // bytes from one place to the next
  int64_t stride_b = 0, stride_h = 0, stride_s = 0;
  int sheets = 0, tokens = 0, D = 0, H = 1, S = 0;
  int sequences = 0, places = 0;  // how many there are; numbers outside are skipped
  bool x_by_sheet = false;        // x is [sheets, tokens, D], contiguous
  PageTable table;                // without entries x is dense; else x are working pages, `stride_b` from one to the
  int source_pages = 0;           // next, their number, and `index` are slots of the row `sequence`
  Format format;
  DType dtype = DType::f32;
  int device = -1;

  TC_HD int groups_per_row() const { return format.axis == Axis::token ? D / format.group : D; }
  TC_HD int sequence_of(int sheet) const {
    const int s = sequence ? sequence[sheet] : sheet;
    return s >= 0 && s < sequences ? s : -1;
  }
  // Where a sheet's codes are, -1 where nowhere: such a sheet is skipped.
  TC_HD int place_of(int sheet) const {
    const int p = pages ? pages[sheet] : sheet;
    return p >= 0 && p < places ? p : -1;
  }
  // Element offset of a sheet's first row (of its head in each page) in x, -1 where there is no such sequence.
  TC_HD int64_t sheet_offset(int sheet) const {
    if (x_by_sheet) return int64_t(sheet) * tokens * D;
    const int s = sequence_of(sheet);
    if (s < 0) return -1;
    return (table.entry ? 0 : s / H * stride_b) + s % H * stride_h;
  }
  // Element offset of slot t's row in x, -1 where the slot is empty.
  TC_HD int64_t row_offset(int64_t first, int sheet, int t) const {
    if (x_by_sheet) return first + int64_t(t) * D;
    const int row = index ? index[int64_t(sheet) * tokens + t] : t;
    if (first < 0 || row < 0 || row >= S) return -1;
    return table.entry ? slot_offset(first, sheet, row) : first + row * stride_s;
  }
  // Per-channel vectors of a sheet.
  TC_HD const float* scale_of(int sheet) const { return map_of(pre_scale, sheet); }
  TC_HD const float* bias_of(int sheet) const { return map_of(pre_bias, sheet); }
  TC_HD uint8_t* codes_at(int place) const { return codes + place * code_stride; }
  TC_HD f16* params_at(int place) const {
    return reinterpret_cast<f16*>(reinterpret_cast<char*>(params) + place * param_stride);
  }
  TC_HD int row_bytes() const { return D * format.bits / 8; }

 private:
  TC_HD int64_t slot_offset(int64_t first, int sheet, int slot) const {
    const int s = sequence_of(sheet);
    const int32_t entry = table.row(s / H, s % H)[slot >> table.shift];
    if (uint32_t(entry) >= uint32_t(source_pages)) return -1;  // none, or not a working page
    return first + entry * stride_b + table.slot_in_page(slot) * stride_s;
  }
  TC_HD const float* map_of(const float* map, int sheet) const {
    const int s = sequence_of(sheet);
    return map && s >= 0 ? map + int64_t(s) * D : nullptr;
  }
};

// Step and minimum as stored; NaN where the group cannot be held. `poison` is 0, or NaN if an element is not finite.
struct Grid {
  float step = 0, minimum = 0;
  TC_HD bool usable() const { return step > 0; }
};

TC_HD float through_fp16(float x) { return to_float(from_float<f16>(x)); }

// Zeros lose their sign: which of -0 and 0 is the smallest depends on the order of comparisons.
TC_HD Grid make_grid(const Format& format, float smallest, float largest, float poison) {
  Grid g;
  if (format.kind == Kind::fp8) {
    const float size = largest > -smallest ? largest : -smallest;
    g.step = through_fp16(size / bitpack::kLargestFp8) + 0.0f;
  } else {
    g.step = through_fp16((largest - smallest) / float(format.levels()));
    g.minimum = through_fp16(smallest) + 0.0f;
  }
  const bool held = poison == 0 && g.step - g.step == 0 && g.minimum - g.minimum == 0;
  if (!held) g.step = g.minimum = kNaN;
  return g;
}

struct RepackArgs {
  const uint8_t* in = nullptr;  // [sequences, S, D * bits / 8]
  uint8_t* out = nullptr;
  int64_t units = 0;  // blocks of 16 tokens, or rows where both layouts are linear
  int D = 0, bits = 8;
  Layout from = Layout::linear, to = Layout::linear;
  int device = -1;
};

struct HadamardArgs {
  const void* x = nullptr;       // [B, H, S, D], last dimension contiguous
  const float* signs = nullptr;  // [D], or null
  void* out = nullptr;           // [B, H, S, D] contiguous
  int64_t stride_b = 0, stride_h = 0, stride_s = 0;
  int B = 0, H = 0, S = 0, D = 0;
  bool inverse = false;
  float norm = 1;
  DType dtype = DType::f32;
  int device = -1;

  TC_HD int64_t rows() const { return int64_t(B) * H * S; }
  TC_HD int64_t row_offset(int64_t row) const {
    const int64_t sequence = row / S;
    return sequence / H * stride_b + sequence % H * stride_h + row % S * stride_s;
  }
};

// Tokens of one partial sum of a statistic. A function of nothing: results do not depend on threads or device.
constexpr int kStatTokens = 512;
constexpr int kStatRun = 16;  // tokens summed before they are added to the others: fewer roundings in a row

struct StatsArgs {
  const void* x = nullptr;       // [B, H, S, D], last dimension contiguous
  const int* lengths = nullptr;  // [B], or null: S
  const int* starts = nullptr;   // [B], or null: 0
  float* partial = nullptr;      // [sequences, parts, 3, D]: min, max, sum
  float* out = nullptr;          // [4, B, H, D]: absmax, min, max, mean
  int64_t stride_b = 0, stride_h = 0, stride_s = 0;
  int B = 0, H = 0, S = 0, D = 0;
  DType dtype = DType::f32;
  int device = -1;

  TC_HD int parts() const { return (S + kStatTokens - 1) / kStatTokens; }
  TC_HD int begin(int b) const { return clamp(starts ? starts[b] : 0); }
  TC_HD int end(int b) const { return clamp(lengths ? lengths[b] : S); }

 private:
  TC_HD int clamp(int t) const { return t < 0 ? 0 : t > S ? S : t; }
};

}  // namespace tokencomp::kvquant
