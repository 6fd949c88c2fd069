// The list of test operators; their kernels are in the other files of this folder. In the CUDA library those of
// bugs*.cu have a schema and no kernel.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(TOKENCOMP_TEST_NAMESPACE, m) {
  // conformance.cu
  m.def("ldmatrix(Tensor x, bool transpose) -> Tensor");
  m.def("stmatrix(Tensor x, bool transpose) -> Tensor");
  m.def("mma(Tensor a, Tensor b, Tensor c, bool is_bf16) -> Tensor");
  m.def("movmatrix(Tensor x) -> Tensor");
  m.def("f16x2(Tensor a, Tensor b) -> Tensor");
  m.def("mma_s8(Tensor a, Tensor b, Tensor c) -> Tensor");
  m.def("shuffle(Tensor x, Tensor argument, int kind, int width) -> Tensor");
  m.def("votes(Tensor x, int lanes) -> Tensor");
  m.def("reduce(Tensor x) -> Tensor");
  m.def("cp_async(Tensor x, Tensor valid) -> Tensor");
  m.def("loads(Tensor x) -> Tensor");
  m.def("atomics(Tensor x) -> (Tensor, Tensor)");
  m.def("bits(Tensor a, Tensor b) -> Tensor");
  m.def("maths(Tensor a, Tensor b) -> Tensor");
  m.def("device_info(Tensor x) -> (int, int, int, int)");
  // conformance_kernels.cu
  m.def("row_sum(Tensor x) -> Tensor");
  m.def("cluster_exchange(Tensor x, int cluster) -> Tensor");
  m.def("cluster_argmax(Tensor x, int cluster) -> Tensor");
  m.def("pipeline(Tensor x) -> Tensor");
  m.def("gemm(Tensor a, Tensor b) -> Tensor");
  m.def("grid_phases(Tensor x, int blocks, int phases) -> Tensor");
  m.def("last_block_sum(Tensor x) -> Tensor");
  // conformance_sm90.cu
  m.def("wgmma(Tensor a, Tensor b, Tensor? c) -> Tensor");
  m.def("wgmma_fragment(Tensor a, Tensor b, Tensor? c) -> Tensor");
  // bugs.cu, bugs_async.cu
  m.def("bug(str name, Tensor x, bool inject) -> Tensor");
  m.def("async_bug(str name, Tensor x, bool inject) -> Tensor");
}
