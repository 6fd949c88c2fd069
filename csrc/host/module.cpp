// The host module `tokencomp._host`: facts about the build and the processor, and the pure plan functions, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/isa.h"
#include "cpu/kcenter_plan.h"

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

py::dict kcenter_cpu_plan(const std::string& objective, bool nonnegative_weights, int64_t B, int64_t N, int64_t k,
                          int threads) {
  if (objective != "max_min" && objective != "max_sum") {
    throw py::value_error("kcenter_cpu_plan: objective must be one of 'max_min', 'max_sum', got '" + objective + "'");
  }
  const auto which = objective == "max_min" ? kcenter::Objective::max_min : kcenter::Objective::max_sum;
  const kcenter::CpuPlan plan = kcenter::plan_cpu(which, nonnegative_weights, B, N, k, threads);
  constexpr const char* kPaths[] = {"lazy", "stream", "gram"};
  py::dict d;
  d["path"] = kPaths[int(plan.path)];
  d["across_items"] = plan.across_items;
  return d;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("build_info", &build_info, "Compilers and targets the package was built with.");
  m.def("cpu_features", &cpu_features, "Instruction-set levels: active, available on this machine, compiled.");
  m.def("kcenter_cpu_plan", &kcenter_cpu_plan, py::kw_only(), py::arg("objective"),
        py::arg("nonnegative_weights") = true, py::arg("B"), py::arg("N"), py::arg("k"), py::arg("threads"),
        "How kcenter_greedy runs a problem on the CPU: path (lazy, stream, gram) and across_items.");
}
