// Instruction-set levels of the CPU back end. Kernel files (`*_kernels.cpp`) are compiled once per level with that
// level's flags; the level is chosen once, when the library is loaded. TOKENCOMP_CPU_ISA forces a lower one.
#pragma once

#include <string>
#include <vector>

namespace tokencomp::cpu {

enum class Isa { scalar, avx2, avx512, avx512_bf16 };

const char* name(Isa isa);
std::vector<Isa> compiled_isas();   // ascending
std::vector<Isa> available_isas();  // compiled, and supported by this processor and operating system
Isa active_isa();

constexpr int kIsaCount = 4;

// A function `f` that exists once per compiled level, in the namespaces tokencomp::cpu::<level>:
//   TOKENCOMP_FOR_EACH_ISA(declare it)        TOKENCOMP_ISA_TABLE(f) = {scalar::f, avx2::f, ...}, null where not
//   compiled
#if defined(TOKENCOMP_X86_ISAS)
#define TOKENCOMP_FOR_EACH_ISA(X) X(scalar) X(avx2) X(avx512) X(avx512_bf16)
#define TOKENCOMP_ISA_TABLE(f) {scalar::f, avx2::f, avx512::f, avx512_bf16::f}
#else
#define TOKENCOMP_FOR_EACH_ISA(X) X(scalar)
#define TOKENCOMP_ISA_TABLE(f) {scalar::f}
#endif

template <class F>
F* select_isa(F* const (&table)[kIsaCount]) {
  return table[int(active_isa())];
}

}  // namespace tokencomp::cpu
