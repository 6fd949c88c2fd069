// Warp-wide matrix instructions: ldmatrix, stmatrix and mma. Layouts are those of the PTX documentation; with
// g = lane / 4 and t = lane % 4, an accumulator register pair holds row g (and g + 8), columns 2t and 2t + 1.
#include "emu/halves.h"
#include "emu/record.h"
#include "emu/runtime.h"

namespace emu {
namespace {

constexpr uint32_t kAllLanes = ~0u;

void check_whole_warp(const char* op, Loc loc) {
  if (self->block->count - unsigned(self->rank / kWarp * kWarp) < kWarp) {
    fail(std::string(op) + ": needs a whole warp, the block's last one is partial", loc);
  }
}

void check_row(const char* op, const void* row, Loc loc) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    fail(std::string(op) + ": misaligned: rows start at multiples of 16 bytes", loc);
  const Block& b = *self->block;
  const auto* p = static_cast<const char*>(row);
  const size_t smem = b.cluster->team->launch.shape.smem;
  if (!b.arena || p < b.arena || p + 16 > b.arena + smem) {
    fail(std::string(op) + ": out of bounds: the row is not in the block's shared memory", loc);
  }
}

struct RowOperand {
  uint16_t* row;
  uint32_t* r;
};

// Element (i, j) of 8x8 matrix m lies in the row that lane 8m + i points to; lane l holds (l / 4, 2 (l % 4)) and its
// right neighbour, or with `transpose` (2 (l % 4), l / 4) and its lower neighbour.
template <bool transpose>
uint16_t& element(void** lanes, int m, int l, int half) {
  const int a = l / 4, b = l % 4 * 2 + half;
  const int i = transpose ? b : a, j = transpose ? a : b;
  return static_cast<RowOperand*>(lanes[m * 8 + i])->row[j];
}

void record_rows(void** lanes) {
  if (!record::counting) return;
  const void* rows[kWarp];
  for (int l = 0; l < kWarp; l++) rows[l] = static_cast<RowOperand*>(lanes[l])->row;
  record::matrix_rows(rows);
}

template <bool transpose>
void load_matrices(void** lanes, uint32_t) {
  record_rows(lanes);
  for (int m = 0; m < 4; m++) {
    for (int l = 0; l < kWarp; l++) {
      const uint32_t low = element<transpose>(lanes, m, l, 0), high = element<transpose>(lanes, m, l, 1);
      static_cast<RowOperand*>(lanes[l])->r[m] = low | high << 16;
    }
  }
}

template <bool transpose>
void store_matrices(void** lanes, uint32_t) {
  record_rows(lanes);
  for (int m = 0; m < 4; m++) {
    for (int l = 0; l < kWarp; l++) {
      const uint32_t pair = static_cast<RowOperand*>(lanes[l])->r[m];
      element<transpose>(lanes, m, l, 0) = uint16_t(pair);
      element<transpose>(lanes, m, l, 1) = uint16_t(pair >> 16);
    }
  }
}

struct MoveOperand {
  uint32_t a, d;
};

void transpose_matrix(void** lanes, uint32_t) {
  for (int l = 0; l < kWarp; l++) {
    uint32_t pair = 0;
    for (int half = 0; half < 2; half++) {
      const int row = l % 4 * 2 + half, column = l / 4;
      const uint32_t from = static_cast<MoveOperand*>(lanes[row * 4 + column / 2])->a;
      pair |= (from >> 16 * (column % 2) & 0xffffu) << 16 * half;
    }
    static_cast<MoveOperand*>(lanes[l])->d = pair;
  }
}

struct MmaOperand {
  float* d;
  const uint32_t *a, *b;
};

using Row8 [[gnu::vector_size(32)]] = float;

template <Half type>
void multiply(void** lanes, uint32_t) {
  float a[16][16];
  alignas(32) float b[16][8], c[16][8];
  for (int l = 0; l < kWarp; l++) {
    const auto& x = *static_cast<MmaOperand*>(lanes[l]);
    const int g = l / 4;
    for (int half = 0; half < 2; half++) {
      const int t = l % 4 * 2 + half, shift = 16 * half;
      a[g][t] = widen<type>(uint16_t(x.a[0] >> shift));
      a[g + 8][t] = widen<type>(uint16_t(x.a[1] >> shift));
      a[g][t + 8] = widen<type>(uint16_t(x.a[2] >> shift));
      a[g + 8][t + 8] = widen<type>(uint16_t(x.a[3] >> shift));
      b[t][g] = widen<type>(uint16_t(x.b[0] >> shift));
      b[t + 8][g] = widen<type>(uint16_t(x.b[1] >> shift));
      c[g][t] = x.d[half];
      c[g + 8][t] = x.d[2 + half];
    }
  }
  // Four rows at a time: independent sums hide the latency of the additions.
  for (int i = 0; i < 16; i += 4) {
    Row8 sum[4];
    for (int r = 0; r < 4; r++) sum[r] = *reinterpret_cast<const Row8*>(c[i + r]);
    for (int k = 0; k < 16; k++) {
      const Row8 row = *reinterpret_cast<const Row8*>(b[k]);
      for (int r = 0; r < 4; r++) sum[r] += a[i + r][k] * row;
    }
    for (int r = 0; r < 4; r++) *reinterpret_cast<Row8*>(c[i + r]) = sum[r];
  }
  for (int l = 0; l < kWarp; l++) {
    float* d = static_cast<MmaOperand*>(lanes[l])->d;
    for (int half = 0; half < 2; half++) {
      d[half] = c[l / 4][l % 4 * 2 + half];
      d[2 + half] = c[l / 4 + 8][l % 4 * 2 + half];
    }
  }
}

struct IntegerMmaOperand {
  int32_t* d;
  const uint32_t *a, *b;
};

// As m16n8k16, with four consecutive values of k in a register instead of two.
void multiply_s8(void** lanes, uint32_t) {
  int8_t a[16][32], b[32][8];
  for (int l = 0; l < kWarp; l++) {
    const auto& x = *static_cast<IntegerMmaOperand*>(lanes[l]);
    const int g = l / 4;
    for (int byte = 0; byte < 4; byte++) {
      const int k = l % 4 * 4 + byte, shift = 8 * byte;
      a[g][k] = int8_t(x.a[0] >> shift);
      a[g + 8][k] = int8_t(x.a[1] >> shift);
      a[g][k + 16] = int8_t(x.a[2] >> shift);
      a[g + 8][k + 16] = int8_t(x.a[3] >> shift);
      b[k][g] = int8_t(x.b[0] >> shift);
      b[k + 16][g] = int8_t(x.b[1] >> shift);
    }
  }
  for (int l = 0; l < kWarp; l++) {
    int32_t* d = static_cast<IntegerMmaOperand*>(lanes[l])->d;
    for (int i = 0; i < 4; i++) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      uint32_t sum = uint32_t(d[i]);  // the sum wraps
      for (int k = 0; k < 32; k++) sum += uint32_t(int(a[row][k]) * int(b[k][column]));
      d[i] = int32_t(sum);
    }
  }
}

}  // namespace

