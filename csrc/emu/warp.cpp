// Warp operations. Each lane leaves a pointer to its operand and parks; the last lane of the mask computes for all.
#include <cstring>

#include "emu/runtime.h"

namespace emu {
namespace {

std::string hex(uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof text, "%08x", mask);
  return text;
}

bool same_op(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }

// The meeting that this lane joins, opened if need be. Anything but agreement on operation, mask and place is
// divergence.
size_t join(Warp& warp, uint32_t mask, const char* op, Loc loc) {
  for (size_t i = 0; i < warp.open.size(); i++) {
    const Rendezvous& r = warp.open[i];
    if (!(r.mask & mask)) continue;
    if (r.mask != mask || !same_op(r.op, op)) {
      fail(std::string("warp divergence: ") + op + " mask " + hex(mask) + " meets " + r.op + " mask " + hex(r.mask) +
               " at " + place(r.loc),
           loc);
    }
    if (r.loc.line() != loc.line() || r.loc.column() != loc.column()) {
      fail(std::string("warp divergence: lanes of one warp call ") + op + " here and at " + place(r.loc), loc);
    }
    return i;
  }
  warp.open.push_back({mask, 0, op, loc, {}});
  return warp.open.size() - 1;
}

struct ShuffleOperand {
  unsigned char* value;
  size_t bytes;
  int source;
  unsigned char received[16];
};

struct VoteOperand {
  bool predicate;
  uint32_t result;
};

struct ReduceOperand {
  Reduce kind;
  bool is_signed;
  uint32_t value;
};

uint32_t combine(Reduce kind, bool is_signed, uint32_t a, uint32_t b) {
  const bool less = is_signed ? int32_t(a) < int32_t(b) : a < b;
  switch (kind) {
    case Reduce::add:
      return a + b;
    case Reduce::min:
      return less ? a : b;
    case Reduce::max:
      return less ? b : a;
    case Reduce::bit_and:
      return a & b;
    case Reduce::bit_or:
      return a | b;
    case Reduce::bit_xor:
      return a ^ b;
  }
  return 0;
}

uint32_t reduce_bits(uint32_t mask, Reduce kind, bool is_signed, uint32_t value, Loc loc) {
  static constexpr const char* names[] = {"__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
                                          "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  ReduceOperand mine{kind, is_signed, value};
  warp_collective(
      mask, names[int(kind)], &mine,
      [](void** lanes, uint32_t) {
        ReduceOperand* first = nullptr;
        for (int l = 0; l < kWarp; l++) {
          auto* x = static_cast<ReduceOperand*>(lanes[l]);
          if (!x) continue;
          if (!first)
            first = x;
          else
            first->value = combine(x->kind, x->is_signed, first->value, x->value);
        }
        for (int l = 0; l < kWarp; l++) {
          if (lanes[l]) static_cast<ReduceOperand*>(lanes[l])->value = first->value;
        }
      },
      loc);
  return mine.value;
}

}  // namespace

unsigned lane() { return unsigned(self->rank) % kWarp; }

void warp_collective(uint32_t mask, const char* op, void* operand, Compute compute, Loc loc) {
  Block& block = *self->block;
  const int first = self->rank / kWarp * kWarp, me = self->rank % kWarp;
  Warp& warp = block.warps[self->rank / kWarp];
  const unsigned lanes = std::min<unsigned>(kWarp, block.count - unsigned(first));
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if (!(mask >> me & 1)) fail(std::string(op) + ": the calling lane is not in its own mask", loc);
  if (mask & warp.exited) fail(std::string(op) + ": the mask names a lane that has already exited", loc);
  const size_t which = join(warp, mask, op, loc);
  Rendezvous& r = warp.open[which];
  r.operand[me] = operand;
  r.arrived |= 1u << me;
  if (r.arrived != mask) return give_way(State::collective, op, loc);
  void* operands[kWarp];
  for (int l = 0; l < kWarp; l++) operands[l] = mask >> l & 1 ? r.operand[l] : nullptr;
  warp.open.erase(warp.open.begin() + ptrdiff_t(which));
  compute(operands, mask);
  for (int l = 0; l < kWarp; l++) {
    if (mask >> l & 1) block.threads[first + l].state = State::ready;
  }
}

void warp_barrier(uint32_t mask, Loc loc) {
  warp_collective(
      mask, "__syncwarp", self,
      [](void** lanes, uint32_t) {
        Thread* members[kWarp];
        int count = 0;
        for (int l = 0; l < kWarp; l++) {
          if (lanes[l]) members[count++] = static_cast<Thread*>(lanes[l]);
        }
        race::meet(members, count);
      },
      loc);
}

void shuffle(uint32_t mask, const char* op, void* value, size_t bytes, int source, Loc loc) {
  ShuffleOperand mine{static_cast<unsigned char*>(value), bytes, source & (kWarp - 1), {}};
  if (bytes > sizeof mine.received) fail(std::string(op) + ": the value is too large", loc);
  const bool absent = (mask >> lane() & 1) && !(mask >> mine.source & 1) &&
                      unsigned(self->rank / kWarp * kWarp + mine.source) < self->block->count;
  if (absent)
    fail(std::string(op) + ": reads lane " + std::to_string(mine.source) + ", which its mask leaves out", loc);
  warp_collective(
      mask, op, &mine,
      [](void** lanes, uint32_t) {
        for (int l = 0; l < kWarp; l++) {
          if (!lanes[l]) continue;
          auto& to = *static_cast<ShuffleOperand*>(lanes[l]);
          const auto* from = static_cast<ShuffleOperand*>(lanes[to.source]);
          std::memcpy(to.received, from ? from->value : to.value, to.bytes);
        }
        for (int l = 0; l < kWarp; l++) {
          if (auto* x = static_cast<ShuffleOperand*>(lanes[l])) std::memcpy(x->value, x->received, x->bytes);
        }
      },
      loc);
}

uint32_t ballot(uint32_t mask, const char* op, bool predicate, Loc loc) {
  VoteOperand mine{predicate, 0};
  warp_collective(
      mask, op, &mine,
      [](void** lanes, uint32_t) {
        uint32_t bits = 0;
        for (int l = 0; l < kWarp; l++) {
          if (lanes[l] && static_cast<VoteOperand*>(lanes[l])->predicate) bits |= 1u << l;
        }
        for (int l = 0; l < kWarp; l++) {
          if (lanes[l]) static_cast<VoteOperand*>(lanes[l])->result = bits;
        }
      },
      loc);
  return mine.result;
}

int32_t reduce(uint32_t mask, Reduce kind, int32_t value, Loc loc) {
  return int32_t(reduce_bits(mask, kind, true, uint32_t(value), loc));
}

uint32_t reduce(uint32_t mask, Reduce kind, uint32_t value, Loc loc) {
  return reduce_bits(mask, kind, false, value, loc);
}

uint32_t match_any(uint32_t mask, uint64_t value, Loc loc) {
  struct Operand {
    uint64_t value;
    uint32_t result;
  } mine{value, 0};
  warp_collective(
      mask, "__match_any_sync", &mine,
      [](void** lanes, uint32_t) {
        for (int l = 0; l < kWarp; l++) {
          auto* x = static_cast<Operand*>(lanes[l]);
          for (int k = 0; x && k < kWarp; k++) {
            if (lanes[k] && static_cast<Operand*>(lanes[k])->value == x->value) x->result |= 1u << k;
          }
        }
      },
      loc);
  return mine.result;
}

}  // namespace emu
