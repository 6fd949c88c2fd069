// Attention scores on the CPU, torch side: working memory and registration. The arithmetic is in score_*_kernels.cpp,
// once per instruction set.
#include "op/score.h"

#include <torch/csrc/stable/library.h>

#include <memory>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/score_kernels.h"

namespace tokencomp::cpu {

#define TOKENCOMP_DECLARE(isa)         \
  namespace isa {                      \
  score::ColumnKernel score_rows;      \
  score::ColumnKernel score_columns;   \
  score::ColumnKernel score_diagonals; \
  score::ColumnKernel score_heads;     \
  score::LseKernel score_lse;          \
  score::VoteKernel score_vote;        \
  score::DecayKernel score_decay;      \
  }
TOKENCOMP_FOR_EACH_ISA(TOKENCOMP_DECLARE)

namespace {

using namespace score;

constexpr ColumnKernel* kRowsKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(score_rows);
constexpr ColumnKernel* kColumnKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(score_columns);
constexpr ColumnKernel* kDiagonalKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(score_diagonals);
constexpr ColumnKernel* kHeadKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(score_heads);
constexpr LseKernel* kLseKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(score_lse);
constexpr VoteKernel* kVoteKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(score_vote);
constexpr DecayKernel* kDecayKernels[kIsaCount] = TOKENCOMP_ISA_TABLE(score_decay);

template <class T>
std::unique_ptr<T[]> allocate(int64_t count) {
  return std::unique_ptr<T[]>(new T[size_t(count)]);
}

// Sums per query head by `kernel`, then the reduction over heads.
void run_columns(const ColumnArgs& c, ColumnKernel* kernel) {
  const Geometry& g = c.a.g;
  const int64_t heads = int64_t(g.B) * g.Hq, slots = thread_count(), words = scratch_words(c.a);
  const auto beta = allocate<float>(heads * g.T);
  const auto range = allocate<Range>(int64_t(g.B) * g.T);
  const auto bounds = allocate<Bounds>(heads * row_blocks(g.T));
  const auto per_head = allocate<float>(c.heads == Heads::none ? 0 : heads * g.S);
  const auto scratch = allocate<uint32_t>(slots * words);
  const ColumnWork work{beta.get(),    range.get(), bounds.get(), c.heads == Heads::none ? c.out : per_head.get(),
                        scratch.get(), words,       int(slots)};
  select_isa(kRowsKernels)(c, work);
  kernel(c, work);
  if (c.heads != Heads::none) select_isa(kHeadKernels)(c, work);
}

void run_lse(const LseArgs& l) {
  const Geometry& g = l.a.g;
  LseWork work = plan_lse(g);
  work.slots = thread_count();
  work.scratch_words = scratch_words(l.a);
  const auto partial = allocate<float>(int64_t(work.splits) * g.B * g.Hq * g.T * 2);
  const auto scratch = allocate<uint32_t>(work.slots * work.scratch_words);
  work.partial = partial.get();
  work.scratch = scratch.get();
  select_isa(kLseKernels)(l, work);
}

Tensor column_score(const Tensor& q, const Tensor& k, const Tensor& lse, double scale, MaybeTensor row_weight,
                    MaybeTensor key_bias, MaybeTensor q_position, MaybeTensor lengths, MaybeTensor starts, bool causal,
                    std::optional<int64_t> window, std::optional<double> softcap, std::string rows, std::string heads,
                    int64_t power) {
  ColumnArgs c = make_column_args("column_score", q, k, lse, scale, row_weight, key_bias,
                                  {q_position, lengths, starts, causal, window}, softcap, rows, heads, power);
  Tensor out = make_column_output(c, q);
  run_columns(c, select_isa(kColumnKernels));
  return out;
}

Tensor diagonal_score(const Tensor& q, const Tensor& k, const Tensor& lse, double scale, MaybeTensor row_weight,
                      MaybeTensor key_bias, MaybeTensor q_position, MaybeTensor lengths, MaybeTensor starts,
                      bool causal, std::optional<int64_t> window, std::optional<double> softcap, std::string heads,
                      int64_t power) {
  ColumnArgs c = make_column_args("diagonal_score", q, k, lse, scale, row_weight, key_bias,
                                  {q_position, lengths, starts, causal, window}, softcap, "sum", heads, power);
  Tensor out = make_column_output(c, q);
  run_columns(c, select_isa(kDiagonalKernels));
  return out;
}

Tensor attention_lse(const Tensor& q, const Tensor& k, double scale, MaybeTensor key_bias, MaybeTensor q_position,
                     MaybeTensor lengths, MaybeTensor starts, bool causal, std::optional<int64_t> window,
                     std::optional<double> softcap) {
  LseArgs l = make_lse_args(q, k, scale, key_bias, {q_position, lengths, starts, causal, window}, softcap);
  Tensor lse = make_lse_output(l, q);
  run_lse(l);
  return lse;
}

std::tuple<Tensor, Tensor> qk_scores(const Tensor& q, const Tensor& k, double scale, MaybeTensor block_table,
                                     MaybeTensor k_min, MaybeTensor key_bias, MaybeTensor lengths, MaybeTensor starts,
                                     std::optional<double> softcap, MaybePools pools, MaybeFormats formats,
                                     MaybeTensor k_scale, MaybeTensor k_bias, MaybeTensor v_scale, MaybeTensor v_bias) {
  LseArgs l = make_qk_args(q, k, scale, block_table, k_min, key_bias, lengths, starts, softcap,
                           {pools, formats, k_scale, k_bias, v_scale, v_bias}, false);
  std::tuple<Tensor, Tensor> out = make_qk_outputs(l, q);
  run_lse(l);
  return out;
}

Tensor head_vote(const Tensor& scores, MaybeTensor lse, std::string mode, int64_t groups) {
  VoteArgs v = make_vote_args(scores, lse, mode, groups);
  Tensor out = make_vote_output(v, scores);
  select_isa(kVoteKernels)(v);
  return out;
}

void decay_score_(const Tensor& score, const Tensor& logits, MaybeTensor lse, double gamma, MaybeTensor lengths,
                  std::string heads, int64_t power, MaybeTensor count, MaybeTensor last, MaybeTensor interval,
                  int64_t step, double alpha) {
  select_isa(kDecayKernels)(
      make_decay_args(score, logits, lse, gamma, lengths, heads, power, count, last, interval, step, alpha));
}

}  // namespace
}  // namespace tokencomp::cpu

STABLE_TORCH_LIBRARY_IMPL(tokencomp, CPU, m) {
  m.impl("column_score", TORCH_BOX(&tokencomp::cpu::column_score));
  m.impl("diagonal_score", TORCH_BOX(&tokencomp::cpu::diagonal_score));
  m.impl("attention_lse", TORCH_BOX(&tokencomp::cpu::attention_lse));
  m.impl("qk_scores", TORCH_BOX(&tokencomp::cpu::qk_scores));
  m.impl("head_vote", TORCH_BOX(&tokencomp::cpu::head_vote));
  m.impl("decay_score_", TORCH_BOX(&tokencomp::cpu::decay_score_));
}
