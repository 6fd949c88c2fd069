// Threads for kernels without torch headers: the pool is torch's own, so torch.set_num_threads is obeyed.
#pragma once

#include <cstdint>

namespace tokencomp::cpu {

int thread_count();

// Calls task(context, begin, end) on disjoint ranges that cover [0, n); ranges are at least `grain` long, except the
// last. Runs inline where one range would do or inside another parallel region.
void parallel_run(int64_t n, int64_t grain, void* context, void (*task)(void* context, int64_t begin, int64_t end));

template <class F>
static inline void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= grain) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  parallel_run(n, grain, &f,
               [](void* context, int64_t begin, int64_t end) { (*static_cast<__decltype(&f)>(context))(begin, end); });
}

// Tasks [0, count) are taken as threads come, so that one that wakes late does not keep the others waiting. What a task
// computes does not depend on who takes it. f(task, slot).
template <class F>
static inline void for_each_task(int64_t count, int slots, F&& f) {
  int64_t next = 0;
  parallel_for(slots < count ? slots : count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) f(task, slot);
    }
  });
}

}  // namespace tokencomp::cpu
