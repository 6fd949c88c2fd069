# Headers of the PyTorch that TOKENCOMP_PYTHON imports, for the LibTorch stable ABI.
#   TorchStable::headers   include paths and the ABI the package targets (2.10)
#   TorchStable::cpu       the above, plus a NEEDED entry for libtorch_cpu.so
#   TorchStable::cuda      the above, plus a NEEDED entry for libtorch_cuda.so (absent from a CPU PyTorch)
# The libraries are linked against empty stand-ins of the same name: a built library records that it needs libtorch_cpu.so,
# nothing about this machine's copy, and so loads under any PyTorch >= 2.10.
execute_process(
  COMMAND ${TOKENCOMP_PYTHON} -c
          "import torch, os; print(torch.__version__, os.path.join(os.path.dirname(torch.__file__), 'include'), sep=';')"
  OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _failed)
if(_failed)
  message(FATAL_ERROR "PyTorch is not importable by ${TOKENCOMP_PYTHON}: install torch>=2.10 first "
                      "and build without isolation (pip install --no-build-isolation .)")
endif()
list(GET _torch 0 TORCH_VERSION)
list(GET _torch 1 TORCH_INCLUDE)
if(TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "tokencomp needs PyTorch >= 2.10, found ${TORCH_VERSION}")
endif()

add_library(TorchStable_headers INTERFACE)
add_library(TorchStable::headers ALIAS TorchStable_headers)
target_include_directories(TorchStable_headers SYSTEM INTERFACE ${TORCH_INCLUDE} ${TORCH_INCLUDE}/torch/csrc/api/include)
target_compile_definitions(TorchStable_headers INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)

file(WRITE ${CMAKE_BINARY_DIR}/stand_in/empty.cpp "")
foreach(part cpu cuda)
  add_library(torch_${part}_stand_in SHARED ${CMAKE_BINARY_DIR}/stand_in/empty.cpp)
  set_target_properties(torch_${part}_stand_in PROPERTIES OUTPUT_NAME torch_${part}
                        LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/stand_in)
  add_library(TorchStable_${part} INTERFACE)
  add_library(TorchStable::${part} ALIAS TorchStable_${part})
  target_link_libraries(TorchStable_${part} INTERFACE TorchStable_headers torch_${part}_stand_in)
  target_link_options(TorchStable_${part} INTERFACE LINKER:--no-as-needed)
endforeach()
target_link_libraries(TorchStable_cuda INTERFACE TorchStable_cpu)
target_compile_definitions(TorchStable_cuda INTERFACE USE_CUDA)
