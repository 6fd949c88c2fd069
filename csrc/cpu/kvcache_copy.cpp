#include "cpu/kvcache_copy.h"

#include <cstring>
#include <initializer_list>

namespace tokencomp::kvcache {
namespace {

// Where the slots of one row are, in bytes.
class Row {
 public:
  Row(const Pages& pages, const PageTable& table, int b, int h, int element_bytes)
      : pages_(pages), table_(table), entries_(table.row(b, h)), h_(h), bytes_(element_bytes) {}

  char* slot(int slot) const {
    const int64_t at = pages_.offset(entries_[slot >> table_.shift], h_, table_.slot_in_page(slot));
    return static_cast<char*>(pages_.base) + at * bytes_;
  }
  // Whether slots of one page follow each other without a gap.
  bool dense() const { return pages_.slot_stride == pages_.channels; }
  int64_t row_bytes() const { return int64_t(pages_.channels) * bytes_; }
  // Slots from `slot` to the end of its page.
  int left_in_page(int slot) const { return table_.page_size() - table_.slot_in_page(slot); }

 private:
  const Pages& pages_;
  const PageTable& table_;
  const int32_t* entries_;
  const int h_, bytes_;
};

// The processor does not foresee which slots are kept: fetched this many slots ahead, compaction is three times as
// fast.
constexpr int kLine = 64, kAhead = 24;
void fetch(const char* slot, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(slot + at);
}

int smaller(int a, int b) { return a < b ? a : b; }

// `n` tokens between a dense-or-strided tensor and consecutive slots; one copy a page where both sides are dense.
template <bool kIntoPages>
void copy_tokens(const Row& row, int slot, char* token, int64_t token_stride, int n) {
  const int64_t bytes = row.row_bytes();
  const bool runs = row.dense() && token_stride == bytes;
  while (n > 0) {
    const int run = runs ? smaller(n, row.left_in_page(slot)) : 1;
    if (kIntoPages) {
      std::memcpy(row.slot(slot), token, size_t(run * bytes));
    } else {
      std::memcpy(token, row.slot(slot), size_t(run * bytes));
    }
    slot += run;
    token += run * token_stride;
    n -= run;
  }
}

}  // namespace

void append_tokens(const AppendArgs& a, int b, int h, int begin, int end) {
  const int bytes = a.s.element_bytes(), slot = a.s.lengths[b * a.s.Hkv + h] + begin, first = a.start(b) + begin;
  const auto copy = [&](const Pages& pages, const void* x, int64_t stride_b, int64_t stride_h, int64_t stride_t) {
    const char* token = static_cast<const char*>(x) + (b * stride_b + h * stride_h + first * stride_t) * bytes;
    copy_tokens<true>(Row(pages, a.s.table, b, h, bytes), slot, const_cast<char*>(token), stride_t * bytes,
                      end - begin);
  };
  copy(a.s.k, a.k, a.k_stride_b, a.k_stride_h, a.k_stride_t);
  copy(a.s.v, a.v, a.v_stride_b, a.v_stride_h, a.v_stride_t);
}

void gather_tokens(const GatherArgs& g, int b, int h, int begin, int end) {
  const int bytes = g.s.element_bytes(), row = b * g.s.Hkv + h;
  for (const bool values : {false, true}) {
    const Pages& pages = values ? g.s.v : g.s.k;
    const Row slots(pages, g.s.table, b, h, bytes);
    const int64_t row_bytes = slots.row_bytes();
    char* out = static_cast<char*>(values ? g.v : g.k) + int64_t(row) * g.size * row_bytes;
    for (int i = begin; i < end;) {
      const int slot = g.source(row, i);
      int run = 1;
      while (i + run < end && g.source(row, i + run) == (slot < 0 ? -1 : slot + run)) ++run;
      if (slot < 0) {
        std::memset(out + i * row_bytes, 0, size_t(run * row_bytes));
      } else {
        copy_tokens<false>(slots, slot, out + i * row_bytes, row_bytes, run);
      }
      i += run;
    }
  }
}

// Neighbours that stay neighbours move together.
void compact_row(const CompactArgs& c, int b, int h, bool values) {
  const int bytes = c.s.element_bytes(), row = b * c.s.Hkv + h, count = c.count[row];
  if (count == 0) return;
  const Pages& pages = values ? c.s.v : c.s.k;
  const Row from(pages, c.s.table, b, h, bytes), to(pages, c.to, b, h, bytes);
  const int64_t row_bytes = from.row_bytes();
  SourceWalk sources(c, row), ahead(c, row);
  for (int i = 0; i < kAhead && i < count; ++i) fetch(from.slot(ahead.next()), row_bytes);
  int source = sources.next();
  for (int i = 0; i < count;) {
    const int room = from.dense() ? smaller(from.left_in_page(source), to.left_in_page(i)) : 1;
    int run = 0, next = source;
    do {
      ++run;
      if (i + run + kAhead <= count) fetch(from.slot(ahead.next()), row_bytes);
      if (i + run < count) next = sources.next();
    } while (i + run < count && run < room && next == source + run);
    char* target = to.slot(i);
    if (target != from.slot(source)) std::memmove(target, from.slot(source), size_t(run * row_bytes));
    i += run;
    source = next;
  }
}

}  // namespace tokencomp::kvcache
