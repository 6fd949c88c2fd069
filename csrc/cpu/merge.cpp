// Token merging on the CPU, torch side: working memory, threads over items and rows, registration. The arithmetic is in
// merge_kernels.cpp and merge_match_kernels.cpp, once per instruction set; maps are made in merge_map.cpp.
#include "op/merge.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <vector>

#include "cpu/floats.h"
#include "cpu/isa.h"
#include "cpu/merge_kernels.h"
#include "cpu/merge_map.h"
#include "cpu/parallel.h"

namespace tokencomp::cpu {

#define TOKENCOMP_DECLARE(isa)         \
  namespace isa {                      \
  merge::PackKernel pack_match;        \
  merge::MatchKernel match_rows;       \
  merge::PackEnergyKernel pack_energy; \
  merge::EnergyKernel energy_rows;     \
  merge::MergeKernel merge_rows;       \
  }
TOKENCOMP_FOR_EACH_ISA(TOKENCOMP_DECLARE)

namespace {

using namespace merge;

constexpr PackKernel* kPackMatch[kIsaCount] = TOKENCOMP_ISA_TABLE(pack_match);
constexpr MatchKernel* kMatchRows[kIsaCount] = TOKENCOMP_ISA_TABLE(match_rows);
constexpr PackEnergyKernel* kPackEnergy[kIsaCount] = TOKENCOMP_ISA_TABLE(pack_energy);
constexpr EnergyKernel* kEnergyRows[kIsaCount] = TOKENCOMP_ISA_TABLE(energy_rows);
constexpr MergeKernel* kMergeRows[kIsaCount] = TOKENCOMP_ISA_TABLE(merge_rows);

// Work that is worth another thread: about 50 us, what waking one costs under a passive wait policy.
constexpr int64_t kTaskProducts = 1 << 21;
constexpr int64_t kTaskBytes = 1 << 19;
constexpr int64_t kTaskTokens = 1 << 15;

// Working memory of a match or an energy for each thread: the packed columns of an item, and a block of rows.
class ItemMemory {
 public:
  ItemMemory(int slots, int64_t padded, int channels)
      : padded_(padded),
        channels_(channels),
        slot_(padded * (channels + 2) + int64_t(kRowBlock) * channels + kLine),
        memory_(slots * slot_) {}
  Columns columns(int64_t slot) const {
    float* data = memory_.get() + slot * slot_;
    return {data, data + padded_ * channels_, data + padded_ * (channels_ + 1)};
  }
  float* rows(int64_t slot) const { return columns(slot).position + padded_; }

