// What a warp reads next, and its copies to shared memory, for decode over pages of several types. A step is 16, 32 or
// 64 slots of one page: as many as fit into a stage of the ring, so that copies of all types are about as large. A step
// lies within one group of tokens of the page's grids.
#pragma once

#include "cuda/decode_codes.h"
#include "cuda/decode_parts.h"

namespace tokencomp::decode {

constexpr int kStepTokens = 16;  // steps are one, two or four blocks of so many
constexpr int kMaxStepBlocks = 4;

// Keys or values of the pages of one type.
struct StepHalf {
  Tier tier = Tier::working;
  bool by_channel = false;
  int group_shift = 0;        // log2 of the channels, or tokens, of a group
  int bits = 16;              // of a code
  int codes = 0, params = 0;  // bytes from the beginning of the page
};

struct StepType {
  const uint8_t* base = nullptr;
  int64_t page_bytes = 0;
  int blocks = 1;  // of a step, at most
  StepHalf k, v;
};

// Type 0 are the working pages.
struct StepTypes {
  StepType type[kMaxPageTypes + 1];
  PageMaps maps;
  bool whole;  // rows of working pages are whole, aligned 16-byte chunks
};

// Bytes of a step's sections, in the order in which they lie in a stage.
struct Sections {
  int k_codes, k_params, v_codes, v_params;
  TC_HD int k_params_at() const { return k_codes; }
  TC_HD int v_codes_at() const { return k_codes + k_params; }
  TC_HD int v_params_at() const { return v_codes_at() + v_codes; }
  TC_HD int bytes() const { return v_params_at() + v_params; }
};

TC_HD int code_bytes(const StepHalf& h, int D, int tokens) { return tokens * D / 8 * h.bits; }
TC_HD int param_bytes(const StepHalf& h, int D, int tokens) {
  if (h.tier == Tier::working) return 0;
  return page_blob::kParamBytes * (h.by_channel ? D : tokens * D >> h.group_shift);
}
TC_HD Sections sections_of(const StepType& type, int D, int tokens) {
  return {code_bytes(type.k, D, tokens), param_bytes(type.k, D, tokens), code_bytes(type.v, D, tokens),
          param_bytes(type.v, D, tokens)};
}

// Slots [slot, slot + 16 * blocks) of the page of `entry`; bit i of `mask`: slot + i is looked at.
struct Step {
  int slot;  // -1: none
  int32_t entry;
  int blocks;
  uint32_t mask;
};

// The steps of a warp, in turn; the same for all lanes.
class Walk {
 public:
  __device__ Walk(const DecodeArgs& args, const Unit& unit, const StepTypes& types, int warp)
      : a(args), u(unit), t(types) {
    const int n = u.end - u.first;
    if (a.index) {
      chunk = n <= 64 ? 16 : 32;
      at = u.first + warp * chunk;
    } else {
      chunk = n <= 64 ? 16 : n <= 128 ? 32 : 64;
      at = u.first + warp * chunk;
      entry = load(at);
      ahead = load(following(at));
    }
  }

  __device__ __forceinline__ Step next() { return a.index ? next_listed() : next_slots(); }

 private:
  __device__ __forceinline__ int32_t load(int slot) const {
    return slot < u.end ? entry_of(a, u.b, u.kv, slot) : kNoPage;
  }
  __device__ __forceinline__ int past(int slot) const {  // chunks of the other warps lie between
    return slot & (chunk - 1) ? slot : slot + (kWarps - 1) * chunk;
  }
  // The first slot of the warp in the page after that of `slot`.
  __device__ __forceinline__ int following(int slot) const {
    const int step = min(chunk, a.table.page_size());
    return past((slot & -step) + step);
  }

  // Entries of pages are loaded a page ahead.
  __device__ __forceinline__ Step next_slots() {
    while (at < u.end) {
      const int step = min(chunk, a.table.page_size());
      const int blocks = entry < 0 ? step / kStepTokens : min(t.type[page_type(entry)].blocks, step / kStepTokens);
      const Step found{at, entry, blocks, ~0u};
      const int end = (at & -step) + step;
      at += blocks * kStepTokens;
      if (at == end) {
        at = past(at);
        entry = ahead;
        ahead = load(following(at));
      }
      if (found.entry >= 0) return found;
    }
    return {-1, kNoPage, 1, 0};
  }

  // A lane knows an entry of the list; entries of one block of 16 slots make a step.
  __device__ __forceinline__ Step next_listed() {
    const int lane = int(threadIdx.x) % 32;
    while (!waiting) {
      if (at >= u.end) return {-1, kNoPage, 1, 0};
      listed = lane < chunk ? candidate(a, u, at + lane) : -1;
      entry = listed >= 0 ? entry_of(a, u.b, u.kv, listed) : kNoPage;
      waiting = __ballot_sync(~0u, entry >= 0);
      at += kWarps * chunk;
    }
    const int leader = __ffs(int(waiting)) - 1;
    const int slot = __shfl_sync(~0u, listed, leader) & -kStepTokens, page = __shfl_sync(~0u, entry, leader);
    const bool same = (waiting >> lane & 1) && (listed & -kStepTokens) == slot;
    waiting &= ~__ballot_sync(~0u, same);
    return {slot, page, 1, __reduce_or_sync(~0u, same ? 1u << (listed & (kStepTokens - 1)) : 0u)};
  }

