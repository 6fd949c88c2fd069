// wgmma: the matrix product of a warpgroup (four warps). The instruction is only recorded when its 128 threads have
// met; it is executed when its group is waited for, so operands overwritten or accumulators read too early give wrong
// results: the accumulators are poisoned meanwhile. Operands are read through the same 64-bit descriptors that hardware
// decodes.
#include <cstring>
#include <limits>

#include "emu/halves.h"
#include "emu/runtime.h"

namespace emu {
namespace {

using race::Kind;
constexpr int kRows = 64, kDepth = 16;

Warpgroup& my_warpgroup(const char* op, Loc loc) {
  require_sm90(op, loc);
  Block& b = *self->block;
  const size_t which = size_t(self->rank / kWarpgroup);
  if (which >= b.warpgroups.size()) fail(std::string(op) + ": needs a whole warpgroup of 128 threads", loc);
  return b.warpgroups[which];
}

// Meets the 128 threads; true in the last one, which does the work and wakes the others with wake().
bool meet(Warpgroup& group, const char* op, void* operand, Loc loc) {
  if (group.arrived == 0) {
    group.op = op;
    group.loc = loc;
  } else if (std::strcmp(group.op, op) || group.loc.line() != loc.line() || group.loc.column() != loc.column()) {
    fail(std::string("warpgroup divergence: ") + op + " meets " + group.op + " at " + place(group.loc), loc);
  }
  group.operand[self->rank % kWarpgroup] = operand;
  if (++group.arrived == kWarpgroup) return true;
  give_way(State::collective, op, loc);
  return false;
}

void wake(Warpgroup& group) {
  group.arrived = 0;
  Thread* first = self->block->threads + self->rank / kWarpgroup * kWarpgroup;
  for (int i = 0; i < kWarpgroup; i++) first[i].state = State::ready;
}

// A tile of 16-bit elements: groups of eight rows `stride` bytes apart, rows of 64 elements = 128 bytes inside a group,
// panels of 64 elements `leading` bytes apart, 16-byte chunks exchanged by the 128-byte swizzle (address bits 4-6 ^=
// bits 7-9). K-major tiles have k along a row and a single panel; others have k down the rows.
struct Descriptor {
  uint32_t start, leading, stride;
  unsigned swizzle;

  explicit Descriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) << 4),
        leading(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4),
        swizzle(unsigned(bits >> 62)) {}

  // Where elements (row, i .. i + 7) lie; i is a multiple of 8, so that they are one 16-byte chunk.
  const char* chunk(int row, int i, Loc loc) const {
    if (swizzle != 1) fail("wgmma: only descriptors with the 128-byte swizzle are supported", loc);
    uint32_t address = start + uint32_t(row / 8) * stride + uint32_t(row % 8) * 128 + uint32_t(i % 64) * 2;
    address += uint32_t(i / 64) * leading;
    address ^= (address >> 7 & 7) << 4;
    const Block& b = *self->block;
    const size_t offset = address - 1024;
    if (address < 1024 || offset + 16 > b.cluster->team->launch.shape.smem) {
      fail("wgmma: out of bounds: an operand is not in the block's shared memory", loc);
    }
    return b.arena + offset;
  }
};

// f(chunk, row, i) for each 16-byte chunk of `rows` rows of `width` elements.
template <class F>
void for_chunks(const Descriptor& tile, int first, int rows, int width, Loc loc, F&& f) {
  for (int row = first; row < first + rows; row++) {
    for (int i = 0; i < width; i += 8) f(tile.chunk(row, i, loc), row, i);
  }
}

// Each warp reads its own 16 rows of A and all of B, through the asynchronous proxy.
void touch_operands(const WgmmaOp& op, Loc loc) {
  if (!race::enabled) return;
  const Thread* first = self->block->threads + self->rank / kWarpgroup * kWarpgroup;
  const Descriptor a(op.a), b(op.b);
  for (int w = 0; w < 4; w++) {
    const auto touch = [&](const char* p, int, int) { race::touch(first[w * kWarp], p, 16, Kind::async_read, loc); };
    if (!op.fragment) for_chunks(a, w * 16, kRows / 4, kDepth, loc, touch);
    if (op.fragment)
      for_chunks(b, 0, kDepth, op.columns, loc, touch);
    else
      for_chunks(b, 0, op.columns, kDepth, loc, touch);
  }
}

// `side_by_side`: the tile's rows are k, and what it holds along them goes to rows of `out`.
template <Half type>
void read_tile(const Descriptor& tile, int rows, bool side_by_side, float (*out)[kDepth], Loc loc) {
  const auto read = [&](const char* p, int row, int i) {
    uint16_t bits[8];
    std::memcpy(bits, p, 16);
    for (int e = 0; e < 8; e++) (side_by_side ? out[i + e][row] : out[row][i + e]) = widen<type>(bits[e]);
  };
  if (side_by_side)
    for_chunks(tile, 0, kDepth, rows, loc, read);
  else
    for_chunks(tile, 0, rows, kDepth, loc, read);
}

