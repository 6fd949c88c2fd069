# The host module: what Python needs to know about the build, the processor and the plans. No torch inside.
file(GLOB host_sources CONFIGURE_DEPENDS csrc/host/*.cpp)
pybind11_add_module(_host MODULE NO_EXTRAS ${host_sources} csrc/cpu/isa.cpp)
target_link_libraries(_host PRIVATE tokencomp_options)
string(JOIN " " cuda_targets ${CMAKE_CUDA_ARCHITECTURES})
string(REPLACE "-real" "" cuda_targets "${cuda_targets}")
target_compile_definitions(_host PRIVATE
  TOKENCOMP_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  TOKENCOMP_TORCH_BUILT_WITH="${TORCH_VERSION}"
  TOKENCOMP_NVCC_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
  TOKENCOMP_CUDA_TARGETS="${cuda_targets}")
set_target_properties(_host PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${TOKENCOMP_OUTPUT})