void ldmatrix_x4(uint32_t* r, const void* row, bool transpose, Loc loc) {
  const char* op = transpose ? "ldmatrix_x4_trans" : "ldmatrix_x4";
  check_whole_warp(op, loc);
  check_row(op, row, loc);
  race::touch(*self, row, 16, race::Kind::read, loc);
  RowOperand mine{static_cast<uint16_t*>(const_cast<void*>(row)), r};
  warp_collective(kAllLanes, op, &mine, transpose ? load_matrices<true> : load_matrices<false>, loc);
}

void stmatrix_x4(void* row, const uint32_t* r, bool transpose, Loc loc) {
  const char* op = transpose ? "stmatrix_x4_trans" : "stmatrix_x4";
  require_sm90(op, loc);
  check_whole_warp(op, loc);
  check_row(op, row, loc);
  race::touch(*self, row, 16, race::Kind::write, loc);
  RowOperand mine{static_cast<uint16_t*>(row), const_cast<uint32_t*>(r)};
  warp_collective(kAllLanes, op, &mine, transpose ? store_matrices<true> : store_matrices<false>, loc);
}

uint32_t movmatrix_trans(uint32_t a, Loc loc) {
  check_whole_warp("movmatrix_trans", loc);
  MoveOperand mine{a, 0};
  warp_collective(kAllLanes, "movmatrix_trans", &mine, transpose_matrix, loc);
  return mine.d;
}

void mma_m16n8k16(Half type, float* d, const uint32_t* a, const uint32_t* b, Loc loc) {
  const bool f16 = type == Half::f16;
  check_whole_warp("mma_m16n8k16", loc);
  MmaOperand mine{d, a, b};
  warp_collective(kAllLanes, f16 ? "mma_m16n8k16 f16" : "mma_m16n8k16 bf16", &mine,
                  f16 ? multiply<Half::f16> : multiply<Half::bf16>, loc);
}

void mma_m16n8k32_s8(int32_t* d, const uint32_t* a, const uint32_t* b, Loc loc) {
  check_whole_warp("mma_m16n8k32_s8", loc);
  IntegerMmaOperand mine{d, a, b};
  warp_collective(kAllLanes, "mma_m16n8k32_s8", &mine, multiply_s8, loc);
}

}  // namespace emu
