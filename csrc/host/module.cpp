// The native module `tokencomp._native`: facts about the build and the processor, the pure plan functions, and the
// pool of pages. Arguments are positional; `tokencomp.native` gives them names, defaults and types.
#include <string>
#include <vector>

#include "core/decode_plan.h"
#include "core/kcenter_plan.h"
#include "core/topk_plan.h"
#include "cpu/isa.h"
#include "cpu/kcenter_plan.h"
#include "host/python.h"

using namespace tokencomp;
using host::guarded;

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s}", "compiler", TOKENCOMP_COMPILER, "torch_built_with",
                       TOKENCOMP_TORCH_BUILT_WITH, "stable_abi_target", "2.10", "nvcc", TOKENCOMP_NVCC_VERSION,
                       "cuda_targets", TOKENCOMP_CUDA_TARGETS);
}

PyObject* names(const std::vector<cpu::Isa>& isas) {
  PyObject* list = PyList_New(0);
  for (cpu::Isa isa : isas) {
    PyObject* name = list ? PyUnicode_FromString(cpu::name(isa)) : nullptr;
    if (!name || PyList_Append(list, name)) Py_CLEAR(list);
    Py_XDECREF(name);
  }
  return list;
}

PyObject* cpu_features(PyObject*, PyObject*) {
  return guarded([] {
    return Py_BuildValue("{s:s,s:N,s:N}", "active", cpu::name(cpu::active_isa()), "available",
                         names(cpu::available_isas()), "compiled", names(cpu::compiled_isas()));
  });
}

// Whether `count` int32 numbers at an address are all in [low, limit). By far the most calls: no format is parsed.
PyObject* all_within(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "all_within: takes memory, count, low and limit");
    return nullptr;
  }
  long long number[4];
  for (int i = 0; i < 4; ++i) {
    number[i] = PyLong_AsLongLong(arguments[i]);
    if (number[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const int* values = reinterpret_cast<const int*>(number[0]);
  bool inside = true;
  for (long long i = 0; i < number[1]; ++i) inside &= values[i] >= number[2] && values[i] < number[3];
  return PyBool_FromLong(inside);
}

template <class E>
E choice(const char* function, const char* argument, const std::string& got, const std::vector<std::string>& names) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == got) return E(i);
  }
  std::string list;
  for (const std::string& name : names) list += (list.empty() ? "'" : ", '") + name + "'";
  throw std::invalid_argument(std::string(function) + ": " + argument + " must be one of " + list + ", got '" + got +
                              "'");
}

PyObject* kcenter_cpu_plan(PyObject*, PyObject* arguments) {
  const char* objective;
  int nonnegative_weights, all_pairs, threads;
  long long B, N, k, item_bytes;
  if (!PyArg_ParseTuple(arguments, "sppLLLLi:kcenter_cpu_plan", &objective, &nonnegative_weights, &all_pairs, &B, &N,
                        &k, &item_bytes, &threads)) {
    return nullptr;
  }
  return guarded([&] {
    const auto which = choice<kcenter::Objective>("kcenter_cpu_plan", "objective", objective, {"max_min", "max_sum"});
    const kcenter::CpuPlan plan =
        kcenter::plan_cpu(which, nonnegative_weights, all_pairs, B, N, k, item_bytes, threads);
    constexpr const char* kPaths[] = {"lazy", "stream", "gram"};
    return Py_BuildValue("{s:s,s:N}", "path", kPaths[int(plan.path)], "across_items",
                         PyBool_FromLong(plan.across_items));
  });
}

PyObject* describe(const kcenter::CudaPlan& plan) {
  return Py_BuildValue("{s:s,s:L,s:L,s:L,s:d,s:z}", "name", plan.name().c_str(), "blocks",
                       (long long)(plan.size * plan.teams), "items", (long long)plan.items, "smem",
                       (long long)plan.smem, "microseconds", double(plan.microseconds), "refused", plan.refused);
}

PyObject* describe(const topk::CudaPlan& plan) {
  return Py_BuildValue("{s:s,s:L,s:L,s:d,s:z}", "name", plan.name().c_str(), "size", (long long)plan.size, "smem",
                       (long long)plan.smem, "microseconds", double(plan.microseconds), "refused", plan.refused);
}

// The plan that is taken, then all candidates.
template <class Plan>
PyObject* describe_all(const Plan& taken, const std::vector<Plan>& candidates) {
  PyObject* list = PyList_New(0);
  const auto add = [&](const Plan& plan) {
    PyObject* described = list ? describe(plan) : nullptr;
    if (!described || PyList_Append(list, described)) Py_CLEAR(list);
    Py_XDECREF(described);
  };
  add(taken);
  for (const Plan& plan : candidates) add(plan);
  return list;
}

PyObject* kcenter_cuda_plans(PyObject*, PyObject* arguments) {
  int B, N, C, k, element_bytes, l2, shrinking, sm_count, max_cluster;
  const char* first;
  Py_ssize_t smem_per_block;
  if (!PyArg_ParseTuple(arguments, "iiiiippsini:kcenter_cuda_plans", &B, &N, &C, &k, &element_bytes, &l2, &shrinking,
                        &first, &sm_count, &smem_per_block, &max_cluster)) {
    return nullptr;
  }
  return guarded([&] {
    const auto begin =
        choice<kcenter::First>("kcenter_cuda_plans", "first", first, {"largest_nn", "index0", "centroid"});
    const kcenter::CudaProblem problem{B, N, C, k, element_bytes, l2 != 0, shrinking != 0, begin};
    const kcenter::CudaDevice device{sm_count, size_t(smem_per_block), max_cluster};
    return describe_all(kcenter::plan_cuda(problem, device), kcenter::cuda_candidates(problem, device));
  });
}

PyObject* topk_cuda_plans(PyObject*, PyObject* arguments) {
  int R, S, element_bytes, by_mass, sm_count, max_cluster;
  Py_ssize_t smem_per_block;
  if (!PyArg_ParseTuple(arguments, "iiipini:topk_cuda_plans", &R, &S, &element_bytes, &by_mass, &sm_count,
                        &smem_per_block, &max_cluster)) {
    return nullptr;
  }
  return guarded([&] {
    const topk::CudaProblem problem{R, S, element_bytes, by_mass != 0};
    const topk::CudaDevice device{sm_count, size_t(smem_per_block), max_cluster};
    return describe_all(topk::plan_cuda(problem, device), topk::cuda_candidates(problem, device));
  });
}

PyObject* decode_cuda_parts(PyObject*, PyObject* arguments) {
  long long units, keys, resident;
  if (!PyArg_ParseTuple(arguments, "LLL:decode_cuda_parts", &units, &keys, &resident)) return nullptr;
  return PyLong_FromLong(decode::plan_parts(units, keys, resident));
}

PyCFunction fast(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));  // as METH_FASTCALL wants it
}

PyMethodDef functions[] = {{"build_info", build_info, METH_NOARGS, nullptr},
                           {"cpu_features", cpu_features, METH_NOARGS, nullptr},
                           {"all_within", fast(all_within), METH_FASTCALL, nullptr},
                           {"kcenter_cpu_plan", kcenter_cpu_plan, METH_VARARGS, nullptr},
                           {"kcenter_cuda_plans", kcenter_cuda_plans, METH_VARARGS, nullptr},
                           {"topk_cuda_plans", topk_cuda_plans, METH_VARARGS, nullptr},
                           {"decode_cuda_parts", decode_cuda_parts, METH_VARARGS, nullptr},
                           {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  PyObject* module = PyModule_Create(&definition);
  if (module && !host::add_page_pool(module)) Py_CLEAR(module);
  return module;
}
