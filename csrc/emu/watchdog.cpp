// The watchdog thread. See watchdog.h.
#include "emu/watchdog.h"

#include <chrono>
#include <cstdio>

namespace emu {

Watchdog::Watchdog(size_t workers, double seconds, dim3 grid, const void* kernel)
    : workers_(workers), seconds_(seconds), grid_(grid), kernel_(kernel), thread_([this] { watch(); }) {}

Watchdog::~Watchdog() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void Watchdog::watch() {
  std::vector<uint64_t> seen(workers_.size());
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, std::chrono::duration<double>(seconds_), [this] { return stop_; })) {
    for (size_t i = 0; i < workers_.size(); i++) {
      const uint64_t now = workers_[i].switches.load(std::memory_order_relaxed);
      if (now == seen[i]) report(workers_[i]);
      seen[i] = now;
    }
  }
}

void Watchdog::report(const Worker& worker) const {
  const uint64_t running = worker.running.load(std::memory_order_relaxed);
  if (running == 0) return;
  const uint64_t block = (running - 1) >> 16, thread = (running - 1) & 0xffff;
  std::fprintf(stderr, "%s: block (%u,%u,%u) thread %u has not given way for %g s: spinning on memory?\n",
               kernel_at(kernel_).c_str(), unsigned(block % grid_.x), unsigned(block / grid_.x % grid_.y),
               unsigned(block / grid_.x / grid_.y), unsigned(thread), seconds_);
  std::fflush(stderr);
}

}  // namespace emu
