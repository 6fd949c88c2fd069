// Working memory of the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace tokencomp::cpu {

// Floats that start on a cache line, so that no vector straddles two.
class Floats {
 public:
  explicit Floats(int64_t count)
      : memory_(static_cast<float*>(::operator new(size_t(count > 0 ? count : 1) * sizeof(float), kLine))) {}
  float* get() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<float[], Free> memory_;
};

}  // namespace tokencomp::cpu
