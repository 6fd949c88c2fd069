// Decode attention over pages on the CPU, torch side: the parts, working memory and registration. The arithmetic is in
// decode_kernels.cpp, once per instruction set.
#include "op/decode.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <vector>

#include "cpu/decode_kernels.h"
#include "cpu/floats.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace tokencomp::cpu {

#define TOKENCOMP_DECLARE(isa)       \
  namespace isa {                    \
  decode::DecodeKernel paged_decode; \
  decode::MergeKernel merge_states;  \
  }
TOKENCOMP_FOR_EACH_ISA(TOKENCOMP_DECLARE)

namespace {

using namespace decode;

constexpr DecodeKernel* kDecodeKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(paged_decode);
constexpr MergeKernel* kMergeKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(merge_states);

// The parts of all pairs, one after the other; a pair without keys has one too, which writes what there is to write.
struct Parts {
  std::vector<Task> tasks;
  std::vector<int> first;

  explicit Parts(const DecodeArgs& a) {
    for (int pair = 0; pair < a.B * a.Hkv; ++pair) {
      first.push_back(int(tasks.size()));
      const int b = pair / a.Hkv, kv = pair % a.Hkv, length = length_of(a, b, kv);
      const int from = a.index ? 0 : first_slot(a, b, kv, length) / kPartKeys, keys = candidates_of(a, b, kv);
      tasks.push_back({pair, from});
      for (int part = from + 1; int64_t(part) * kPartKeys < keys; ++part) tasks.push_back({pair, part});
    }
    first.push_back(int(tasks.size()));
  }
};

void run_decode(const DecodeArgs& a) {
  if (a.rows() == 0 || a.B == 0) return;
  if (a.logits && a.index) std::fill_n(a.logits, int64_t(a.B) * a.Hq * a.T * a.capacity, -INFINITY);
  const Parts parts(a);
  DecodeWork w{};
  w.tasks = parts.tasks.data();
  w.first_task = parts.first.data();
  w.task_count = int64_t(parts.tasks.size());
  w.partial_floats = partial_floats(a);
  w.scratch_bytes = scratch_bytes(a);
  w.slots = int(std::min<int64_t>(thread_count(), w.task_count));
  const std::unique_ptr<float[]> partial(new float[size_t(w.partial_floats * w.task_count)]);
  const Floats scratch(w.scratch_bytes / 4 * w.slots);
  std::vector<uint32_t> done(size_t(a.B) * a.Hkv, 0);
  w.partial = partial.get();
  w.scratch = reinterpret_cast<unsigned char*>(scratch.get());
  w.done = done.data();
  select_isa(kDecodeKernels)(a, w);
}

std::tuple<Tensor, Tensor, Tensor> paged_decode(
    const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, MaybeTensor block_table, const Tensor& lengths,
    double scale, MaybeTensor index, MaybeTensor index_count, MaybeTensor key_bias, MaybeTensor position,
    MaybeTensor q_position, std::optional<int64_t> window, std::optional<double> softcap, MaybeTensor sinks,
    bool causal, bool logits_out, std::optional<std::vector<Tensor>> pools, std::optional<std::vector<int64_t>> formats,
    MaybeTensor k_scale, MaybeTensor k_bias, MaybeTensor v_scale, MaybeTensor v_bias) {
  const Options options{index,
                        index_count,
                        key_bias,
                        position,
                        q_position,
                        sinks,
                        window,
                        softcap,
                        causal,
                        logits_out,
                        {pools, formats, k_scale, k_bias, v_scale, v_bias}};
  DecodeArgs a = make_decode_args(q, k_pages, v_pages, block_table, lengths, scale, options, false);
  std::tuple<Tensor, Tensor, Tensor> out = make_decode_outputs(a, q, logits_out);
  run_decode(a);
  return out;
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out, const Tensor& lse) {
  MergeArgs m = make_merge_args(out, lse);
  std::tuple<Tensor, Tensor> merged = make_merge_outputs(m, out, lse);
  select_isa(kMergeKernels)(m);
  return merged;
}

}  // namespace
}  // namespace tokencomp::cpu

STABLE_TORCH_LIBRARY_IMPL(tokencomp, CPU, m) {
  m.impl("paged_decode", TORCH_BOX(&tokencomp::cpu::paged_decode));
  m.impl("merge_states", TORCH_BOX(&tokencomp::cpu::merge_states));
}