 private:
  static constexpr int kLine = 16;  // floats between the threads' memories, so that no line is shared
  int64_t padded_, channels_, slot_;
  Floats memory_;
};

// How many threads are worth waking for `work`, of which `task` is worth one.
int slots_for(int64_t work, int64_t task) {
  const int64_t worth = work / task + 1, threads = thread_count();
  return int(worth < threads ? worth : threads);
}

// For every item: pack(b, begin, end, columns), then fold(b, begin, end, columns, rows) over blocks of rows. Items go
// to threads where there are enough of them, else the blocks of one item after the other do.
template <class Pack, class Fold>
void for_each_item(int B, int rows, int columns, int channels, Pack&& pack, Fold&& fold) {
  const int64_t padded = padded_columns(columns), scratch = int64_t(kRowBlock) * channels;
  const int64_t products = int64_t(rows) * columns * channels + 1;
  if (B >= thread_count()) {
    const int slots = slots_for(products * B, kTaskProducts);
    const ItemMemory memory(slots, padded, channels);
    for_each_task(B, slots, [&](int64_t b, int64_t slot) {
      pack(int(b), 0, int(padded), memory.columns(slot));
      fold(int(b), 0, rows, memory.columns(slot), memory.rows(slot));
    });
    return;
  }
  const ItemMemory memory(1, padded, channels);
  const int64_t pads = padded / kColumnPad, blocks = (rows + kRowBlock - 1) / kRowBlock;
  for (int b = 0; b < B; ++b) {
    parallel_for(pads, kTaskBytes / (kColumnPad * channels) + 1, [&](int64_t begin, int64_t end) {
      pack(b, int(begin) * kColumnPad, int(end) * kColumnPad, memory.columns(0));
    });
    parallel_for(blocks, kTaskProducts * blocks / products + 1, [&](int64_t begin, int64_t end) {
      const Floats row_memory(scratch);
      const int last = int(end) * kRowBlock;
      fold(b, int(begin) * kRowBlock, last < rows ? last : rows, memory.columns(0), row_memory.get());
    });
  }
}

void match_all(const MatchArgs& m) {
  PackKernel* pack = select_isa(kPackMatch);
  MatchKernel* rows = select_isa(kMatchRows);
  for_each_item(
      m.B, m.a.R, m.b.R, m.C + m.C2,
      [&](int item, int begin, int end, const Columns& columns) { pack(m, item, begin, end, columns); },
      [&](int item, int begin, int end, const Columns& columns, float* scratch) {
        rows(m, item, begin, end, columns, scratch);
      });
}

std::tuple<Tensor, Tensor> cosine_match(const Tensor& a, const Tensor& b, std::optional<Tensor> a_index,
                                        std::optional<Tensor> b_index, std::optional<Tensor> a2,
                                        std::optional<Tensor> b2, double alpha, std::optional<Tensor> a_weight,
                                        std::optional<Tensor> b_weight, int64_t band, int64_t protect_a,
                                        int64_t protect_b, std::optional<Tensor> mask_a, std::optional<Tensor> mask_b,
                                        std::optional<double> min_similarity, int64_t top, bool exclude_self) {
  MatchArgs m = make_match_args(a, b, a_index, b_index, a2, b2, alpha, a_weight, b_weight, band, protect_a, protect_b,
                                mask_a, mask_b, min_similarity, top, exclude_self);
  MatchOutputs out = make_match_outputs(m, a);
  match_all(m);
  return {out.value, out.index};
}

Tensor energy_score(const Tensor& x, double margin, double alpha, std::string kind, int64_t prefix,
                    std::optional<Tensor> mask) {
  EnergyArgs e = make_energy_args(x, margin, alpha, kind, prefix, mask);
  Tensor out = make_energy_output(e, x);
  PackEnergyKernel* pack = select_isa(kPackEnergy);
  EnergyKernel* rows = select_isa(kEnergyRows);
  for_each_item(
      e.B, e.x.N, e.x.N, e.C,
      [&](int item, int begin, int end, const Columns& columns) { pack(e, item, begin, end, columns); },
      [&](int item, int begin, int end, const Columns& columns, float* scratch) {
        int members = 0;
        for (int j = 0; j < e.x.N; ++j) members += columns.factor[j] == columns.factor[j];
        rows(e, item, begin, end, members, columns, scratch);
      });
  return out;
}

void map_all(const MapArgs& m) {
  parallel_for(m.B, kTaskTokens / (m.N + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int b = int(begin); b < end; ++b) map_item(m, b);
  });
}

Tensor bipartite_map(const Tensor& value, const Tensor& index, int64_t r, int64_t tokens, int64_t prefix, bool distill,
                     std::string order, std::optional<Tensor> a_tokens, std::optional<Tensor> b_tokens,
                     std::optional<Tensor> rest_tokens) {
  MapArgs m = make_map_args(value, index, r, tokens, prefix, distill, order, a_tokens, b_tokens, rest_tokens);
  Tensor out = make_map_output(m, value);
  map_all(m);
  return out;
}

// Stable counting sort of one item's tokens by output row.
void group_tokens(const MergeArgs& m, int b, int* first, int* token) {
  for (int g = 0; g <= m.M; ++g) first[g] = 0;
  for (int i = 0; i < m.N; ++i) {
    if (const int g = m.group(b, i); g >= 0) ++first[g];
  }
  int next = 0;
  for (int g = 0; g <= m.M; ++g) {
    const int count = first[g];
    first[g] = next;
    next += count;
  }
  for (int i = 0; i < m.N; ++i) {
    if (const int g = m.group(b, i); g >= 0) token[first[g]++] = i;
  }
  for (int g = m.M; g > 0; --g) first[g] = first[g - 1];  // each now points behind its group
  first[0] = 0;
}

// Rows of the output that no token maps to.
void clear_empty_rows(const MergeArgs& m, int b, const int* first, int64_t row_bytes) {
  for (int g = 0; g < m.M; ++g) {
    if (first[g] < first[g + 1]) continue;
    const int64_t at = int64_t(b) * m.M + g;
    std::memset(static_cast<char*>(m.y) + at * row_bytes, 0, size_t(row_bytes));
    m.out_size[at] = 0;
  }
}

int64_t row_bytes(const MergeArgs& m) { return int64_t(m.C) * (m.dtype == DType::f32 ? 4 : 2); }

// The groups of every item, in working memory of one piece an item or a thread.
class GroupMemory {
 public:
  GroupMemory(const MergeArgs& m, int64_t pieces) : M_(m.M), piece_(m.M + 1 + m.N), memory_(new int[pieces * piece_]) {}
  Groups get(int64_t piece) const { return {first(piece), first(piece) + M_ + 1}; }
  void fill(const MergeArgs& m, int b, int64_t piece) const {
    group_tokens(m, b, first(piece), first(piece) + M_ + 1);
    clear_empty_rows(m, b, first(piece), row_bytes(m));
  }

