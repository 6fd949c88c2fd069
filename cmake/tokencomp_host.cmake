# The native module: what Python needs to know about the build, the processor and the plans. No torch inside, and of
# Python the limited API alone, which its name says: one file for every Python from 3.10 on.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
file(GLOB host_sources CONFIGURE_DEPENDS csrc/host/*.cpp)
add_library(_native MODULE ${host_sources} csrc/cpu/isa.cpp)
target_include_directories(_native SYSTEM PRIVATE ${Python_INCLUDE_DIRS})
target_link_libraries(_native PRIVATE tokencomp_options)
string(JOIN " " cuda_targets ${CMAKE_CUDA_ARCHITECTURES})
string(REPLACE "-real" "" cuda_targets "${cuda_targets}")
target_compile_definitions(_native PRIVATE
  Py_LIMITED_API=0x030A0000
  TOKENCOMP_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  TOKENCOMP_TORCH_BUILT_WITH="${TORCH_VERSION}"
  TOKENCOMP_NVCC_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
  TOKENCOMP_CUDA_TARGETS="${cuda_targets}")
set_target_properties(_native PROPERTIES PREFIX "" SUFFIX ".abi3.so" LIBRARY_OUTPUT_DIRECTORY ${TOKENCOMP_OUTPUT})
