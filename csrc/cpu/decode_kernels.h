// The boundary between the torch-aware side (decode.cpp) and the kernels compiled once per instruction set.
#pragma once

#include "core/decode.h"

namespace tokencomp::decode {

constexpr int kPartKeys = 512;             // of a part: fixed, so that results depend on the row's own keys alone
constexpr int64_t kCacheBytes = 48 << 20;  // more than any cache keeps of the pages of a call
constexpr int kChunkKeys = 64;             // keys and values of a chunk stay in L1 between the two products

// One part of the keys of a (sequence, kv head).
struct Task {
  int pair, part;
};

struct DecodeWork {
  const Task* tasks;
  const int* first_task;  // [B * Hkv + 1] tasks before those of a pair
  int64_t task_count;
  float* partial;  // [tasks, partial_floats] maxima, sums and weighted values of a part
  int64_t partial_floats;
  uint32_t* done;          // [B * Hkv] parts that are finished; 0 at the start
  unsigned char* scratch;  // of each slot
  int64_t scratch_bytes;
  int slots;  // tasks that run at a time
};

TC_HD constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int kRowPadding = 4, kValuePadding = 64, kKeyPadding = 32;
constexpr int kBlockKeys = 16;                         // of a chunk that are in one page, and in one group of it
constexpr int kMaxGroups = kMaxHeadDim / kKeyPadding;  // of a token's channels that are multiplied apart

TC_HD int64_t padded_rows(const DecodeArgs& a) { return round_up(a.rows(), kRowPadding); }
TC_HD int64_t padded_values(const DecodeArgs& a) { return round_up(a.Dv, kValuePadding); }
TC_HD int64_t partial_floats(const DecodeArgs& a) { return padded_rows(a) * (padded_values(a) + 2); }

// Queries; then by key: rows of both kinds, bias and slot; then logits and weights of a chunk, and one row of values.
TC_HD int64_t working_bytes(const DecodeArgs& a) {
  const int64_t queries = padded_rows(a) * round_up(a.D, kKeyPadding) * 4, keys = kPartKeys + kChunkKeys;
  return round_up(queries + keys * 24 + kChunkKeys * kRowPadding * 8 + padded_values(a) * 4, 64);
}

// Of what is multiplied in bytes: two parts of queries, folded queries and weights; weights and scales.
TC_HD int64_t byte_floats(const DecodeArgs& a) {
  const int64_t rows = padded_rows(a), parts = (rows + kRowPadding) * padded_values(a) + kChunkKeys * kRowPadding;
  return parts / 2 + kChunkKeys * kRowPadding + 2 * round_up(rows, 16);
}

// Of chunks with quantized pages: rows of numbers; grids; scales and biases of a block's sums; folded queries, sums and
// weights; the queries themselves, in two forms and a number each.
TC_HD int64_t coded_bytes(const DecodeArgs& a) {
  const int64_t width = padded_values(a), rows = padded_rows(a);
  const int64_t grids = 4 * kMaxGroups * kChunkKeys, blocks = 2 * (kChunkKeys / kBlockKeys + 1) * width;
  const int64_t folded = 3 * kRowPadding * width + kChunkKeys * kRowPadding;
  return 4 *
         (2 * kChunkKeys * width + grids + blocks + folded + rows * 3 * width + round_up(rows, 16) + byte_floats(a));
}

TC_HD int64_t scratch_bytes(const DecodeArgs& a) {
  return working_bytes(a) + (a.types.count ? round_up(coded_bytes(a), 64) : 0);
}

using DecodeKernel = void(const DecodeArgs& args, const DecodeWork& work);
using MergeKernel = void(const MergeArgs& args);

}  // namespace tokencomp::decode
