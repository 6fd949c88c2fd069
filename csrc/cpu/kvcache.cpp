// The paged KV cache on the CPU, torch side: threads over rows, working memory, registration. Copies are in
// kvcache_copy.cpp, arithmetic in kvcache_*_kernels.cpp, once per instruction set.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "cpu/floats.h"
#include "cpu/isa.h"
#include "cpu/kvcache_copy.h"
#include "cpu/kvcache_kernels.h"
#include "cpu/parallel.h"
#include "op/kvcache_merge.h"

namespace tokencomp::cpu {

#define TOKENCOMP_DECLARE(isa)                \
  namespace isa {                             \
  kvcache::ShiftKernel kv_shift;              \
  kvcache::PackCentersKernel kv_pack_centers; \
  kvcache::AssignKernel kv_assign;            \
  kvcache::MergeKernel kv_merge;              \
  }
TOKENCOMP_FOR_EACH_ISA(TOKENCOMP_DECLARE)

namespace {

using namespace kvcache;

constexpr ShiftKernel* kShift[kIsaCount] = TOKENCOMP_ISA_TABLE(kv_shift);
constexpr PackCentersKernel* kPackCenters[kIsaCount] = TOKENCOMP_ISA_TABLE(kv_pack_centers);
constexpr AssignKernel* kAssign[kIsaCount] = TOKENCOMP_ISA_TABLE(kv_assign);
constexpr MergeKernel* kMerge[kIsaCount] = TOKENCOMP_ISA_TABLE(kv_merge);

constexpr int64_t kTaskBytes = 1 << 18;     // moved by a task: about 30 us, what waking a thread costs
constexpr int64_t kTaskProducts = 1 << 21;  // about as long

// f(b, h, begin, end) over tokens [0, n) of every row, in parallel.
template <class F>
void for_each_run(const Store& s, int64_t n, F&& f) {
  const int64_t token_bytes = int64_t(s.k.channels + s.v.channels) * s.element_bytes();
  const int64_t grain = kTaskBytes / token_bytes + 1;
  parallel_for(s.rows() * n, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / n, first = begin - row * n, last = first + end - begin < n ? first + end - begin : n;
      f(int(row / s.Hkv), int(row % s.Hkv), int(first), int(last));
      begin += last - first;
    }
  });
}

void kv_append_(const Tensor& k_pages, const Tensor& v_pages, const Tensor& k, const Tensor& v,
                const Tensor& block_table, const Tensor& lengths, MaybeTensor starts, MaybeTensor counts) {
  const AppendArgs a = make_append_args(k_pages, v_pages, k, v, block_table, lengths, starts, counts);
  for_each_run(a.s, a.T, [&](int b, int h, int begin, int end) {
    const int count = a.count(b);
    append_tokens(a, b, h, begin, end < count ? end : count);
  });
}

void kv_compact_(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table, const Tensor& lengths,
                 const Tensor& index, const Tensor& count, std::string order, MaybeTensor out_table) {
  const CompactArgs c = make_compact_args(k_pages, v_pages, block_table, lengths, index, count, order, out_table);
  const int64_t row_bytes = int64_t(c.K) * c.s.k.channels * c.s.element_bytes() + 1;
  parallel_for(2 * int64_t(c.s.rows()), kTaskBytes / row_bytes + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      compact_row(c, int(i / 2 / c.s.Hkv), int(i / 2 % c.s.Hkv), i % 2);
    }
  });
}

std::tuple<Tensor, Tensor> kv_gather(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                                     const Tensor& lengths, MaybeTensor index, MaybeTensor count, int64_t size) {
  GatherArgs g = make_gather_args(k_pages, v_pages, block_table, lengths, index, count, size);
  std::tuple<Tensor, Tensor> out = make_gather_outputs(g, k_pages);
  for_each_run(g.s, g.size, [&](int b, int h, int begin, int end) { gather_tokens(g, b, h, begin, end); });
  return out;
}

void rope_shift_(const Tensor& k_pages, const Tensor& block_table, const Tensor& lengths, const Tensor& old_position,
                 const Tensor& new_position, const Tensor& inv_freq, std::string layout) {
  const ShiftArgs a = make_shift_args(k_pages, block_table, lengths, old_position, new_position, inv_freq, layout);
  ShiftKernel* shift = select_isa(kShift);
  for_each_run(a.s, a.S, [&](int b, int h, int begin, int end) {
    const Floats table(2 * a.pairs);
    const int length = a.s.lengths[b * a.s.Hkv + h];
    shift(a, b, h, begin, end < length ? end : length, table.get());
  });
}

class CenterMemory {
 public:
  explicit CenterMemory(const AssignArgs& a)
      : padded_(padded_centers(a.lists.K)),
        keys_(padded_ * (a.s.k.channels + 1)),
        values_(a.with_values ? padded_ * (a.s.v.channels + 1) : 0),
        factors_(2 * padded_) {}
  Centers get(const Floats& rows) const {
    return {keys_.get(), values_.get(), factors_.get(), factors_.get() + padded_, rows.get()};
  }

