// The lines of memory that the next chunk wants, fetched a few at a time while this one is multiplied: a processor has
// few misses under way, and all at once they would keep the products waiting. Included by decode_kernels.cpp only.
#pragma once

#include "cpu/decode_kernels.h"
#include "cpu/simd.h"

namespace tokencomp::cpu::TOKENCOMP_ISA {

using namespace decode;

namespace {  // of this level alone

class LinesAhead {
 public:
  // Slots of (b, kv) from `slot` on, a chunk of those before `end`: pages of codes; of working ones the keys and
  // values, if asked for. They will be asked for in `steps` steps.
  template <class T>
  void look(const DecodeArgs& a, int b, int kv, int slot, int end, bool keys, bool values, int steps) {
    ranges = range = 0;
    int lines = 0;
    for (int s = slot; s < slot + kChunkKeys && s < end;) {
      const int in_page = a.table.slot_in_page(s), rest = a.table.page_size() - in_page;
      const int most = slot + kChunkKeys - s, n = rest < most ? rest : most;
      const int32_t entry = entry_of(a, b, kv, s);
      s += n;
      if (entry == kNoPage || (page_type(entry) == 0 && !keys)) continue;
      if (page_type(entry)) {
        const PagePool& pool = a.types.pool_of(page_type(entry));
        const uint8_t* page = a.types.page(entry);
        lines += add(page + pool.k.params, pool.v.codes - pool.k.params);  // first wanted: grids
        lines += add(page + pool.v.params, pool.page_bytes - pool.v.params);
        lines += add(page, pool.k.params) + add(page + pool.v.codes, pool.v.params - pool.v.codes);
        continue;
      }
      const T* p = static_cast<const T*>(a.k.base) + a.k.offset(entry, kv, in_page);
      lines += add(reinterpret_cast<const uint8_t*>(p), int64_t(n) * a.k.slot_stride * int64_t(sizeof(T)));
      if (!values) continue;
      p = static_cast<const T*>(a.v.base) + a.v.offset(entry, kv, in_page);
      lines += add(reinterpret_cast<const uint8_t*>(p), int64_t(n) * a.v.slot_stride * int64_t(sizeof(T)));
    }
    step = (lines + steps - 1) / steps;
  }

  // The first line of every piece of memory that has an address translation of its own: those wait for each other less
  // than in the middle of other work.
  static void touch(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 4096) __builtin_prefetch(p + i);
    __builtin_prefetch(p + bytes - 1);
  }

  TC_INLINE_MEMBER void fetch() {
    if (range < ranges) fetch_lines(step);
  }
  void fetch_rest() {
    while (range < ranges) fetch_lines(1 << 20);
  }

 private:
  int add(const uint8_t* p, int64_t bytes) {
    from[ranges] = p, to[ranges++] = p + bytes;
    return int(bytes + 63) / 64;
  }

  void fetch_lines(int n) {
    for (; n > 0 && range < ranges; ++range) {
      const uint8_t *p = from[range], *last = to[range];
      for (; p < last && n > 0; p += 64, --n) __builtin_prefetch(p);
      from[range] = p;
      if (p < last) return;
    }
  }

  static constexpr int kMost = 4 * kChunkKeys / kBlockKeys;  // pages hold a block at least
  const uint8_t *from[kMost], *to[kMost];                    // what is left of ranges
  int ranges = 0, range = 0, step = 0;
};

}  // namespace
}  // namespace tokencomp::cpu::TOKENCOMP_ISA
