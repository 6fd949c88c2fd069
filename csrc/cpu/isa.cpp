// Detection of the instruction-set level, torch-free: shared by the operator library and the native module.
#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace tokencomp::cpu {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

#if defined(__x86_64__)
bool supported(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
  return false;
}
#else
bool supported(Isa isa) { return isa == Isa::scalar; }
#endif

Isa choose() {
  const std::vector<Isa> available = available_isas();
  const char* wanted = std::getenv("TOKENCOMP_CPU_ISA");
  if (!wanted || !*wanted) return available.back();
  std::string names;
  for (Isa isa : available) {
    if (std::string(wanted) == name(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + name(isa);
  }
  throw std::runtime_error("TOKENCOMP_CPU_ISA: must be one of " + names + " on this machine, got " + wanted);
}

}  // namespace

const char* name(Isa isa) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};
  return kNames[int(isa)];
}

std::vector<Isa> compiled_isas() {
#if defined(TOKENCOMP_X86_ISAS)
  return {std::begin(kAll), std::end(kAll)};
#else
  return {Isa::scalar};
#endif
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : compiled_isas()) {
    if (supported(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace tokencomp::cpu
