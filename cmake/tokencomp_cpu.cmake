# The CPU library. `*_kernels.cpp` are compiled once per instruction-set level, in a namespace named after the level;
# all other files with the baseline flags. Kernel files must not include torch or standard templates with out-of-line
# code: the linker would merge copies compiled for different processors (tests/test_isa.py looks for such symbols).
file(GLOB cpu_sources CONFIGURE_DEPENDS csrc/cpu/*.cpp)
set(kernel_sources ${cpu_sources})
list(FILTER kernel_sources INCLUDE REGEX "_kernels\\.cpp$")
list(FILTER cpu_sources EXCLUDE REGEX "_kernels\\.cpp$")

# Sanitizers see each access of the scalar level, and nothing inside intrinsics: so they get that level alone.
set(isa_levels scalar)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT TOKENCOMP_SANITIZE)
  set(isa_levels scalar avx2 avx512 avx512_bf16)
  target_compile_definitions(tokencomp_options INTERFACE TOKENCOMP_X86_ISAS)
  # Less than half the time to compile, and not slower on the whole (bench/notes/cpu_limits.md).
  set(flags_scalar -O2)
  set(flags_avx2 -mavx2 -mfma -mf16c -DTOKENCOMP_AVX2)
  set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -DTOKENCOMP_AVX512)
  set(flags_avx512_bf16 ${flags_avx512} -mavx512bf16 -mavx512vnni -DTOKENCOMP_AVX512_BF16)
endif()

add_library(tokencomp_cpu SHARED csrc/ops.cpp ${cpu_sources})
foreach(isa ${isa_levels})
  add_library(cpu_kernels_${isa} OBJECT ${kernel_sources})
  target_link_libraries(cpu_kernels_${isa} PRIVATE tokencomp_options)
  # GCC 12 warns of its own AVX-512 headers (__Y uninitialised).
  target_compile_options(cpu_kernels_${isa} PRIVATE ${kernel_optimization} -Wno-uninitialized -Wno-maybe-uninitialized -DTOKENCOMP_ISA=${isa} ${flags_${isa}})
  target_sources(tokencomp_cpu PRIVATE $<TARGET_OBJECTS:cpu_kernels_${isa}>)
endforeach()
target_compile_definitions(tokencomp_cpu PRIVATE TOKENCOMP_NAMESPACE=tokencomp)
target_link_libraries(tokencomp_cpu PRIVATE tokencomp_options TorchStable::cpu)
set_target_properties(tokencomp_cpu PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${TOKENCOMP_OUTPUT}/lib)