 private:
  int64_t padded_;
  Floats keys_, values_, factors_;
};

// Rows go to threads where there are enough of them, else the members of one row after the other do.
void assign_rows(const AssignArgs& a) {
  PackCentersKernel* pack = select_isa(kPackCenters);
  AssignKernel* assign = select_isa(kAssign);
  const int64_t channels = a.s.k.channels + (a.with_values ? a.s.v.channels : 0);
  const int64_t scratch = kMemberBlock * (channels + 2), products = a.lists.K * channels + 1;
  if (a.s.rows() >= thread_count()) {
    parallel_for(a.s.rows(), kTaskProducts / (products * (a.lists.M + 1)) + 1, [&](int64_t begin, int64_t end) {
      const CenterMemory memory(a);
      const Floats rows(scratch);
      for (int row = int(begin); row < end; ++row) {
        pack(a, row / a.s.Hkv, row % a.s.Hkv, memory.get(rows));
        assign(a, row / a.s.Hkv, row % a.s.Hkv, 0, a.lists.M, memory.get(rows));
      }
    });
    return;
  }
  const CenterMemory memory(a);
  for (int row = 0; row < a.s.rows(); ++row) {
    const int b = row / a.s.Hkv, h = row % a.s.Hkv;
    pack(a, b, h, memory.get(Floats(0)));
    parallel_for(a.lists.M, kTaskProducts / products + kMemberBlock, [&](int64_t begin, int64_t end) {
      const Floats rows(scratch);
      assign(a, b, h, int(begin), int(end), memory.get(rows));
    });
  }
}

std::tuple<Tensor, Tensor> evict_assign(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                                        const Tensor& lengths, const Tensor& keep_index, const Tensor& keep_count,
                                        const Tensor& member_index, std::string similarity, bool clamp,
                                        std::optional<double> min_similarity) {
  AssignArgs a = make_assign_args(k_pages, v_pages, block_table, lengths, keep_index, keep_count, member_index,
                                  similarity, clamp, min_similarity);
  std::tuple<Tensor, Tensor> out = make_assign_outputs(a, k_pages);
  assign_rows(a);
  return out;
}

// Stable counting sort of one row's members by centre; `first` holds K + 1 entries.
Groups group_members(const MergeArgs& m, int row, int* first, int* member) {
  const int64_t at = int64_t(row) * m.lists.M;
  const auto center = [&](int i) { return m.lists.member[at + i] < 0 ? -1 : m.target[at + i]; };
  for (int c = 0; c <= m.lists.K; ++c) first[c] = 0;
  for (int i = 0; i < m.lists.M; ++i) {
    if (const int c = center(i); c >= 0) ++first[c + 1];
  }
  for (int c = 0; c < m.lists.K; ++c) first[c + 1] += first[c];
  for (int i = 0; i < m.lists.M; ++i) {
    if (const int c = center(i); c >= 0) member[first[c]++] = i;
  }
  for (int c = m.lists.K; c > 0; --c) first[c] = first[c - 1];  // each now points behind its group
  first[0] = 0;
  return {first, member};
}

void evict_merge_(const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table, const Tensor& lengths,
                  const Tensor& keep_index, const Tensor& keep_count, const Tensor& member_index, const Tensor& target,
                  const Tensor& weight, const Tensor& center, std::string values, std::string keys, bool by_norm) {
  const MergeArgs m = make_merge_args(k_pages, v_pages, block_table, lengths, keep_index, keep_count, member_index,
                                      target, weight, center, values, keys, by_norm);
  MergeKernel* merge = select_isa(kMerge);
  const int channels = m.s.k.channels > m.s.v.channels ? m.s.k.channels : m.s.v.channels;
  const int64_t row_bytes = int64_t(m.lists.M + m.lists.K) * channels * m.s.element_bytes() + 1;
  parallel_for(m.s.rows(), kTaskBytes / row_bytes + 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<int[]> memory(new int[size_t(m.lists.K) + 1 + size_t(m.lists.M)]);
    const Floats out(channels);
    for (int row = int(begin); row < end; ++row) {
      const Groups groups = group_members(m, row, memory.get(), memory.get() + m.lists.K + 1);
      merge(m, row / m.s.Hkv, row % m.s.Hkv, 0, m.lists.keep_count[row], groups, out.get());
    }
  });
}

}  // namespace
}  // namespace tokencomp::cpu

STABLE_TORCH_LIBRARY_IMPL(tokencomp, CPU, m) {
  m.impl("kv_append_", TORCH_BOX(&tokencomp::cpu::kv_append_));
  m.impl("kv_compact_", TORCH_BOX(&tokencomp::cpu::kv_compact_));
  m.impl("kv_gather", TORCH_BOX(&tokencomp::cpu::kv_gather));
  m.impl("rope_shift_", TORCH_BOX(&tokencomp::cpu::rope_shift_));
  m.impl("evict_assign", TORCH_BOX(&tokencomp::cpu::evict_assign));
  m.impl("evict_merge_", TORCH_BOX(&tokencomp::cpu::evict_merge_));
}
