// Quantization of KV caches on the CPU, torch side: threads over units of work, registration. The arithmetic is in
// kvquant_kernels.cpp and kvquant_maps_kernels.cpp, once per instruction set.
#include "op/kvquant.h"

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/kvquant_kernels.h"
#include "cpu/parallel.h"
#include "op/kvquant_pages.h"

namespace tokencomp::cpu {

#define TOKENCOMP_DECLARE(isa)            \
  namespace isa {                         \
  kvquant::SheetKernel quantize_sheets;   \
  kvquant::SheetKernel dequantize_sheets; \
  kvquant::RepackKernel repack_units;     \
  kvquant::HadamardKernel hadamard_rows;  \
  kvquant::StatsKernel stat_parts;        \
  kvquant::StatsKernel stat_sequences;    \
  }
TOKENCOMP_FOR_EACH_ISA(TOKENCOMP_DECLARE)

namespace {

using namespace kvquant;

constexpr SheetKernel* kQuantize[kIsaCount] = TOKENCOMP_ISA_TABLE(quantize_sheets);
constexpr SheetKernel* kDequantize[kIsaCount] = TOKENCOMP_ISA_TABLE(dequantize_sheets);
constexpr RepackKernel* kRepack[kIsaCount] = TOKENCOMP_ISA_TABLE(repack_units);
constexpr HadamardKernel* kHadamard[kIsaCount] = TOKENCOMP_ISA_TABLE(hadamard_rows);
constexpr StatsKernel* kStatParts[kIsaCount] = TOKENCOMP_ISA_TABLE(stat_parts);
constexpr StatsKernel* kStatSequences[kIsaCount] = TOKENCOMP_ISA_TABLE(stat_sequences);

// Elements that are worth another thread: about 50 us, what waking one costs under a passive wait policy.
constexpr int64_t kTaskElements = 1 << 17;

int64_t grain(int64_t elements_per_unit) { return kTaskElements / (elements_per_unit > 0 ? elements_per_unit : 1) + 1; }

void run_sheets(const Sheets& s, SheetKernel* kernel) {
  const int64_t unit = int64_t(tokens_per_unit(s.format)) * s.D;
  parallel_for(s.sheets * units_per_sheet(s), grain(unit), [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
}

std::tuple<Tensor, Tensor> kv_quantize(const Tensor& x, int64_t bits, std::string axis, int64_t group,
                                       MaybeTensor pre_scale, MaybeTensor pre_bias, std::string layout,
                                       std::string rounding, std::string kind) {
  Sheets s = make_quantize_args(x, bits, axis, group, pre_scale, pre_bias, layout, rounding, kind);
  auto out = make_quantize_outputs(s, x);
  run_sheets(s, select_isa(kQuantize));
  return out;
}

Tensor kv_dequantize(const Tensor& codes, const Tensor& params, int64_t bits, std::string axis, int64_t group,
                     MaybeTensor pre_scale, MaybeTensor pre_bias, std::string layout, std::string kind,
                     ScalarType dtype) {
  Sheets s = make_dequantize_args(codes, params, bits, axis, group, pre_scale, pre_bias, layout, kind, dtype);
  Tensor x = make_dequantize_output(s, codes, dtype);
  run_sheets(s, select_isa(kDequantize));
  return x;
}

Tensor kv_repack(const Tensor& codes, int64_t bits, std::string source, std::string target) {
  RepackArgs r = make_repack_args(codes, bits, source, target);
  Tensor out = make_repack_output(r, codes);
  RepackKernel* kernel = select_isa(kRepack);
  parallel_for(r.units, grain(int64_t(bitpack::kBlock) * r.D * 16),
               [&](int64_t begin, int64_t end) { kernel(r, begin, end); });
  return out;
}

Tensor hadamard(const Tensor& x, MaybeTensor signs, bool inverse) {
  HadamardArgs a = make_hadamard_args(x, signs, inverse);
  Tensor out = make_hadamard_output(a, x);
  HadamardKernel* kernel = select_isa(kHadamard);
  parallel_for(a.rows(), grain(a.D), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

Tensor channel_stats(const Tensor& x, MaybeTensor lengths, MaybeTensor starts) {
  StatsArgs a = make_stats_args(x, lengths, starts);
  Tensor out = make_stats_output(a, x);
  const Tensor memory = make_stats_memory(a, x);
  StatsKernel *parts = select_isa(kStatParts), *sequences = select_isa(kStatSequences);
  const int64_t count = int64_t(a.B) * a.H;
  parallel_for(count * a.parts(), grain(int64_t(kStatTokens) * a.D),
               [&](int64_t begin, int64_t end) { parts(a, begin, end); });
  parallel_for(count, grain(int64_t(a.parts()) * a.D * 3),
               [&](int64_t begin, int64_t end) { sequences(a, begin, end); });
  return out;
}

void kv_page_write_(const Tensor& pool, const Tensor& k, const Tensor& v, const Tensor& sequence, const Tensor& index,
                    const Tensor& pages, std::string tier_k, std::string axis_k, int64_t group_k, std::string tier_v,
                    std::string axis_v, int64_t group_v, std::string layout, MaybeTensor k_scale, MaybeTensor k_bias,
                    MaybeTensor v_scale, MaybeTensor v_bias) {
  const PageArgs a = make_page_write_args(pool, k, v, sequence, index, pages,
                                          {tier_k, axis_k, group_k, tier_v, axis_v, group_v, layout}, k_scale, k_bias,
                                          v_scale, v_bias);
  run_sheets(a.k, select_isa(kQuantize));
  run_sheets(a.v, select_isa(kQuantize));
}

void kv_retier_(const Tensor& pool, const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                const Tensor& sequence, const Tensor& slots, const Tensor& pages, std::string tier_k,
                std::string axis_k, int64_t group_k, std::string tier_v, std::string axis_v, int64_t group_v,
                std::string layout, MaybeTensor k_scale, MaybeTensor k_bias, MaybeTensor v_scale, MaybeTensor v_bias) {
  const PageArgs a =
      make_retier_args(pool, k_pages, v_pages, block_table, sequence, slots, pages,
                       {tier_k, axis_k, group_k, tier_v, axis_v, group_v, layout}, k_scale, k_bias, v_scale, v_bias);
  run_sheets(a.k, select_isa(kQuantize));
  run_sheets(a.v, select_isa(kQuantize));
}

std::tuple<Tensor, Tensor> kv_page_read(const Tensor& pool, const Tensor& pages, int64_t tokens, int64_t D,
                                        std::string tier_k, std::string axis_k, int64_t group_k, std::string tier_v,
                                        std::string axis_v, int64_t group_v, std::string layout, MaybeTensor sequence,
                                        MaybeTensor k_scale, MaybeTensor k_bias, MaybeTensor v_scale,
                                        MaybeTensor v_bias, ScalarType dtype) {
  PageArgs a = make_page_read_args(pool, pages, tokens, D, {tier_k, axis_k, group_k, tier_v, axis_v, group_v, layout},
                                   sequence, k_scale, k_bias, v_scale, v_bias, dtype);
  auto out = make_page_read_outputs(a, pool, dtype);
  run_sheets(a.k, select_isa(kDequantize));
  run_sheets(a.v, select_isa(kDequantize));
  return out;
}

}  // namespace
}  // namespace tokencomp::cpu

STABLE_TORCH_LIBRARY_IMPL(tokencomp, CPU, m) {
  m.impl("kv_quantize", TORCH_BOX(&tokencomp::cpu::kv_quantize));
  m.impl("kv_dequantize", TORCH_BOX(&tokencomp::cpu::kv_dequantize));
  m.impl("kv_repack", TORCH_BOX(&tokencomp::cpu::kv_repack));
  m.impl("hadamard", TORCH_BOX(&tokencomp::cpu::hadamard));
  m.impl("channel_stats", TORCH_BOX(&tokencomp::cpu::channel_stats));
  m.impl("kv_page_write_", TORCH_BOX(&tokencomp::cpu::kv_page_write_));
  m.impl("kv_retier_", TORCH_BOX(&tokencomp::cpu::kv_retier_));
  m.impl("kv_page_read", TORCH_BOX(&tokencomp::cpu::kv_page_read));
}
