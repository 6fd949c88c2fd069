// The host module `tokencomp._host`: facts about the build and the processor, the pure plan functions, and
// the pool of pages, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "core/decode_plan.h"
#include "core/kcenter_plan.h"
#include "core/topk_plan.h"
#include "cpu/isa.h"
#include "cpu/kcenter_plan.h"
#include "host/page_pool_module.h"

namespace py = pybind11;
using namespace tokencomp;

namespace {

std::map<std::string, std::string> build_info() {
  return {{"compiler", TOKENCOMP_COMPILER},
          {"torch_built_with", TOKENCOMP_TORCH_BUILT_WITH},
          {"stable_abi_target", "2.10"},
          {"nvcc", TOKENCOMP_NVCC_VERSION},
          {"cuda_targets", TOKENCOMP_CUDA_TARGETS}};
}

py::dict cpu_features() {
  const auto names = [](const std::vector<cpu::Isa>& isas) {
    std::vector<std::string> out;
    for (cpu::Isa isa : isas) out.emplace_back(cpu::name(isa));
    return out;
  };
  py::dict d;
  d["active"] = cpu::name(cpu::active_isa());
  d["available"] = names(cpu::available_isas());
  d["compiled"] = names(cpu::compiled_isas());
  return d;
}

// Whether `count` integers in memory are all in [low, limit).
bool all_within(uintptr_t memory, int64_t count, int64_t low, int64_t limit) {
  const int* values = reinterpret_cast<const int*>(memory);
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= values[i] >= low && values[i] < limit;
  return inside;
}

template <class E>
E choice(const char* function, const char* argument, const std::string& got, const std::vector<std::string>& names) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == got) return E(i);
  }
  std::string list;
  for (const std::string& name : names) list += (list.empty() ? "'" : ", '") + name + "'";
  throw py::value_error(std::string(function) + ": " + argument + " must be one of " + list + ", got '" + got + "'");
}

py::dict kcenter_cpu_plan(const std::string& objective, bool nonnegative_weights, bool all_pairs, int64_t B, int64_t N,
                          int64_t k, int64_t item_bytes, int threads) {
  const auto which = choice<kcenter::Objective>("kcenter_cpu_plan", "objective", objective, {"max_min", "max_sum"});
  const kcenter::CpuPlan plan = kcenter::plan_cpu(which, nonnegative_weights, all_pairs, B, N, k, item_bytes, threads);
  constexpr const char* kPaths[] = {"lazy", "stream", "gram"};
  py::dict d;
  d["path"] = kPaths[int(plan.path)];
  d["across_items"] = plan.across_items;
  return d;
}

py::dict describe(const kcenter::CudaPlan& plan) {
  py::dict d;
  d["name"] = plan.name();
  d["blocks"] = plan.size * plan.teams;
  d["items"] = plan.items;
  d["smem"] = plan.smem;
  d["microseconds"] = plan.microseconds;
  d["refused"] = plan.refused ? py::object(py::str(plan.refused)) : py::none();
  return d;
}

std::vector<py::dict> kcenter_cuda_plans(int B, int N, int C, int k, int element_bytes, bool l2, bool shrinking,
                                         const std::string& first, int sm_count, size_t smem_per_block,
                                         int max_cluster) {
  const kcenter::CudaProblem problem{
      B,
      N,
      C,
      k,
      element_bytes,
      l2,
      shrinking,
      choice<kcenter::First>("kcenter_cuda_plans", "first", first, {"largest_nn", "index0", "centroid"})};
  const kcenter::CudaDevice device{sm_count, smem_per_block, max_cluster};
  std::vector<py::dict> plans{describe(kcenter::plan_cuda(problem, device))};
  for (const kcenter::CudaPlan& plan : kcenter::cuda_candidates(problem, device)) plans.push_back(describe(plan));
  return plans;
}

py::dict describe(const topk::CudaPlan& plan) {
  py::dict d;
  d["name"] = plan.name();
  d["size"] = plan.size;
  d["smem"] = plan.smem;
  d["microseconds"] = plan.microseconds;
  d["refused"] = plan.refused ? py::object(py::str(plan.refused)) : py::none();
  return d;
}

std::vector<py::dict> topk_cuda_plans(int R, int S, int element_bytes, bool by_mass, int sm_count,
                                      size_t smem_per_block, int max_cluster) {
  const topk::CudaProblem problem{R, S, element_bytes, by_mass};
  const topk::CudaDevice device{sm_count, smem_per_block, max_cluster};
  std::vector<py::dict> plans{describe(topk::plan_cuda(problem, device))};
  for (const topk::CudaPlan& plan : topk::cuda_candidates(problem, device)) plans.push_back(describe(plan));
  return plans;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  host::add_page_pool(m);
  m.def("build_info", &build_info, "Compilers and targets the package was built with.");
  m.def("cpu_features", &cpu_features, "Instruction-set levels: active, available on this machine, compiled.");
  m.def("kcenter_cpu_plan", &kcenter_cpu_plan, py::kw_only(), py::arg("objective"),
        py::arg("nonnegative_weights") = true, py::arg("all_pairs") = false, py::arg("B"), py::arg("N"), py::arg("k"),
        py::arg("item_bytes"), py::arg("threads"),
        "How kcenter_greedy runs a problem on the CPU: path (lazy, stream, gram) and across_items.");
  m.def("kcenter_cuda_plans", &kcenter_cuda_plans, py::kw_only(), py::arg("B"), py::arg("N"), py::arg("C"),
        py::arg("k"), py::arg("element_bytes"), py::arg("l2") = false, py::arg("shrinking") = true, py::arg("first"),
        py::arg("sm_count") = 132, py::arg("smem_per_block") = 227 << 10, py::arg("max_cluster") = 8,
        "How kcenter_greedy could run a problem on a CUDA device (default: H200): the plan it takes, then every "
        "candidate "
        "with its floor in microseconds, or the reason why it is refused.");
  m.def("topk_cuda_plans", &topk_cuda_plans, py::kw_only(), py::arg("R"), py::arg("S"), py::arg("element_bytes"),
        py::arg("by_mass") = false, py::arg("sm_count") = 132, py::arg("smem_per_block") = 227 << 10,
        py::arg("max_cluster") = 8,
        "How topk_select (topp_select: by_mass) could run a problem on a CUDA device (default: H200): the plan it "
        "takes, then every candidate with its floor in microseconds, or the reason why it is refused.");
  m.def("all_within", &all_within, py::arg("memory"), py::arg("count"), py::arg("low"), py::arg("limit"),
        "Whether `count` int32 numbers at the address `memory` are all in [low, limit).");
  m.def("decode_cuda_parts", &decode::plan_parts, py::kw_only(), py::arg("units"), py::arg("keys"),
        py::arg("resident") = 3 * 132,
        "Into how many parts paged_decode cuts `keys` on a CUDA device (default: H200) for `units` pairs of (sequence, "
        "kv head), where `resident` blocks run at a time.");
}
