#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace tokencomp::cpu {

int thread_count() { return int(torch::stable::get_num_threads()); }

void parallel_run(int64_t n, int64_t grain, void* context, void (*task)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { task(context, begin, end); });
}

}  // namespace tokencomp::cpu
