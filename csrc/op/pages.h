// Pages at the torch boundary: the checks that every operator on pages shares. Shapes are always checked. Values (page
// numbers, lengths) are checked where they can be read without waiting: on the CPU always, on CUDA under
// TOKENCOMP_CHECKED=1.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>

#include "core/pages.h"
#include "op/check.h"

namespace tokencomp {

constexpr int64_t kMaxRows = 1 << 20, kMaxSlots = 1 << 28, kMaxPageChannels = 1024;

// Pages [N, Hx, P, channels] of Hkv heads.
inline Pages pages_of(const char* op, const char* argument, const Tensor& t, int64_t Hkv) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", argument, " must have shape [N, Hx, P, D], got ", shape_of(t));
  STD_TORCH_CHECK(t.size(1) == 1 || t.size(1) == Hkv, op, ": ", argument, " must hold 1 or Hkv=", Hkv,
                  " heads a page, got ", t.size(1));
  const int64_t P = t.size(2);
  STD_TORCH_CHECK(P == 16 || P == 32 || P == 64, op, ": ", argument, " must have pages of 16, 32 or 64 slots, got ", P);
  STD_TORCH_CHECK(t.size(3) >= 1 && t.size(3) <= kMaxPageChannels, op, ": ", argument, " must have between 1 and ",
                  kMaxPageChannels, " channels, got ", t.size(3));
  STD_TORCH_CHECK(t.size(0) <= int64_t(1) << kPageNumberBits, op, ": ", argument, " must have at most ",
                  int64_t(1) << kPageNumberBits, " pages, got ", t.size(0));
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) == 1, op, ": ", argument,
                  " must be contiguous in its last dimension, got stride ", t.stride(3));
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.size(1) == 1 ? 0 : t.stride(1), t.stride(2),
          int(t.size(3))};
}

// The table of `rows` [B, Hkv]: int32 [B, Hkv, places].
inline PageTable table_of(const char* op, const char* argument, const Tensor& t, const Tensor& rows,
                          int64_t page_size) {
  STD_TORCH_CHECK(same_device(t, rows), op, ": ", argument, " must be on the device of lengths, got another device");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, op, ": ", argument, " must be Int, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == rows.size(0) && t.size(1) == rows.size(1), op, ": ", argument,
                  " must have shape [B=", rows.size(0), ", Hkv=", rows.size(1), ", places], got ", shape_of(t));
  STD_TORCH_CHECK(t.size(2) <= 1 || t.stride(2) == 1, op, ": ", argument,
                  " must be contiguous in its last dimension, got stride ", t.stride(2));
  STD_TORCH_CHECK(t.size(2) * page_size <= kMaxSlots, op, ": ", argument, " must name at most ", kMaxSlots / page_size,
                  " pages a row, got ", t.size(2));
  return {static_cast<const int32_t*>(t.const_data_ptr()), t.stride(0), t.stride(1), int(t.size(2)),
          page_size == 16   ? 4
          : page_size == 32 ? 5
                            : 6};
}

// Whether the values of a tensor may be looked at.
inline bool readable(const Tensor& t) {
  if (t.device().type() == torch::headeronly::DeviceType::CPU) return true;
  const char* checked = std::getenv("TOKENCOMP_CHECKED");
  return checked && !std::strcmp(checked, "1");
}

// Integers of a tensor on the host: its own memory, or a copy.
class HostInts {
 public:
  HostInts() = default;
  explicit HostInts(const std::optional<Tensor>& t) {
    if (!t) return;
    const bool here = t->device().type() == torch::headeronly::DeviceType::CPU;
    tensor_ = here ? *t : torch::stable::to(*t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    data_ = static_cast<const int*>(tensor_->const_data_ptr());
  }
  explicit operator bool() const { return data_; }
  int operator[](int64_t i) const { return data_[i]; }
  const int* data() const { return data_; }
  int64_t stride(int64_t d) const { return tensor_->stride(d); }
  int64_t size(int64_t d) const { return tensor_->size(d); }

 private:
  std::optional<Tensor> tensor_;
  const int* data_ = nullptr;
};

// The values of a table against those of lengths and the number of pages.
struct TableCheck {
  const char* op;
  const char* argument;
  HostInts table;
  int64_t pages;
  int page_size;

  // Row (b, h) must have a working page for each of its slots in [begin, end).
  void slots(int64_t b, int64_t h, int64_t begin, int64_t end) const {
    if (begin >= end) return;
    STD_TORCH_CHECK(end <= table.size(2) * page_size, op, ": ", argument, " must have places for ", end,
                    " slots of row (", b, ", ", h, "), got ", table.size(2), " places of ", page_size, " slots");
    const int64_t row = b * table.stride(0) + h * table.stride(1);
    for (int64_t place = begin / page_size; place <= (end - 1) / page_size; ++place) {
      const int32_t entry = table[row + place];
      if (uint32_t(entry) < uint64_t(pages)) continue;  // type 0 and a page of the pool
      STD_TORCH_CHECK(entry != kNoPage, op, ": ", argument, " must name a page for slot ", place * page_size,
                      " of row (", b, ", ", h, "), got -1");
      STD_TORCH_CHECK(page_type(entry) == 0, op, ": ", argument, " must name working pages, got a page of type ",
                      page_type(entry), " at [", b, ", ", h, ", ", place, "]");
      STD_TORCH_CHECK(false, op, ": ", argument, " must be in [0, N=", pages, "), got ", page_number(entry), " at [", b,
                      ", ", h, ", ", place, "]");
    }
  }
};

}  // namespace tokencomp