// As mma.m16n8k16 has it, each warp for its own 16 rows.
template <Half type>
void read_fragments(const WgmmaOp& op, float (*out)[kDepth], Loc loc) {
  for (int t = 0; t < kWarpgroup; t++) {
    for (int i = 0; i < 4; i++) {
      const uint32_t pair = op.registers[t][i];
      if (pair != op.issued[size_t(t) * 4 + size_t(i)])
        fail("wgmma: a register of the operand a changed before wgmma_wait", loc);
      const int row = t / kWarp * 16 + t % kWarp / 4 + i % 2 * 8, k = t % 4 * 2 + i / 2 * 8;
      out[row][k] = widen<type>(uint16_t(pair));
      out[row][k + 1] = widen<type>(uint16_t(pair >> 16));
    }
  }
}

template <Half type>
void execute(const WgmmaOp& op, Loc loc) {
  static thread_local float a[kRows][kDepth], b[256][kDepth];
  if (op.fragment)
    read_fragments<type>(op, a, loc);
  else
    read_tile<type>(Descriptor(op.a), kRows, false, a, loc);
  read_tile<type>(Descriptor(op.b), op.columns, op.fragment, b, loc);
  const int values = op.columns / 2;  // accumulators of a thread
  for (int t = 0; t < kWarpgroup; t++) {
    if (!op.saved.empty()) std::memcpy(op.d[t], &op.saved[size_t(t) * size_t(values)], size_t(values) * sizeof(float));
    for (int i = 0; i < values; i++) {
      const int row = t / kWarp * 16 + t % kWarp / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float sum = op.accumulate ? op.d[t][i] : 0.0f;
      for (int k = 0; k < kDepth; k++) sum += a[row][k] * b[column][k];
      op.d[t][i] = sum;
    }
  }
}

bool pending_on(const Warpgroup& group, const float* d) {
  for (const auto& g : group.groups) {
    for (const WgmmaOp& op : g) {
      if (op.d[0] == d) return true;
    }
  }
  return false;
}

// Until the wait the accumulators belong to the instruction: whoever reads them gets NaN.
void save_and_poison(WgmmaOp& op) {
  const size_t values = size_t(op.columns) / 2;
  op.saved.resize(values * kWarpgroup);
  for (size_t t = 0; t < kWarpgroup; t++) {
    std::memcpy(&op.saved[t * values], op.d[t], values * sizeof(float));
    std::fill_n(op.d[t], values, std::numeric_limits<float>::quiet_NaN());
  }
}

struct Operand {
  float* d;
  uint64_t a;
  const uint32_t* registers;  // of a; null: it lies in shared memory
  uint64_t b;
  bool accumulate;
};

// The thread that comes last records the product for all.
void record(WgmmaOp op, Operand mine, Loc loc) {
  Warpgroup& group = my_warpgroup("wgmma", loc);
  if (!meet(group, "wgmma", &mine, loc)) return;
  if (!group.fenced) fail("wgmma: without wgmma_fence after the accumulators were last touched", loc);
  for (int t = 0; t < kWarpgroup; t++) {
    const auto& x = *static_cast<Operand*>(group.operand[t]);
    if (x.a != op.a || x.b != op.b || x.accumulate != op.accumulate)
      fail("wgmma: the threads of a warpgroup disagree on operands", loc);
    op.d[t] = x.d;
    op.registers[t] = x.registers;
    if (op.fragment) op.issued.insert(op.issued.end(), x.registers, x.registers + 4);
  }
  touch_operands(op, loc);
  if (!pending_on(group, op.d[0])) save_and_poison(op);
  if (group.groups.empty()) group.groups.emplace_back();
  group.groups.back().push_back(std::move(op));
  wake(group);
}

}  // namespace

void wgmma(Half type, int columns, float* d, uint64_t a, uint64_t b, bool accumulate, Loc loc) {
  record({type, columns, a, b, accumulate}, {d, a, nullptr, b, accumulate}, loc);
}

void wgmma_fragment(Half type, int columns, float* d, const uint32_t* a, uint64_t b, bool accumulate, Loc loc) {
  record({type, columns, 0, b, accumulate, true}, {d, 0, a, b, accumulate}, loc);
}

// What all threads of a warpgroup do together and has no effect here.
void require_warpgroup(const char* op, Loc loc) {
  Warpgroup& group = my_warpgroup(op, loc);
  if (meet(group, op, nullptr, loc)) wake(group);
}

void wgmma_fence(Loc loc) {
  Warpgroup& group = my_warpgroup("wgmma_fence", loc);
  if (!meet(group, "wgmma_fence", nullptr, loc)) return;
  group.fenced = true;
  wake(group);
}

void wgmma_commit(Loc loc) {
  Warpgroup& group = my_warpgroup("wgmma_commit", loc);
  if (!meet(group, "wgmma_commit", nullptr, loc)) return;
  if (group.groups.empty()) group.groups.emplace_back();
  group.groups.emplace_back();
  wake(group);
}

void wgmma_wait(int pending, Loc loc) {
  Warpgroup& group = my_warpgroup("wgmma_wait", loc);
  if (!meet(group, "wgmma_wait", nullptr, loc)) return;
  while (group.groups.size() > size_t(pending) + 1) {
    for (const WgmmaOp& op : group.groups.front()) {
      touch_operands(op, loc);
      op.type == Half::f16 ? execute<Half::f16>(op, loc) : execute<Half::bf16>(op, loc);
    }
    group.groups.erase(group.groups.begin());
  }
  if (pending == 0) group.fenced = false;
  wake(group);
}

}  // namespace emu