  const DecodeArgs& a;
  const Unit& u;
  const StepTypes& t;
  int at, chunk;
  int32_t entry = kNoPage, ahead = kNoPage;
  int listed = -1;
  uint32_t waiting = 0;  // lanes whose entries of the list have not been taken
};

// Added to the logits of a slot; -inf hides it from all rows. `floor` is that of the only query row; with several, rows
// are told apart later.
__device__ __forceinline__ float side_of(const DecodeArgs& a, const Unit& u, const Step& step, int i, int floor) {
  const int slot = step.slot + i;
  if (!(step.mask >> (i & 31) & 1) || slot >= end_of(a, a.T - 1, u.length)) return -INFINITY;
  const float side = a.key_bias ? a.key_bias[u.b * a.bias_stride_b + u.kv * a.bias_stride_h + slot] : 0.0f;
  if (a.T == 1 && a.window && !(position_of(a, u.b, u.kv, slot) > floor)) return -INFINITY;
  return fmaxf(side, -INFINITY);  // of a NaN too
}

// 16-byte chunks of a row that need not be aligned; zeros where there is no row and past its end.
__device__ __forceinline__ uint4 gather_halves(const uint16_t* row, int c, int n) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = row && c + 2 * i < n ? row[c + 2 * i] : 0,
                   high = row && c + 2 * i + 1 < n ? row[c + 2 * i + 1] : 0;
    word[i] = high << 16 | low;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// A warp's copies. Working rows lie in a stage as rows of chunks, chunk c of row r at position c ^ (r % 8).
template <int kD>
struct Copies {
  static constexpr int kChunks = kD / 8;
  const DecodeArgs& a;
  const Unit& u;
  const StepTypes& t;
  const int lane;

  // Starts the copies of a step and closes a group, be it an empty one.
  __device__ __forceinline__ void start(const Step& step, uint8_t* stage, int floor) const {
    if (step.slot >= 0) {
      if (page_type(step.entry) == 0) {
        const bool seen = lane < kStepTokens && side_of(a, u, step, lane, floor) > -INFINITY;
        const uint32_t there = __ballot_sync(~0u, seen);
        rows(a.k, step, there, stage);
        rows(a.v, step, there, stage + kStepTokens * kD * 2);
      } else {
        blobs(step, stage);
      }
    }
    gpu::cp_async_commit();
  }

 private:
  __device__ __forceinline__ void rows(const Pages& pages, const Step& step, uint32_t there, uint8_t* to) const {
    const auto* base = static_cast<const uint16_t*>(pages.base);
    const int64_t first = pages.offset(step.entry, u.kv, a.table.slot_in_page(step.slot));
#pragma unroll 2
    for (int i = lane; i < kStepTokens * kChunks; i += 32) {
      const int r = i / kChunks, c = i % kChunks;
      uint4* chunk = reinterpret_cast<uint4*>(to) + r * kChunks + (c ^ (r & 7));
      const uint16_t* row = base + first + r * pages.slot_stride;
      const bool valid = there >> r & 1;
      if (t.whole) {
        gpu::cp_async16(chunk, valid ? row + c * 8 : base, valid);
      } else {
        *chunk = gather_halves(valid ? row : nullptr, c * 8, pages.channels);
      }
    }
  }

  __device__ __forceinline__ void blobs(const Step& step, uint8_t* stage) const {
    const StepType& type = t.type[page_type(step.entry)];
    const uint8_t* page = type.base + page_number(step.entry) * type.page_bytes;
    const int first = a.table.slot_in_page(step.slot), tokens = step.blocks * kStepTokens;
    stage = half(type.k, page, first, tokens, stage);
    half(type.v, page, first, tokens, stage);
  }

  __device__ __forceinline__ uint8_t* half(const StepHalf& h, const uint8_t* page, int first, int tokens,
                                           uint8_t* to) const {
    to = section(page + h.codes + code_bytes(h, kD, first), code_bytes(h, kD, tokens), to);
    const int group = h.by_channel ? (first >> h.group_shift) * kD : first * kD >> h.group_shift;
    return section(page + h.params + group * page_blob::kParamBytes, param_bytes(h, kD, tokens), to);
  }

  __device__ __forceinline__ uint8_t* section(const uint8_t* from, int bytes, uint8_t* to) const {
#pragma unroll 2
    for (int i = lane * 16; i < bytes; i += 512) gpu::cp_async16(to + i, from + i);
    return to + bytes;
  }
};

}  // namespace tokencomp::decode
