// Prefill attention on the CPU, torch side: order of the tasks, working memory and registration. The arithmetic is in
// prefill_kernels.cpp, once per instruction set.
#include "op/prefill.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/prefill_kernels.h"

namespace tokencomp::cpu {

#define TOKENCOMP_DECLARE(isa)           \
  namespace isa {                        \
  prefill::PrefillKernel prefill_pack;   \
  prefill::PrefillKernel prefill_attend; \
  }
TOKENCOMP_FOR_EACH_ISA(TOKENCOMP_DECLARE)

namespace {

using namespace prefill;

constexpr PrefillKernel* kPackKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(prefill_pack);
constexpr PrefillKernel* kAttendKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(prefill_attend);

// Keys that a task meets, about: what its time is proportional to.
int64_t work_of(const PrefillArgs& p, const PrefillTask& task, int rows) {
  const Geometry& g = p.a.g;
  if (p.blocks.pointer) {
    const Range blocks = list_of(p, p.blocks, task.b, task.h, task.block);
    const Range columns = list_of(p, p.columns, task.b, task.h, task.block);
    return int64_t(blocks.end - blocks.begin) * p.block_k + columns.end - columns.begin;
  }
  const Range keys = visible(g, task.b, task.h / g.group(), std::min(g.T, (task.block + 1) * rows) - 1);
  return keys.end - keys.begin;
}

// Head after head of a group, so that its packed keys and values stay in the caches; long tasks first, so that threads
// end together.
std::vector<PrefillTask> make_tasks(const PrefillArgs& p, int rows) {
  const Geometry& g = p.a.g;
  const int blocks = (g.T + rows - 1) / rows;
  std::vector<std::pair<int64_t, PrefillTask>> order;
  std::vector<PrefillTask> tasks;
  tasks.reserve(size_t(g.B) * g.Hq * blocks);
  for (int b = 0; b < g.B; ++b) {
    for (int kv = 0; kv < g.Hkv; ++kv) {
      order.clear();
      for (int block = blocks - 1; block >= 0; --block) {
        for (int h = kv * g.group(); h < (kv + 1) * g.group(); ++h) {
          const PrefillTask task{b, h, block};
          order.emplace_back(work_of(p, task, rows), task);
        }
      }
      std::stable_sort(order.begin(), order.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
      for (const auto& [work, task] : order) tasks.push_back(task);
    }
  }
  return tasks;
}

std::unique_ptr<uint32_t[]> allocate(int64_t count) { return std::unique_ptr<uint32_t[]>(new uint32_t[size_t(count)]); }

// How many (b, kv head) are packed at a time: what is packed stays small however large the cache is, unless that would
// leave threads idle.
int64_t pairs_at_a_time(const PrefillArgs& p, const PrefillWork& w) {
  constexpr int64_t kPackedWords = int64_t(8) << 20, kTasksOfThread = 4;
  const Geometry& g = p.a.g;
  const int64_t words = std::max<int64_t>(1, units_of(g.S) * (unit_words(g.D) + unit_words(p.Dv)));
  const int64_t tasks = std::max<int64_t>(1, int64_t(g.group()) * ((g.T + w.rows - 1) / w.rows));
  const int64_t busy = (kTasksOfThread * w.slots + tasks - 1) / tasks;
  return std::min<int64_t>(int64_t(g.B) * g.Hkv, std::max<int64_t>(kPackedWords / words, busy));
}

void run(const PrefillArgs& p) {
  const Geometry& g = p.a.g;
  PrefillWork w{};
  w.rows = p.blocks.pointer ? p.block_q : kDenseRows;
  w.slots = thread_count();
  w.scratch_words = scratch_words(g.D, p.Dv);
  const std::vector<PrefillTask> tasks = make_tasks(p, w.rows);
  const int64_t pairs = int64_t(g.B) * g.Hkv, at_a_time = pairs_at_a_time(p, w), units = at_a_time * units_of(g.S);
  const auto keys = allocate(units * unit_words(g.D)), values = allocate(units * unit_words(p.Dv));
  const auto scratch = allocate(w.slots * w.scratch_words);
  w.keys = keys.get();
  w.values = values.get();
  w.scratch = scratch.get();
  const int64_t tasks_of_pair = pairs ? int64_t(tasks.size()) / pairs : 0;
  for (; w.first_pair < pairs; w.first_pair += at_a_time) {
    w.pairs = int(std::min(at_a_time, pairs - w.first_pair));
    w.tasks = tasks.data() + w.first_pair * tasks_of_pair;
    w.count = w.pairs * tasks_of_pair;
    select_isa(kPackKernels)(p, w);
    select_isa(kAttendKernels)(p, w);
  }
}

std::tuple<Tensor, Tensor> flash_prefill(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                         MaybeTensor indptr, MaybeTensor indices, MaybeTensor column_ptr,
                                         MaybeTensor columns, int64_t block_q, int64_t block_k, MaybeTensor key_bias,
                                         MaybeTensor q_position, MaybeTensor lengths, MaybeTensor starts, bool causal,
                                         std::optional<int64_t> window, std::optional<double> softcap,
                                         MaybeTensor sinks, MaybeTensor block_table, MaybeTensor q_starts,
                                         MaybeTensor q_counts, MaybePools pools, MaybeFormats formats,
                                         MaybeTensor k_scale, MaybeTensor k_bias, MaybeTensor v_scale,
                                         MaybeTensor v_bias) {
  PrefillArgs p = make_prefill_args(q, k, v, scale, {indptr, indices, column_ptr, columns, block_q, block_k}, key_bias,
                                    {q_position, lengths, starts, causal, window, q_starts, q_counts}, softcap, sinks,
                                    {block_table, {pools, formats, k_scale, k_bias, v_scale, v_bias}, false});
  std::tuple<Tensor, Tensor> out = make_prefill_outputs(p, q);
  run(p);
  return out;
}

}  // namespace
}  // namespace tokencomp::cpu

STABLE_TORCH_LIBRARY_IMPL(tokencomp, CPU, m) { m.impl("flash_prefill", TORCH_BOX(&tokencomp::cpu::flash_prefill)); }
