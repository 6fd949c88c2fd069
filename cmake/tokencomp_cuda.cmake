# The CUDA library: every csrc/cuda/*.cu for all targets, `*_sm90.cu` for sm_90a only. nvcc's resource report of each
# file is kept in build/ptxas/<file>.log, where tests/emu/test_ptxas.py reads it.
set(CMAKE_CUDA_COMPILER_LAUNCHER sh ${PROJECT_SOURCE_DIR}/cmake/keep_ptxas_log.sh ${PROJECT_SOURCE_DIR}/build/ptxas)
if(CCACHE)
  list(APPEND CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()

# tokencomp_add_cuda_library(name, definition, sources...): objects of the portable files and of the Hopper files, linked together.
function(tokencomp_add_cuda_library name definition)
  set(portable ${ARGN})
  list(FILTER portable EXCLUDE REGEX "_sm90\\.cu$")
  set(hopper ${ARGN})
  list(FILTER hopper INCLUDE REGEX "_sm90\\.cu$")
  if(NOT "90a-real" IN_LIST CMAKE_CUDA_ARCHITECTURES)
    set(hopper "")
  endif()
  add_library(${name} SHARED ${portable})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
  if(hopper)
    add_library(${name}_sm90 OBJECT ${hopper})
    set_target_properties(${name}_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
    target_sources(${name} PRIVATE $<TARGET_OBJECTS:${name}_sm90>)
  endif()
  foreach(target ${name} ${name}_sm90)
    if(TARGET ${target})
      target_link_libraries(${target} PRIVATE tokencomp_options TorchStable::cuda)
      target_compile_definitions(${target} PRIVATE ${definition} TOKENCOMP_KEY=CUDA)
      target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas -v -Xcompiler -Wall -lineinfo>)
      set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
    endif()
  endforeach()
endfunction()

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
tokencomp_add_cuda_library(tokencomp_cuda TOKENCOMP_NAMESPACE=tokencomp ${cuda_sources})
set_target_properties(tokencomp_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${TOKENCOMP_OUTPUT}/lib)

# Conformance kernels of the instruction wrappers; the injected bugs stay on the emulator.
file(GLOB conformance_sources CONFIGURE_DEPENDS tests/emu/*.cu)
list(FILTER conformance_sources EXCLUDE REGEX "/bugs[a-z_]*\\.cu$")
tokencomp_add_cuda_library(tokencomp_test_cuda TOKENCOMP_TEST_NAMESPACE=tokencomp_test_cuda ${conformance_sources})
set_target_properties(tokencomp_test_cuda PROPERTIES
  LIBRARY_OUTPUT_DIRECTORY ${TOKENCOMP_TEST_LIBRARIES} EXCLUDE_FROM_ALL ON)