 private:
  int* first(int64_t piece) const { return memory_.get() + piece * piece_; }
  int64_t M_, piece_;
  std::unique_ptr<int[]> memory_;
};

// Items go to threads where there are enough of them: one of them groups its tokens and merges them at once.
void merge_items(const MergeArgs& m, MergeKernel* merge) {
  const int slots = slots_for(int64_t(m.B) * m.N * row_bytes(m), kTaskBytes);
  const int64_t mean = m.mode == Mode::mlerp ? m.C : 0;
  const GroupMemory groups(m, slots);
  const Floats row(slots * mean);
  for_each_task(m.B, slots, [&](int64_t b, int64_t slot) {
    groups.fill(m, int(b), slot);
    merge(m, int(b), 0, m.N, groups.get(slot), row.get() + slot * mean);
  });
}

// Else all rows of all items are shared among them.
void merge_shared(const MergeArgs& m, MergeKernel* merge) {
  const GroupMemory groups(m, m.B);
  for (int b = 0; b < m.B; ++b) groups.fill(m, b, b);
  parallel_for(int64_t(m.B) * m.N, kTaskBytes / row_bytes(m) + 1, [&](int64_t begin, int64_t end) {
    const Floats row(m.mode == Mode::mlerp ? m.C : 0);
    for (int64_t at = begin; at < end;) {
      const int b = int(at / m.N), from = int(at % m.N);
      const int to = int(end - at < m.N - from ? from + (end - at) : m.N);
      merge(m, b, from, to, groups.get(b), row.get());
      at += to - from;
    }
  });
}

void merge_all(const MergeArgs& m) {
  MergeKernel* merge = select_isa(kMergeRows);
  if (m.B >= thread_count()) {
    merge_items(m, merge);
  } else {
    merge_shared(m, merge);
  }
}

std::tuple<Tensor, Tensor> merge_tokens(const Tensor& x, const Tensor& token_map, int64_t out_tokens,
                                        std::optional<Tensor> size, std::optional<Tensor> weight, std::string mode) {
  MergeArgs m = make_merge_args(x, token_map, out_tokens, size, weight, mode);
  MergeOutputs out = make_merge_outputs(m, x);
  merge_all(m);
  return {out.y, out.size};
}

// Match, map and merge of one item after the other: threads wake once, and while one of them multiplies the other
// copies.
void step_items(const BipartiteArgs& all) {
  const MatchArgs& match = all.match;
  const MergeArgs& m = all.merge;
  PackKernel* pack = select_isa(kPackMatch);
  MatchKernel* fold = select_isa(kMatchRows);
  MergeKernel* merge = select_isa(kMergeRows);
  const int64_t padded = padded_columns(match.b.R), mean = m.mode == Mode::mlerp ? m.C : 0;
  const int64_t products = int64_t(match.a.R) * match.b.R * match.C;
  const int64_t copied = int64_t(m.N) * row_bytes(m) * (kTaskProducts / kTaskBytes);
  const int slots = slots_for(m.B * (products + copied), kTaskProducts);
  const ItemMemory memory(slots, padded, match.C);
  const GroupMemory groups(m, slots);
  const Floats row(slots * mean);
  for_each_task(m.B, slots, [&](int64_t item, int64_t slot) {
    const int b = int(item);
    pack(match, b, 0, int(padded), memory.columns(slot));
    fold(match, b, 0, match.a.R, memory.columns(slot), memory.rows(slot));
    map_item(all.map, b);
    groups.fill(m, b, slot);
    merge(m, b, 0, m.N, groups.get(slot), row.get() + slot * mean);
  });
}

std::tuple<Tensor, Tensor, Tensor> bipartite_merge(const Tensor& x, const Tensor& metric, int64_t r,
                                                   std::optional<Tensor> size, std::optional<Tensor> weight,
                                                   int64_t prefix, std::string order, std::string mode,
                                                   std::optional<Tensor> a_tokens, std::optional<Tensor> b_tokens,
                                                   std::optional<Tensor> rest_tokens) {
  BipartiteArgs all =
      make_bipartite_args(x, metric, r, size, weight, prefix, order, mode, a_tokens, b_tokens, rest_tokens);
  BipartiteOutputs out = make_bipartite_outputs(all, x);
  const int64_t rows = int64_t(all.map.B) * all.map.Ra;
  const Floats value(rows);
  const std::unique_ptr<int[]> index(new int[size_t(rows)]);
  all.through(value.get(), index.get());
  if (all.map.B >= thread_count()) {
    step_items(all);
  } else {
    match_all(all.match);
    map_all(all.map);
    merge_all(all.merge);
  }
  return {out.merged.y, out.merged.size, out.map};
}

}  // namespace
}  // namespace tokencomp::cpu

STABLE_TORCH_LIBRARY_IMPL(tokencomp, CPU, m) {
  m.impl("cosine_match", TORCH_BOX(&tokencomp::cpu::cosine_match));
  m.impl("energy_score", TORCH_BOX(&tokencomp::cpu::energy_score));
  m.impl("bipartite_map", TORCH_BOX(&tokencomp::cpu::bipartite_map));
  m.impl("merge_tokens", TORCH_BOX(&tokencomp::cpu::merge_tokens));
  m.impl("bipartite_merge", TORCH_BOX(&tokencomp::cpu::bipartite_merge));
}
