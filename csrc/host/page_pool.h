// Which pages of a pool are in use, and by how many rows. Knows nothing of the memory behind them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace tokencomp::host {

struct OutOfPages : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class PagePool {
 public:
  explicit PagePool(int64_t capacity);

  // The lowest free pages, ascending, each used once. Throws OutOfPages, with nothing taken, where there are too few.
  void allocate(int64_t count, int32_t* pages);
  // One use more, or one less: a page is free again when nobody uses it. -1 is skipped. Throws with nothing changed.
  void retain(const int64_t* pages, int64_t count);
  void free(const int64_t* pages, int64_t count);
  // How many use a page; 0: free.
  int64_t refcount(int64_t page) const;
  void grow(int64_t capacity);

  int64_t capacity() const { return int64_t(uses_.size()); }
  int64_t in_use() const { return in_use_; }
  int64_t peak() const { return peak_; }
  int64_t allocations() const { return allocations_; }

 private:
  int32_t& uses_of(const char* method, int64_t page);
  void set_free(int64_t page);

  std::vector<int32_t> uses_;
  std::vector<uint64_t> free_;  // a bit for each page
  size_t first_ = 0;            // no word before this one has a free page
  int64_t in_use_ = 0, peak_ = 0, allocations_ = 0;
};

}  // namespace tokencomp::host
