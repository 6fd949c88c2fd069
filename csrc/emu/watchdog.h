// The watchdog: fibers cannot be pre-empted, so device code that spins on memory hangs the launch. A helper thread
// notices that a fiber has not given way for long and says on stderr which kernel thread it is. One per launch, so that
// nothing outlives the library or is lost in a fork.
#pragma once
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "emu/runtime.h"

#pragma GCC visibility push(hidden)

namespace emu {

class Watchdog {
 public:
  Watchdog(size_t workers, double seconds, dim3 grid, const void* kernel);
  ~Watchdog();
  size_t workers() const { return workers_.size(); }
  Worker& worker(size_t i) { return workers_[i]; }

 private:
  void watch();
  void report(const Worker& worker) const;

  std::deque<Worker> workers_;
  double seconds_;
  dim3 grid_;
  const void* kernel_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace emu

#pragma GCC visibility pop
