// Pages: where the keys and values of a cache live. A row is one (sequence, kv head); slot s of a row lies in the page
// that its table names at place s / P, at slot s % P of that page. A page belongs to one row, or, in the buffers of
// other engines, holds all kv heads of a sequence.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace tokencomp {

// An entry of a block table: the page's number in its low 28 bits, its type (0: a working page, of the model's own 16-
// or 32-bit elements; else which quantized pool, see core/page_types.h) in the upper four. kNoPage names none.
constexpr int32_t kNoPage = -1;
constexpr int kPageNumberBits = 28;
TC_HD constexpr int32_t page_entry(int type, int number) {
  return int32_t(uint32_t(type) << kPageNumberBits | uint32_t(number));
}
TC_HD constexpr int page_type(int32_t entry) { return int(uint32_t(entry) >> kPageNumberBits); }
TC_HD constexpr int page_number(int32_t entry) { return entry & ((1 << kPageNumberBits) - 1); }

// Keys or values of a pool of pages; strides in elements, channels contiguous.
struct Pages {
  void* base = nullptr;
  int64_t page_stride = 0;
  int64_t head_stride = 0;  // 0 where a page belongs to one head
  int64_t slot_stride = 0;
  int channels = 0;

  // Elements before the first channel of a slot.
  TC_HD int64_t offset(int32_t entry, int h, int slot_in_page) const {
    return page_number(entry) * page_stride + h * head_stride + slot_in_page * slot_stride;
  }
};

// The pages of every row: [B, Hkv, places], any strides, places contiguous.
struct PageTable {
  const int32_t* entry = nullptr;
  int64_t stride_b = 0, stride_h = 0;
  int places = 0;
  int shift = 0;  // log2 of the page size P

  TC_HD int page_size() const { return 1 << shift; }
  TC_HD const int32_t* row(int b, int h) const { return entry + b * stride_b + h * stride_h; }
  TC_HD int slot_in_page(int slot) const { return slot & (page_size() - 1); }
};

// The first channel of `slot` of row (b, h), null where no page is there.
template <class T>
TC_HD T* slot_of(const Pages& pages, const PageTable& table, int b, int h, int slot) {
  const int32_t entry = table.row(b, h)[slot >> table.shift];
  if (entry == kNoPage) return nullptr;
  return static_cast<T*>(pages.base) + pages.offset(entry, h, table.slot_in_page(slot));
}

static_assert(page_type(page_entry(5, 12345)) == 5 && page_number(page_entry(5, 12345)) == 12345);

}  // namespace tokencomp
