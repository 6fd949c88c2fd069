// Token merging on the CPU, torch side: working memory, threads over items and rows, registration. The arithmetic is in
// merge_kernels.cpp and merge_match_kernels.cpp, once per instruction set; maps are made in merge_map.cpp.
#include "op/merge.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <new>
#include <vector>

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

// Floats that start on a cache line, so that no vector straddles two.
class Floats {
 public:
  explicit Floats(int64_t count)
      : memory_(static_cast<float*>(::operator new(size_t(count > 0 ? count : 1) * sizeof(float), kLine))) {}
  float* get() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<float[], Free> memory_;
};

struct ColumnMemory {
  Floats data, factor, position;
  ColumnMemory(int64_t padded, int channels) : data(padded * channels), factor(padded), position(padded) {}
  Columns get() const { return {data.get(), factor.get(), position.get()}; }
};

// For every item: pack(b, begin, end, columns), then fold(b, begin, end, columns, rows) over blocks of rows. Items go
// to threads where there are enough of them, else the blocks of one item after the other do.
template <class Pack, class Fold>
void for_each_item(int B, int rows, int columns, int channels, Pack&& pack, Fold&& fold) {
  const int64_t padded = padded_columns(columns), scratch = int64_t(kRowBlock) * channels;
  const int64_t products = int64_t(rows) * columns * channels + 1;
  if (B >= thread_count()) {
    parallel_for(B, kTaskProducts / products + 1, [&](int64_t begin, int64_t end) {
      const ColumnMemory memory(padded, channels);
      const Floats row_memory(scratch);
      for (int b = int(begin); b < end; ++b) {
        pack(b, 0, int(padded), memory.get());
        fold(b, 0, rows, memory.get(), row_memory.get());
      }
    });
    return;
  }
  const ColumnMemory memory(padded, channels);
  const int64_t pads = padded / kColumnPad, blocks = (rows + kRowBlock - 1) / kRowBlock;
  for (int b = 0; b < B; ++b) {
    parallel_for(pads, kTaskBytes / (kColumnPad * channels) + 1, [&](int64_t begin, int64_t end) {
      pack(b, int(begin) * kColumnPad, int(end) * kColumnPad, memory.get());
    });
    parallel_for(blocks, kTaskProducts * blocks / products + 1, [&](int64_t begin, int64_t end) {
      const Floats row_memory(scratch);
      const int last = int(end) * kRowBlock;
      fold(b, int(begin) * kRowBlock, last < rows ? last : rows, memory.get(), row_memory.get());
    });
  }
}

std::tuple<Tensor, Tensor> cosine_match(const Tensor& a, const Tensor& b, std::optional<Tensor> a_index,
                                        std::optional<Tensor> b_index, std::optional<Tensor> a2,
                                        std::optional<Tensor> b2, double alpha, std::optional<Tensor> a_weight,
                                        std::optional<Tensor> b_weight, int64_t band, int64_t protect_a,
                                        int64_t protect_b, std::optional<Tensor> mask_a, std::optional<Tensor> mask_b,
                                        std::optional<double> min_similarity, int64_t top) {
  MatchArgs m = make_match_args(a, b, a_index, b_index, a2, b2, alpha, a_weight, b_weight, band, protect_a, protect_b,
                                mask_a, mask_b, min_similarity, top);
  MatchOutputs out = make_match_outputs(m, a);
  PackKernel* pack = select_isa(kPackMatch);
  MatchKernel* rows = select_isa(kMatchRows);
  for_each_item(
      m.B, m.a.R, m.b.R, m.C + m.C2,
      [&](int item, int begin, int end, const Columns& columns) { pack(m, item, begin, end, columns); },
      [&](int item, int begin, int end, const Columns& columns, float* scratch) {
        rows(m, item, begin, end, columns, scratch);
      });
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

Tensor bipartite_map(const Tensor& value, const Tensor& index, int64_t r, int64_t tokens, int64_t prefix, bool distill,
                     std::string order, std::optional<Tensor> a_tokens, std::optional<Tensor> b_tokens,
                     std::optional<Tensor> rest_tokens) {
  MapArgs m = make_map_args(value, index, r, tokens, prefix, distill, order, a_tokens, b_tokens, rest_tokens);
  Tensor out = make_map_output(m, value);
  parallel_for(m.B, kTaskTokens / (m.N + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int b = int(begin); b < end; ++b) map_item(m, b);
  });
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

std::tuple<Tensor, Tensor> merge_tokens(const Tensor& x, const Tensor& token_map, int64_t out_tokens,
                                        std::optional<Tensor> size, std::optional<Tensor> weight, std::string mode) {
  MergeArgs m = make_merge_args(x, token_map, out_tokens, size, weight, mode);
  MergeOutputs out = make_merge_outputs(m, x);
  MergeKernel* merge = select_isa(kMergeRows);
  const int64_t per_item = m.M + 1 + m.N, row_bytes = int64_t(m.C) * (m.dtype == DType::f32 ? 4 : 2);
  const std::unique_ptr<int[]> memory(new int[size_t(per_item * m.B)]);
  const auto groups = [&](int64_t b) {
    return Groups{memory.get() + b * per_item, memory.get() + b * per_item + m.M + 1};
  };
  parallel_for(m.B, kTaskTokens / per_item + 1, [&](int64_t begin, int64_t end) {
    for (int b = int(begin); b < end; ++b) {
      int* first = memory.get() + b * per_item;
      group_tokens(m, b, first, first + m.M + 1);
      clear_empty_rows(m, b, first, row_bytes);
    }
  });
  parallel_for(int64_t(m.B) * m.N, kTaskBytes / row_bytes + 1, [&](int64_t begin, int64_t end) {
    const Floats row(m.mode == Mode::mlerp ? m.C : 0);
    for (int64_t at = begin; at < end;) {
      const int b = int(at / m.N), from = int(at % m.N);
      const int to = int(end - at < m.N - from ? from + (end - at) : m.N);
      merge(m, b, from, to, groups(b), row.get());
      at += to - from;
    }
  });
  return {out.y, out.size};
}

}  // namespace
}  // namespace tokencomp::cpu

STABLE_TORCH_LIBRARY_IMPL(tokencomp, CPU, m) {
  m.impl("cosine_match", TORCH_BOX(&tokencomp::cpu::cosine_match));
  m.impl("energy_score", TORCH_BOX(&tokencomp::cpu::energy_score));
  m.impl("bipartite_map", TORCH_BOX(&tokencomp::cpu::bipartite_map));
  m.impl("merge_tokens", TORCH_BOX(&tokencomp::cpu::merge_tokens));
}
