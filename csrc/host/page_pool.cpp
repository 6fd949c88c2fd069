#include "host/page_pool.h"

namespace tokencomp::host {
namespace {

constexpr int64_t kMostPages = int64_t(1) << 28;  // what a table's entry can name
constexpr int32_t kMostUses = INT32_MAX;

std::string text(int64_t n) { return std::to_string(n); }

}  // namespace

PagePool::PagePool(int64_t capacity) {
  if (capacity < 0 || capacity > kMostPages) {
    throw std::invalid_argument("PagePool: capacity must be in [0, " + text(kMostPages) + "], got " + text(capacity));
  }
  grow(capacity);
}

void PagePool::allocate(int64_t count, int32_t* pages) {
  const int64_t free = capacity() - in_use_;
  if (count > free) {
    throw OutOfPages("PagePool.allocate: " + text(count) + " pages wanted, " + text(free) + " of " + text(capacity()) +
                     " free (" + text(in_use_) + " in use, peak " + text(peak_) + ")");
  }
  for (int64_t i = 0; i < count; ++i) {
    while (!free_[first_]) ++first_;
    const int64_t page = int64_t(first_) * 64 + __builtin_ctzll(free_[first_]);
    free_[first_] &= free_[first_] - 1;
    uses_[size_t(page)] = 1;
    pages[i] = int32_t(page);
  }
  allocations_ += count;
  in_use_ += count;
  if (in_use_ > peak_) peak_ = in_use_;
}

int32_t& PagePool::uses_of(const char* method, int64_t page) {
  if (page < 0 || page >= capacity()) {
    throw std::out_of_range("PagePool." + std::string(method) + ": pages must be in [0, capacity=" + text(capacity()) +
                            "), got " + text(page));
  }
  return uses_[size_t(page)];
}

void PagePool::retain(const int64_t* pages, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {  // uses only grow: a second pass can look no worse than the first
    if (pages[i] == -1) continue;
    const int32_t uses = uses_of("retain", pages[i]);
    if (uses == 0) throw std::invalid_argument("PagePool.retain: page " + text(pages[i]) + " is free");
    if (uses > kMostUses - count) {
      throw std::invalid_argument("PagePool.retain: page " + text(pages[i]) + " has " + text(uses) + " uses already");
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    if (pages[i] != -1) ++uses_[size_t(pages[i])];
  }
}

void PagePool::free(const int64_t* pages, int64_t count) {
  int64_t done = 0;
  try {
    for (; done < count; ++done) {
      if (pages[done] == -1) continue;
      int32_t& uses = uses_of("free", pages[done]);
      if (uses == 0) {
        throw std::invalid_argument("PagePool.free: page " + text(pages[done]) +
                                    " is not in use (freed twice, or never allocated)");
      }
      --uses;
    }
  } catch (...) {
    while (done-- > 0) {
      if (pages[done] != -1) ++uses_[size_t(pages[done])];
    }
    throw;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (pages[i] != -1 && uses_[size_t(pages[i])] == 0) set_free(pages[i]);
  }
}

void PagePool::set_free(int64_t page) {
  const size_t word = size_t(page) / 64;
  const uint64_t bit = uint64_t(1) << (page % 64);
  if (free_[word] & bit) return;  // listed more than once
  free_[word] |= bit;
  if (word < first_) first_ = word;
  --in_use_;
}

int64_t PagePool::refcount(int64_t page) const {
  return page == -1 ? 0 : const_cast<PagePool*>(this)->uses_of("refcount", page);
}

void PagePool::grow(int64_t capacity) {
  const int64_t before = this->capacity();
  if (capacity < before || capacity > kMostPages) {
    throw std::invalid_argument("PagePool.grow: capacity must be in [" + text(before) + ", " + text(kMostPages) +
                                "], got " + text(capacity));
  }
  uses_.resize(size_t(capacity));
  free_.resize(size_t(capacity + 63) / 64);
  for (int64_t page = before; page < capacity; ++page) free_[size_t(page) / 64] |= uint64_t(1) << (page % 64);
  if (size_t(before) / 64 < first_) first_ = size_t(before) / 64;
}

}  // namespace tokencomp::host
